"Teacher features on the disk: never the wrong ones, and none computed twice."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import errno
import io
import json
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from children import Children, photo_parquet, small_images
from conftest import SMALL
from datasets import Dataset
from PIL import Image
from torch import nn

from radio_nb.front import cli
from radio_nb.training import teacher_cache
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import plan_stages
from radio_nb.training.statistics import open_sources
from radio_nb.training.teacher_cache import Damaged, cache_key, fill_cache
from radio_nb.data.crops import Crops, RandomCrop
from radio_nb.data.files import lock
from radio_nb.data.images import UNDECODED, images_fingerprint, open_images
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.models.teachers import Teacher, load_teacher, timm_features

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def images(tmp_path_factory): return open_images(small_images(tmp_path_factory.mktemp('cache')/'images', 10))


def teacher(seed=0, name='small', scale=1.):
    "A small network with random weights that counts the images it has seen."
    torch.manual_seed(seed)
    model = timm.create_model('test_vit', num_classes=0, img_size=32)
    features, counts = timm_features(model), []
    def counting(pixels):
        counts.append(len(pixels))
        summary, spatial = features(pixels)
        return Features(summary, spatial*scale)
    made = Teacher(name, model, counting, 32)
    made.counts = counts
    return made


def fill(teachers, crops, folder, batch_size=1):
    return fill_cache(teachers, crops, folder, batch_size, new_accelerator(CPU))


class Killed(BaseException):
    "Stands in for a kill."


@pytest.mark.parametrize('dies_at', [3, 17, 30])
def test_a_killed_fill_goes_on(images, tmp_path, dies_at):
    "Of 40 crops 16 are recorded at a time; their features are not computed again."
    crops, whole, half = Crops(images, 32, views=4), teacher(), teacher()
    expected = fill({'small': whole}, crops, tmp_path/'whole')['small']
    assert sum(whole.counts) == 1 + crops.rows == 41   # the first is the probe
    features = half.features
    def dying(pixels):
        if len(half.counts) == dies_at + 1: raise Killed
        return features(pixels)
    half.features = dying
    with pytest.raises(Killed): fill({'small': half}, crops, tmp_path/'half')
    assert not [path for path in (tmp_path/'half').iterdir() if path.suffix != '.part']   # nobody reads it yet
    half.features = features
    half.counts.clear()
    found = fill({'small': half}, crops, tmp_path/'half')['small']
    assert sum(half.counts) == 1 + crops.rows - dies_at//16*16
    np.testing.assert_array_equal(expected.summary, found.summary)
    np.testing.assert_array_equal(expected.spatial, found.spatial)
    half.counts.clear()
    fill({'small': half}, crops, tmp_path/'half')
    assert half.counts == [1] and [path.suffix for path in (tmp_path/'half').iterdir()] == ['']   # the probe


def test_a_name_is_not_enough_to_share(images, tmp_path):
    "Two teachers of one name with other weights; and each gives what it would give without a cache."
    crops, one, other = Crops(images, 32, views=2), teacher(0), teacher(1)
    cached = [fill({'small': each}, crops, tmp_path)['small'] for each in (one, other)]
    assert len(list(tmp_path.iterdir())) == 2
    crop = crops[13]
    for each, known in zip((one, other), cached):
        remembered, computed = known(torch.tensor([crop.row])), each(crop.image[None]/255)
        torch.testing.assert_close(remembered.spatial, computed.spatial, atol=2e-3, rtol=2e-3)
    assert np.abs(cached[0].spatial - cached[1].spatial).max() > .1


def test_what_half_precision_cannot_hold_is_refused(images, tmp_path):
    message = 'teacher small gives values up to .*half precision cannot hold: leave out --cache'
    with pytest.raises(BadInput, match=message) as refused:
        fill({'small': teacher(scale=1e6)}, Crops(images, 32, views=2), tmp_path)
    assert '\n' not in str(refused.value)
    assert all(path.suffix == '.part' for path in tmp_path.iterdir())


def test_a_full_disk_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**9, 10**9 - 5, 5))
    flags = ['--cache', str(tmp_path/'cache'), *SMALL, '--out', str(tmp_path/'run')]
    with pytest.raises(SystemExit) as exit: cli.main([*'distill --depth 1 --views 2 --device cpu'.split(), *flags])
    error = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and '\n' not in error
    assert 'has room for 0 MB' in error and 'take fewer views, or another --cache' in error
    assert not list((tmp_path/'cache').iterdir())


def test_one_changed_image_changes_the_key(tmp_path):
    folder, small = small_images(tmp_path/'images', 4), teacher()
    def key():
        images = open_images(folder)
        return cache_key(small, Crops(images, 32, views=2), images_fingerprint(images, thorough=True))
    first = key()
    assert key() == first
    file = Path(folder)/'02.png'
    stat = file.stat()
    Image.new('RGB', (96, 96)).save(file)
    assert key()['images'] != first['images']
    assert key() | {'images': ''} == first | {'images': ''}
    before = key()
    os.utime(file, ns=(stat.st_atime_ns, file.stat().st_mtime_ns + 1))   # of the same size, written a moment later
    assert key() != before


def test_one_changed_image_within_a_file_changes_the_key(tmp_path):
    def png(shade):
        Image.new('RGB', (32, 32), (shade, 0, 0)).save(file := io.BytesIO(), 'png')
        return {'bytes': file.getvalue(), 'path': None}
    def key(*shades):
        rows = {'image': [png(shade) for shade in shades]}
        return images_fingerprint(Dataset.from_dict(rows, features=UNDECODED))
    assert key(1, 2, 3) == key(1, 2, 3)
    assert len({key(1, 2, 3), key(1, 2, 4), key(2, 1, 3), key(1, 2)}) == 4


def test_a_row_without_an_image_can_be_in_a_cached_set(tmp_path):
    "Sets of the hub have such rows; they are skipped like images that are broken."
    photo_parquet(tmp_path/'images.parquet', 3)
    rows = open_images(str(tmp_path/'images.parquet'))['image']
    holes = Dataset.from_dict({'image': [*rows, None]}, features=UNDECODED)
    crops = Crops(holes, 32, views=1)
    cached = fill({'small': teacher()}, crops, tmp_path/'cache')['small']
    assert len(cached.spatial) == 4 + 1 and np.isfinite(cached.spatial).all()


def test_crops_of_a_draft_are_others(images):
    keys = [cache_key(teacher(), Crops(images, 32, views=2, draft=draft), 'images') for draft in (False, True)]
    assert keys[0] != keys[1]


def test_crops_are_as_large_as_the_recipe_says(images):
    recipe = Recipe('zoo:photos', ('small',), '', size=32, least_area=.8)
    plan, accelerator = plan_stages(recipe, ['small'])[0], new_accelerator(CPU)
    [source] = open_sources(recipe, plan, images, {'small': teacher()}, accelerator, CPU)
    assert source.crops.crop == RandomCrop(.8)
    keys = [cache_key(teacher(), Crops(images, 32, views=2, crop=RandomCrop(least)), 'images') for least in (.4, .8)]
    assert keys[0] == cache_key(teacher(), Crops(images, 32, views=2), 'images') and 'least_area' not in keys[0]
    assert keys[1]['least_area'] == .8 and keys[1]['pixels'] != keys[0]['pixels']


def test_a_crop_of_one_s_own_is_not_cached(images):
    "Two of one name may cut differently."
    recipe = Recipe('zoo:photos', ('small',), '', size=32, views=2, cache='cache')
    plan, accelerator = plan_stages(recipe, ['small'])[0], new_accelerator(CPU)
    with pytest.raises(BadInput, match='a cache cannot tell one crop of your own from another'):
        open_sources(recipe, plan, images, {'small': teacher()}, accelerator, CPU, crop=lambda *_: None)


def test_a_teacher_is_more_than_its_weights(images, tmp_path):
    "Two of one class and one state: another size, or another normalization of the input, are others."
    crops, nothing = Crops(images, 32, views=2), nn.Identity()
    made = [Teacher('a', nothing, None, 32), Teacher('a', nothing, None, 64),
            Teacher('a', nothing, None, 32, mean=(.5, .5, .5))]
    keys = [cache_key(each, crops, 'images') for each in made]
    assert len({str(key) for key in keys}) == 3


def test_a_killed_fill_goes_on_with_batches_of_another_size(images, tmp_path):
    "Row 1: batches were counted, and rows of zeros kept as complete. Small batches first, then large ones, and back."
    crops, expected = Crops(images, 32, views=12), fill({'small': teacher()}, Crops(images, 32, views=12), tmp_path/'a')
    dying, features = teacher(), teacher().features
    for batch_size, dies_at in ((3, 20), (5, 9), (2, 20), (120, 0)):
        seen = []
        def some(pixels, seen=seen, dies_at=dies_at):
            seen.append(len(pixels))
            if dies_at and len(seen) == dies_at + 1: raise Killed
            return features(pixels)
        dying.features = some
        if dies_at:
            with pytest.raises(Killed): fill({'small': dying}, crops, tmp_path/'b', batch_size)
    found = fill({'small': dying}, crops, tmp_path/'b', batch_size)['small']
    assert sum(seen) == 1 + 120 - 96   # the probe, and what was not recorded: 16 batches of 3, 16 of 5, 48 of 2 were
    assert (found.checksum != 0).all()
    torch.testing.assert_close(found(torch.arange(120)), expected['small'](torch.arange(120)), rtol=1e-2, atol=1e-3)


def fill_slowly(images, folder, batch_size, names='a', pause=.02):
    "Fill entries in a process of its own, and print how many images each of its teachers has seen."
    teachers = {name: teacher(ord(name), name) for name in names}
    def slow(features):
        def wait(pixels):
            time.sleep(pause)
            return features(pixels)
        return wait
    for each in teachers.values(): each.features = slow(each.features)
    cached = fill(teachers, Crops(open_images(images), 32, views=4), Path(folder), batch_size)
    for each in cached.values(): each(torch.arange(40))
    print('seen', json.dumps({name: sum(each.counts) for name, each in teachers.items()}))


def recorded(folder):
    "How many rows of the parts in a folder are recorded, or -1."
    try: return min(int((np.load(path)[:-1] != 0).sum()) for path in folder.glob('*.part/checksum.npy'))
    except (ValueError, OSError): return -1   # there is none yet, or half of one


@pytest.mark.parametrize('again, batch_size', [(1, 7), (3, 6)])
def test_a_fill_by_two_processes_goes_on_with_another_number_of_them(tmp_path, again, batch_size):
    "Row 1: a row counts when the process that had it has written it."
    images, folder = small_images(tmp_path/'images', 10), tmp_path/'cache'
    first = Children(2, tmp_path/'first', fill_slowly, images, folder, 2, 'a', .1)
    while recorded(folder) < 32: assert first.alive(), first.output()
    for process in first.processes: process.kill()
    for process in first.processes: process.join()
    there = recorded(folder)
    assert 32 <= there < 40   # more where a machine is too busy to be asked in time
    second = Children(again, tmp_path/'second', fill_slowly, images, folder, batch_size)
    second.wait()
    seen = [json.loads(log.read_text().split('seen ')[1])['a'] for log in second.logs]
    assert sum(seen) == again + 40 - there   # a probe each, and what was not there
    crops, expected = Crops(open_images(images), 32, views=4), teacher(ord('a'), 'a')
    found = fill({'a': expected}, crops, folder)['a']
    assert expected.counts == [1]
    for row in range(40):
        own = expected(crops.by_row()[row].image[None]/255)
        torch.testing.assert_close(found(torch.tensor([row])), own, rtol=1e-2, atol=2e-3)


def test_two_runs_that_fill_one_cache_at_once(tmp_path):
    "Row 21: neither computes what the other has, and the one that waits says for whom; in any order of the teachers."
    images = small_images(tmp_path/'images', 10)
    runs = [Children(1, tmp_path/f'run{names}', fill_slowly, images, tmp_path/'cache', 4, names, .1)
            for names in ('abc', 'cba')]
    for run in runs: run.wait()
    seen = [json.loads(run.output().split('seen ')[1].splitlines()[0]) for run in runs]
    for name in 'abc': assert sum(one[name] for one in seen) == 2 + 40   # a probe each
    waited, = (run.output() for run in runs if 'is in use by process' in run.output())
    assert waited.count('; waiting') == 1
    assert {path.suffix for path in (tmp_path/'cache').iterdir()} == {''}


def test_all_processes_of_a_run_wait_for_another_run(tmp_path):
    "Row 21."
    images, folder = small_images(tmp_path/'images', 10), tmp_path/'cache'
    key = cache_key(teacher(ord('a')), Crops(open_images(images), 32, views=4),
                    images_fingerprint(open_images(images), thorough=True))
    folder.mkdir()
    name = teacher_cache._Entry(folder, key, teacher(ord('a'))).folder
    with lock(name.with_suffix('.lock'), 'the cache'):
        waiting = Children(2, tmp_path/'run', fill_slowly, images, folder, 4)
        while '; waiting' not in waiting.output(): assert waiting.alive(), waiting.output()
        time.sleep(2.5)
        assert waiting.alive() and list(folder.iterdir()) == [name.with_suffix('.lock')]
    waiting.wait()
    assert waiting.output().count('; waiting') == 1 and waiting.output().count('seen') == 2


def test_an_entry_that_another_run_has_finished_meanwhile_is_read(images, tmp_path, monkeypatch):
    "Row 21: it looks again when it has the lock."
    crops, late = Crops(images, 32, views=2), teacher()
    def lock_when_done(path, what, wait):
        monkeypatch.setattr(teacher_cache, 'lock', lock)
        fill({'small': teacher()}, crops, tmp_path)
        return lock(path, what, wait)
    monkeypatch.setattr(teacher_cache, 'lock', lock_when_done)
    fill({'small': late}, crops, tmp_path)
    assert late.counts == [1]


def cut(path): path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    "One bit of row 3."
    array = np.load(path, mmap_mode='r+')
    array[3] = np.nextafter(array[3], np.float16(1e4))
    array.flush()


def of_another(path): path.write_text(json.dumps(json.loads(path.read_text()) | {'seed': 7}))


DAMAGES = [('spatial.npy', cut), ('summary.npy', cut), ('checksum.npy', cut), ('spatial.npy', Path.unlink),
           ('key.json', Path.unlink), ('key.json', cut), ('key.json', of_another),
           ('key.json', lambda f: f.write_text('[]')),
           ('key.json', lambda f: f.write_bytes(b'\xff\xfe')), ('checksum.npy', lambda f: f.write_bytes(b'')),
           ('spatial.npy', lambda f: f.write_bytes(b'PK\x03\x04 of another program')),
           ('checksum.npy', lambda f: f.write_bytes(f.read_bytes().replace(b'), }', b'+, }'))),   # a bit of its header
           ('summary.npy', lambda f: np.save(f, np.zeros((21, 64)))), ('summary.npy', lambda f: np.save(f, 'text'))]


@pytest.mark.parametrize('file, damage', [*DAMAGES, ('spatial.npy', flip), ('summary.npy', flip)])
def test_a_damaged_cache_is_named_and_left_alone(images, tmp_path, file, damage):
    "Row 22."
    crops = Crops(images, 32, views=2)
    fill({'small': teacher()}, crops, tmp_path)
    folder, = tmp_path.iterdir()
    damage(folder/file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Damaged) as refused:
        cached = fill({'small': teacher()}, crops, tmp_path)['small']
        for row in range(20): cached(torch.tensor([row]))
    message = str(refused.value)
    assert str(folder) in message and 'delete this folder' in message and '\n' not in message
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('file, damage', DAMAGES)
def test_a_damaged_part_is_begun_again_with_a_notice(images, tmp_path, file, damage, capsys):
    "Row 22."
    crops, whole = Crops(images, 32, views=2), teacher()
    expected = fill({'small': whole}, crops, tmp_path/'whole')['small']
    folder = shutil.copytree(expected.folder, (tmp_path/'half'/expected.folder.name).with_suffix('.part'))
    damage(folder/file)
    whole.counts.clear()
    found = fill({'small': whole}, crops, tmp_path/'half')['small']
    assert sum(whole.counts) == 1 + 20 and 'is damaged' in (notice := capsys.readouterr().err)
    assert notice.count('it is begun again') == 1
    np.testing.assert_array_equal(found.spatial, expected.spatial)


def test_a_disk_that_fills_up_while_a_cache_is_filled(images, tmp_path, monkeypatch):
    "Row 22: one line, and the next run goes on, although the disk would not hold all of it twice."
    crops, small, sync, synced = Crops(images, 32, views=4), teacher(), os.fsync, []
    def full(file):
        synced.append(file)
        if len(synced) > 7: raise OSError(errno.ENOSPC, 'No space left on device')   # the probe took 3, 16 rows 3
        sync(file)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(BadInput, match='could not be written .No space left on device.: make room, and the same') as e:
        fill({'small': small}, crops, tmp_path)
    assert '\n' not in str(e.value)
    monkeypatch.setattr(os, 'fsync', sync)
    part, = tmp_path.glob('*.part')
    left = sum(path.stat().st_size - 512*path.stat().st_blocks for path in part.glob('*.npy'))
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: usage(10**9, 0, max(left, 0) + 1000))
    small.counts.clear()
    cached = fill({'small': small}, crops, tmp_path)['small']
    assert sum(small.counts) == 1 + 40 - 16
    cached(torch.arange(40))


@pytest.mark.parametrize('folder', ['file', 'file/cache'])
def test_a_cache_that_cannot_be_made_is_refused_in_one_line(images, tmp_path, folder):
    (tmp_path/'file').touch()
    with pytest.raises(BadInput, match='could not be written'):
        fill({'small': teacher()}, Crops(images, 32, views=2), tmp_path/folder)


def test_a_whole_cache_that_nobody_may_write_to_is_read(images, tmp_path, monkeypatch):
    crops = Crops(images, 32, views=2)
    fill({'small': teacher()}, crops, tmp_path)
    def refuse(*_): raise PermissionError
    for name in ('lock', 'check_room'): monkeypatch.setattr(teacher_cache, name, refuse)
    assert len(fill({'small': teacher()}, crops, tmp_path)['small'](torch.arange(20)).spatial) == 20


def test_architectures_that_share_weights_do_not_share_a_cache(images, tmp_path):
    "Row 2: with one file, `tf_` networks pad as TensorFlow does."
    torch.save(timm.create_model('efficientnet_lite0', num_classes=0).state_dict(), file := tmp_path/'lite0.pth')
    one, other = (load_teacher(f'timm:{name}@{file}#64', name='lite0')
                  for name in ('efficientnet_lite0', 'tf_efficientnet_lite0'))
    other.mean, other.std = one.mean, one.std
    keys = [cache_key(each, Crops(images, 64, views=2), 'images') for each in (one, other)]
    assert keys[0] | {'teacher': ''} == keys[1] | {'teacher': ''} and keys[0] != keys[1]


def test_a_network_of_one_s_own_that_reads_other_features_is_not_served_those_of_another(images, tmp_path):
    "Row 2: of one class and one state, so that only what it gives tells it apart; a source of its own is the cure."
    crops, model = Crops(images, 32, views=2), timm.create_model('test_vit', num_classes=0, img_size=32)
    def early(x):
        spatial = model.patch_embed.proj(x).movedim(1, -1)
        return Features(spatial.mean((1, 2)), spatial)
    fill({'mine': load_teacher(model, timm_features(model), 32, 'mine')}, crops, tmp_path)
    with pytest.raises(BadInput, match='other features than teacher mine gives .*a source of its own'):
        fill({'mine': load_teacher(model, early, 32, 'mine')}, crops, tmp_path)
    own = load_teacher(model, early, 32, 'mine', source='patch embedding')
    cached = fill({'mine': own}, crops, tmp_path)['mine']
    torch.testing.assert_close(cached(torch.tensor([3])), own(crops.by_row()[3].image[None]/255), rtol=1e-2, atol=1e-3)


def test_two_names_of_one_teacher_share_an_entry(images, tmp_path):
    one, same = teacher(name='one'), teacher(name='same')
    fill({'one': one, 'same': same}, Crops(images, 32, views=2), tmp_path)
    assert sorted([sum(one.counts), sum(same.counts)]) == [1, 21] and len(list(tmp_path.iterdir())) == 1


def test_pixels_that_another_decoder_made_have_another_key(images):
    "Of the same files: another version of a library, say."
    crops = Crops(images, 32, views=2)
    before = cache_key(teacher(), crops, 'images')
    class Darker(Crops):
        def by_row(self): return Darker(self.images, 32, self.seed, self.crop, shuffle=False, views=2)
        def __getitem__(self, position):
            crop = super().__getitem__(position)
            return crop._replace(image=crop.image//2)
    after = cache_key(teacher(), Darker(images, 32, views=2), 'images')
    assert before != after and before | {'pixels': ''} == after | {'pixels': ''}


def test_what_half_precision_would_lose_is_refused(images, tmp_path):
    "Features that are all tiny would have been rounded to nothing."
    with pytest.raises(BadInput, match='half precision cannot hold'):
        fill({'small': teacher(scale=1e-7)}, Crops(images, 32, views=2), tmp_path)
