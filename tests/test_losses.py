"""What the chapters on losses cannot show well: every shape, mask and combination,
and what a missing term must not spoil."""
import io
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.losses.balancing import BALANCES, AdaLoss, UncertaintyWeights
from radio_nb.losses.losses import GRIDS, SPATIAL_LOSSES, same_grid, spatial_loss, summary_loss
from radio_nb.losses.methods import METHODS, TEN
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features, resample
from radio_nb.targets.phi_s import KINDS
from radio_nb.training.recipe import Recipe

sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))
kinds = st.sampled_from(sorted(SPATIAL_LOSSES))


def normal(seed, *shape):
    "Float64 noise of that shape."
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(seed, *shape):
    "Half of the positions, at random."
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < .5


def one_position(kind, x, y):
    "The definition for two vectors, written out with Python's numbers."
    x, y = x.tolist(), y.tolist()
    dot, norms = sum(a*b for a, b in zip(x, y)), (sum(a*a for a in x)*sum(b*b for b in y))**.5
    errors = [abs(a - b) for a, b in zip(x, y)]
    cosine, mse = 1 - dot/norms, sum(e*e for e in errors)/len(x)
    sml1 = sum(e*e/2 if e < 1 else e - .5 for e in errors)/len(x)
    dampened = sum(e*e/2 if e < 1 else 2*e**.5 - 1.5 for e in errors)/len(x)
    return {'mse': mse, 'cosine': cosine, 'hyb-mse': .9*cosine + .1*mse, 'hyb-sml1': .9*cosine + .1*sml1,
            'dampened': dampened}[kind]


@settings(deadline=None, max_examples=40)
@given(kinds, sizes, st.integers(2, 6), st.integers(0, 99))
def test_the_loss_of_an_image_is_the_mean_of_its_positions_that_count(kind, size, width, seed):
    "And every image counts the same, so that a batch may be divided."
    x, y, mask = normal(seed, 2, *size, width), normal(seed + 100, 2, *size, width), random_mask(seed, 2, *size)
    by_image = [[one_position(kind, a, b) for a, b in zip(x[i][mask[i]], y[i][mask[i]])] for i in range(2)]
    expected = torch.tensor(sum(sum(losses)/max(len(losses), 1) for losses in by_image)/2, dtype=torch.float64)
    assert_close(spatial_loss(x, y, kind, mask), expected)
    halves = [spatial_loss(x[i:i+1], y[i:i+1], kind, mask[i:i+1]) for i in range(2)]
    assert_close(sum(halves)/2, expected)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.sampled_from(GRIDS), st.integers(0, 99))
def test_nothing_from_the_padding_reaches_a_position_that_counts(student, teacher, grid, seed):
    x, mask = torch.zeros(2, *student, 3), random_mask(seed, 2, *teacher)
    y = torch.full((2, *teacher, 3), 7.).masked_fill(~mask[..., None], 1e3)
    x, y, counts = same_grid(x, y, mask, grid)
    assert x.shape == y.shape and counts.shape == y.shape[:3]
    assert_close(y[counts], torch.full_like(y[counts], 7.), rtol=1e-5, atol=0)
    if mask.all(): assert counts.all()


@pytest.mark.parametrize('teacher, student', [(39, 9), (52, 12), (57, 9), (65, 15)])
def test_a_position_counts_though_a_weight_that_is_0_came_out_as_less(teacher, student):
    "These are grids at whose positions the last weight of a window is about 1e-8."
    from torch.nn.functional import interpolate
    for first in range(teacher):
        mask = torch.ones(1, 2, teacher, dtype=torch.bool)
        mask[..., first] = False
        impulse = (~mask).double()[:, None]
        weights = interpolate(impulse, (2, student), mode='bilinear', antialias=True)[0, 0]
        counts = same_grid(torch.zeros(1, 2, student, 3), torch.zeros(1, 2, teacher, 3), mask, 'smaller')[2][0]
        assert torch.equal(counts, weights.abs() < 1e-7)


def test_the_grids_of_the_papers():
    x, y = normal(0, 2, 4, 6, 3), normal(1, 2, 5, 3, 3)
    assert_close(spatial_loss(x, y), spatial_loss(resample(x, (5, 6)), resample(y, (5, 6))))
    assert_close(spatial_loss(x, y, grid='student'), spatial_loss(x, resample(y, (4, 6))))
    assert_close(spatial_loss(x, y, grid='smaller'), spatial_loss(resample(x, (4, 3)), resample(y, (4, 3))))
    with pytest.raises(BadInput, match="unknown grid 'teacher': known: larger, smaller, student|did you mean"):
        spatial_loss(x, y, grid='teacher')


@pytest.mark.parametrize('kind', SPATIAL_LOSSES)
def test_gradients_through_resampling_and_masks(kind):
    x, y, mask = normal(0, 2, 3, 2, 4).requires_grad_(), normal(1, 2, 2, 4, 4), random_mask(2, 2, 2, 4)
    mask[0] = True
    assert torch.autograd.gradcheck(lambda x: spatial_loss(x, y, kind, mask), x)


def test_a_batch_of_padding_teaches_nothing():
    x = normal(0, 1, 2, 2, 4).requires_grad_()
    loss = spatial_loss(x, torch.full((1, 2, 2, 4), float('nan')), 'hyb-sml1', torch.zeros(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not x.grad.any()


def test_errors_name_the_thing():
    x, y = normal(0, 2, 2, 2, 4), normal(1, 2, 2, 2, 5)
    with pytest.raises(ValueError, match=r'spatial features: the student gives \(2, 2, 2, 4\) and the teacher'):
        spatial_loss(x, y)
    with pytest.raises(ValueError, match='summary: the student gives'): summary_loss(x[:, 0, 0], y[:1, 0, 0, :4])
    with pytest.raises(ValueError, match=r'mask: \(2, 4\) of torch.bool; expected a bool for each position'):
        spatial_loss(x, x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match='of torch.float32; expected a bool'):
        spatial_loss(x, x, mask=torch.ones(2, 2, 2))
    with pytest.raises(BadInput, match="unknown spatial loss 'l1'"): spatial_loss(x, x, 'l1')
    with pytest.raises(BadInput, match="unknown balance 'adaloss': did you mean ada"):
        MultiTeacherLoss('mse', {}, {}, balance='adaloss')
    with pytest.raises(BadInput, match="unknown term 'b'"): AdaLoss(['a'])({'b': torch.ones(())})
    nothing = MultiTeacherLoss('mse', {'a': 0}, {'a': 0})
    with pytest.raises(ValueError, match=r"no term to compute for the teachers \['a'\]"):
        nothing({'a': Features(x, x)}, {'a': Features(x, x)})


def test_the_ten_methods_are_those_of_the_study():
    assert set(TEN) == set('mse cosine hyb-mse hyb-sml1 global standardize phi-s pca zca hca'.split()) < set(METHODS)
    assert {m.normalizer for m in METHODS.values()} == set(KINDS)
    assert {m.spatial for m in METHODS.values()} == set(SPATIAL_LOSSES)
    assert all(METHODS[name].spatial == 'mse' for name in TEN if METHODS[name].normalizer != 'none')
    assert METHODS['phi-s'].normalizer == 'phi-s' and METHODS['cosine'] == ('none', 'cosine')


def test_methods_are_names_and_need_no_torch():
    code = "import sys, radio_nb.losses.methods; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_weights_and_scale_multiply_the_terms():
    x, y = Features(normal(0, 2, 4), normal(1, 2, 2, 2, 4)), Features(normal(2, 2, 4), normal(3, 2, 2, 2, 4))
    criterion = MultiTeacherLoss('cosine', {'a': 2, 'b': 3}, {'a': 5, 'b': 7})
    total, parts = criterion({'a': x, 'b': y}, {'a': y, 'b': y}, scale={'a': 11})
    summary, spatial = summary_loss(x.summary, y.summary), spatial_loss(x.spatial, y.spatial, 'cosine')
    assert_close(total, 11*(2*summary + 5*spatial), rtol=1e-6, atol=1e-6)
    assert_close(parts['a'], {'summary': summary, 'spatial': spatial})


@pytest.mark.parametrize('balance', BALANCES)
@pytest.mark.parametrize('method', METHODS)
def test_every_combination_under_autocast(method, balance):
    criterion = MultiTeacherLoss(method, {'a': 1, 'b': 0}, {'a': 1, 'b': 2}, balance)
    head = torch.nn.Linear(6, 6)
    with torch.autocast('cpu', torch.bfloat16):
        out = head(normal(0, 2, 3, 3, 6).float())
        students = {name: Features(out.mean((1, 2)), out) for name in 'ab'}
        teachers = {name: Features(normal(1, 2, 6), normal(2, 2, 4, 4, 6).bfloat16()) for name in 'ab'}
        total, parts = criterion(students, teachers)
    total.backward()
    assert out.dtype == torch.bfloat16 and head.weight.grad.isfinite().all() and head.weight.grad.any()
    assert {name: set(kinds) for name, kinds in parts.items()} == {'a': {'summary', 'spatial'}, 'b': {'spatial'}}
    assert not any(loss.requires_grad for kinds in parts.values() for loss in kinds.values())
    assert parts['a']['spatial'].dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(['a', 'b', 'both', 'nan']), min_size=1, max_size=12), st.sampled_from([.5, .9, .99]))
def test_ada_averages_what_each_term_has_seen(steps, momentum):
    ada, seen = AdaLoss(['a', 'b'], momentum), {'a': [], 'b': []}
    for t, step in enumerate(steps, 1):
        terms = {name: float(t) for name in ('ab' if step in ('both', 'nan') else step)}
        if step == 'nan': terms['b'] = float('nan')
        ada.update(terms)
        assert set(ada({name: torch.tensor(value) for name, value in terms.items()})) == set(terms)
        for name, value in terms.items():
            if value == value: seen[name].append(value)
    assert ada.without_average() == {name for name, values in seen.items() if not values}
    for name, average in zip(ada.names, ada.average):
        weights = [momentum**i for i in reversed(range(len(seen[name])))]
        expected = sum(w*v for w, v in zip(weights, seen[name]))/sum(weights) if weights else 0
        assert_close(average.item(), float(expected), rtol=1e-4, atol=0)


def test_ada_divides_by_what_was_before_and_by_itself_at_first():
    ada, x = AdaLoss(['a', 'b']), torch.ones(2, requires_grad=True)
    ada.begin({'a': 4.})
    balanced = ada({'a': 2*x.sum(), 'b': x.sum()})   # b has nothing to be divided by
    assert_close(balanced, {'a': torch.tensor(1.), 'b': torch.tensor(2.)})
    ada.update({'a': 8.})
    ada.begin({'a': 1.})   # too late: it has an average
    balanced['a'].backward()   # the averages have moved since
    assert_close(x.grad, torch.full((2,), .5))
    assert ada.average.tolist() == [8, 0] and ada.steps.tolist() == [1, 0]


def test_a_loss_of_nothing_does_not_blow_up_the_next():
    "A batch of padding alone has a loss of 0, which nothing may be divided by."
    ada = AdaLoss(['a'])
    ada.update({'a': 0.})
    assert ada({'a': torch.tensor(3.)})['a'] == 3


def test_ada_wants_a_momentum_and_knows_its_terms():
    for momentum in (0, 1, -.5):
        with pytest.raises(ValueError, match='momentum must lie between 0 and 1'): AdaLoss(['a'], momentum)
    for method in (AdaLoss(['a']).update, AdaLoss(['a']).begin):
        with pytest.raises(BadInput, match="unknown term 'b'"): method({'b': 1.})


def test_a_log_with_other_terms_is_no_harm_to_ada():
    "The terms of rate–distortion modules, and those of weight 0, are not balanced."
    criterion = MultiTeacherLoss('mse', {'a': 0}, {'a': 1}, 'ada')
    assert criterion.needs_begin(['a']) and not criterion.needs_begin(['b'])
    criterion.update({'a': {'spatial': 2., 'R=10': 5.}})
    assert criterion.balance.average.tolist() == [2] and not criterion.needs_begin(['a'])
    assert not MultiTeacherLoss('mse', {'a': 1}, {'a': 1}).needs_begin(['a'])


def test_the_recipe_offers_the_grids_that_there_are():
    "PHI-S's own choice of a grid can be asked for."
    assert get_args({field.name: field.type for field in fields(Recipe)}['grid']) == GRIDS


def test_a_missing_term_leaves_uncertainty_finite():
    weights = UncertaintyWeights(['a', 'b'])
    weights({'a': torch.tensor(3.)})['a'].backward()
    assert_close(weights.b.grad, torch.tensor([.5 - 3, 0.]))  # d/db of e^-b L + log(1 + e^b) at 0


@pytest.mark.parametrize('balance', BALANCES)
def test_state_travels_through_a_file_and_does_not_mind_the_order(balance):
    x, y = Features(normal(0, 2, 4), normal(1, 2, 2, 2, 4)), Features(normal(2, 2, 4), normal(3, 2, 2, 2, 4))
    z = Features(y.summary, 60*y.spatial)
    one = MultiTeacherLoss('mse', {'a': 1, 'b': 1}, {'a': 1, 'b': 1}, balance)
    one.update(one({'a': x, 'b': x}, {'a': y, 'b': z})[1])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = MultiTeacherLoss('mse', {'b': 1, 'a': 1}, {'b': 1, 'a': 1}, balance)
    other.load_state_dict(torch.load(file, weights_only=True))
    step = {'a': x, 'b': x}, {'a': z, 'b': y}
    assert_close(one(*step)[0], other(*step)[0])
