"""What a linear probe costs beside scikit-learn, and how much memory one of many summaries takes.

    python benchmarks/probe.py [--n 4000] [--width 1280] [--classes 200] [--threads 2] [--device cpu]

scikit-learn fits once, with the strength that the probe chose; the probe fits seven times: six strengths on four fifths
of the summaries, and once more on all of them. The accuracies are those on 2,000 others; scikit-learn's is that of the
best of the six strengths only with --best 1, which takes minutes. The memory is the growth of the peak resident size in
a process of its own, of a probe of 100,000 × 768 in half precision mapped from a file, with 1,000 classes; the 147 MiB
of the file are part of it, in float32 it would be 293 and in float64 586.
"""
import resource
import subprocess
import sys
import tempfile

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from timing import arguments, report, seconds

from radio_nb.evaluation.linear_probe import STRENGTHS, linear_probe


def clouds(n, width, classes):
    "Overlapping classes whose channels are correlated, as those of a network are."
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, width + 1)**-.7
    turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    y = torch.randint(classes, (n,), generator=random)
    means = .45*spectrum*torch.randn(classes, width, generator=random)
    return (means[y] + spectrum*torch.randn(n, width, generator=random)) @ turn, y


def grow(classes):
    "Probe a file of 100,000 × 768 and print the growth of the peak, in MiB."
    with tempfile.NamedTemporaryFile() as file:
        x = np.memmap(file.name, np.float16, 'w+', shape=(100_000, 768))
        for i in range(0, len(x), 1000): x[i:i+1000] = np.random.default_rng(i).standard_normal((1000, 768))
        x, y = torch.from_numpy(x), torch.arange(100_000) % classes
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        linear_probe(x[:64], y[:64], x[:9], y[:9], l2=100.)   # what libraries take once
        before = peak()
        took = seconds(lambda: linear_probe(x, y, x[:4096], y[:4096], l2=1.))
        print(f'{peak() - before:.0f} MiB, {took:.0f} s for one strength')


args = arguments(__doc__, n=4000, width=1280, classes=200, best=0, grow='no')
if args.grow != 'no': sys.exit(grow(1000))
command = [sys.executable, __file__, *sys.argv[1:], '--grow', 'yes']   # first: a child counts the peak of its parent
print('streamed:', subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
(x, y), found = clouds(args.n + 2000, args.width, args.classes), []
x, test_x, y, test_y = x[:args.n], x[args.n:], y[:args.n], y[args.n:]
ours = seconds(lambda: found.append(linear_probe(x, y, test_x, test_y, device=args.device, what='probe')))
mean, std = x.mean(0), x.std(0, correction=0)


def theirs(l2):
    "The accuracy of scikit-learn, on the same scale."
    fit = LogisticRegression(C=1/(args.n*l2), max_iter=1000).fit(((x - mean)/std).numpy(), y)
    return fit.score(((test_x - mean)/std).numpy(), test_y)


bare = seconds(lambda: found.append(theirs(found[0].l2)))
best = max(map(theirs, STRENGTHS)) if args.best else found[1]
print(f'linear_probe {ours:.1f} s, accuracy {found[0].accuracy:.4f}; scikit-learn {bare:.1f} s for one fit, {best:.4f}')
report(f'linear_probe against one fit of scikit-learn, {args.n} × {args.width}, {args.classes} classes', ours/bare, 5)
