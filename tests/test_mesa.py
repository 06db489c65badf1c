"A student that agrees with the average of its weights, in a step and in whole runs."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from children import small_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.agglomeration.mesa import AVERAGE, mesa_loss
from radio_nb.agglomeration.shifts import Shift, Windows, moved, shared_positions
from radio_nb.models.backbones import Transformer
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.training.plan import plan_recipe
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import BatchPartition, check_recipe
from radio_nb.training.train import Callbacks, run_recipe
from radio_nb.training.trainer import DistillStep


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


class Colours(torch.nn.Module):
    "A student whose grid is the mean colour of each patch, so that it moves with the image."
    def layers(self, images, every): return [Features(None, colours(images))]

    def adapted(self, layers, names): return {}

    def logits(self, outputs): return {}

    config = {'teachers': {}}


def colours(images): return F.avg_pool2d(images, 16).movedim(1, -1)


class NoTeachers(torch.nn.Module):
    def forward(self, *args): return torch.zeros(()), {}


def test_who_moves_with_the_image_agrees_with_its_average_wherever_that_looks():
    shift, part = Shift(1, (4, 4), (4, 4)), BatchPartition((0, 2), (64, 64), .25, {})
    step, seen_from = DistillStep(Colours(), NoTeachers(), mesa=.3), set()
    for seed in range(12):
        places = shift.draw(['', AVERAGE], seed)
        seen_from.add(str(places))
        images = torch.randint(256, (2, 3, *shift.crop_size((64, 64))), dtype=torch.uint8)
        seen = Windows(images, torch.device('cpu'), shift, places)
        average = colours(seen.at(64, AVERAGE))
        masks, moves = shared_positions(shift, places, {AVERAGE: Features(average[:, 0, 0], average)})
        def loss_of(average, moves, masks=masks, seen=seen):
            return step(seen.at(64), {}, part, {}, masks, moves, average)[0]
        assert loss_of(average, moves) < 1e-6
        if moves[AVERAGE].any():
            assert loss_of(average, {AVERAGE: -moves[AVERAGE]}) > 1e-3
            assert loss_of(average, moves, {}) > 1e-3   # what is not seen by both must not count
        other = average + torch.randn_like(average)
        there = moved(colours(seen.at(64)), moves[AVERAGE])
        assert_close(loss_of(other, moves), .3*.25*mesa_loss(there, other, masks[AVERAGE]))
    assert len(seen_from) > 8


def test_its_pass_is_planned(recipe):
    with_mesa, without = plan_recipe(recipe), plan_recipe(replace(recipe, mesa=0.))
    more = sum(with_mesa.step().values()) - sum(without.step().values())
    (_, (cost,)), = without.stages
    assert .5*sum(cost.forward.values())*cost.images < more < sum(cost.forward.values())*cost.images


def test_it_needs_an_average(recipe):
    with pytest.raises(BadInput, match='mesa: there is no average to agree with: add --ema'):
        check_recipe(replace(recipe, ema=0.))
