"Several processes train the student that one would have trained."
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import SMALL
from safetensors.torch import load_file
from test_train import wait_for

from radio_nb.runs import load_checkpoint

# so many statistics that the covariance has full rank: the principal directions of no variance are anyone's choice
FULL = [*SMALL, '--statistics-steps', '40', '--steps', '20', '--checkpoint-every', '10', '--device', 'cpu']


def launch(n, *args):
    "Start the command in `n` processes that train together."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n),
               '--no-python', sys.executable, '-c', 'from radio_nb.cli import main; main()']
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'})


@pytest.fixture(scope='module', params=[[], ['--information', '10', '1', '--information-steps', '5']], ids=['plain', 'information'])
def folders(request, tmp_path_factory):
    "The folders of one run in one process and in two."
    out = {n: tmp_path_factory.mktemp('processes')/str(n) for n in (1, 2)}
    for n, folder in out.items():
        process = launch(n, 'distill', *FULL, *request.param, '--out', folder)
        printed, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert printed.count('The report is') == 1   # only one of them speaks
    return out


def differences(a, b): return {key: (a[key].double() - b[key].double()).abs().max().item() for key in a}


def test_two_processes_measure_what_one_does(folders):
    apart = differences(*(load_file(folder/'statistics.safetensors') for folder in folders.values()))
    assert max(gap for key, gap in apart.items() if '.modules.' not in key) < 1e-10


def test_two_processes_train_the_student_of_one(folders, request):
    one, two = (load_checkpoint(folder/'checkpoints')['trainer']['student'] for folder in folders.values())
    apart = differences(one, two)
    # what is added to all keys of a query changes no attention: the bias of the keys moves by rounding alone, which Adam enlarges
    for key in [key for key in apart if key.endswith('qkv.bias')]:
        queries, _, values = (one[key] - two[key]).abs().chunk(3)
        apart[key] = max(queries.max().item(), values.max().item())
    # KD dropout makes steps with next to no gradient, whose rounding Adam enlarges too
    assert max(apart.values()) < (1e-4 if 'information' in request.node.name else 1e-5), max(apart, key=apart.get)


def test_two_processes_log_what_one_does(folders):
    one, two = ([json.loads(line) for line in (folder/'metrics.jsonl').open()] for folder in folders.values())
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
        for kind, loss in a['teachers']['u2netp'].items(): assert b['teachers']['u2netp'][kind] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize('folders', [[]], indirect=True, ids=['plain'])
def test_two_processes_stop_together_and_go_on_as_one(folders, tmp_path):
    process = launch(2, 'distill', *FULL, '--out', tmp_path/'run')
    wait_for(tmp_path/'run'/'metrics.jsonl')
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode and 'add --resume' in error
    process = launch(1, 'distill', *FULL, '--out', tmp_path/'run', '--resume')
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    a, b = (load_checkpoint(folder/'checkpoints')['trainer']['student'] for folder in (folders[1], tmp_path/'run'))
    # small rounding differences grow from step to step, but it is the same student
    assert max(gap for key, gap in differences(a, b).items() if not key.endswith('qkv.bias')) < 1e-4


def test_a_batch_that_cannot_be_cut_is_refused_in_one_line(tmp_path):
    process = launch(2, 'distill', *SMALL, '--batch-size', '3', '--device', 'cpu', '--out', tmp_path/'run')
    _, error = process.communicate(timeout=300)
    assert process.returncode and 'a batch of 3 cannot be cut into 2 equal parts' in error
