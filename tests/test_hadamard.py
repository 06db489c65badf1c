"What `hadamard` and `hadamard_search` cannot show well: properties over many orders, and that the failures fail."
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_nb.appendix.hadamard_search import fwht
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.hadamard import (
    CONSTRUCTIONS,
    HadamardError,
    construction,
    hadamard,
    is_known_order,
    jacobsthal,
    kronecker_factors,
    powers_of_x,
    prime_power,
)

KNOWN = [n for n in range(1, 1025) if is_known_order(n)]


def exact(h):
    "Whether h is ±1 with orthogonal rows; float32 is exact for sums of fewer than 2**24 signs."
    rows = h.float()
    return h.dtype == torch.int8 and h.abs().eq(1).all() and torch.equal(rows @ rows.T, len(h)*torch.eye(len(h)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KNOWN))
def test_every_known_order_builds_exactly(n):
    assert hadamard(n).shape == (n, n) and exact(hadamard(n))


@pytest.mark.parametrize('name', CONSTRUCTIONS)
def test_every_construction_is_exact_at_all_its_orders(name):
    orders = [n for n in KNOWN if n <= 400 and construction(n) == name]
    assert orders
    for n in orders: assert exact(CONSTRUCTIONS[name](n)), n


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KNOWN), st.sampled_from(KNOWN))
def test_products_of_known_orders_are_known(a, b):
    assert is_known_order(a*b)
    factors = kronecker_factors(a*b)
    assert all(construction(n) for n in factors) and torch.tensor(factors).prod() == a*b


@given(st.integers(-10**6, 10**6))
@settings(max_examples=200, deadline=None)
def test_only_orders_that_can_exist_are_known(n):
    assert not is_known_order(n) or n in (1, 2) or (n > 0 and n % 4 == 0)


@given(st.integers(-20, 4000).filter(lambda n: not is_known_order(n)))
@settings(max_examples=100, deadline=None)
def test_the_error_names_the_order_and_the_nearest_ones(n):
    with pytest.raises(HadamardError) as error: hadamard(n)
    form = r'no Hadamard matrix of order (-?\d+): .+; the nearest orders with one are (\d+) and (\d+)'
    order, below, above = map(int, re.fullmatch(form, str(error.value)).groups())
    assert order == n and is_known_order(below) and is_known_order(above)
    assert not any(is_known_order(m) for m in range(below + 1, above))
    assert below < n < above if n > 0 else (below, above) == (1, 2)
    assert ('multiple of 4' in str(error.value)) == (n < 1 or n % 4 != 0)
    assert isinstance(error.value, BadInput)


def test_the_error_word_for_word():
    with pytest.raises(HadamardError, match=re.escape(
            'no Hadamard matrix of order 386: the order has to be 1, 2 or a multiple of 4; '
            'the nearest orders with one are 384 and 388')): hadamard(386)
    with pytest.raises(HadamardError, match=re.escape(
            'no Hadamard matrix of order 668: neither Sylvester, Paley nor Williamson reach it')): hadamard(668)


@given(st.integers(-5, 20_000))
def test_prime_power_agrees_with_factoring(q):
    primes, rest = [], q
    for p in range(2, 150):
        while rest > 1 and rest % p == 0: primes, rest = [*primes, p], rest//p
    if rest > 1: primes.append(rest)
    assert prime_power(q) == ((primes[0], len(primes)) if len(set(primes)) == 1 else None)


@pytest.mark.parametrize(('p', 'k'), [(2, 1), (2, 5), (3, 1), (3, 5), (5, 3), (7, 2), (11, 2), (101, 1)])
def test_powers_of_x_are_all_nonzero_elements(p, k):
    elements = powers_of_x(p, k)
    assert len(elements) == len(set(elements)) == p**k - 1
    assert (0,)*k not in elements and all(0 <= c < p for element in elements for c in element)


@pytest.mark.parametrize('q', [q for q in range(3, 400, 2) if prime_power(q) and prime_power(q)[1] > 1])
def test_the_prime_powers_have_no_stray_products(q):
    rows = jacobsthal(q).float()
    assert torch.equal(rows @ rows.T, q*torch.eye(q) - 1) and not rows.sum(1).any()


@pytest.mark.parametrize('name', CONSTRUCTIONS)
def test_a_construction_refuses_what_it_cannot_build(name):
    for n in range(-4, 260):
        try: h = CONSTRUCTIONS[name](n)
        except HadamardError: assert n < 1 or construction(n) != name
        else: assert h.shape == (n, n) and exact(h), n


@pytest.mark.parametrize('q', [-3, 0, 1, 2, 4, 8, 15, 35])
def test_the_table_of_squares_needs_an_odd_prime_power(q):
    with pytest.raises(HadamardError, match=f'an odd prime power, not {q}'): jacobsthal(q)


def test_two_calls_do_not_share_memory():
    for n in (8, 12, 24, 92):
        hadamard(n).zero_()
        assert exact(hadamard(n))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shape', [(1,), (2, 16), (3, 0, 128), (2, 3, 256)])
def test_fwht_keeps_dtype_and_shape(dtype, shape):
    torch.manual_seed(0)
    x = torch.randint(-3, 4, shape).to(dtype)   # whole numbers small enough to be exact in half precision
    y = fwht(x)
    assert y.dtype == dtype and y.shape == x.shape
    dense = x.double() @ hadamard(shape[-1]).double()
    rtol, atol = (1e-2, .3) if dtype.itemsize == 2 else (1e-6, 1e-6)
    torch.testing.assert_close(y.double(), dense, rtol=rtol, atol=atol)


@pytest.mark.parametrize('n', [0, 3, 12, 384])
def test_fwht_refuses_other_widths(n):
    with pytest.raises(HadamardError, match=f'power of two on the last axis, not {n}; .* hadamard'):
        fwht(torch.zeros(2, n))
