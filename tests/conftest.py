"What several tests share: a small run of the command line, made once."
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault('HF_HUB_OFFLINE', '1')
signal.signal(signal.SIGHUP, signal.SIG_DFL)   # a shell that runs the tests in the background has them ignore these
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ['OMP_NUM_THREADS'] = '1'   # of all processes: runs compared to the last bit must add up in one order
os.fsync = lambda file: None   # what a killed process wrote is there without it; no test pulls the plug

SMALL = ['--teachers', 'zoo:u2netp#64', '--size', '64', '--depth', '2', '--steps', '6', '--statistics-steps', '2',
         '--batch-size', '4', '--head-width', '32', '--checkpoint-every', '2', '--hold-out', '4',
         '--images', 'zoo:photos', '--device', 'cpu']   # runs are compared to the last bit, which no GPU promises


def pytest_addoption(parser):
    parser.addoption('--fuzz', type=int, default=0, help='about how many invocations tests/fuzz makes')
    parser.addoption('--fuzz-seed', type=int, default=0, help='of what it draws')
    parser.addoption('--sweep', action='store_true', help='make every family of timm and open_clip a teacher')


def radio_nb(*args, **kwargs):
    "Run the command as a user would, in a process of its own."
    return subprocess.run([sys.executable, '-c', 'from radio_nb.front.cli import main; main()', *map(str, args)],
                          capture_output=True, text=True, timeout=600, **kwargs)


@pytest.fixture(scope='session')
def run(tmp_path_factory):
    "The folder of a finished run, and what was printed."
    out = tmp_path_factory.mktemp('runs')/'small'
    done = radio_nb('distill', *SMALL, '--out', out)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture
def refused(capsys):
    "Run the command in this process, where it must refuse: the one line that it prints, behind lines of progress."
    from radio_nb.front import cli  # not above: most tests of the package need no command line

    def command(*args):
        with pytest.raises(SystemExit) as exit: cli.main(list(map(str, args)))
        assert exit.value.code == 2
        *progress, error = capsys.readouterr().err.strip().splitlines()
        assert all(' left ' in line for line in progress) and error.startswith('radio-nb: ')
        return error
    return command
