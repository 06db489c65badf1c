"""The rate of `image_batches` beside that of bare processes that decode, crop and resize with Pillow and keep nothing.

    python benchmarks/loader.py [--images zoo:photos] [--size 224] [--batch 16] [--steps 40] [--workers 2]

Both take the same boxes of the same images and start their processes anew in every turn; the two take turns, in one run,
and a ratio is that of their fastest turns. The second figure is that of the same images as a stream, with threads.
"""
from io import BytesIO
from multiprocessing import Pool

import numpy as np
from PIL import Image
from timing import arguments, ratio, report, seconds

from radio_nb.data.crops import Crops, image_batches, random_box
from radio_nb.data.images import open_images
from radio_nb.data.streams import StreamedCrops

SEED = 0


def boxes(rows, size, n):
    "For each position which image, which box of it and which size; what `random_crop` draws."
    sizes = [opened(row).size for row in rows]
    for p in range(n): yield p % len(rows), random_box(*sizes[p % len(rows)], np.random.default_rng([SEED, 1, p])), size


def opened(row): return Image.open(row['path'] if row['bytes'] is None else BytesIO(row['bytes']))


kept = []  # in every bare process, the undecoded images


def bare_crop(index, box, size):
    "The least work for one crop."
    opened(kept[index]).convert('RGB').resize((size, size), Image.Resampling.BILINEAR, box=box)


def bare(rows, work, workers, batch):
    with Pool(workers, kept.extend, (rows,)) as pool: pool.starmap(bare_crop, work, batch)


def ours(crops, batch, steps, workers):
    for _ in image_batches(crops, batch, steps, workers=workers): pass


args = arguments(__doc__, threads=1, images='zoo:photos', size=224, batch=16, steps=40, workers=2, repeats=5)
source = open_images(args.images)
rows = list(source['image'])
work = list(boxes(rows, args.size, args.batch*args.steps))
kinds = {'image_batches': Crops(source, args.size, SEED, shuffle=False),
         'image_batches of a stream': StreamedCrops(open_images(f'stream:{args.images}'), args.size, SEED, shuffle=False)}
for name, crops in kinds.items():
    def loaded(crops=crops): ours(crops, args.batch, args.steps, args.workers)
    print(f'{name}: {len(work)/seconds(loaded):.0f} images a second')
    by_hand = ratio(lambda: bare(rows, work, args.workers, args.batch), loaded, args.repeats)
    report(f'{name}, its rate against bare Pillow', by_hand, .8, '≥')
