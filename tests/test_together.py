"All that a recipe can switch on, in one run: broken off, in parts, and in two processes it trains the same student."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from children import differences_by_division, same_after_a_break, small_images
from datasets import ClassLabel, Dataset
from datasets import Image as ImageColumn
from PIL import Image

from radio_nb.listening.listeners import LISTENERS
from radio_nb.training.recipe import Listen, Recipe
from radio_nb.training.train import run_recipe

LITE0 = 'efficientnet-lite0/-2'


def labelled_parquet(folder):
    "Twelve small photographs of the first two of a thousand classes."
    images = [np.asarray(Image.open(path)) for path in sorted(Path(small_images(folder, 12)).iterdir())]
    table = Dataset.from_dict({'image': images, 'label': [i % 2 for i in range(12)]})
    path = folder.with_suffix('.parquet')
    thousand = ClassLabel(names=[str(i) for i in range(1000)])
    table.cast_column('image', ImageColumn()).cast_column('label', thousand).to_parquet(path)
    return str(path)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('together')
    return Recipe(labelled_parquet(home/'images'), (f'zoo:{LITE0}#64', 'zoo:u2netp#64'), str(home/'run'),
                  method='global',   # so few crops name no principal axes
                  depth=2, head_width=16, steps=4, batch_size=4, statistics_steps=2, checkpoint_every=2, device='cpu',
                  watch_every=2, log_every=1, flexible=(LITE0, 'u2netp'), sizes=(64, 96), shift=1, ema=.5, mesa=1.,
                  summary_loss='angle', balance='ada', head_attention=1, ladder=True, windows=(2, 0),
                  teacher_dropout=.3, spectral=True,
                  listen=tuple(Listen(name, .1) for name, listener in LISTENERS.items()
                               if not {'a second teacher', 'the student as it was'} & {*listener.needs}
                               and not listener.compares_images))


def test_a_broken_run_goes_on_to_the_same_student(recipe, tmp_path):
    noisy = replace(recipe, damp=.1, spectral=False, heads_only=1)
    assert same_after_a_break(noisy, run_recipe(noisy), tmp_path/'run')


def test_parts_and_processes_train_the_same_student(recipe, tmp_path):
    "Without noise on the weights, which every part of a batch has of its own."
    assert max(differences_by_division(recipe, tmp_path)) < 1e-5
