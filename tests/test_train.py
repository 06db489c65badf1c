"What a run survives: kills, signals, damaged checkpoints, teachers that go mad."
import json
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import SMALL

from radio_nb.front.cli import main
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.targets.moments import NonFinite
from radio_nb.targets.normalizers import Normalizer
from radio_nb.training.monitor import check_finite
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.statistics import measure
from radio_nb.training.trainer import check_width


def start(*args):
    return subprocess.Popen([sys.executable, '-c', 'from radio_nb.front.cli import main; main()', *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    process = start('distill', *SMALL, '--out', out)
    wait_for(out/moment)
    process.kill()
    process.wait()
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
    process = start('distill', *SMALL, '--out', out)
    wait_for(out/'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and 'add --resume' in error and 'Traceback' not in error
    main(['distill', *SMALL, '--out', str(out), '--resume'])
    assert same_weights(out, run[0])


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, capsys):
    out = tmp_path/'run'
    process = start('distill', *SMALL, '--out', out)
    wait_for(out/'checkpoints'/'00000004.pt')
    process.kill()
    process.wait()
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


def test_a_loss_that_is_not_finite_names_the_teacher():
    with pytest.raises(BadInput, match='step 4: the spatial loss of teacher mad is nan'):
        teachers = {'sane': {'summary': .1, 'spatial': .2}, 'mad': {'summary': .1, 'spatial': float('nan')}}
        check_finite({'step': 4, 'teachers': teachers})


def test_a_full_disk_leaves_the_checkpoint_before(run, tmp_path):
    "A limit on the size of files stands in for a full disk: the weights do not fit, the log does."
    out = tmp_path/'run'
    main(['distill', *SMALL, '--steps', '2', '--out', str(tmp_path/'two')])
    size = (tmp_path/'two'/'checkpoints'/'00000002.pt').stat().st_size
    process = start('distill', *SMALL, '--out', out)
    wait_for(out/'checkpoints'/'00000002.pt')
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size//2, size//2))
    _, error = process.communicate(timeout=120)
    if process.returncode == 0: pytest.skip('the run was over before the disk was full')
    last = error.strip().splitlines()[-1]
    assert process.returncode == 2 and 'Traceback' not in error
    assert 'could not be written' in last and 'the last whole checkpoint is' in last
    assert not list((out/'checkpoints').glob('*.part'))
    assert all(torch.load(path, weights_only=True)['step'] for path in (out/'checkpoints').glob('*.pt'))
    main(['distill', *SMALL, '--out', str(out), '--resume'])
    assert same_weights(out, run[0])


def test_a_dead_worker_is_reported_in_one_line(tmp_path):
    process = start('distill', *SMALL, '--steps', '500', '--workers', '1', '--out', tmp_path/'run')
    wait_for(tmp_path/'run'/'checkpoints'/'00000002.pt')
    for child in psutil.Process(process.pid).children(): child.kill()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and 'a process that decodes images died' in error and 'Traceback' not in error
    assert load_checkpoint(tmp_path/'run'/'checkpoints')['step'] >= 2


def test_a_teacher_that_changes_its_width_is_named():
    with pytest.raises(BadInput, match='step 7: teacher fickle gives 5 channels, and gave 3 when'):
        check_width(7, 'fickle', torch.rand(1, 2, 2, 5), Normalizer(torch.zeros(3), torch.eye(3), torch.eye(3)))
