"Streams whose shards can be opened: who reads what, and that it makes no difference to the images."
import io
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from radio_nb.data.crops import TRIES, Crops, image_batches
from radio_nb.data.images import (
    UNDECODED,
    Shards,
    hold_out,
    images_fingerprint,
    only_images,
    open_images,
    tar_member,
)
from radio_nb.data.streams import Chain, Lanes, StreamedCrops, crop_stream, number_of_lanes
from radio_nb.targets.bad_input import BadInput


def png(i, sides=(20, 20)):
    file = io.BytesIO()
    Image.new('RGB', sides, (i%256, i//256, 255 - i%256)).save(file, 'PNG')
    return file.getvalue()


def number(image): return image[0, 0, 0].item() + 256*image[1, 0, 0].item()


def parquet(path, n, group):
    rows = [{'bytes': png(i), 'path': None} for i in range(n)]
    Dataset.from_dict({'image': rows}, features=UNDECODED).to_parquet(path, batch_size=group)
    return str(path)


class Counted:
    "Shards of numbered images that remember which rows were read, those that are skipped over within a shard too."
    def __init__(self, sizes):
        self.ends, self.rows = np.cumsum(sizes), []
        self.shards = Shards(sizes, self.read)

    def read(self, i, first):
        begin = int(self.ends[i] - self.shards.sizes[i])
        self.rows += range(begin, begin + first)
        for row in range(begin + first, int(self.ends[i])):
            self.rows.append(row)
            yield {'path': f'{row}', 'bytes': None}


def taken(lanes, batches):
    return [[int(next(rows)['path']) for _, rows in batch] for batch in lanes.with_followers(batches)]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 9), st.integers(0, 50), st.integers(1, 6), st.integers(0, 60))
def test_lanes_show_every_image_once_an_epoch_whoever_asks(sizes, seed, buffer, world, start):
    lanes, n = Lanes(Counted(sizes).shards, seed, buffer), sum(sizes)
    chain = [int(row['path']) for row in islice(lanes.undecoded(0), 2*n + 70)]
    assert sorted(chain[:n]) == sorted(chain[n:2*n]) == list(range(n))
    if not buffer: assert chain[:2*n] == [*range(n)]*2
    for rank in range(world):
        own = [range(first + rank, first + 6*world, world) for first in range(start, n, 6*world)]
        assert taken(lanes, own) == [[chain[p] for p in positions if p < len(chain)] for positions in own]


@pytest.mark.parametrize('world, shards', [(1, 97), (2, 97), (4, 97), (8, 97), (3, 397), (6, 397), (12, 397)])
def test_processes_read_their_part_and_little_more(world, shards):
    "Row 32: rank 0 of 4 read 256 rows for 40 images."
    sizes = [10]*shards   # images that no number of processes divides evenly
    for rank in range(world):
        counted = Counted(sizes)
        seen, batch = 10*shards//48*48, 48
        batches = [range(first + rank, first + batch, world) for first in range(0, seen, batch)]
        taken(Lanes(counted.shards, 0, 200), batches)
        lanes = number_of_lanes(shards)//world
        assert seen/world <= len(counted.rows) <= 10*shards/world + 2*10*lanes   # a shard more at either end of a lane
        assert len(set(counted.rows)) <= 10*shards/world + 2*10*lanes


def test_resuming_reads_one_shard_more_than_it_needs():
    "Row 32: it read from the start."
    sizes = [25]*40
    for position in (0, 1, 399, 600, 999, 1000, 7654):
        counted = Counted(sizes)
        lanes = Lanes(counted.shards, 0, 8)   # windows of one image
        resumed = next(lanes.undecoded(position))
        assert len(counted.rows) <= 25
        assert resumed == next(islice(lanes.undecoded(0), position, None))


def test_lanes_have_four_shards_each():
    numbers = [number_of_lanes(n) for n in (1, 3, 4, 7, 8, 15, 16, 191, 192, 10**6)]
    assert numbers == [1, 1, 1, 1, 2, 2, 4, 16, 48, 192]


def test_a_broken_image_is_replaced_alike_in_any_number_of_processes(tmp_path):
    rows = [{'bytes': b'broken' if i%3 else png(i), 'path': None} for i in range(64)]
    Dataset.from_dict({'image': rows}, features=UNDECODED).to_parquet(tmp_path/'x.parquet', batch_size=2)
    crops = StreamedCrops(open_images(f'stream:{tmp_path}/x.parquet'), 16, shuffle_buffer=20)
    whole = list(image_batches(crops, 8, 20))
    for rank in range(4):
        for batch, part in zip(whole, image_batches(crops, 8, 20, rank=rank, world=4, workers=2), strict=True):
            assert torch.equal(batch.images[rank::4], part.images)
    assert all(number(image)%3 == 0 for batch in whole for image in batch.images)


def test_a_damaged_group_of_rows_is_skipped_and_named(tmp_path):
    file = parquet(tmp_path/'x.parquet', 40, 4)
    whole = [row['image'] for row in open_images(f'stream:{file}')]
    column = pq.read_metadata(file).row_group(3).column(0)
    with open(file, 'r+b') as f:
        f.seek(column.dictionary_page_offset or column.data_page_offset)
        f.write(b'\xff'*column.total_compressed_size)
    rows = [row['image'] for row in open_images(f'stream:{file}')]
    assert rows[:12] == whole[:12] and rows[16:] == whole[16:]
    names = {f'{file}, row group 3, row {i}' for i in range(4)}
    assert {row['path'] for row in rows[12:16]} == names
    batch, = image_batches(StreamedCrops(open_images(f'stream:{file}'), 16), 40, 1)
    assert batch.skipped == dict.fromkeys(names, 'is lost: its group of rows is damaged')


def test_a_large_damaged_group_of_rows_ends_no_run(tmp_path):
    file = parquet(tmp_path/'x.parquet', 2*TRIES + 60, TRIES + 30)
    column = pq.read_metadata(file).row_group(0).column(0)
    with open(file, 'r+b') as f:
        f.seek(column.dictionary_page_offset or column.data_page_offset)
        f.write(b'\xff'*column.total_compressed_size)
    batch, = image_batches(StreamedCrops(open_images(f'stream:{file}'), 16, shuffle=False), 4, 1)
    assert len(batch.images) == 4 and len(batch.skipped) == TRIES + 30


def tar(path, members):
    with tarfile.open(path, 'w') as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def test_tar_shards_are_opened_without_unpacking(tmp_path):
    "Row 32: they were refused."
    for k in range(3):
        tar(tmp_path/f'{k}.tar', [(f'{i}.{kind}', png(i) if kind == 'png' else b'{}')
                                  for i in range(5*k, 5*k + 5) for kind in ('json', 'png')])
    images = open_images(str(tmp_path))
    assert len(images) == 15
    numbers = [number(crop.image) for crop in map(Crops(images, 16, shuffle=False).__getitem__, range(15))]
    assert numbers == list(range(15))
    streamed = next(image_batches(StreamedCrops(open_images(f'stream:{tmp_path}'), 16), 15, 1)).images
    assert sorted(map(number, streamed)) == list(range(15))
    print_of = images_fingerprint(images)
    tar(tmp_path/'2.tar', [(f'{i}.png', png(i + 1)) for i in range(5)])
    assert images_fingerprint(open_images(str(tmp_path))) != print_of


def test_images_and_masks_of_one_name_in_a_tar_are_told_apart(tmp_path):
    file = tar(tmp_path/'x.tar', [(f'{i}.{kind}', png(i)) for i in range(4) for kind in ('depth.png', 'mask.png')])
    with pytest.raises(BadInput, match=r'several columns of images \(depth.png, mask.png\): add #depth.png'):
        open_images(file)
    assert all('mask' in row['path'] for row in open_images(f'{file}#mask.png')['image'])
    file = tar(tmp_path/'y.tar', [(f'{i}.{kind}', png(i)) for i in range(4) for kind in ('mask.png', 'JPEG')])
    assert all('JPEG' in row['path'] for row in open_images(file)['image'])
    names = [('shot.1.jpg', png(1)), ('shot.2.jpg', png(2)), ('a/shot.1.jpg', png(3)), ('._shot.jpg', b'')]
    assert len(open_images(tar(tmp_path/'z.tar', names))) == 4


def test_masks_are_not_taken_for_the_images_of_a_tar(tmp_path):
    "Where some images are of another kind than others, or one is missing, only the masks had one for each name."
    def names(kinds): return [f'{i}.{kind}' for i, own in enumerate(kinds) for kind in own]
    def opened(names):
        images = open_images(tar(tmp_path/'x.tar', [(name, png(1)) for name in names]))
        return sorted(Path(row['path'].rpartition('#')[0]).name for row in images['image'])
    for images in (['png', 'jpg']*5, ['webp'] + 9*['jpg']):
        assert opened(names((kind, 'mask.png') for kind in images)) == [f'{i}.{kind}' for i, kind in enumerate(images)]
    whole = names([('jpg', 'mask.png')]*10)
    assert opened(whole[1:]) == whole[2::2]
    with pytest.raises(BadInput, match='several columns of images'):
        opened(names([('depth.png', 'mask.png')]*9 + [('mask.png',)]))


def test_numbers_behind_a_dot_belong_to_the_name(tmp_path):
    for frames in ([1, 2, 3, 4, 1, 2], [4]*6):
        names = [f'clip_{i}/frame.{k:04}.jpg' for i, n in enumerate(frames) for k in range(n)]
        assert len(open_images(tar(tmp_path/'x.tar', [(name, png(1)) for name in names]))) == sum(frames)


def test_a_tar_in_a_folder_that_is_called_like_one_is_read(tmp_path):
    (tmp_path/'n.tar').mkdir()
    tar(tmp_path/'n.tar'/'x.tar', [('y.tar/a.png', png(7))])
    images = open_images(str(tmp_path/'n.tar'))
    assert number(Crops(images, 16)[0].image) == 7
    assert tar_member(images[0]['image']['path'])[0] == str(tmp_path/'n.tar'/'x.tar')


def test_a_hard_link_in_a_tar_is_an_image(tmp_path):
    with tarfile.open(tmp_path/'x.tar', 'w') as archive:
        for name, kind, link in (('a.png', tarfile.REGTYPE, ''), ('b.png', tarfile.LNKTYPE, 'a.png'),
                                 ('c.png', tarfile.SYMTYPE, 'a.png'), ('d.png', tarfile.LNKTYPE, 'gone.png')):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, 0 if link else len(png(9))
            archive.addfile(member, None if link else io.BytesIO(png(9)))
    crops = Crops(open_images(str(tmp_path/'x.tar')), 16)
    assert len(crops.images) == 2 and all(number(crops[i].image) == 9 for i in range(2))


@pytest.mark.parametrize('more', [['a.png', 'a.jpg'], ['shot at 10.23.png', 'shot at 10.24.png']])
def test_some_images_of_one_name_do_not_cost_all_others(tmp_path, more):
    names = [*(f'{i}.{more[0][-3:]}' for i in range(20)), *more]
    assert len(open_images(tar(tmp_path/'x.tar', [(name, png(3)) for name in names]))) >= 21


def test_a_tar_that_is_broken_or_compressed_is_refused(tmp_path):
    whole = tar(tmp_path/'x.tar', [(f'{i}.png', png(i)) for i in range(4)])
    (tmp_path/'cut.tar').write_bytes(open(whole, 'rb').read()[:3000])
    (tmp_path/'none.tar').touch()
    with tarfile.open(tmp_path/'packed.tar', 'w:gz') as archive: archive.add(whole, 'x.png')
    for name in ('cut', 'none', 'packed'):
        with pytest.raises(BadInput, match=f'{name}.tar could not be loaded as an uncompressed tar file'):
            open_images(f'{tmp_path}/{name}.tar')
    assert images_fingerprint(open_images(whole)) == images_fingerprint(open_images(whole))


@pytest.mark.parametrize('change, complaint', [
    (lambda x: x[:1024] + b'\xff' + x[1025:], 'is damaged at byte 1024: fetch it again'),
    (lambda x: x[:2048], 'is cut off at byte 2048: fetch it again'),
    (lambda x: x + x, 'holds more behind its end at byte 4096')])
def test_a_tar_that_ends_too_early_is_refused(tmp_path, change, complaint):
    whole = open(tar(tmp_path/'x.tar', [(f'{i}.png', png(i)) for i in range(4)]), 'rb').read()
    (tmp_path/'Y.TAR').write_bytes(whole)
    assert len(open_images(f'{tmp_path}/Y.TAR')) == 4 and Crops(open_images(f'{tmp_path}/Y.TAR'), 16)[0]
    (tmp_path/'z.tar').write_bytes(change(whole))
    with pytest.raises(BadInput, match=f'z.tar {complaint}'): open_images(f'{tmp_path}/z.tar')


@pytest.mark.parametrize('source', ['{}#jpg', 'zoo:photos#jpg'])
def test_files_have_no_columns(tmp_path, source):
    (tmp_path/'x.png').write_bytes(png(0))
    with pytest.raises(BadInput): open_images(source.format(tmp_path))


def test_a_source_that_only_goes_forward_is_read_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', 0)   # seconds after every epoch
    file = parquet(tmp_path/'x.parquet', 12, 2)
    forward = load_dataset('parquet', data_files=file, split='train', streaming=True)
    crops = StreamedCrops(only_images(forward, file), 16)
    assert isinstance(crops.reader, Chain)
    whole = [batch.images for batch in image_batches(crops, 4, 9)]
    for batch, part in zip(whole[2:], image_batches(crops, 4, 9, 2, rank=1, world=2), strict=True):
        assert torch.equal(batch[1::2], part.images)


def test_shards_without_their_first_images(tmp_path):
    images = open_images('stream:' + parquet(tmp_path/'x.parquet', 23, 3))
    rest, held = hold_out(images, 7)
    assert isinstance(images, IterableDataset) and isinstance(rest, Shards) and int(rest.sizes.sum()) == 16
    kept = {row['bytes'] for row in held['image']}
    seen = [row['bytes'] for row in islice(crop_stream(rest, 16).undecoded(0), 32)]
    assert len(kept) == 7 and len(set(seen)) == 16 and not kept & set(seen)
    twice = rest.skip(3).skip(4)
    assert [row for row in twice] == [row for row in images][14:]
