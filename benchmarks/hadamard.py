"""How long it takes to build Hadamard matrices, and when the fast transform beats a dense product.

    python benchmarks/hadamard.py [--numbers 4194304] [--threads 1] [--device cpu] [--dtype float32]

The second table holds ratios of times measured in one run; above 1 `fwht` is faster than `x @ H`.
"""
import torch
from timing import arguments, fastest

from radio_nb.appendix.hadamard_search import fwht
from radio_nb.targets.hadamard import hadamard, is_known_order, kronecker_factors


def build(order):
    "`hadamard(order)`, with its factors searched for again."
    kronecker_factors.cache_clear()
    return hadamard(order)


def known_orders(last=2048):
    "All known orders up to `last`, searched for again."
    kronecker_factors.cache_clear()
    return [n for n in range(1, last + 1) if is_known_order(n)]


args = arguments(__doc__, threads=1, numbers=2**22, dtype='float32')
dtype = getattr(torch, args.dtype)
print(f'is_known_order up to 2048: {1000*fastest(known_orders, repeats=3):.0f} ms')
for order in (768, 1024, 1280, 1536, 2048, 4096, 6144, 8192):
    print(f'hadamard({order}): {1000*fastest(build, order, repeats=3):.0f} ms')

print('\n width   rows   dense (ms)   times faster with fwht')
for width in (2**e for e in range(4, 14)):
    x = torch.randn(args.numbers//width, width, device=args.device, dtype=dtype)
    h = hadamard(width).to(x)
    dense = fastest(torch.matmul, x, h)
    fast = fastest(fwht, x)
    print(f'{width:6d} {len(x):6d} {1000*dense:12.2f} {dense/fast:12.2f}')
