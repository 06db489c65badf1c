"The stream of crops: its parts make up the whole, it can be entered at any position, and no image in it stops a run."
import json
import os
import shutil
import sys
from contextlib import ExitStack
from io import BytesIO
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch.testing import assert_close

from radio_nb.data.crops import (
    RATIO,
    Crops,
    RandomCrop,
    centre_crop,
    image_batches,
    padded_crop,
    random_box,
    random_crop,
    resize,
    shortest_side,
)
from radio_nb.data.images import UNDECODED, Unreadable, decode, hold_out, images_fingerprint, open_images, to_rgb
from radio_nb.data.labelled import labelled_images
from radio_nb.data.streams import StreamedCrops, crop_stream
from radio_nb.models.randomness import rng_shard, uniform
from radio_nb.models.student import upright
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import height_width

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


@pytest.mark.parametrize('least', [.1, .4, .8, 1.])
def test_a_random_crop_has_the_area_that_is_asked_for(least):
    "Told by pixels that say where in the image they were."
    ramp, random = np.arange(240, dtype=np.uint8), np.random.default_rng(0)
    image = Image.fromarray(np.stack([*np.meshgrid(ramp, ramp), np.zeros((240, 240), np.uint8)], -1))
    areas = []
    for _ in range(200):
        x, y, _ = RandomCrop(least)(image, 60, random).flatten(1).float()
        width, height = ((axis.max() - axis.min()).item()*60/59/240 for axis in (x, y))
        areas.append(width*height)
    squeezed = least > RATIO[0]   # where a wide box does not fit, it is cut
    assert min(areas) > (least*RATIO[0] if squeezed else least) - .03
    assert max(areas) < 1.03 and np.mean(areas) < (1 + least)/2 + .05
    side = shortest_side(60, least)
    left, top, right, bottom = random_box(side, side, SimpleNamespace(uniform=lambda low, high: low), (least, 1))
    assert right - left >= 60


@pytest.mark.parametrize('turn', range(10))
def test_a_picture_is_turned_as_pillow_turns_it(turn):
    entry = Image.Exif()
    entry[0x0112] = turn
    image = Image.open(BytesIO(jpeg(40, 24, exif=entry)['bytes']))
    found, expected = upright(image), ImageOps.exif_transpose(image)
    assert found.size == expected.size and found.tobytes() == expected.tobytes()
    assert upright(found).tobytes() == found.tobytes()   # once


def test_a_picture_with_damaged_pixels_cannot_be_used():
    "Looking for the EXIF entry of a PNG reads its pixels, and finds out first."
    file = BytesIO()
    Image.effect_noise((64, 64), 90).save(file, 'PNG')
    damaged = bytearray(file.getvalue())
    damaged[len(damaged)//4:len(damaged)//4 + 64] = bytes(64)
    with pytest.raises(Unreadable): decode({'path': None, 'bytes': bytes(damaged)})


def test_a_picture_with_a_damaged_entry_stays_as_it_is():
    assert to_rgb(Image.open(BytesIO(jpeg(40, 24, dpi=(72, 72), exif=b'Exif\0\0junkjunk')['bytes']))).size == (40, 24)


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


def test_the_mask_of_a_crop_goes_with_it_into_the_batch(sources):
    "Row 12: masks never reached a batch."
    def half(image, size, random):
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[:, :random.integers(1, size)] = True
        return random_crop(image, size, random), mask
    for stream in (False, True):
        crops = crops_of(sources[4], stream, crop=half)
        none, two = (list(image_batches(crops, 6, 3, workers=workers)) for workers in (0, 2*stream))
        for a, b in zip(none, two, strict=True):
            assert a.masks.dtype == torch.bool and a.masks.shape == (6, 16, 16) and torch.equal(a.masks, b.masks)
        assert len({batch.masks.sum().item() for batch in none}) > 1
        part = next(image_batches(crops, 6, 3, rank=1, world=2))
        assert torch.equal(part.masks, none[0].masks[1::2])
        assert next(image_batches(crops_of(sources[4], stream), 6, 1)).masks is None
    def small(image, size, random): return random_crop(image, 16, random), torch.ones(8, 8)
    wrong = crops_of(sources[4], False, crop=small)
    with pytest.raises(BadInput, match=r'a crop of \(3, 16, 16\) cannot have a mask of \(8, 8\)'): wrong[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(16, 200), st.integers(16, 200), st.integers(8, 64), st.integers(8, 64))
def test_a_padded_crop_shows_all_of_an_image_and_says_where(width, height, h, w):
    image, mask = padded_crop(Image.new('RGB', (width, height), 'red'), (h, w))
    assert image.shape == (3, h, w) and mask.shape == (h, w)
    red = (image == torch.tensor([255, 0, 0]).view(3, 1, 1)).all(0)
    assert torch.equal(red, mask) and (image[:, ~mask] == 128).all()
    rows, columns = mask.any(1), mask.any(0)
    assert torch.equal(mask, rows[:, None] & columns) and (rows.all() or columns.all())


@pytest.mark.parametrize('stream', ['', 'stream:'])
def test_a_column_called_image_is_used_and_others_must_be_chosen(tmp_path, stream):
    "Row 7: columns `mask`, `image` were trained on `mask`."
    def table(name, *columns):
        cells = {column: [{'bytes': encoded(i), 'path': None}] for i, column in enumerate(columns)}
        Dataset.from_dict(cells, Features(dict.fromkeys(columns, ImageColumn()))).to_parquet(tmp_path/name)
        return f'{stream}{tmp_path/name}'
    def first(source): return next(iter(open_images(source)))['image']['bytes']
    assert first(table('a.parquet', 'mask', 'image')) == encoded(1)
    assert first(table('b.parquet', 'depth')) == encoded(0)
    both = table('c.parquet', 'left', 'right')
    with pytest.raises(BadInput, match=r'several columns of images \(left, right\): add #left'): open_images(both)
    assert first(f'{both}#right') == encoded(1)
    with pytest.raises(BadInput, match='of images called middle, but left, right'): open_images(f'{both}#middle')


def grey(name, array, folder):
    Image.fromarray(array).save(folder/name)
    return {'path': f'{folder/name}', 'bytes': None}


def test_deep_images_are_never_black_without_a_word(tmp_path):
    "Row 7: float TIFFs became black."
    ramp = np.tile(np.arange(256), (20, 1))
    for scaled, kind in ((ramp*257, np.uint16), (ramp*257, np.int32), (ramp/255, np.float32)):
        shown = decode(grey('x.tif', scaled.astype(kind), tmp_path))
        assert (np.asarray(shown) == ramp[..., None]).all()
    for values, kind, why in ((ramp, np.float32, 'has values from 0 to 255, and 0 to 1 are black to white'),
                              (ramp/255 - .1, np.float32, 'has values from -0.1'),
                              (ramp*np.nan, np.float32, 'has values from nan'),
                              (ramp*70000, np.int32, 'and 0 to 65535 are black to white'),
                              (ramp, np.uint16, 'is all but black: its largest value is 255 of 65535'),
                              (ramp, np.int32, 'is all but black')):
        with pytest.raises(Unreadable, match=why): decode(grey('x.tif', values.astype(kind), tmp_path))
    assert not np.asarray(decode(grey('black.tif', np.zeros((20, 20), np.uint16), tmp_path))).any()   # as it was meant


def reasons(folder):
    "Why images cannot be used, by name."
    wrong = {}
    for row in open_images(str(folder))['image']:
        try: decode(row)
        except Unreadable as e: wrong[row['path'].rpartition('/')[2]] = str(e)
    return wrong


def test_what_looks_like_an_image_is_listed_even_if_it_cannot_be_opened(tmp_path):
    "Rows 7 and 25: `.heic` was neither used nor listed; names that are not UTF-8 ended in a traceback."
    (tmp_path/'good.png').write_bytes(encoded(1))
    (tmp_path/'phone.HEIC').write_bytes(b'\0\0\0\x18ftypheic')
    Image.new('RGB', (20, 20)).save(tmp_path/'thumbnail.tif')
    (tmp_path/'thumbnail.tif').rename(tmp_path/'camera.nef')   # Pillow could open its preview
    (tmp_path/'folder.png').mkdir()
    (tmp_path/'nowhere.png').symlink_to(tmp_path/'gone.png')
    (tmp_path/'loop').symlink_to(tmp_path)
    os.mkfifo(tmp_path/'pipe.png')
    with open(os.fsencode(tmp_path) + b'/caf\xe9.png', 'wb') as file: file.write(encoded(2))
    wrong = reasons(tmp_path)
    assert wrong.pop('phone.HEIC') == 'needs the package pillow-heif' or 'pillow_heif' in sys.modules
    assert wrong == {'camera.nef': 'is a raw photograph, which has to be developed first',
                     'caf\\xe9.png': 'has a name that is not UTF-8: rename it'}
    batch = next(image_batches(Crops(open_images(str(tmp_path)), 16), 8, 1))
    assert len(batch.images) == 8 and json.dumps(batch.skipped).encode()


def test_links_to_folders_are_followed_once(tmp_path):
    "A set of class folders that are links was empty without labels, and whole with them."
    for name in ('cat', 'dog'):
        (tmp_path/'all'/name).mkdir(parents=True)
        (tmp_path/'all'/name/'a.png').write_bytes(encoded(1))
    (tmp_path/'some').mkdir()
    for name in ('cat', 'dog'): (tmp_path/'some'/name).symlink_to(tmp_path/'all'/name)
    assert len(open_images(str(tmp_path/'some'))) == len(labelled_images(str(tmp_path/'some'))[0]) == 2
    found = [row['path'] for row in open_images(tmp_path)['image']]
    assert found == [str(tmp_path/'all'/name/'a.png') for name in ('cat', 'dog')]


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    "One file of a kind that comes first decided what was trained on."
    for i in range(3): (tmp_path/f'{i}.png').write_bytes(encoded(i))
    (tmp_path/'notes.pdf').write_bytes(b'%PDF')   # Pillow writes them, and reads none
    assert len(open_images(str(tmp_path))) == 3
    Dataset.from_dict({'row': [1]}).to_parquet(tmp_path/'features.parquet')
    with pytest.raises(BadInput, match='holds 3 images and 1 Parquet files: name the file or the subfolder'):
        open_images(str(tmp_path))


def test_a_bomb_is_skipped(tmp_path):
    "Row 25."
    file = BytesIO()
    Image.new('1', (20000, 20000)).save(file, 'PNG')
    (tmp_path/'bomb.png').write_bytes(file.getvalue())
    (tmp_path/'good.png').write_bytes(encoded(1))
    assert 'could be decompression bomb' in reasons(tmp_path)['bomb.png']


@pytest.mark.parametrize('stream', ['', 'stream:'])
def test_sources_that_are_no_source_are_refused_in_one_line(tmp_path, stream):
    "Row 25: pipes, folders called `x.parquet`, files of no or too few bytes, loops and names too long."
    whole = write(tmp_path/'whole', [encoded(i) for i in range(23)])
    (tmp_path/'zero.parquet').touch()
    (tmp_path/'cut.parquet').write_bytes((tmp_path/'whole'/'0.parquet').read_bytes()[:-200])
    os.mkfifo(tmp_path/'pipe.parquet')
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'loop').symlink_to(tmp_path/'loop')
    (tmp_path/'empty.parquet').mkdir()
    names = {'zero.parquet': 'could not be loaded', 'cut.parquet': 'could not be loaded', 'pipe': 'holds neither',
             'pipe.parquet': 'holds neither', 'loop': 'no such folder or file', 'empty.parquet': 'holds neither',
             'x'*300: 'no such folder or file', 'caf\udce9': r'caf\\xe9 \(a data set'}
    for name, message in names.items():
        with pytest.raises(BadInput, match=message) as error: open_images(f'{stream}{tmp_path}/{name}')
        assert '\n' not in str(error.value) and str(error.value).encode()
    (tmp_path/'whole'/'nested.parquet').mkdir()
    assert len(list(open_images(stream + whole))) == 23   # a folder is not a Parquet file


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    "Row 25: its images were left out without a word. (Root can read everything, so the refusal is made here.)"
    (tmp_path/'good.png').write_bytes(encoded(1))
    (tmp_path/'locked').mkdir()
    scandir = os.scandir
    def refuse(path):
        if str(path).endswith('locked'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(BadInput, match='locked cannot be read: Permission denied'): open_images(str(tmp_path))


def test_a_file_that_cannot_be_read_or_is_too_large_for_memory_is_skipped(tmp_path, monkeypatch):
    "Row 25."
    path = tmp_path/'x.png'
    path.write_bytes(encoded(1))
    for error, why in ((PermissionError(13, 'Permission denied', 'x.png'), 'Permission denied'),
                       (MemoryError(), 'MemoryError'), (FileNotFoundError(2, 'No such file'), 'No such file')):
        def refuse(*_, error=error): raise error
        monkeypatch.setattr(Image, 'open', refuse)
        with pytest.raises(Unreadable, match=f'^{why}$'): decode({'path': str(path), 'bytes': None})


def test_a_parquet_file_of_the_same_name_and_time_is_read_again(tmp_path):
    "Row 7: it was read from an old cache of `datasets`."
    file = tmp_path/'[2020]*.parquet'   # to `datasets` a path is a pattern
    def fill(shift):
        write(tmp_path/'new', [encoded(i + shift) for i in range(4)])
        file.write_bytes((tmp_path/'new'/'0.parquet').read_bytes())
        os.utime(file, ns=(10**18, 10**18))
    for shift in (0, 7):
        fill(shift)
        assert [row['bytes'] for row in open_images(str(file))['image']] == [encoded(i + shift) for i in range(4)]


def test_a_fingerprint_tells_other_images_and_not_other_places(tmp_path):
    "Row 4: renamed or changed images were not noticed on resuming."
    for i in range(3):
        (tmp_path/'a'/f'{i}').mkdir(parents=True)
        (tmp_path/'a'/f'{i}'/'x.bmp').write_bytes(b'BM' + bytes([i]))
    def prints(folder): return [images_fingerprint(open_images(f'{stream}{folder}')) for stream in ('', 'stream:')]
    first = prints(tmp_path/'a')
    shutil.copytree(tmp_path/'a', tmp_path/'b'/'c')
    assert prints(tmp_path/'b'/'c') == prints(tmp_path/'b') == first
    (tmp_path/'b'/'c'/'1'/'x.bmp').write_bytes(b'BM\xff')   # of the same size
    assert not {*prints(tmp_path/'b')} & {*first}
    (tmp_path/'a'/'1').rename(tmp_path/'a'/'9')
    assert not {*prints(tmp_path/'a')} & {*first}
    shifts = {'p': 0, 'q': 0, 'r': 1}
    same, copy, other = (prints(write(tmp_path/name, [encoded(i + shift) for i in range(4)]))
                         for name, shift in shifts.items())
    assert same == copy and not {*same} & {*other}
