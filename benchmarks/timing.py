"""What the benchmarks share: the time of a call, and the ratio of two measured in turns."""
import argparse
import time

import torch


def arguments(doc, threads=None, **options):
    "The options of a benchmark, all numbers or words with a default; sets the threads and says what it runs on."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {'threads': threads or torch.get_num_threads(), 'device': 'cpu'} | options
    for name, default in options.items(): parser.add_argument(f'--{name}', type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, ' + ', '.join(f'{name} {value}' for name, value in vars(args).items()) + '\n')
    return args


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


def report(name, value, target, sign='≤'):
    "One line for each figure; `sign` says on which side of the target it should lie."
    print(f'{name}: ratio {value:.2f} (target {sign} {target})', flush=True)
