"A teacher that sees quarters of an image, too: in whole runs, divided, kept in a cache, and refused."
from dataclasses import replace

import pytest
import torch
from children import differences_by_division, same_after_a_break, small_images

from radio_nb import front
from radio_nb.agglomeration.resolutions import grid_of
from radio_nb.agglomeration.sharp import sharp_teachers
from radio_nb.evaluation.scores import EvalData
from radio_nb.models.teachers import load_teacher
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.preparation import prepare
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import check_recipe
from radio_nb.training.train import run_recipe

LITE0 = 'efficientnet-lite0/-2'


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('sharp')
    return Recipe(small_images(home/'images', 12), (f'zoo:{LITE0}#64', 'zoo:u2netp#64'), str(home/'run'), size=64,
                  sharp=(LITE0,), depth=1, head_width=16, steps=4, batch_size=4, statistics_steps=2,
                  checkpoint_every=2, device='cpu', watch_every=0, method='global')   # too few crops to name axes


def test_its_grid_is_twice_as_fine(recipe):
    teachers = prepare(recipe).teachers
    assert teachers[LITE0].size == (128, 128) and grid_of(teachers[LITE0]) == (8, 8)
    assert grid_of(teachers['u2netp']) == (2, 2)


def test_a_batch_does_not_matter():
    plain = load_teacher(f'zoo:{LITE0}#64')
    sharp, = sharp_teachers({'a': plain}, ('a',)).values()
    images = torch.rand(3, 3, 128, 128)
    alone = torch.cat([sharp(image[None]).spatial for image in images])
    torch.testing.assert_close(sharp(images).spatial, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sharp(images).summary, plain(images).summary, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_after_a_break_and_can_be_divided(recipe, tmp_path, monkeypatch):
    out, seen = run_recipe(recipe), []
    def look(students, teachers, *others):
        seen.append(grid_of(teachers[LITE0]))
        return {}, []
    monkeypatch.setattr(front.evaluate, 'match_suite', look)
    front.evaluate.evaluate(out, EvalData(recipe.images))
    assert seen == [(8, 8)]   # as it was when the student learned from it
    assert same_after_a_break(recipe, out, tmp_path/'run')
    assert max(differences_by_division(recipe, tmp_path)) < 1e-5


def test_a_cache_tells_it_from_the_teacher_as_it_is(recipe, tmp_path):
    cached = replace(recipe, views=1, cache=str(tmp_path/'cache'), steps=2)
    students = [run_recipe(replace(cached, sharp=sharp, out=str(tmp_path/name)))/'student.safetensors'
                for name, sharp in (('plain', ()), ('sharp', (LITE0,)), ('again', (LITE0,)))]
    plain, sharp, again = (student.read_bytes() for student in students)
    assert sharp == again != plain


def test_what_cannot_be_sharp_is_refused(recipe):
    with pytest.raises(BadInput, match="unknown teacher in sharp 'u2net': did you mean u2netp"):
        check_recipe(replace(recipe, sharp=('u2net',)))
    with pytest.raises(BadInput, match=f'sharp: teacher {LITE0} is flexible, and can see large images at once'):
        check_recipe(replace(recipe, flexible=(LITE0,)))
    with pytest.raises(BadInput, match='mosaic: teacher u2netp is sharp, and sees quarters of one image'):
        check_recipe(replace(recipe, sharp=('u2netp',), mosaic=('u2netp',)))
