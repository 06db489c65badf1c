"A run that is killed at any moment, and goes on, trains the student of a run that nobody disturbed."
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from children import Children, other_teacher, small_images, train

from radio_nb.models.student import Student
from radio_nb.training.recipe import Listen, Partition, Recipe, Stage

KILLS, STEPS = 20, 13


@pytest.fixture(scope='module')
def hard(tmp_path_factory):
    "A recipe with all that has a state, and the folder and seconds of its undisturbed run."
    home = tmp_path_factory.mktemp('kills')
    teachers = ('zoo:u2netp#64', other_teacher(home/'small_vit.safetensors'))
    mixed = (Partition(.5, 32), Partition(.5, (64, 32), ('small_vit',)))
    stages = (Stage(4, partitions=mixed), Stage(4, restart_statistics=False, restart_lr=False),
              Stage(5, partitions=mixed))
    recipe = Recipe(images=small_images(home/'images'), teachers=teachers, out=str(home/'undisturbed'),
                    depth=2, size=64, head_width=32, batch_size=8, accumulate=2, stages=stages, statistics_steps=6,
                    heads_only=3, ema=.9, teacher_dropout=.5, views=2, cache=str(home/'cache'), checkpoint_every=1,
                    keep=2, device='cpu', watch_every=3, warmup=.3,
                    listen=(Listen('mgd', .1), Listen('attention', .1, 'rising')))
    Children(1, home/'first', time.sleep, 0).wait()   # starts the server
    child = Children(1, home/'undisturbed', train, recipe)
    return recipe, Path(recipe.out), child.wait()


def losses(out):
    "The lines of a log without the times."
    whole = [line for line in (out/'metrics.jsonl').read_text().splitlines(keepends=True) if line.endswith('\n')]
    return [{key: value for key, value in json.loads(line).items() if key != 'seconds'} for line in whole]


def kill_at(child, moment):
    "Kill after some seconds; whether it was still at work."
    while time.time() < child.begun + moment:
        if not child.alive(): return False
        time.sleep(.002)
    child.processes[0].kill()
    child.processes[0].join()
    return child.processes[0].exitcode == -signal.SIGKILL


def kill_writing(child, folder, nth):
    "Kill while the `nth` checkpoint from now is being written, or during the export; whether it was still at work."
    seen = set()
    while child.alive():
        seen |= {name for name in (os.listdir(folder) if folder.exists() else []) if name.endswith('.part')}
        if len(seen) >= nth: return kill_at(child, 0)
    return False


def test_killed_twenty_times_it_trains_the_same_student(hard, tmp_path):
    recipe, undisturbed, seconds = hard
    dice, kills, writing, finished, measuring = random.Random(7), 0, 0, 0, 0
    while kills < KILLS or finished == 0:
        run = replace(recipe, out=str(tmp_path/f'run{finished}'), cache=str(tmp_path/f'cache{finished}'))
        out, resume, done = Path(run.out), False, False
        while not done:
            child = Children(1, tmp_path/f'run{finished}', train, run, resume)
            if kills >= KILLS: killed = child.wait() < 0
            elif dice.random() < .6:
                taken = len(losses(out)) if (out/'metrics.jsonl').exists() else 0
                left = 1 - taken/STEPS   # of the run, after its start
                killed = kill_at(child, dice.uniform(.05, .3 + .6*left)*seconds)
            else: killed = kill_writing(child, out/'checkpoints', dice.randint(1, 5))
            kills += killed
            writing += killed and any(out.glob('checkpoints/*.part'))
            measuring += killed and not any(out.glob('checkpoints/*.pt'))
            done, resume = (out/'student.safetensors').exists(), (out/'recipe.toml').exists()
            assert killed or done, child.output()[-3000:]
        if killed: continue   # in the very last moment, after the student was written
        assert (out/'student.safetensors').read_bytes() == (undisturbed/'student.safetensors').read_bytes()
        assert (out/'statistics-8.safetensors').read_bytes() == (undisturbed/'statistics-8.safetensors').read_bytes()
        assert losses(out) == losses(undisturbed)
        finished += 1
    print(f'{kills} kills, {writing} while a checkpoint was written, {measuring} before the first; '
          f'{finished} runs of {seconds:.1f} s')
    assert writing >= 4 and measuring >= 2
    assert Student.from_pretrained(undisturbed).config['teachers'].keys() == {'u2netp', 'small_vit'}


class Killed(BaseException):
    "Stands in for a kill within a file."


@pytest.mark.parametrize('resumed', [False, True])
def test_a_kill_within_a_text_file_leaves_a_run_that_goes_on(hard, tmp_path, monkeypatch, resumed):
    "Every text file of a run in turn gets half of what was to be written, when it is made and when it is made again."
    recipe = replace(hard[0], teachers=('zoo:u2netp#64',), stages=(), steps=2, depth=1, size=32, statistics_steps=2,
                     cache='', heads_only=0)
    undisturbed, write, written, end, n = tmp_path/'0', Path.write_text, [], None, 0
    train(replace(recipe, out=str(undisturbed)))
    def dying(path, text, *args, **kwargs):
        written.append(path)
        if len(written) != end: return write(path, text, *args, **kwargs)
        write(path, text[:len(text)//2])
        raise Killed
    monkeypatch.setattr(Path, 'write_text', dying)
    while True:
        n, written, out = n + 1, [], tmp_path/str(n + 1)
        if resumed:
            shutil.copytree(undisturbed, out)
            for name in ('student.safetensors', 'checkpoints/00000002.pt'): (out/name).unlink()
        end = n
        try: train(replace(recipe, out=str(out)), resume=resumed)
        except Killed: end = None
        else: break
        train(replace(recipe, out=str(out)), resume=(out/'recipe.toml').exists())
        assert (out/'student.safetensors').read_bytes() == (undisturbed/'student.safetensors').read_bytes()
        assert losses(out) == losses(undisturbed)
    assert n > 3   # the recipe, the log and the student's shape at least
