"A run that is killed at any moment, and goes on, trains the student of a run that nobody disturbed."
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from children import Children, other_teacher, small_images, train

from radio_nb.recipe import Partition, Recipe, Stage
from radio_nb.student import Student

KILLS = 20


@pytest.fixture(scope='module')
def hard(tmp_path_factory):
    "A recipe with all that has a state, and the folder and seconds of its undisturbed run."
    home = tmp_path_factory.mktemp('kills')
    teachers = ('zoo:u2netp#64', other_teacher(home/'small_vit.safetensors'))
    mixed = (Partition(.5, 32), Partition(.5, (64, 32), ('small_vit',)))
    stages = (Stage(4, partitions=mixed), Stage(4, restart_statistics=False, restart_lr=False), Stage(5, partitions=mixed))
    recipe = Recipe(images=small_images(home/'images'), teachers=teachers, out=str(home/'undisturbed'), depth=2, size=64, head_width=32,
                    batch_size=8, accumulate=2, stages=stages, statistics_steps=6, heads_only=3, ema=.9, teacher_dropout=.5, views=2,
                    cache=str(home/'cache'), checkpoint_every=1, keep=2, device='cpu', watch_every=3, warmup=.3)
    child = Children(1, home/'undisturbed', train, recipe)
    return recipe, Path(recipe.out), child.wait()


def losses(out):
    "The lines of a log without the times."
    return [{key: value for key, value in json.loads(line).items() if key != 'seconds'} for line in (out/'metrics.jsonl').open()]


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
            elif dice.random() < .5: killed = kill_at(child, dice.uniform(.3, 1)*seconds)
            else: killed = kill_writing(child, out/'checkpoints', dice.randint(1, 5))
            kills += killed
            writing += killed and any(out.glob('checkpoints/*.part'))
            measuring += killed and not any(out.glob('checkpoints/*.pt'))
            done, resume = (out/'student.safetensors').exists(), (out/'recipe.toml').exists()
            assert killed or done, child.said()[-3000:]
        if killed: continue   # in the very last moment, after the student was written
        assert (out/'student.safetensors').read_bytes() == (undisturbed/'student.safetensors').read_bytes()
        assert (out/'statistics-8.safetensors').read_bytes() == (undisturbed/'statistics-8.safetensors').read_bytes()
        assert losses(out) == losses(undisturbed)
        finished += 1
    print(f'{kills} kills, {writing} of them while a checkpoint was written, {measuring} before the first; {finished} runs, {seconds:.1f} s each')
    assert writing >= 4 and measuring >= 2
    assert Student.from_pretrained(undisturbed).config['teachers'].keys() == {'u2netp', 'small_vit'}
