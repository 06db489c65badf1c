"Failures by trial: each names its cause, and leaves a run that goes on."
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from children import Children, command, small_images, train
from test_kills import losses
from test_processes import train_double

from radio_nb.data.crops import fetch
from radio_nb.front import cli
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training import distributed
from radio_nb.training.recipe import Recipe
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.train import Callbacks, run_recipe


def recipe_at(home, **fields):
    return Recipe(**{'images': str(home/'images'), 'teachers': ('zoo:u2netp#64',), 'out': str(home/'run'),
                     'depth': 1, 'size': 64, 'head_width': 32, 'batch_size': 4, 'statistics_steps': 2, 'device': 'cpu',
                     'checkpoint_every': 1, 'watch_every': 0} | fields)


def wait_for_lines(child, out, n):
    while not (out/'metrics.jsonl').exists() or len((out/'metrics.jsonl').read_text().splitlines()) < n:
        assert child.alive(), child.output()
        time.sleep(.002)


def test_after_a_failure_nobody_waits_for_the_other_processes():
    with pytest.raises(ZeroDivisionError), distributed.in_step(): 1/0   # noqa: B018
    assert not distributed._in_step
    with distributed.in_step(): pass
    assert distributed._in_step


def test_an_accelerator_of_another_precision_is_named(monkeypatch):
    accelerator = distributed.new_accelerator(torch.device('cpu'))
    assert accelerator.mixed_precision == 'no'
    monkeypatch.setitem(AcceleratorState._shared_state, '_mixed_precision', 'bf16')
    with pytest.raises(BadInput, match='an Accelerator with mixed precision was made before'):
        distributed.new_accelerator(torch.device('cpu'))


def test_images_that_go_while_a_run_is_on_are_named(tmp_path):
    "One file is deleted and one cut off between two steps."
    small_images(tmp_path/'images', 8)
    recipe = recipe_at(tmp_path, steps=12)
    child, out = Children(1, tmp_path/'log', train, recipe), Path(recipe.out)
    wait_for_lines(child, out, 1)
    os.kill(child.processes[0].pid, signal.SIGSTOP)   # both happen before the next step
    (tmp_path/'images'/'03.png').unlink()
    (tmp_path/'images'/'05.png').write_bytes((tmp_path/'images'/'05.png').read_bytes()[:2000])
    before = len(losses(out))
    os.kill(child.processes[0].pid, signal.SIGCONT)
    child.wait()
    assert before <= 6 and len(losses(out)) == 12
    skipped = {Path(path).name: why for path, why in json.loads((out/'skipped.json').read_text()).items()}
    assert set(skipped) == {'03.png', '05.png'}
    assert 'No such file' in skipped['03.png'] and 'truncated' in skipped['05.png']
    assert load_checkpoint(out/'checkpoints')['step'] == 12


def test_a_disk_that_is_full_when_the_log_is_written(tmp_path):
    small_images(tmp_path/'images', 8)
    whole, recipe = recipe_at(tmp_path, steps=4, out=str(tmp_path/'whole')), recipe_at(tmp_path, steps=4, log_every=1)
    log = Path(recipe.out)/'metrics.jsonl'
    def fill_up(run):
        if run.step == 3:
            log.unlink()
            log.symlink_to('/dev/full')
    with pytest.raises(BadInput, match=r'metrics.jsonl could not be written \(No space left on device\)'):
        run_recipe(recipe, callbacks=Callbacks(fill_up))
    log.unlink()
    for one, again in ((whole, False), (recipe, True)): run_recipe(one, again)
    one, two = (Path(one.out, 'student.safetensors').read_bytes() for one in (whole, recipe))
    assert one == two


def test_a_run_whose_images_all_go_ends_in_one_line_and_goes_on_when_they_are_back(tmp_path):
    small_images(tmp_path/'images', 8)
    whole, recipe = recipe_at(tmp_path, steps=6, out=str(tmp_path/'whole')), recipe_at(tmp_path, steps=6)
    run_recipe(whole)
    out = Path(recipe.out)
    flags = cli.as_flags({key: value for key, value in vars(recipe).items() if value != ''})
    child = Children(1, tmp_path/'log', command, 'distill', *flags)
    wait_for_lines(child, out, 1)
    (tmp_path/'images').rename(tmp_path/'gone')
    child.wait(code=2)
    last = child.output().strip().splitlines()[-1]
    assert 'none of 100 images that were tried can be used; the first:' in last or 'none of 8' in last
    assert 'No such file' in last and 'Traceback' not in child.output()
    assert 1 <= load_checkpoint(out/'checkpoints')['step'] < 6
    (tmp_path/'gone').rename(tmp_path/'images')
    run_recipe(recipe, resume=True)
    assert (out/'student.safetensors').read_bytes() == (tmp_path/'whole'/'student.safetensors').read_bytes()


def test_a_run_whose_worker_died_goes_on(tmp_path):
    small_images(tmp_path/'images', 8)
    recipe = recipe_at(tmp_path, steps=60, workers=1)
    out = Path(recipe.out)
    def workers():
        found = psutil.Process(child_run.processes[0].pid).children()
        return [child for child in found if 'resource_tracker' not in ' '.join(child.cmdline())]
    child_run = Children(1, tmp_path/'log', _named, recipe)
    wait_for_lines(child_run, out, 2)
    for worker in workers(): worker.kill()
    child_run.wait(code=2)
    last = child_run.output().strip().splitlines()[-1]
    assert 'a process that decodes images died' in last
    assert 'all that was saved is whole: ask again (a run with --resume)' in last
    step = load_checkpoint(out/'checkpoints')['step']
    assert 2 <= step < 60
    steps = [line['step'] for line in losses(out)]
    child = Children(1, tmp_path/'log', train, replace(recipe, workers=0), True)
    wait_for_lines(child, out, step + 1)
    os.kill(child.processes[0].pid, signal.SIGTERM)
    child.wait(code=130)
    assert steps[:step] == [line['step'] for line in losses(out)][:step]


def test_a_connection_that_ends_before_its_worker_is_the_death_of_it(monkeypatch):
    def ended(*_, **__): raise ConnectionResetError(104, 'Connection reset by peer')
    monkeypatch.setattr('radio_nb.data.crops.DataLoader', ended)
    with pytest.raises(BadInput, match='a process that decodes images died .*Connection reset by peer.; all that was'):
        list(fetch([], [], workers=1))


def test_the_death_of_a_worker_is_one_line_wherever_it_is_noticed(monkeypatch, capsys):
    "PyTorch raises from the handler of a signal, in whatever line the program is."
    def command(_): raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')
    monkeypatch.setattr(cli, 'run_command', command)
    with pytest.raises(SystemExit) as ended: cli.main(['evaluate'])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith('radio-nb: a process that decodes images died (DataLoader worker (pid 7)')


def _named(recipe):
    "A run whose error the command would print."
    try: run_recipe(recipe)
    except BadInput as e: raise SystemExit(print(e) or 2) from e


@pytest.mark.parametrize('fields', [{}, {'windows': (2, 0)}], ids=['global', 'windows'])
def test_a_compiled_student_learns_what_an_eager_one_does(tmp_path, fields):
    small_images(tmp_path/'images', 8)
    eager, compiled = (recipe_at(tmp_path, out=str(tmp_path/name), steps=3, compile=backend, **fields)
                       for name, backend in (('eager', ''), ('compiled', 'aot_eager')))
    runs = [Children(1, tmp_path/'log', train_double, recipe) for recipe in (eager, compiled)]
    for child in runs: child.wait()
    a, b = (load_checkpoint(Path(recipe.out)/'checkpoints')['trainer']['weights'] for recipe in (eager, compiled))
    assert a.keys() == b.keys()   # no trace of the compiler in what is kept
    gap = max((a[key] - b[key]).abs().max().item() for key in a)
    print(f'compiled and eager are {gap:.1e} apart')
    assert gap < 1e-9
    Student.from_pretrained(compiled.out)(torch.rand(1, 3, 64, 64))


@pytest.fixture(scope='module')
def two_teachers(tmp_path_factory):
    "A run with two teachers, to be judged."
    home = tmp_path_factory.mktemp('judged')
    small_images(home/'images', 4)
    recipe = recipe_at(home, steps=2, teachers=('zoo:u2netp#64', 'zoo:u2netp#96'))
    run_recipe(recipe)
    return recipe


def test_evaluate_at_several_sizes(two_teachers, capsys):
    cli.main(['evaluate', two_teachers.out, '--images', two_teachers.images, '--sizes', '64', '96x128', '128'])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith('zoo:u2netp')]
    for size in ('64 × 64', '96 × 128', '128 × 128'):
        assert [row.split()[0] for row in rows if f'at {size} ' in row] == list(two_teachers.teachers)
    assert len(rows) == 6
    numbers = {row.split(' at ')[1].split('  ')[0]: row.split()[-4:] for row in rows if row.startswith('zoo:u2netp#64')}
    assert len({tuple(row) for row in numbers.values()}) == 3   # it is seen at other sizes, not three times at the same


@pytest.mark.parametrize('size', ['large', '64x', '1x2x3', '0', '-64', '6.4'])
def test_a_size_that_is_none_is_refused_in_one_line(two_teachers, capsys, size):
    with pytest.raises(SystemExit) as exit:
        cli.main(['evaluate', two_teachers.out, '--images', two_teachers.images, f'--sizes={size}'])
    assert exit.value.code == 2 and f"size '{size}' is neither a side" in capsys.readouterr().err


@pytest.mark.parametrize('size', ['1', '7', '100x70'])
def test_a_size_that_holds_no_whole_patches_is_judged_or_refused_in_one_line(two_teachers, capsys, size):
    "No traceback, whichever it is."
    try: cli.main(['evaluate', two_teachers.out, '--images', two_teachers.images, '--sizes', size])
    except SystemExit as exit: assert exit.code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) > 10
