"A student that agrees with the average of its weights, in a step and in whole runs."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import small_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.agglomeration.mesa import mesa_loss
from radio_nb.models.backbones import Transformer
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.plan import plan_recipe
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import check_recipe
from radio_nb.training.train import Callbacks, run_recipe


@given(st.integers(1, 3), st.integers(8, 40), st.floats(.1, 10), st.floats(-5, 5), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_only_the_pattern_of_a_vector_counts(side, width, factor, offset, seed):
    torch.manual_seed(seed)
    x, average = torch.randn(2, side, side, width, dtype=torch.float64), torch.randn(2, side, side, width)
    loss = mesa_loss(x, average)
    assert 0 <= loss <= 4 + 1e-5
    assert_close(mesa_loss(factor*x + offset, average), loss, rtol=1e-2, atol=1e-3)
    rows = zip(x.flatten(0, 2), average.double().flatten(0, 2))
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows]).mean()
    assert_close(loss.double(), 2 - 2*correlation, rtol=1e-3, atol=1e-3)


def test_the_average_gets_no_gradient():
    x, average = torch.randn(1, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 2, 8, requires_grad=True)
    mesa_loss(x, average).backward()
    assert average.grad is None and x.grad.abs().sum() > 0
    nowhere = torch.zeros(1, 2, 2, dtype=torch.bool)
    assert mesa_loss(x, average, nowhere) == 0


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('mesa')
    return Recipe(small_images(home/'images', 12), ('zoo:efficientnet-lite0/-2#64',), str(home/'run'), size=64, depth=1,
                  head_width=16, steps=4, batch_size=4, statistics_steps=2, checkpoint_every=2, device='cpu', shift=1,
                  ema=.5, mesa=1., watch_every=2, log_every=1)


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def lines(out): return [json.loads(line) for line in (Path(out)/'metrics.jsonl').read_text().splitlines()]


def test_it_is_in_the_loss_and_begins_with_the_backbone(recipe, out, tmp_path):
    def total(line): return sum(line['teachers']['efficientnet-lite0/-2'].values())
    for line in lines(out): assert_close(line['loss'], total(line) + line['mesa'], rtol=1e-4, atol=1e-4)
    assert all(line['mesa'] > 0 for line in lines(out))
    later = lines(run_recipe(replace(recipe, out=str(tmp_path/'later'), heads_only=2)))
    assert ['mesa' in line for line in later] == [False, False, True, True]


def test_looking_from_one_place_it_is_nothing_before_the_first_step(recipe, tmp_path, monkeypatch):
    "The average is the student then, but for the positions that a student has to do without in training."
    monkeypatch.setattr(Transformer, 'train', lambda self, mode=True: torch.nn.Module.train(self, False))
    def first(**fields):
        def stop(run): raise RuntimeError(run.metrics['mesa'])
        with pytest.raises(RuntimeError) as stopped: run_recipe(replace(recipe, **fields), callbacks=Callbacks(stop))
        return stopped.value.args[0]
    together, elsewhere = first(out=str(tmp_path/'a'), shift=0), first(out=str(tmp_path/'b'))
    assert together < 1e-9 < .01*elsewhere


def test_its_pass_is_planned(recipe):
    with_mesa, without = plan_recipe(recipe), plan_recipe(replace(recipe, mesa=0.))
    more = sum(with_mesa.step().values()) - sum(without.step().values())
    (_, (cost,)), = without.stages
    assert .5*sum(cost.forward.values())*cost.images < more < sum(cost.forward.values())*cost.images


def test_it_needs_an_average(recipe):
    with pytest.raises(BadInput, match='mesa: there is no average to agree with: add --ema'):
        check_recipe(replace(recipe, ema=0.))
