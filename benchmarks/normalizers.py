"""What statistics and PHI-S cost beside the one matrix product that each cannot do without.

    python benchmarks/normalizers.py [--rows 100000] [--threads 2] [--device cpu]

A ratio is of the fastest of nine runs each, taken in turns. The bare product of `Moments.update` gets its vectors in
float64 already, so the conversion, the mean and the subtraction are ours to pay.
"""
import torch
from timing import arguments, fastest, ratio, report

from radio_nb.targets.hadamard import hadamard, kronecker_factors
from radio_nb.targets.moments import Moments
from radio_nb.targets.phi_s import fit_normalizer

WIDTHS = 192, 768, 1280


def features(rows, width, device):
    "Vectors with a mean and correlated channels, as a teacher's are."
    torch.manual_seed(0)
    return torch.randn(rows, width, device=device) @ torch.randn(width, width, device=device)/width**.5 + 1


def build(order):
    "`hadamard(order)`, with its factors searched for again."
    kronecker_factors.cache_clear()
    return hadamard(order)


def update_cost(x):
    "`Moments.update` against `x.T @ x` of vectors that are float64 already."
    exact = x.double()
    return ratio(lambda: Moments(x.shape[1]).update(x), lambda: exact.T @ exact)


def phi_s_cost(x):
    "PHI-S against the product with a matrix of its size."
    phi_s = fit_normalizer('phi-s', Moments(x.shape[1]).update(x)).to(x.device)
    weight = phi_s.weight.T.contiguous()
    return ratio(lambda: phi_s(x), lambda: x @ weight)


args = arguments(__doc__, rows=100_000)

for width in WIDTHS:
    cost = update_cost(features(args.rows, width, args.device))
    report(f'Moments.update against x.T @ x in float64, width {width}', cost, 1.5)
for width in WIDTHS:
    cost = phi_s_cost(features(args.rows, width, args.device))
    report(f'PHI-S against x @ W in float32, width {width}', cost, 1.15)
print(f'hadamard(4096): {1000*fastest(build, 4096, repeats=3):.0f} ms (target ≤ 1000)')
