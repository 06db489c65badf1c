"The stream of crops: its parts make up the whole, it can be entered at any position, and no image in it stops a run."
from contextlib import ExitStack
from io import BytesIO
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from radio_nb.data.crops import (
    Crops,
    centre_crop,
    height_width,
    image_batches,
    random_box,
    random_crop,
    resize,
    shortest_side,
)
from radio_nb.data.images import UNDECODED, Unreadable, decode, hold_out, open_images
from radio_nb.data.streams import StreamedCrops, crop_stream
from radio_nb.models.randomness import rng_shard, uniform
from radio_nb.targets.bad_input import BadInput

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0   # seconds a stream of Parquet waits for Arrow's threads at its end


def encoded(i, size=(24, 20)):
    "A PNG of one colour, which tells the number of the image."
    file = BytesIO()
    Image.new('RGB', size, (i, 2*i, 255 - i)).save(file, 'PNG')
    return file.getvalue()


def number(crop): return crop[0].flatten()[0].item()


def write(folder, images, files=1):
    "Parquet files of images given as bytes, as even as they can be."
    folder.mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(np.array_split(np.arange(len(images)), files)):
        columns = {'label': part, 'photo': [images[i] and {'bytes': images[i], 'path': None} for i in part]}
        kinds = Features({'label': Value('int64'), 'photo': ImageColumn()})
        Dataset.from_dict(columns, kinds).to_parquet(folder/f'{k}.parquet')
    return str(folder)


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "23 images in Parquet, as one file and as four; the fifth and sixth are broken."
    images = [encoded(i) for i in range(23)]
    images[5], images[6] = images[5][:40], None
    return {files: write(tmp_path_factory.mktemp('parquet')/str(files), images, files) for files in (1, 4)}


def crops_of(source, stream, **kwargs):
    if stream: return StreamedCrops(open_images(f'stream:{source}'), 16, seed=3, shuffle_buffer=7, **kwargs)
    return Crops(open_images(source), 16, seed=3, **kwargs)


cuts = st.integers(1, 4).flatmap(lambda world: st.tuples(st.integers(0, world - 1), st.just(world)))


@given(st.lists(cuts, max_size=3), st.integers(1, 3))
def test_a_shard_of_a_shard_is_what_slicing_twice_gives(shards, n):
    whole = torch.manual_seed(0) and torch.rand(n*int(np.prod([world for _, world in shards])), 2)
    torch.manual_seed(0)
    with ExitStack() as stack:
        for shard in shards: stack.enter_context(rng_shard(*shard))
        numbers = uniform(n, 2)
    for rank, world in shards: whole = whole[rank::world]
    assert torch.equal(numbers, whole)


@settings(max_examples=25, deadline=None)
@given(stream=st.booleans(), files=st.sampled_from([1, 4]), shard=cuts,
       span=st.sampled_from([None, (0, 12), (3, 9), (8, 12)]), start=st.integers(0, 4),
       workers=st.sampled_from([0, 0, 0, 2]), shuffle=st.booleans())
def test_a_part_of_a_stream_is_a_slice_of_the_whole(sources, stream, files, shard, span, start, workers, shuffle):
    crops, (rank, world) = crops_of(sources[files], stream, shuffle=shuffle), shard
    whole = image_batches(crops, 12, 5)   # 60 positions, 2.6 epochs
    if (12 if span is None else span[1] - span[0]) % world:
        with pytest.raises(BadInput, match=f'cannot be cut into {world} equal parts'):
            image_batches(crops, 12, 5, rank=rank, world=world, span=span)
        return
    again = crops_of(sources[files], stream, shuffle=shuffle)
    part = image_batches(again, 12, 5, start, workers if stream else 0, rank, world, span)
    for a, b in zip(islice(whole, start, None), part, strict=True):
        assert torch.equal(a.images[slice(*span or (None,))][rank::world], b.images)


@pytest.mark.parametrize('stream', [False, True])
def test_workers_change_nothing(sources, stream):
    none, two = (list(image_batches(crops_of(sources[1], stream), 4, 8, workers=workers)) for workers in (0, 2))
    for a, b in zip(none, two, strict=True): assert torch.equal(a.images, b.images) and a.skipped == b.skipped


@pytest.mark.parametrize('files', [1, 4])
@pytest.mark.parametrize('stream', [False, True])
def test_an_epoch_shows_every_image_once_and_each_in_another_order(sources, files, stream):
    crops = crops_of(sources[files], stream)
    if stream: seen = [row and len(row['bytes']) for row in islice(crops.undecoded(0), 69)]
    else: seen = [crops.index(p) for p in range(69)]
    epochs = np.array(seen, object).reshape(3, 23)
    assert all(sorted(map(str, epoch)) == sorted(map(str, epochs[0])) for epoch in epochs)
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_a_position_of_a_stream_is_found_again_after_any_number_of_epochs(sources):
    crops = crops_of(sources[4], True)
    chain = list(islice(crops.undecoded(0), 100))
    for position in (0, 1, 22, 23, 24, 46, 80): assert next(crops.undecoded(position)) == chain[position]


@pytest.mark.parametrize('stream', [False, True])
def test_what_is_broken_is_named_and_replaced(sources, stream):
    batches = list(image_batches(crops_of(sources[4], stream, shuffle=False), 23, 2))
    for batch in batches: assert len(batch.skipped) == 2 and 'is missing' in batch.skipped.values()
    numbers = [number(image) for image in batches[0].images]
    if stream: assert numbers == [0, 1, 2, 3, 4, 7, 7, *range(7, 23)]   # the next that can be read
    assert not {5, 6} & set(numbers)


@pytest.mark.parametrize('stream', [False, True])
def test_where_nothing_can_be_read_it_says_so(tmp_path, stream):
    crops = crops_of(write(tmp_path/'bad', [b'no image']*3), stream)
    message = 'images that were tried can be used; the first: .* cannot be identified as an image'
    with pytest.raises(BadInput, match=message):
        next(image_batches(crops, 2, 1))


def test_a_source_without_images_is_refused(tmp_path):
    Dataset.from_dict({'text': ['a']}).to_parquet(tmp_path/'text.parquet')
    for source in ('', 'stream:'):
        (tmp_path/'broken.parquet').write_bytes(b'PAR1 no more')
        for wrong, message in ((f'{tmp_path}/text.parquet', 'has no column of images; its columns are text'),
                               (write(tmp_path/'empty', []), 'is empty|corresponds to no data'),
                               ('hf:nobody/nothing', 'hf:nobody/nothing could not be loaded'),
                               (f'{tmp_path}/broken.parquet', 'broken.parquet could not be loaded')):
            with pytest.raises(BadInput, match=message): open_images(source + wrong)
    with pytest.raises(BadInput, match='the stream of images is empty'):
        next(StreamedCrops(open_images('stream:zoo:photos').take(0), 16).undecoded(0))


@pytest.mark.parametrize('files', [1, 4])
def test_held_out_images_never_come_back(tmp_path, files):
    images = open_images('stream:' + write(tmp_path/'all', [encoded(i) for i in range(23)], files))
    rest, held = hold_out(images, 8)
    kept = {row['bytes'] for row in held['image']}
    seen = [row['bytes'] for row in islice(crop_stream(rest, 16).undecoded(0), 45)]
    assert len(kept) == 8 and len(set(seen)) == 15 and not kept & set(seen)
    assert hold_out(images, 0)[0] is images and len(hold_out(images, 0)[1]) == 0
    with pytest.raises(BadInput, match='cannot hold out 23 of 23 images'): hold_out(images, 23)


@given(st.integers(16, 400), st.integers(16, 400), st.integers(8, 64), st.integers(8, 64), st.integers(0, 9))
def test_a_wide_crop_is_the_square_crop_of_the_image_squeezed(width, height, h, w, seed):
    ratio = w/h
    box = random_box(width, height, np.random.default_rng(seed), ratio=(3/4*ratio, 4/3*ratio))
    square = random_box(width/ratio, height, np.random.default_rng(seed))
    assert_close(box, (square[0]*ratio, square[1], square[2]*ratio, square[3]))
    assert 0 <= box[0] < box[2] <= width*(1 + 1e-9) and 0 <= box[1] < box[3] <= height*(1 + 1e-9)


def test_a_pair_is_height_and_width():
    image, rng = Image.new('RGB', (300, 200)), np.random.default_rng
    for crop in (random_crop, centre_crop):
        assert crop(image, (32, 56), rng(0)).shape == (3, 32, 56)
        assert torch.equal(crop(image, 32, rng(0)), crop(image, (32, 32), rng(0)))
    gradient = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    assert centre_crop(gradient.convert('RGB'), (100, 50))[0, 0].tolist() == list(range(75, 125))


@pytest.mark.parametrize('k', [1, 3])
def test_views_are_the_same_crops_every_k_epochs_and_each_has_its_row(sources, k):
    crops = crops_of(sources[4], False, views=k)
    n, in_order = crops.rows, list(image_batches(crops.by_row(), 1, crops.rows))
    assert n == 23*k and [batch.rows.item() for batch in in_order] == list(range(n))
    for i, batch in enumerate(image_batches(crops, 1, 2*n)):
        row = batch.rows.item()
        assert row == crops.row(i)
        assert torch.equal(batch.images, in_order[row].images) and batch.skipped == in_order[row].skipped
    orders = np.array([crops.row(p) for p in range(2*n)]).reshape(2, n)
    assert (np.sort(orders) == np.arange(n)).all() and not (orders[0] == orders[1]).all()
    if k > 1: assert not torch.equal(in_order[0].images, in_order[23].images) or number(in_order[0].images[0]) == 0


def test_without_views_there_are_no_rows(sources):
    crops = crops_of(sources[1], False)
    for access in (lambda: crops.rows, lambda: crops.row(0), crops.by_row):
        with pytest.raises(ValueError, match='only where each image has a fixed number of views'): access()
    for stream in (False, True): assert next(image_batches(crops_of(sources[1], stream), 4, 1)).rows.tolist() == [-1]*4
    with pytest.raises(BadInput, match='a stream have no fixed views'):
        crop_stream(open_images('stream:zoo:photos'), 16, views=2)


def test_a_span_must_lie_in_the_batch(sources):
    with pytest.raises(BadInput, match='a batch of 8 has no positions 4 to 9'):
        image_batches(crops_of(sources[1], False), 8, 1, span=(4, 9))


def jpeg(width, height, seed=0, **options):
    "A smooth picture with a little noise, as a cell of `datasets`."
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 4, (height, width, 1))
    file = BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, 'JPEG', quality=90, **options)
    return {'path': None, 'bytes': file.getvalue()}


class Extreme:
    "A generator that draws the least or the most, as it is told."
    def __init__(self, *most): self.most = iter(most)
    def uniform(self, low, high): return high if next(self.most) else low


sizes = st.one_of(st.integers(8, 100), st.tuples(st.integers(8, 100), st.integers(8, 100)))


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 900), st.integers(16, 900), sizes)
def test_a_draft_is_large_enough_for_every_crop_or_is_not_made(width, height, size):
    row = jpeg(width, height)
    full, draft = decode(row), decode(row, shortest_side(size))
    if draft.size == full.size: return
    h, w = height_width(size)
    for scale, tall in ((0, 0), (0, 1), (1, 0), (1, 1)):
        left, top, right, bottom = random_box(*draft.size, Extreme(scale, tall, 0, 0), ratio=(3/4*w/h, 4/3*w/h))
        assert right - left >= w - 1e-6 and bottom - top >= h - 1e-6
    assert draft.width >= w and draft.height >= h   # and so `centre_crop` has enough too


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.booleans(), st.sampled_from([(1200, 904), (1200, 900)]))
def test_a_draft_changes_the_pixels_of_a_crop_a_little_and_nothing_else(seed, stream, sides):
    "Where a side is not a multiple of 8, the draft is rounded up by less than a pixel, which moves its edges by that."
    width, height = sides
    row, size = jpeg(width, height, seed), (48, 64)
    images = Dataset.from_dict({'image': [row, row]}, features=UNDECODED)
    if stream: images = images.to_iterable_dataset()
    whole, draft = crop_stream(images, size, seed), crop_stream(images, size, seed, draft=True)
    for a, b in zip(image_batches(whole, 2, 2), image_batches(draft, 2, 2), strict=True):
        difference = (a.images.int() - b.images.int()).abs().float()
        assert a.images.shape == b.images.shape and 0 < difference.mean() < (3 if height % 8 else .5)


def test_a_draft_is_made_where_it_saves_something_and_only_there():
    row = jpeg(1200, 900)
    assert shortest_side(64) == 117 and shortest_side((10, 100)) == 100
    for min_side, size in ((0, (1200, 900)), (901, (1200, 900)), (900, (1200, 900)), (450, (600, 450)),
                           (451, (1200, 900)), (117, (300, 225)), (112, (150, 113)), (1, (150, 113))):
        assert decode(row, min_side).size == size
    assert decode({'path': None, 'bytes': encoded(0, (1200, 900))}, 100).size == (1200, 900)   # a PNG cannot
    turned = Image.Exif()
    turned[0x0112] = 6   # to be turned by 90°
    assert decode(jpeg(1200, 900, exif=turned), 450).size == (450, 600)
    assert decode(jpeg(40, 40), 1).size == (20, 20)   # not below what `decode` takes for an image
    with pytest.raises(Unreadable, match='is only 40 × 8 pixels'): decode(jpeg(40, 8), 1)


def test_drafts_are_off_unless_asked_for_and_rows_keep_them():
    images = Dataset.from_dict({'image': [jpeg(1200, 900)]}, features=UNDECODED)
    by_hand = random_crop(decode(images[0]['image']), 32, np.random.default_rng([0, 1, 0]))
    assert torch.equal(Crops(images, 32)[0].image, by_hand)
    crops = Crops(images, 32, views=2, draft=True)
    assert torch.equal(crops.by_row()[1].image, crops[1].image)
    assert not torch.equal(Crops(images, 32, views=2)[1].image, crops[1].image)


def test_resize_gives_a_batch_another_size_or_itself():
    images = torch.rand(2, 3, 32, 48)
    assert resize(images, (32, 48)) is images and resize(images, [32, 48]) is images
    assert torch.equal(resize(images, 16), F.interpolate(images, (16, 16), mode='bilinear', antialias=True))
