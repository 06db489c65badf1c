"""How the memory of a stream grows with the number of images: peak resident size with 50,000 beside that with 10,000.

    python benchmarks/memory.py [--few 10000] [--many 50000] [--size 32] [--batch 64]

Distinct small JPEGs are written, as files in a folder and as rows of Parquet, and each way of reading them goes once
through all of them in a process of its own. Parquet that is opened is mapped into memory: the peak counts every page
that was touched, though the system takes those back when it needs them, so the memory is given without them too. A
stream holds parts of ten files at a time, whose size is therefore the same for both numbers of images.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, disable_progress_bars
from datasets import Image as ImageColumn
from PIL import Image
from timing import report


def jpeg(i):
    "A small photograph of noise, another for every number."
    file = BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file, 'JPEG')
    return file.getvalue()


def write(folder, n):
    "The first `n` images, as files and as Parquet, 500 rows in a file."
    files = folder/'files'
    for i in range(n):
        if i % 1000 == 0: (files/f'{i//1000:03}').mkdir(parents=True)
        (files/f'{i//1000:03}'/f'{i:06}.jpg').write_bytes(jpeg(i))
    (folder/'parquet').mkdir()
    for k, shard in enumerate(np.split(np.arange(n), range(500, n, 500))):
        rows = {'image': [{'bytes': jpeg(i), 'path': None} for i in shard]}
        dataset = Dataset.from_dict(rows, Features({'image': ImageColumn()}))
        dataset.to_parquet(folder/'parquet'/f'{k:03}.parquet', batch_size=100)


def read(source, n, size, batch):
    "Go through a source once; print the peak in MiB, and what of it was not mapped from files at the end."
    from radio_nb.data.crops import image_batches
    from radio_nb.data.images import open_images
    from radio_nb.data.streams import crop_stream
    for _ in image_batches(crop_stream(open_images(source), size), batch, n//batch): pass
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
    anonymous = int(status['RssAnon'].split()[0])/1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, anonymous)


def peak(source, n, args):
    command = [sys.executable, __file__, '--read', source, '--few', str(n),
               '--size', str(args.size), '--batch', str(args.batch)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(map(float, printed.split()[-2:]))


disable_progress_bars()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {'few': 10_000, 'many': 50_000, 'size': 32, 'batch': 64}.items():
    parser.add_argument(f'--{name}', type=int, default=default)
parser.add_argument('--read', default='')
args = parser.parse_args()
if args.read: sys.exit(read(args.read, args.few, args.size, args.batch))

with tempfile.TemporaryDirectory() as folder:
    for n in (args.few, args.many): write(Path(folder)/str(n), n)
    for name, source in {'files': '{}/files', 'Parquet': '{}/parquet', 'streamed Parquet': 'stream:{}/parquet'}.items():
        (few, few_own), (many, many_own) = (
            peak(source.format(Path(folder)/str(n)), n, args) for n in (args.few, args.many))
        print(f'{name}: {few:.0f} MiB with {args.few} images, {many:.0f} MiB with {args.many}')
        report(f'peak resident size, {name}', many/few, 1.05)
        report(f'of it not mapped from files, {name}', many_own/few_own, 1.05)
