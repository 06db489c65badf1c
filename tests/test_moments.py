"""What `moments` cannot show well: random cuts, orders, shapes and masks."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.targets import moments as chapter
from radio_nb.targets.moments import CHUNK, Moments, NonFinite, float64_device, in_float64, sums_in_chunks

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def close(a, b, rtol=1e-10):
    "Two moments agree, errors measured against the scale of the data."
    assert a.count == b.count
    scale = b.cov.diagonal().max().sqrt()
    assert_close(a.mean/scale, b.mean/scale, rtol=rtol, atol=rtol)
    assert_close(a.cov/scale**2, b.cov/scale**2, rtol=rtol, atol=rtol)


@quick
@given(seeds, st.integers(1, 7), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.data())
def test_cut_anywhere_and_merged_in_any_order(seed, dim, sizes, shift, data):
    torch.manual_seed(seed)
    parts = [shift*torch.randn(dim) + torch.randn(n, dim) for n in [2, *sizes]]
    whole = Moments(dim).update(torch.cat(parts))
    order = data.draw(st.permutations(range(len(parts))))
    pieces = [Moments(dim).update(parts[i]) for i in order]
    while len(pieces) > 1:   # merge neighbours in a random tree
        i = data.draw(st.integers(0, len(pieces) - 2))
        pieces[i:i + 2] = [pieces[i].merge(pieces[i + 1])]
    close(pieces[0], whole)


@quick
@given(seeds, st.lists(st.integers(1, 5), max_size=3), st.integers(1, 6),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_any_shape_mask_and_dtype(seed, leading, dim, dtype):
    torch.manual_seed(seed)
    x, mask = torch.randn(*leading, dim).to(dtype), torch.rand(leading) < .7
    x[~mask] = float('nan')
    first = torch.randn(3, dim)
    found = Moments(dim).update(first).update(x, mask)
    rows = torch.cat([first.double(), x[mask].double()])
    assert found.count == len(rows)
    assert_close(found.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(found.cov, torch.cov(rows.T, correction=0).reshape(dim, dim), rtol=1e-10, atol=1e-12)


@quick
@given(seeds, st.sampled_from([float('nan'), float('inf'), -float('inf')]), st.integers(0, 49))
def test_one_bad_value_changes_nothing(seed, bad, row):
    torch.manual_seed(seed)
    found = Moments(3, 'sam').update(torch.randn(9, 3))
    before, x = found.state_dict(), torch.randn(50, 3)
    x[row, row % 3] = bad
    with pytest.raises(NonFinite, match='sam of width 3: NaN or infinity in 1 of 50 vectors'): found.update(x)
    for name, value in found.state_dict().items(): assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize('large', [1e160, 1e308])
def test_float64_features_whose_sums_overflow_are_refused(large):
    found = Moments(2, 'sam').update(torch.randn(9, 2))
    before = found.state_dict()
    with pytest.raises(NonFinite, match='sam of width 2: finite, but too large'):
        found.update(torch.tensor([[0., large], [0., -large], [1., large]], dtype=torch.float64))
    for name, value in found.state_dict().items(): assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize('chunk', [1, 7, 64, 10_000])
def test_the_size_of_a_chunk_does_not_matter(monkeypatch, chunk):
    x = torch.randn(333, 4, generator=torch.Generator().manual_seed(0)) + 100
    whole = sums_in_chunks(x)
    monkeypatch.setattr(chapter, 'CHUNK', chunk)
    assert_close(sums_in_chunks(x), whole, rtol=1e-10, atol=1e-10)


def test_the_input_is_left_as_it_was():
    x = torch.randn(20, 3, dtype=torch.float64)
    before = x.clone()
    Moments(3).update(x)
    assert_close(x, before, rtol=0, atol=0)


def test_the_other_is_left_as_it_was():
    a, b = Moments(3).update(torch.randn(5, 3)), Moments(3).update(torch.randn(5, 3))
    before = b.state_dict()
    a.merge(b).update(torch.randn(5, 3))
    for name, value in b.state_dict().items(): assert_close(value, before[name], rtol=0, atol=0)


def test_inference_mode_leaves_nothing_that_cannot_go_on():
    with torch.inference_mode(): found = Moments(3).update(torch.randn(5, 3))
    found.update(torch.randn(5, 3)).merge(Moments(3).update(torch.randn(5, 3)))
    assert found.count == 15


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason='every device here has float64')
def test_a_device_without_float64_is_summed_on_the_cpu():
    x = torch.randn(CHUNK, 3)   # in several pieces
    assert float64_device(torch.device('mps')) == torch.device('cpu')
    assert_close(Moments(3).update(x.to('mps')).cov, Moments(3).update(x).cov)
    assert_close(in_float64(x.to('mps')[1:]), x[1:].double())


def test_a_large_mean_with_a_small_deviation():
    x = 1e3 + 1e-2*torch.randn(50_000, 16, generator=torch.Generator().manual_seed(0))
    found = Moments(16)
    for batch in x.split(777): found.update(batch)
    two_pass = x.double().var(0, correction=0)
    assert_close(found.cov.diagonal(), two_pass, rtol=1e-6, atol=0)
