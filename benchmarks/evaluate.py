"""What a vote of nearest neighbours costs beside the bare product and top-k, and how much memory it takes.

    python benchmarks/evaluate.py [--queries 10000] [--references 50000] [--width 768] [--threads 2] [--device cpu]

The bare work gets directions, not features: normalizing, checking and voting are ours to pay. It takes 1024 queries at
a time against all references. The memory is the growth of the peak resident size in a process of its own (on a GPU, of
what was allocated), the features themselves not counted; a function that kept all similarities would need 2 GB.
"""
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from timing import arguments, ratio, report

from radio_nb.evaluation.knn import knn_predict


def vectors(n, width, device):
    "Features and classes, made without a copy that would count into the peak."
    torch.manual_seed(n)
    return torch.randn(n, width, device=device), torch.randint(1000, (n,), device=device)


def bare(references, queries, k=20):
    "The most similar references of every query, in so many lines."
    return torch.cat([(part @ references.T).topk(k).indices for part in queries.split(1024)])


def peak(device):
    "In MiB, of this process or of the GPU."
    if torch.device(device).type == 'cuda': return torch.cuda.max_memory_allocated()/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def growth(what):
    "How much memory one call takes, in MiB."
    command = [sys.executable, __file__, *sys.argv[1:], '--grow', what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


args = arguments(__doc__, queries=10_000, references=50_000, width=768, repeats=3, grow='no')
if args.grow == 'no':   # first, for a child counts the peak of its parent
    print(f'peak memory: {growth("ours"):.0f} MiB, bare {growth("bare"):.0f} MiB')
(train_x, train_y), (test_x, _) = (vectors(n, args.width, args.device) for n in (args.references, args.queries))
if args.grow != 'no':
    call = (lambda: knn_predict(train_x, train_y, test_x)) if args.grow == 'ours' else lambda: bare(train_x, test_x)
    small = torch.randn(64, args.width, device=args.device)
    small @ small.T   # what libraries take once
    before = peak(args.device)
    call()
    sys.exit(print(peak(args.device) - before))

directions = F.normalize(train_x), F.normalize(test_x)
cost = ratio(lambda: knn_predict(train_x, train_y, test_x), lambda: bare(*directions), args.repeats)
report(f'knn_predict against product and top-k, {args.queries} × {args.references} of width {args.width}', cost, 1.3)
