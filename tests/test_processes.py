"Several processes train the student that one would have trained."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from children import Children, apart, command, photo_parquet, small_images, train
from conftest import SMALL
from safetensors.torch import load_file
from test_train import wait_for

from radio_nb.data.images import open_images
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.recipe import Partition, Recipe, Stage
from radio_nb.training.run_folder import load_checkpoint

STEPS = 12
# so many statistics that the covariance has full rank: the principal directions of no variance are anyone's choice
PLAIN = Recipe(images='', teachers=('zoo:u2netp#64',), out='', depth=2, size=64, head_width=32, steps=STEPS,
               batch_size=8, statistics_steps=30, checkpoint_every=6, device='cpu')
TWO = ('zoo:u2netp#64', 'zoo:u2netp#96')
MIXED = (Partition(.5, 64), Partition(.5, (64, 32), TWO[1:]))
CASES = {'plain': {}, 'streamed': {'images': 'stream'},
         'parts': {'teachers': TWO, 'stages': (Stage(STEPS, partitions=MIXED),), 'accumulate': 2, 'views': 3,
                   'cache': 'cache', 'ema': .9},
         'information': {'information': (10., 1.), 'information_steps': 5}}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with images, also as a Parquet file."
    home = tmp_path_factory.mktemp('processes')
    small_images(home/'images', 24)
    photo_parquet(home/'images.parquet')
    return home


def train_double(recipe):
    "A run in double precision: what is left of a difference is then no rounding that Adam has enlarged."
    torch.set_default_dtype(torch.float64)
    train(recipe)


def recipe_of(case, home, out):
    "The recipe of a case; a cache of its own for every run."
    changes = dict(CASES[case])
    images = f'stream:{home}/images.parquet' if changes.pop('images', '') else str(home/'images')
    if 'cache' in changes: changes['cache'] = str(home/f'{out.name}-cache')
    return replace(PLAIN, images=images, out=str(out), **changes)


@pytest.fixture(scope='module', params=CASES)
def folders(request, home):
    "The folders of one run in one process and in two."
    out = {n: home/f'{request.param}-{n}' for n in (1, 2)}
    work = train_double if request.param == 'parts' else train
    children = {n: Children(n, folder, work, recipe_of(request.param, home, folder)) for n, folder in out.items()}
    for runs in children.values(): runs.wait()
    return out


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    with pytest.raises(BadInput, match='2 processes on this machine .* there are 1: .* --device cpu'):
        new_accelerator(torch.device('cuda'))


def test_a_run_on_the_cpu_may_follow_one_on_a_gpu(monkeypatch):
    new_accelerator(torch.device('cpu'))
    monkeypatch.setitem(PartialState._shared_state, 'device', torch.device('cuda:0'))
    assert new_accelerator(torch.device('cpu')).num_processes == 1


def differences(a, b): return {key: (a[key].double() - b[key].double()).abs().max().item() for key in a}


def weights(out, what='weights'): return load_checkpoint(out/'checkpoints')['trainer'][what]


def weights_apart(one, two):
    "The largest difference that a student's answer could show."
    gaps = differences(one, two)
    # what is added to all keys of a query changes no attention:
    # the bias of the keys moves by rounding alone, which Adam enlarges
    for key in [key for key in gaps if key.endswith('qkv.bias')]:
        queries, _, values = (one[key] - two[key]).abs().chunk(3)
        gaps[key] = max(queries.max().item(), values.max().item())
    worst = max(gaps, key=gaps.get)
    print(f'weights are {gaps[worst]:.1e} apart, most in {worst}')
    return gaps[worst]


def test_two_processes_measure_what_one_does(folders):
    gaps = differences(*(load_file(folder/'statistics.safetensors') for folder in folders.values()))
    assert (worst := max(gap for key, gap in gaps.items() if '.modules.' not in key)) < 1e-10
    print(f'statistics are {worst:.1e} apart')


def test_two_processes_train_the_student_of_one(folders, request):
    one, two = (weights(folder) for folder in folders.values())
    untrained = Student(**json.loads((folders[1]/'config.json').read_text()))
    assert one.keys() >= {f'student.backbone.{key}' for key in untrained.backbone.state_dict()}
    # KD dropout makes steps with next to no gradient, whose rounding Adam enlarges
    assert weights_apart(one, two) < (1e-4 if 'information' in request.node.name else 1e-5)
    if 'parts' in request.node.name:   # in double precision
        assert weights_apart(one, two) < 1e-10
        assert weights_apart(*(weights(folder, 'ema') for folder in folders.values())) < 1e-10


def test_two_processes_log_what_one_does(folders):
    one, two = ([json.loads(line) for line in (folder/'metrics.jsonl').open()] for folder in folders.values())
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
        for name, kinds in a['teachers'].items():
            for kind, loss in kinds.items(): assert b['teachers'][name][kind] == pytest.approx(loss, rel=1e-4)


def test_the_sets_of_images_of_these_tests_are_what_they_should_be(home):
    assert len(open_images(str(home/'images'))) == len(list(open_images(f'stream:{home}/images.parquet'))) == 24


def stop(children, out, lines):
    "Ask processes to stop once so many lines are in the log."
    while not (out/'metrics.jsonl').exists() or len((out/'metrics.jsonl').read_text().splitlines()) < lines:
        assert children.alive(), children.output()
        time.sleep(.002)
    for process in children.processes: os.kill(process.pid, signal.SIGTERM)
    children.wait(code=130)


@pytest.fixture(scope='module')
def sharded(home):
    "The folders of a run in two processes, each with all weights (DDP) and with half of them (FSDP)."
    out = {shard: home/f'shard-{shard}' for shard in (False, True)}
    runs = [Children(2, folder, train, replace(recipe_of('plain', home, folder), shard=shard))
            for shard, folder in out.items()]
    for children in runs: children.wait()
    return out


def test_shared_out_weights_are_trained_as_whole_ones(sharded):
    assert apart(*(load_file(folder/'statistics.safetensors') for folder in sharded.values())) == 0
    assert weights_apart(*(weights(folder) for folder in sharded.values())) < 1e-4
    torch.testing.assert_close(*(Student.from_pretrained(folder)(torch.ones(1, 3, 64, 64)/2)['u2netp'].spatial
                                 for folder in sharded.values()), atol=1e-3, rtol=1e-3)


def test_a_checkpoint_of_shared_out_weights_is_whole(sharded):
    state, plain = weights(sharded[True]), weights(sharded[False])
    assert {key: tensor.shape for key, tensor in state.items()} == {key: tensor.shape for key, tensor in plain.items()}
    own = {key[len('student.'):]: tensor for key, tensor in state.items() if key.startswith('student.')}
    exported = Student.from_pretrained(sharded[True]).state_dict()
    same = [key for key in own if key.startswith('backbone.')]
    # heads are folded, the backbone is as it was
    assert same and all(torch.equal(own[key], exported[key]) for key in same)


@pytest.mark.parametrize('again', [2, 1])
def test_a_sharded_run_that_was_stopped_goes_on(sharded, home, tmp_path, again):
    out = tmp_path/'run'
    recipe = replace(recipe_of('plain', home, out), shard=True)
    stop(Children(2, tmp_path/'first', train, recipe), out, 4)
    assert 4 <= load_checkpoint(out/'checkpoints')['step'] < STEPS
    Children(again, tmp_path/'second', train, recipe, True).wait()
    assert weights_apart(weights(out), weights(sharded[True])) < (1e-6 if again == 2 else 1e-4)


@pytest.mark.parametrize('begun, fields', [
    (1, {}), (2, {'heads_only': STEPS}), (2, {'teachers': TWO, 'spatial_weights': (1., 0.), 'accumulate': 2})])
def test_a_sharded_run_goes_on_where_not_all_weights_have_moments(home, tmp_path, begun, fields):
    "Because one process has numbered them, or because some have had no gradient yet."
    whole = replace(recipe_of('plain', home, tmp_path/'whole'), shard=True, **fields)
    broken = replace(whole, out=str(tmp_path/'broken'))
    Children(2, tmp_path/'whole-log', train, whole).wait()
    stop(Children(begun, tmp_path/'first', train, broken), tmp_path/'broken', 4)
    Children(2, tmp_path/'second', train, broken, True).wait()
    assert weights_apart(weights(tmp_path/'broken'), weights(tmp_path/'whole')) < (1e-6 if begun == 2 else 1e-4)


def train_twice(*recipes):
    for recipe in recipes: train(recipe)


def test_a_script_may_train_several_students(home, tmp_path):
    first, second = (replace(recipe_of('plain', home, tmp_path/name), steps=2) for name in ('first', 'second'))
    Children(2, tmp_path/'log', train_twice, first, second).wait()
    assert weights_apart(weights(tmp_path/'first'), weights(tmp_path/'second')) == 0


def test_what_a_launcher_was_configured_to_do_does_not_count(home, tmp_path, monkeypatch):
    logged = []
    for times in (None, '4'):
        if times: monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', times)
        out = tmp_path/f'{times}'
        Children(1, tmp_path/f'log-{times}', train, replace(recipe_of('plain', home, out), steps=2, log_every=1)).wait()
        logged.append([json.loads(line)['gradient'] for line in (out/'metrics.jsonl').open()])
    assert logged[0] == logged[1]


def launch(n, *args):
    "Start the command in `n` processes that train together, as a user would."
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n),
                '--no-python', sys.executable, '-c', 'from radio_nb.front.cli import main; main()']
    return subprocess.Popen([*launcher, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})


def test_two_processes_stop_together_and_go_on_as_one(tmp_path):
    flags = [*SMALL, '--statistics-steps', '40', '--steps', str(STEPS), '--checkpoint-every', '6']
    process = launch(2, 'distill', *flags, '--out', tmp_path/'run')
    wait_for(tmp_path/'run'/'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode and 'add --resume' in error
    children = [Children(1, out, command, 'distill', *flags, '--out', out, *more)
                for out, more in ((tmp_path/'run', ['--resume']), (tmp_path/'whole', []))]
    for child in children:
        child.wait()
        assert child.output().count('The report is') == 1
    # small rounding differences grow from step to step, but it is the same student
    assert weights_apart(weights(tmp_path/'run'), weights(tmp_path/'whole')) < 1e-4


def test_a_batch_that_cannot_be_cut_is_refused_in_one_line(tmp_path):
    children = Children(2, tmp_path/'log', command, 'distill', *SMALL, '--batch-size', '3', '--out', tmp_path/'run')
    children.wait(code=2)
    assert '3 images of a batch cannot be shared out among 2 processes' in children.output()
