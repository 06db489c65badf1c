"""What the benchmarks share: the time of a call, and the ratio of two measured in turns."""
import time

import torch


def seconds(f, *args):
    "How long one call takes."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    f(*args)
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest(f, *args, repeats=7):
    "The fastest of `repeats` calls, after one to warm up."
    f(*args)
    return min(seconds(f, *args) for _ in range(repeats))


def ratio(ours, bare, repeats=9):
    "The fastest of ours over the fastest of the bare work, the two called in turns, so that a busy spell hits both."
    ours(), bare()
    times = [(seconds(ours), seconds(bare)) for _ in range(repeats)]
    return min(t for t, _ in times)/min(t for _, t in times)


def report(name, value, target):
    "One line for each figure."
    print(f'{name}: ratio {value:.2f} (target ≤ {target})', flush=True)
