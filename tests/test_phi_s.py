"The property that PHI-S exists for, over random spectra and widths, for both ways of finding the rotation."
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.hadamard import HadamardError, is_known_order
from radio_nb.targets.moments import Moments
from radio_nb.targets.normalizers import Normalizer
from radio_nb.targets.phi_s import KINDS, fit_hca, fit_normalizer, fit_phi_s, hartley, isotropic_rotation

quick = settings(max_examples=40, deadline=None, derandomize=True)
variances = st.one_of(st.just(0.), st.floats(1e-12, 1e12))
spectra = st.lists(variances, min_size=1, max_size=40).filter(any).map(lambda v: torch.tensor(v, dtype=torch.float64))


def ways(n): return ('auto', 'schur-horn', 'hadamard') if is_known_order(n) else ('auto', 'schur-horn')


def moments_with(cov, mean=None):
    mean = torch.zeros(len(cov)) if mean is None else mean
    state = {'count': torch.tensor(1.), 'mean': mean, 'm2': cov}
    return Moments(len(cov)).load_state_dict(state)


def random_covariance(n, condition, seed):
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=g)).Q
    powers = torch.rand(n, dtype=torch.float64, generator=g)
    powers[0], powers[-1] = 0, 1
    return (U*condition**-powers) @ U.T


@quick
@given(spectra)
def test_rotation_is_orthogonal_and_levels_the_diagonal(eigenvalues):
    n = len(eigenvalues)
    for how in ways(n):
        Q = isotropic_rotation(eigenvalues, how)
        assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
        assert_close(Q**2 @ eigenvalues/eigenvalues.mean(), torch.ones(n, dtype=torch.float64), atol=1e-12, rtol=0)


@quick
@given(n=st.integers(1, 64), decades=st.floats(0, 8), seed=st.integers(0, 1000))
def test_every_channel_has_variance_one_and_errors_keep_their_shape(n, decades, seed):
    cov = random_covariance(n, 10**decades, seed)
    moments, phi = moments_with(cov, torch.linspace(-1, 1, n)), cov.diagonal().mean().sqrt()
    for how in ways(n):
        W, theta = fit_phi_s(moments, how)
        assert_close(((W @ cov)*W).sum(1), torch.ones(n, dtype=torch.float64), atol=1e-9, rtol=0)
        assert_close(theta.T @ theta, phi**2*torch.eye(n, dtype=torch.float64), atol=1e-11*phi.item()**2, rtol=0)
        normalizer, y = Normalizer(moments.mean, W, theta), torch.linspace(-3, 4, 8*n).reshape(n, 8).T
        assert (normalizer.inverse(normalizer(y)) - y).norm() <= 1e-5*y.norm()


@quick
@given(n=st.integers(1, 40), seed=st.integers(0, 1000))
def test_hca_is_white_and_its_channels_have_equal_errors(n, seed):
    cov = random_covariance(n, 1e4, seed)
    for how in ways(n):
        W, theta = fit_hca(moments_with(cov), how)
        assert_close(W @ cov @ W.T, torch.eye(n, dtype=torch.float64), atol=1e-9, rtol=0)
        assert_close(theta.norm(dim=0), cov.diagonal().mean().sqrt().expand(n), atol=1e-10, rtol=1e-10)


@quick
@given(n=st.integers(2, 40), seed=st.integers(0, 1000))
def test_turning_the_teacher_does_not_change_the_covariance(n, seed):
    cov = random_covariance(n, 1e3, seed)
    R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))).Q
    def normalized(c): W, _ = fit_phi_s(moments_with(c)); return W @ c @ W.T
    assert_close(normalized(cov), normalized(R @ cov @ R.T), atol=1e-8, rtol=0)


@pytest.mark.parametrize('n', [1, 2, 3, 12, 23, 92, 130, 386])
def test_hadamard_serves_any_spectrum_and_schur_horn_its_own(n):
    first, other = 10**(-6*torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    one = torch.ones(n, dtype=torch.float64)
    assert_close(isotropic_rotation(first, 'schur-horn')**2 @ first/first.mean(), one, atol=1e-12, rtol=0)
    if is_known_order(n):
        assert_close(isotropic_rotation(first, 'hadamard')**2 @ other/other.mean(), one, atol=1e-12, rtol=0)
    # the rotation stays as flat as where it started
    assert isotropic_rotation(first, 'schur-horn').abs().max() < 1.5*(2/n)**.5 + 1e-12


@pytest.mark.parametrize('n', [1, 4, 5, 386])
def test_rank_one_and_rank_zero(n):
    line = torch.linspace(-1, 1, 64, dtype=torch.float64)[:, None]*torch.linspace(1, 2, n, dtype=torch.float64)
    moments = Moments(n, 'a line').update(line)
    for how in ways(n):
        W, theta = fit_phi_s(moments, how)
        assert_close((W @ moments.cov @ W.T).diagonal(), torch.ones(n, dtype=torch.float64), atol=1e-9, rtol=0)
        assert_close(W @ theta, torch.eye(n, dtype=torch.float64), atol=1e-9, rtol=0)
    with pytest.raises(BadInput, match='a clock'):
        fit_normalizer('phi-s', Moments(n, 'a clock').update(torch.ones(3, n)))


@pytest.mark.parametrize('n', [1, 2, 3, 8, 385, 386])
def test_hartley(n):
    F = hartley(n)
    assert_close(F @ F, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(F, F.T, atol=1e-12, rtol=0)
    assert F.abs().max() <= (2/n)**.5 + 1e-12


def test_what_cannot_be_asked_and_what_can():
    with pytest.raises(HadamardError, match='386'): isotropic_rotation(torch.ones(386), 'hadamard')
    with pytest.raises(BadInput, match="unknown rotation 'hadamar': did you mean hadamard"):
        isotropic_rotation(torch.ones(4), 'hadamar')
    Q = isotropic_rotation(torch.zeros(3))
    assert_close(Q @ Q.T, torch.eye(3, dtype=torch.float64))
    for bad in ([1., -1.], [1., float('nan')], [1., float('inf')]):
        with pytest.raises(BadInput, match='finite and not negative'): isotropic_rotation(torch.tensor(bad))


def test_registered():
    assert list(KINDS)[-2:] == ['hca', 'phi-s']
    moments = moments_with(random_covariance(6, 10, 0))
    assert_close(fit_normalizer('phi-s', moments).weight, fit_phi_s(moments)[0].float())


def test_the_lines_of_the_readme_are_all_that_another_trainer_needs():
    block, = [block for block in (ROOT/'README.md').read_text().split('```') if 'moments = Moments(768)' in block]
    *lines, last = block.removeprefix('python\n').strip().splitlines()
    head, images = torch.nn.Sequential(torch.nn.Linear(5, 12)), torch.randn(20, 4, 7, 7, 8)
    names = {'teacher': torch.nn.Linear(8, 12).requires_grad_(False), 'loader': images, 'head': head,
             'x': torch.randn(4, 7, 7, 5), 'device': torch.device('cpu')}
    exec('\n'.join(lines).replace('768', '12'), names)
    assert names['loss'].requires_grad
    learned = head(names['x'])
    exec(last, names)
    assert_close(names['normalizer'](head(names['x'])), learned, rtol=1e-4, atol=1e-4)
