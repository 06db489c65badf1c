"Teacher features on the disk: never the wrong ones, and none computed twice."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import io
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from children import photo_parquet, small_images
from conftest import SMALL
from datasets import Dataset
from PIL import Image
from torch import nn

from radio_nb.front import cli
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import plan_stages
from radio_nb.training.statistics import open_sources
from radio_nb.training.teacher_cache import cache_key, fill_cache, images_fingerprint
from radio_nb.data.crops import Crops
from radio_nb.data.images import UNDECODED, open_images
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.models.teachers import Teacher, timm_features

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


def fill(teachers, crops, folder): return fill_cache(teachers, crops, folder, 1, CPU)


class Killed(BaseException):
    "Stands in for a kill."


@pytest.mark.parametrize('dies_at', [3, 17, 30])
def test_a_killed_fill_goes_on(images, tmp_path, dies_at):
    "Of 40 crops 16 are recorded at a time; their features are not computed again."
    crops, whole, half = Crops(images, 32, views=4), teacher(), teacher()
    expected = fill({'small': whole}, crops, tmp_path/'whole')['small']
    assert sum(whole.counts) == 1 + crops.rows == 41   # the first is the grey image that tells the shapes
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
    assert not half.counts and [path.suffix for path in (tmp_path/'half').iterdir()] == ['']


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
    def key(): return cache_key(small, Crops(open_images(folder), 32, views=2), images_fingerprint(open_images(folder)))
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
    assert len(cached.spatial) == 4 and np.isfinite(cached.spatial).all()


def test_crops_of_a_draft_are_others(images):
    keys = [cache_key(teacher(), Crops(images, 32, views=2, draft=draft), 'images') for draft in (False, True)]
    assert keys[0] != keys[1]


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
