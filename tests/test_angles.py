"The loss of angles: against float64 and a library's own angle, in a run, and in one that was broken off."
import json
from dataclasses import replace
from functools import partial
from math import pi
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.agglomeration.angles import angle_loss, dispersion, mean_direction, squared_angle
from radio_nb.data.crops import Crops, image_batches
from radio_nb.data.images import open_images
from radio_nb.models.teachers import load_teacher
from radio_nb.training.recipe import Recipe, Stage
from radio_nb.training.statistics import load_statistics, load_summary_losses
from radio_nb.training.train import Callbacks, run_recipe

SPECS = {'u2netp': 'zoo:u2netp#64', 'efficientnet-lite0': 'zoo:efficientnet-lite0#64'}


@given(angle=st.floats(1e-3, pi - 1e-2), length=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_angle_is_that_of_float64(angle, length, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.linalg.qr(torch.randn(8, 2, generator=generator).double())[0].T
    x, y = length*a, torch.cos(torch.tensor(angle).double())*a + torch.sin(torch.tensor(angle).double())*b
    assert_close(squared_angle(x, y).item(), angle**2, rtol=1e-6, atol=1e-9)
    assert_close(squared_angle(x.float(), y.float()).item(), angle**2, rtol=3e-4, atol=1e-6)
    torch.autograd.gradcheck(squared_angle, (a.clone().requires_grad_(), y.requires_grad_()))


def test_a_constant_student_loses_one_from_every_teacher():
    torch.manual_seed(0)
    for width in .05, .5, 3.:
        y = torch.randn(500, 16)*width + torch.ones(16)
        constant = mean_direction(y).float().expand(500, -1)
        assert_close(angle_loss(constant, y, dispersion(y)).item(), 1., rtol=1e-4, atol=0)


@pytest.mark.parametrize('x, y', [((4, 3), (1, 3)), ((4, 1), (4, 3)), ((3,), (4, 3))])
def test_summaries_of_other_shapes_are_not_stretched(x, y):
    with pytest.raises(ValueError, match='images and channels'): angle_loss(torch.ones(x), torch.ones(y))


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    return Recipe('zoo:photos', tuple(SPECS.values()), str(tmp_path_factory.mktemp('angles')/'run'), size=64, depth=1,
                  head_width=16, steps=4, batch_size=4, statistics_steps=3, checkpoint_every=2, device='cpu',
                  summary_loss='angle')


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def test_a_run_divides_by_the_dispersion_of_what_it_has_measured(recipe, out):
    for name, spec in SPECS.items():
        teacher = load_teacher(spec)
        batches = image_batches(Crops(open_images(recipe.images), 64, recipe.seed), 4, 3)
        summaries = torch.cat([teacher(batch.images/255).summary for batch in batches])
        found = load_statistics(out)[f'{name}.dispersion'].item()
        mean = F.normalize(F.normalize(summaries.double(), dim=1).mean(0), dim=0)
        by_hand = torch.acos(F.cosine_similarity(summaries.double(), mean[None])).square().mean().item()
        assert found == pytest.approx(by_hand, rel=1e-4)
        assert load_summary_losses(SPECS, out)[name].keywords == {'disp': found}


def test_a_step_divides_by_it_in_every_stage(recipe, out, tmp_path, monkeypatch):
    def first(folder): return json.loads((Path(folder)/'metrics.jsonl').read_text().splitlines()[0])['teachers']
    def doubled(names, folder, step=0):
        found = load_summary_losses(names, folder, step)
        return {name: partial(angle_loss, disp=2*loss.keywords['disp']) for name, loss in found.items()}
    stages, used = (Stage(1), Stage(1)), []
    def look(run): used.append({name: own.keywords['disp'] for name, own in run.trainer.loss.of_summaries.items()})
    again = run_recipe(replace(recipe, out=str(tmp_path/'two'), stages=stages, log_every=1), callbacks=Callbacks(look))
    measured = [{name: load_statistics(again, step)[f'{name}.dispersion'].item() for name in SPECS} for step in (0, 1)]
    assert used == measured and measured[0] != measured[1]
    monkeypatch.setattr('radio_nb.training.train.load_summary_losses', doubled)
    half = first(run_recipe(replace(recipe, out=str(tmp_path/'half'), log_every=1)))
    whole = first(again)
    for name in SPECS: assert 2*half[name]['summary'] == pytest.approx(whole[name]['summary'], rel=1e-5)


def test_a_run_without_angles_measures_none(recipe, tmp_path):
    plain = run_recipe(replace(recipe, out=str(tmp_path/'run'), summary_loss='cosine', steps=1))
    assert not [key for key in load_statistics(plain) if 'dispersion' in key] and not load_summary_losses(SPECS, plain)
