"""What the chapters on losses cannot show well: every shape, mask and combination,
and what a missing term must not spoil."""
import io
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.losses.balancing import BALANCES, AdaLoss, UncertaintyWeights
from radio_nb.losses.losses import SPATIAL_LOSSES, same_grid, spatial_loss, summary_loss
from radio_nb.losses.methods import METHODS
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features, resample
from radio_nb.targets.phi_s import KINDS

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
    return {'mse': mse, 'cosine': cosine, 'hyb-mse': .9*cosine + .1*mse, 'hyb-sml1': .9*cosine + .1*sml1}[kind]


@settings(deadline=None, max_examples=40)
@given(kinds, sizes, st.integers(2, 6), st.integers(0, 99))
def test_the_loss_is_the_mean_of_the_positions_that_count(kind, size, width, seed):
    x, y, mask = normal(seed, 2, *size, width), normal(seed + 100, 2, *size, width), random_mask(seed, 2, *size)
    losses = [one_position(kind, a, b) for a, b in zip(x[mask], y[mask])]
    expected = torch.tensor(sum(losses)/max(len(losses), 1), dtype=torch.float64)
    assert_close(spatial_loss(x, y, kind, mask), expected)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.sampled_from(['larger', 'student']), st.integers(0, 99))
def test_nothing_from_the_padding_reaches_a_position_that_counts(student, teacher, grid, seed):
    x, mask = torch.zeros(2, *student, 3), random_mask(seed, 2, *teacher)
    y = torch.full((2, *teacher, 3), 7.).masked_fill(~mask[..., None], 1e3)
    x, y, counts = same_grid(x, y, mask, grid)
    assert x.shape == y.shape and counts.shape == y.shape[:3]
    assert_close(y[counts], torch.full_like(y[counts], 7.), rtol=.2, atol=0)
    if mask.all(): assert counts.all()


def test_the_two_grids_of_the_papers():
    x, y = normal(0, 2, 4, 6, 3), normal(1, 2, 5, 3, 3)
    assert_close(spatial_loss(x, y), spatial_loss(resample(x, (5, 6)), resample(y, (5, 6))))
    assert_close(spatial_loss(x, y, grid='student'), spatial_loss(x, resample(y, (4, 6))))
    with pytest.raises(BadInput, match="unknown grid 'teacher': known: larger, student|did you mean"):
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
    assert set(METHODS) == set('mse cosine hyb-mse hyb-sml1 global standardize phi-s pca zca hca'.split())
    assert {m.normalizer for m in METHODS.values()} == set(KINDS)
    assert {m.spatial for m in METHODS.values()} == set(SPATIAL_LOSSES)
    assert all(method.spatial == 'mse' for method in METHODS.values() if method.normalizer != 'none')
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
        terms = {name: torch.tensor(float(t)) for name in ('ab' if step in ('both', 'nan') else step)}
        if step == 'nan': terms['b'] = torch.tensor(float('nan'))
        assert set(ada(terms)) == set(terms)
        for name, value in terms.items():
            if value.isfinite(): seen[name].append(value.item())
    for name, average in zip(ada.names, ada.average):
        weights = [momentum**i for i in reversed(range(len(seen[name])))]
        expected = sum(w*v for w, v in zip(weights, seen[name]))/sum(weights) if weights else 0
        assert_close(average.item(), float(expected), rtol=1e-4, atol=0)


def test_ada_in_evaluation_and_with_accumulated_gradients():
    ada, x = AdaLoss(['a']), torch.ones(2, requires_grad=True)
    first = ada({'a': x.sum()})['a']
    second = ada({'a': 2*x.sum()})['a']  # moves the averages before the first is differentiated
    first.backward()
    assert_close(x.grad, torch.full((2,), .5))
    before = ada.eval().average.clone()
    assert_close(ada({'a': 2*x.sum()})['a'], 4/before[0])
    assert torch.equal(ada.average, before) and second.isfinite()


def test_ada_before_its_first_average_and_with_no_momentum():
    ada = AdaLoss(['a', 'b'])
    ada({'a': torch.tensor(4.)})
    balanced = ada.eval()({'a': torch.tensor(2.), 'b': torch.tensor(3.)})   # b has no average yet
    assert_close(balanced, {'a': torch.tensor(.5), 'b': torch.tensor(3.)})
    for momentum in (0, 1, -.5):
        with pytest.raises(ValueError, match='momentum must lie between 0 and 1'): AdaLoss(['a'], momentum)


def test_a_missing_term_leaves_uncertainty_finite():
    weights = UncertaintyWeights(['a', 'b'])
    weights({'a': torch.tensor(3.)})['a'].backward()
    assert_close(weights.b.grad, torch.tensor([.5 - 3, 0.]))  # d/db of e^-b L + log(1 + e^b) at 0


@pytest.mark.parametrize('balance', BALANCES)
def test_state_travels_through_a_file_and_does_not_mind_the_order(balance):
    x, y = Features(normal(0, 2, 4), normal(1, 2, 2, 2, 4)), Features(normal(2, 2, 4), normal(3, 2, 2, 2, 4))
    z = Features(y.summary, 60*y.spatial)
    one = MultiTeacherLoss('mse', {'a': 1, 'b': 1}, {'a': 1, 'b': 1}, balance)
    one({'a': x, 'b': x}, {'a': y, 'b': z})
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = MultiTeacherLoss('mse', {'b': 1, 'a': 1}, {'b': 1, 'a': 1}, balance)
    other.load_state_dict(torch.load(file, weights_only=True))
    step = {'a': x, 'b': x}, {'a': z, 'b': y}
    assert_close(one(*step)[0], other(*step)[0])
