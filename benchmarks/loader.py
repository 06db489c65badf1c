"""The rate of `image_batches` beside that of bare processes that decode, crop and resize with Pillow and keep nothing.

    python benchmarks/loader.py [--images zoo:photos] [--size 224] [--batch 16] [--steps 40] [--workers 2]

Both take the same boxes of the same images and start their processes anew in every turn; the two take turns, in one
run, and a ratio is that of their fastest turns. The second figure is that of the same images as a stream, with threads.
The last one is for large photographs: crops of a JPEG of 4000 × 3000 pixels, decoded in full and with `draft=True`.
"""
from io import BytesIO
from multiprocessing import Pool

import numpy as np
from datasets import Dataset
from PIL import Image
from timing import arguments, fastest, ratio, report, seconds

from radio_nb.data.crops import Crops, image_batches, random_box
from radio_nb.data.images import UNDECODED, decode, open_images
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


def photograph(rows, width=4000, height=3000):
    "The first image enlarged to that of a camera, with noise, as a JPEG."
    image = np.asarray(decode(rows[0]).resize((width, height), Image.Resampling.BICUBIC))
    noisy = image + np.random.default_rng(SEED).normal(0, 4, image.shape)
    file = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90)
    return Dataset.from_dict({'image': [{'path': None, 'bytes': file.getvalue()}]}, features=UNDECODED)


def bare(rows, work, workers, batch):
    with Pool(workers, kept.extend, (rows,)) as pool: pool.starmap(bare_crop, work, batch)


def ours(crops, batch, steps, workers):
    for _ in image_batches(crops, batch, steps, workers=workers): pass


args = arguments(__doc__, threads=1, images='zoo:photos', size=224, batch=16, steps=40, workers=2, repeats=5)
source = open_images(args.images)
rows = list(source['image'])
work = list(boxes(rows, args.size, args.batch*args.steps))
stream = open_images(f'stream:{args.images}')
kinds = {'image_batches': Crops(source, args.size, SEED, shuffle=False),
         'image_batches of a stream': StreamedCrops(stream, args.size, SEED, shuffle=False)}
for name, crops in kinds.items():
    def loaded(crops=crops): ours(crops, args.batch, args.steps, args.workers)
    print(f'{name}: {len(work)/seconds(loaded):.0f} images a second')
    by_hand = ratio(lambda: bare(rows, work, args.workers, args.batch), loaded, args.repeats)
    report(f'{name}, its rate against bare Pillow', by_hand, .8, '≥')

photo = photograph(rows)
full, draft = Crops(photo, args.size, SEED), Crops(photo, args.size, SEED, draft=True)
times = [fastest(crops.__getitem__, 0, repeats=args.repeats) for crops in (full, draft)]
print('a crop of a JPEG of 4000 × 3000 pixels: {:.3f} s in full, {:.3f} s as a draft'.format(*times))
report('time of a crop in full against a draft', ratio(lambda: full[0], lambda: draft[0], args.repeats), 2, '≥')
