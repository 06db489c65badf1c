"A world small enough to break ten thousand times: one teacher, six images, two steps, a fifth of a second."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
from pathlib import Path

import torch
from children import small_images

from radio_nb.front import cli
from radio_nb.front.run import Run

RUNS = 0   # invocations so far


class World:
    "Images, a teacher, and what an undisturbed run makes of them."
    def __init__(self, home):
        self.home, self.made = Path(home), 0
        torch.set_num_threads(1)
        images = small_images(self.home/'images', 6, 40)
        self.values = {'images': images, 'teachers': ('timm:test_vit@random#32',), 'student': 'test_vit', 'size': 32,
                       'depth': 1, 'head_width': 8, 'steps': 3, 'batch_size': 2, 'statistics_steps': 2, 'device': 'cpu',
                       'checkpoint_every': 1, 'keep': 9, 'hold_out': 1, 'watch_every': 0}

    def fresh(self):
        "A path that is not there yet."
        self.made += 1
        return self.home/f'{self.made}'

    def flags(self, out, **changes):
        "The flags of a run."
        return ['distill', *cli.as_flags(self.values | {'out': str(out)} | changes)]


def command(*args, seconds=60):
    "The exit code of one invocation, what it printed, and its last line of errors. Hangs and tracebacks fail."
    global RUNS
    RUNS += 1
    out, error = io.StringIO(), io.StringIO()
    def too_long(*_): raise TimeoutError(f'hangs: {args}')
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try: code = cli.main([str(arg) for arg in args]) or 0
            except SystemExit as exit: code = exit.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    last = (error.getvalue().strip().splitlines() or [''])[-1]
    assert code in (0, 2, 130), (args, code, last)
    told = last.startswith('radio-nb: ') or 'For full helptext' in error.getvalue()   # tyro's own, of flags
    assert not code or told and 'Traceback' not in error.getvalue(), (args, error.getvalue())
    return code, out.getvalue(), last


def result(out):
    "All that a run has found: student, statistics, log and match."
    run = Run(out)
    log = [{key: value for key, value in line.items() if key != 'seconds'} for line in run.metrics]
    files = [hashlib.sha256(path.read_bytes()).hexdigest()
             for path in (run.out/'student.safetensors', run.out/'statistics.safetensors')]
    return files, json.dumps(log), json.dumps(run.match)


def damage(path, dice):
    "Do to a file what disks and people do; says what."
    data = path.read_bytes()
    kinds = ['cut', 'empty', 'garbage', 'gone', 'folder', 'flip', 'longer', 'swap']
    kind = dice.choice(kinds)
    if kind == 'cut': path.write_bytes(data[:dice.randrange(len(data) + 1)])
    if kind == 'empty': path.write_bytes(b'')
    if kind == 'garbage': path.write_bytes(random.Random(dice.random()).randbytes(dice.choice([1, 100, 5000])))
    if kind in ('gone', 'folder'): path.unlink()
    if kind == 'folder': path.mkdir()
    if kind == 'longer': path.write_bytes(data + b'x'*dice.choice([1, 1000]))
    if kind == 'swap': path.write_bytes(data[len(data)//2:] + data[:len(data)//2])
    if kind == 'flip' and data:
        at, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1:])
    return kind


def repaired(path, data):
    "Put a file back as it was."
    if path.is_dir(): shutil.rmtree(path)
    path.write_bytes(data)
