"Processes that start in a moment: a server imports the package once, and every child is a fork of it."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import contextlib
import faulthandler
import multiprocessing
import os
import socket
import time
import traceback
from dataclasses import replace
from pathlib import Path

import datasets.config
import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import save_file

from radio_nb.front.cli import main
from radio_nb.data.files import Stopped
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.train import Callbacks, run_recipe
from radio_nb.models.zoo import photographs

# in the server nothing has computed yet: a fork of a process with busy threads would hang
server = multiprocessing.get_context('forkserver')
server.set_forkserver_preload(['radio_nb.front.cli', 'radio_nb.front.run', 'radio_nb.front.evaluate',
                               'open_clip', 'PIL.AvifImagePlugin', 'torch._dynamo'])   # what is imported late, too


LIMIT = 300   # seconds for a child, on a machine that is busy with other things

def _begin(work, args, env, log):
    os.environ.update(env)
    os.fsync = lambda file: None   # see conftest
    torch.set_num_threads(1)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0   # it sleeps five seconds after every epoch of a shuffled stream
    with log.open('a', buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        faulthandler.dump_traceback_later(LIMIT - 10, file=file)   # where it hangs, before it is killed
        try: work(*args)
        except Exception:   # into the log, where the test looks
            traceback.print_exc()
            raise
        faulthandler.cancel_dump_traceback_later()


def train(recipe, resume=False):
    "Run a recipe; exits with 130 where it was asked to stop, as the command does."
    try: run_recipe(recipe, resume)
    except Stopped as e:
        print(e)
        raise SystemExit(130) from e


def same_after_a_break(recipe, out, other):
    "Whether a run that is broken off in its third step, and goes on, gives the student of `out`."
    def fail(run):
        if run.step == 3: raise RuntimeError('the power')
    broken = replace(recipe, out=str(other))
    with pytest.raises(RuntimeError, match='the power'): run_recipe(broken, callbacks=Callbacks(fail))
    run_recipe(broken, resume=True)
    one, two = (Path(folder)/'student.safetensors' for folder in (out, broken.out))
    return one.read_bytes() == two.read_bytes()


def train_double(recipe):
    "Run a recipe in float64, where the order of sums does not matter."
    torch.set_default_dtype(torch.float64)
    train(recipe)


def differences_by_division(recipe, folder):
    "How far weights are from those of one process, in microbatches and in two processes."
    ways = {'one': (1, {}), 'pieces': (1, {'accumulate': 2}), 'processes': (2, {})}
    children = [Children(n, folder/f'{name}-log', train_double,
                         replace(recipe, out=str(folder/name), watch_every=0, steps=3, **fields))
                for name, (n, fields) in ways.items()]
    for child in children: child.wait()
    one, *others = (load_checkpoint(folder/name/'checkpoints')['trainer']['weights'] for name in ways)
    return [apart(one, other) for other in others]


def command(*args):
    "The command line."
    main([str(arg) for arg in args])


class Children:
    "Processes that do the same work, together where there are several."
    def __init__(self, n, log, work, *args):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.logs = [Path(f'{log}-{rank}.txt') for rank in range(n)]
        self.begun = time.time()
        self.processes = []
        for rank, own in enumerate(self.logs):
            ranks = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': n, 'LOCAL_WORLD_SIZE': n,
                     'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            env = {key: str(value) for key, value in ranks.items()} if n > 1 else {}
            self.processes.append(server.Process(target=_begin, args=(work, args, env, own)))
            self.processes[-1].start()

    def output(self): return '\n'.join(log.read_text() for log in self.logs if log.exists())

    def alive(self): return any(process.is_alive() for process in self.processes)

    def wait(self, code=0, seconds=LIMIT):
        "Wait for the end; all must exit with `code`. Gives the seconds from the start."
        for process in self.processes: process.join(max(0, self.begun + seconds - time.time()))
        ended = time.time() - self.begun
        for process in self.processes: process.kill()
        codes = [process.exitcode for process in self.processes]
        assert codes == [code]*len(codes), f'exit codes {codes} after {ended:.0f} s\n{self.output()[-3000:]}'
        return ended


def small_images(folder, n=12, side=96):
    "A folder of small photographs, quick to decode."
    folder.mkdir()
    for i, path in enumerate(photographs()[:n]):
        Image.open(path).convert('RGB').resize((side, side)).save(folder/f'{i:02d}.png')
    return str(folder)


def other_teacher(path):
    "The spec of a small transformer with random weights, which are always the same."
    torch.manual_seed(5)
    save_file(timm.create_model('test_vit', num_classes=0).state_dict(), path)
    return f'timm:test_vit@{path}#64'


def apart(a, b):
    "The largest difference between two sets of tensors with the same names."
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def photo_parquet(path, n=24, side=96):
    "A Parquet file of photographs, as hubs keep them."
    images = [Image.open(p).convert('RGB').resize((side, side)) for p in photographs()[:n]]
    dataset = Dataset.from_dict({'image': [np.asarray(image) for image in images]})
    dataset.cast_column('image', ImageColumn()).to_parquet(path)
    return str(path)
