"What a run survives: kills, signals, damaged checkpoints, teachers that go mad."
import json
import os
import resource
import signal
import time

import pytest
import torch
from children import Children, command
from conftest import SMALL

from radio_nb.front.cli import main
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.targets.moments import NonFinite
from radio_nb.targets.normalizers import Normalizer
from radio_nb.training.monitor import check_finite
from radio_nb.training.run_folder import load_checkpoint, save_checkpoint
from radio_nb.training.statistics import measure
from radio_nb.training.trainer import Trainer, check_width


def slow_command(*args):
    "The command line, with time for a kill in each step."
    step = Trainer.__call__
    def slow_step(trainer, *batches):
        time.sleep(.15)
        return step(trainer, *batches)
    Trainer.__call__ = slow_step
    command(*args)


def start(log, *args):
    "The command in a process of its own."
    return Children(1, log, slow_command, *args)


def kill(child):
    for process in child.processes:
        process.kill()
        process.join()


def wait_for(path, seconds=120):
    end = time.time() + seconds
    while not path.exists() or not path.stat().st_size:
        assert time.time() < end, f'{path} did not appear'
        time.sleep(.005)


def same_weights(a, b):
    a, b = Student.from_pretrained(a).state_dict(), Student.from_pretrained(b).state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('moment', ['statistics.safetensors', 'metrics.jsonl',
                                    'checkpoints/00000002.pt', 'checkpoints/00000004.pt'])
def test_a_killed_run_goes_on_to_the_same_student(run, tmp_path, capsys, moment):
    out = tmp_path/'run'
    child = start(tmp_path/'log', 'distill', *SMALL, '--out', out)
    wait_for(out/moment)
    kill(child)
    assert not (out/'student.safetensors').exists()
    if any((out/'checkpoints').glob('*.pt')):
        with pytest.raises(SystemExit) as refused: main(['distill', *SMALL, '--out', str(out)])
        assert refused.value.code == 2 and 'add --resume' in capsys.readouterr().err
        main(['distill', *SMALL, '--out', str(out), '--resume'])
    else: main(['distill', *SMALL, '--out', str(out)])   # nothing has been learned there
    assert same_weights(out, run[0])
    assert [json.loads(line)['step'] for line in (out/'metrics.jsonl').open()] == [1, 2, 3, 4, 5, 6]


def test_a_signal_stops_between_steps_and_leaves_a_checkpoint(run, tmp_path):
    out = tmp_path/'run'
    child = start(tmp_path/'log', 'distill', *SMALL, '--out', out)
    wait_for(out/'metrics.jsonl')
    os.kill(child.processes[0].pid, signal.SIGTERM)
    child.wait(code=130)
    assert 'add --resume' in child.output() and 'Traceback' not in child.output()
    main(['distill', *SMALL, '--out', str(out), '--resume'])
    assert same_weights(out, run[0])


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, capsys):
    out = tmp_path/'run'
    child = start(tmp_path/'log', 'distill', *SMALL, '--out', out)
    wait_for(out/'checkpoints'/'00000004.pt')
    kill(child)
    newest = max((out/'checkpoints').glob('*.pt'))
    newest.write_bytes(newest.read_bytes()[:1000])
    main(['distill', *SMALL, '--out', str(out), '--resume'])
    assert 'is damaged' in capsys.readouterr().err
    assert same_weights(out, run[0])


def test_a_teacher_that_gives_nan_is_named_before_the_statistics_are_spoilt():
    mad = Features(torch.zeros(2, 2), torch.full((2, 2, 2, 2), float('nan')))
    sane = Features(torch.ones(2, 2), torch.rand(2, 2, 2, 2))
    with pytest.raises(NonFinite, match='teacher mad .*NaN or infinity in 8 of 8 vectors'):
        measure([{'sane': sane, 'mad': mad}])
    sad = Features(torch.tensor([[1., 2.], [float('nan'), 0.]]), torch.rand(2, 2, 2, 2))
    with pytest.raises(NonFinite, match='teacher sad: NaN or infinity in its summaries'): measure([{'sad': sad}])


def test_a_loss_that_is_not_finite_names_the_teacher():
    with pytest.raises(BadInput, match='step 4: the spatial loss of teacher mad is nan'):
        teachers = {'sane': {'summary': .1, 'spatial': .2}, 'mad': {'summary': .1, 'spatial': float('nan')}}
        check_finite({'step': 4, 'teachers': teachers})


def test_a_damaged_checkpoint_that_is_ahead_pushes_no_whole_one_out(tmp_path):
    for step in (100, 200): save_checkpoint(tmp_path, {'step': step}, keep=5)
    (tmp_path/'00000200.pt').write_bytes(b'damaged')
    assert load_checkpoint(tmp_path)['step'] == 100
    save_checkpoint(tmp_path, {'step': 150}, keep=1)
    assert load_checkpoint(tmp_path)['step'] == 150 and len([*tmp_path.iterdir()]) == 1


def test_a_full_disk_leaves_the_checkpoint_before(run, tmp_path):
    "A limit on the size of files stands in for a full disk: the weights do not fit, the log does."
    out = tmp_path/'run'
    main(['distill', *SMALL, '--steps', '2', '--out', str(tmp_path/'two')])
    size = (tmp_path/'two'/'checkpoints'/'00000002.pt').stat().st_size
    child = start(tmp_path/'log', 'distill', *SMALL, '--out', out)
    wait_for(out/'checkpoints'/'00000002.pt')
    resource.prlimit(child.processes[0].pid, resource.RLIMIT_FSIZE, (size//2, size//2))
    child.wait(code=2)
    last = child.output().strip().splitlines()[-1]
    assert 'Traceback' not in child.output()
    assert 'could not be written' in last and 'the last whole checkpoint is' in last
    assert not list((out/'checkpoints').glob('*.part'))
    assert all(torch.load(path, weights_only=True)['step'] for path in (out/'checkpoints').glob('*.pt'))
    main(['distill', *SMALL, '--out', str(out), '--resume'])
    assert same_weights(out, run[0])


def test_a_teacher_that_changes_its_width_is_named():
    with pytest.raises(BadInput, match='step 7: teacher fickle gives 5 channels, and gave 3 when'):
        check_width(7, 'fickle', torch.rand(1, 2, 2, 5), Normalizer(torch.zeros(3), torch.eye(3), torch.eye(3)))
