"Warps, and what is found again after them."
from math import isfinite

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.agglomeration.shifts import FixedPattern, fixed_pattern
from radio_nb.evaluation.places import (
    PLACES,
    PlaceMeter,
    found,
    random_warps,
    share_found,
    sought,
    warped,
)
from radio_nb.evaluation.scores import EvalData
from radio_nb.evaluation.suites import place_suite, teacher_eval_model
from radio_nb.models.teachers import load_teacher


def ramp(height, width):
    "An image whose first two colours say where in it one is, from -1 to 1."
    y, x = ((torch.arange(n) + .5)*2/n - 1 for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.zeros(height, width)])[None]


@given(st.integers(60, 200), st.integers(60, 200), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_warped_image_shows_what_was_at_the_places_that_are_sought(height, width, seed):
    warps = random_warps(3, (height, width), seed)
    size = PLACES*5, PLACES*7
    views = warped(ramp(height, width).expand(3, -1, -1, -1), warps, size)[:, :2, 2::5, 3::7]   # at the lattice
    inside = sought(warps).abs().amax(-1) < 1 - 2/min(height, width)   # not beyond the middle of the outermost pixel
    assert inside.float().mean() > .8
    assert_close(views.flatten(2).mT[inside], sought(warps)[inside], rtol=0, atol=1e-4)
    # in pixels, a turn and a scale
    turns = warps[..., :2]*torch.tensor([[width], [height]])/torch.tensor([width, height])
    scale = turns.det().sqrt()[:, None, None]
    assert_close((turns/scale) @ (turns/scale).mT, torch.eye(2).expand(3, -1, -1), rtol=0, atol=1e-5)


def test_a_model_that_sees_colours_finds_the_places_of_a_ramp_again():
    meter = PlaceMeter((96, 144))
    images = ramp(*meter.larger).expand(8, -1, -1, -1)
    def lifted(x): return torch.cat([x.movedim(1, -1), torch.ones(*x[:, 0].shape, 1)], -1)   # a cosine tells no lengths
    assert meter.update(lifted, images).result()['found again'] > .9
    flat = PlaceMeter((96, 144)).update(lambda x: torch.ones(len(x), 6, 9, 4), images)
    assert flat.result()['found again'] < .1


def test_a_pattern_in_batches_is_that_of_all():
    torch.manual_seed(0)
    grids, meter = 5 + torch.randn(2, 50, 3, 4, 6) + 2*torch.randn(3, 4, 6), FixedPattern()
    for views in zip(*(x.split(8) for x in grids)): meter.update(*views)
    assert_close(meter.by_position(), fixed_pattern(*grids))
    mean = grids.double().mean(0)   # of the two looks
    z = mean - mean.mean((1, 2), keepdim=True)
    pattern = z.mean(0).square().sum(-1) - z.var(0).sum(-1)/50
    assert_close(meter.by_position(), pattern/grids.double().flatten(0, 3).var(0, correction=0).sum())


def test_a_pattern_beside_a_mean_that_is_far_larger():
    torch.manual_seed(0)
    grids = torch.randn(1, 50, 3, 4, 6).double() + 2*torch.randn(3, 4, 6)
    assert_close(fixed_pattern(*(1e8 + grids)), fixed_pattern(*grids), rtol=1e-6, atol=1e-6)


def test_far_is_not_found():
    places = torch.zeros(1, 2, 2)
    assert share_found(places, torch.tensor([[[.19, 0.], [.21, 0.]]])).tolist() == [.5]
    grid = torch.eye(9).reshape(1, 3, 3, 9)
    assert share_found(found(grid, grid), sought(torch.eye(2, 3)[None])).item() > .6   # an image that was not turned


def test_an_image_has_the_same_warp_in_whatever_batch():
    assert_close(random_warps(5, (64, 96), 3), torch.cat([random_warps(2, (64, 96), 3), random_warps(3, (64, 96), 5)]))
    torch.manual_seed(0)
    images, parts, whole = torch.rand(7, 3, 64, 96), PlaceMeter((32, 48)), PlaceMeter((32, 48))
    def grid_of(x): return torch.nn.functional.avg_pool2d(x, 4).movedim(1, -1)
    for part in images.split(3): parts.update(grid_of, part)
    assert_close(parts.result(), whole.update(grid_of, images).result())


def test_a_single_image_has_no_score_for_a_pattern():
    model = teacher_eval_model(load_teacher('zoo:u2netp#64'), 'zoo:u2netp#64')
    scores = place_suite(model, EvalData(images='zoo:photos', limit=1), {})
    assert scores and all(isfinite(score.value) for score in scores)
