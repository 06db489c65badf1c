"""Features of many images and labels for them: what a kill leaves, what the files hold, what is refused."""
import radio_nb  # noqa: F401, I001  before open_clip, so that torchvision can be imported
import csv
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from children import Children, other_teacher, small_images
from children import command as begin
from conftest import SMALL
from datasets import Dataset
from safetensors.numpy import load_file
from safetensors.torch import save_file

from radio_nb.data import feature_files
from radio_nb.data.crops import centre_crop
from radio_nb.data.feature_files import part_rows, read_features
from radio_nb.data.files import Stopped, lock
from radio_nb.data.images import decode, open_images
from radio_nb.evaluation import suites, zero_shot
from radio_nb.evaluation.scores import EvalData
from radio_nb.evaluation.zero_shot import TextTower, class_embeddings
from radio_nb.front import cli, evaluate, features
from radio_nb.front.features import FeatureSource, label_images, save_features
from radio_nb.models.student import Student
from radio_nb.models.teachers import load_teacher
from radio_nb.targets.features import Features
from radio_nb.training.recipe import recipe_toml
from radio_nb.training.run_folder import open_recipe

ENDINGS = ('.parquet', '.safetensors', '.npy')
CLIP = 'ViT-S-32-alt'
CLOSE = {'atol': 5e-3, 'rtol': 1e-2} if torch.cuda.is_available() else {'atol': 1e-4, 'rtol': 1e-4}   # TF32


def few_rows(*args):
    "The command line with parts of eight images, in a process of its own."
    feature_files.PART_ROWS = 8
    begin(*args)


def slow(*args):
    "The same, and so slow that it can be met at work."
    check = features.check_finite
    def late(*args):
        time.sleep(.1)
        check(*args)
    features.check_finite = late
    few_rows(*args)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A teacher, a folder with 36 images two of which cannot be read, and the grids that an undisturbed command writes."
    home = tmp_path_factory.mktemp('features')
    images = Path(small_images(home/'images', 36, 40))
    (images/'05.png').write_bytes((images/'05.png').read_bytes()[:300])
    (images/'17.png').write_text('no image')
    spec = other_teacher(home/'small_vit.safetensors').replace('#64', '#32')
    for ending in ENDINGS:
        Children(1, home/f'log{ending}', few_rows, *flags(spec, images, home/f'whole{ending}')).wait()
    return spec, images, home


def flags(spec, images, out): return ['features', spec, '--images', images, '--out', out, '--what', 'grid',
                                      '--batch-size', '3']


def same_files(out, whole):
    "The bytes of two files of features; of the index beside an array, too."
    beside = [(Path(f'{a}.json'), Path(f'{b}.json')) for a, b in [(out, whole)] if a.suffix == '.npy']
    return all(a.read_bytes() == b.read_bytes() for a, b in [(out, whole), *beside])


def parts_of(out): return sorted(path.name for path in Path(f'{out}.parts').glob('0*.safetensors'))


@pytest.mark.parametrize('ending', ENDINGS)
def test_killed_again_and_again_it_writes_the_same_file(world, tmp_path, ending):
    spec, images, home = world
    out, killed, n = tmp_path/f'x{ending}', 0, 0
    while not out.exists():
        before, n = len(parts_of(out)), n + 1
        child = Children(1, tmp_path/f'log{n}', slow if n <= 2 else few_rows, *flags(spec, images, out))
        while child.alive() and len(parts_of(out)) < before + 2: time.sleep(.0005)
        if n <= 2 and child.alive():
            child.processes[0].kill()
            killed += 1
        child.processes[0].join()
    assert killed == 2 and same_files(out, home/f'whole{ending}') and not Path(f'{out}.parts').exists()


class Killed(BaseException):
    "Stands in for a kill at a write."


@pytest.mark.parametrize('ending', ENDINGS)
def test_a_kill_at_every_write_leaves_what_the_same_command_finishes(world, tmp_path, monkeypatch, ending):
    "A part, the request, the index, the last step: each write in turn is the last, before it or just after it."
    spec, images, home = world
    monkeypatch.setattr(feature_files, 'PART_ROWS', 8)
    replace, end, calls = os.replace, None, []
    def dying(a, b):
        calls.append(b)
        if len(calls) == end: raise Killed
        replace(a, b)
        if len(calls) == -(end or 0): raise Killed
    monkeypatch.setattr(os, 'replace', dying)
    writes = 7 + (ending == '.npy')   # request, five parts, (index,) file
    for moment in range(1 if ending == '.npy' else writes, writes + 1):
        for end in (moment, -moment):
            calls, out = [], tmp_path/f'{end}{ending}'
            with pytest.raises(Killed): cli.main(list(map(str, flags(spec, images, out))))
            end = None
            cli.main(list(map(str, flags(spec, images, out))))
            index = read_features(out)[1]
            assert len(index.paths) == 34 and not Path(f'{out}.parts').exists()
            assert same_files(out, home/f'whole{ending}')
    calls = []
    cli.main(list(map(str, flags(spec, images, tmp_path/f'x{ending}'))))
    assert len(calls) == writes


def test_ctrl_c_ends_with_130_and_the_command_that_goes_on(world, tmp_path):
    spec, images, home = world
    out = tmp_path/'my features.npy'
    child = Children(1, tmp_path/'log', slow, *flags(spec, images, out))
    while child.alive() and not parts_of(out): time.sleep(.0005)
    os.kill(child.processes[0].pid, signal.SIGINT)
    child.wait(130)
    kept = len(parts_of(out))
    said = child.output().strip().splitlines()[-1]
    assert said.startswith(f'radio-nb: stopped; the features of {8*kept} of 36 images are kept; to go on: radio-nb ')
    assert f"features '{spec}'" in said and f"--out '{out}'" in said and '--resume' not in said
    Children(1, tmp_path/'log', few_rows, *flags(spec, images, out)).wait()
    assert same_files(out, home/'whole.npy')


def test_every_row_is_the_image_whose_name_it_bears(world):
    spec, images, home = world
    teacher, rows = load_teacher(spec), open_images(str(images))['image']
    found, index = read_features(home/'whole.npy')
    assert found.shape == (34, 2, 2, 64) and found.dtype == np.float32 and isinstance(found, np.memmap)
    assert index.rows == [i for i in range(36) if i not in (5, 17)]
    assert index.paths == [rows[i]['path'] for i in index.rows]
    assert {Path(path).name: why.split()[0] for path, why in index.skipped.items()} == {'05.png': 'image',
                                                                                      '17.png': 'cannot'}
    for row, path in zip(found, index.paths):
        crop = centre_crop(decode({'path': path, 'bytes': None}), 32)
        np.testing.assert_allclose(row, teacher(crop[None]/255).spatial[0], **CLOSE)


def test_the_three_formats_say_the_same_and_others_can_read_them(world):
    home = world[2]
    found = {ending: read_features(home/f'whole{ending}') for ending in ENDINGS}
    for array, index in found.values():
        assert np.array_equal(array, found['.npy'][0]) and index == found['.npy'][1]
    table, tensors = pd.read_parquet(home/'whole.parquet'), load_file(home/'whole.safetensors')
    paths = found['.npy'][1].paths
    assert table.path.tolist() == paths == json.loads(tensors['paths'].tobytes())
    assert np.array_equal(np.stack(table.features).reshape(-1, 2, 2, 64), tensors['features'])
    assert np.array_equal(np.load(home/'whole.npy'), tensors['features'])
    assert table.row.tolist() == tensors['rows'].tolist() == found['.npy'][1].rows


def test_a_student_gives_its_own_features_or_those_of_an_adaptor_at_any_size(run, tmp_path, capsys):
    images = small_images(tmp_path/'images', 3, 96)
    (tmp_path/'images'/'broken.jpg').write_text('no image')
    def made(name, *more):
        cli.main(['features', str(run[0]), '--images', images, '--out', str(tmp_path/name), *more])
        return read_features(tmp_path/name)
    own, index = made('own.npy')
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith('1 image was skipped') and 'broken.jpg: cannot be identified' in printed[0]
    assert 'holds the features of 3 images, 192 for each.' in printed[1] and 'read_features' in printed[-1]
    assert own.shape == (3, 192) and index.request['size'] == '64x64'   # as it was trained
    grid, _ = made('grid.parquet', '--what', 'grid', '--size', '64x96')
    assert grid.shape == (3, 4, 6, 192)
    adapted, index = made('adapted.safetensors', '--adaptor', 'u2netp', '--size', '96')
    crops = torch.stack([centre_crop(decode({'path': path, 'bytes': None}), 96) for path in index.paths])
    with torch.no_grad(): expected = Student.from_pretrained(run[0])(crops/255)['u2netp'].summary
    np.testing.assert_allclose(adapted, expected, **CLOSE)
    # a student alone, without the run around it
    shutil.copytree(run[0], tmp_path/'alone', ignore=lambda *_: ['recipe.toml', 'checkpoints', 'report.html'])
    save_features(str(tmp_path/'alone'), images, tmp_path/'alone.npy', size=(64, 64))
    assert np.array_equal(np.load(tmp_path/'alone.npy'), own)


def test_processes_that_decode_change_nothing_and_a_batch_size_may_be_lowered(world, tmp_path):
    spec, images, home = world
    cli.main([*map(str, flags(spec, images, tmp_path/'x.npy')), '--workers', '2'])
    assert np.load(tmp_path/'x.npy').shape == (34, 2, 2, 64)
    asked = iter(range(99))
    with pytest.raises(Stopped, match='0 of 36 images are kept'):
        save_features(spec, str(images), tmp_path/'y.npy', what='grid', stopped=lambda: next(asked) == 1)
    save_features(spec, str(images), tmp_path/'y.npy', what='grid', batch_size=2)
    np.testing.assert_allclose(np.load(tmp_path/'x.npy'), np.load(tmp_path/'y.npy'), **CLOSE)


def test_what_is_there_is_of_this_command_or_refused(world, tmp_path, refused, capsys):
    spec, images, home = world
    out = tmp_path/'x.npy'
    for name in ('x.npy', 'x.npy.json'): shutil.copy(home/name.replace('x', 'whole'), tmp_path/name)
    before = out.read_bytes(), out.stat().st_mtime_ns
    cli.main(list(map(str, flags(spec, images, out))))   # the same: nothing to do
    assert 'holds the features of 34 images, 2 × 2 × 64 for each' in capsys.readouterr().out
    def command(*more, at=out, source=images): return refused(*flags(spec, source, at), *more)
    assert 'x.npy is of another request (what is grid there and summary here): choose' in command('--what', 'summary')
    assert 'contents is' in command(source='zoo:photos')
    assert 'weights is' in refused('features', f'{spec.split("@")[0]}@random#32', *flags(0, images, out)[2:])
    np.save(out, np.zeros(3))   # somebody else's, beside an index of ours
    assert 'x.npy is not a file of features (it does not belong to the .json beside it)' in command()
    np.save(tmp_path/'alien.npy', np.zeros(3))
    assert 'alien.npy is not a file of features' in command(at=tmp_path/'alien.npy')
    (tmp_path/'y.parquet.parts').mkdir()
    (tmp_path/'y.parquet.parts'/'thesis.txt').write_text('precious')
    assert 'is not empty and holds no features' in command(at=tmp_path/'y.parquet')
    assert (tmp_path/'y.parquet.parts'/'thesis.txt').read_text() == 'precious'
    assert before[0] == (home/'whole.npy').read_bytes()


def test_another_layer_of_the_same_teacher_is_another_request(world, tmp_path, refused):
    "The weights are the same, and the file of the first layer was taken for that of the second."
    spec, images, _ = world
    first, second = (spec.replace('@', f'/{layer}@') for layer in (0, 1))
    cli.main(list(map(str, flags(first, images, tmp_path/'x.npy'))))
    error = refused(*flags(second, images, tmp_path/'x.npy'))
    assert 'x.npy is of another request (output is ' in error and '/0 there and ' in error and '/1 here)' in error


def test_images_of_a_table_that_cannot_be_read_are_all_counted(tmp_path):
    "Two with one name were one."
    good = small_images(tmp_path/'images', 1, 40)
    rows = [{'bytes': (Path(good)/'00.png').read_bytes(), 'path': 'a.png'}, None,
            *[{'bytes': b'no image', 'path': 'b.png'}]*2]
    table = Dataset.from_dict({'image': rows}, features=datasets.Features({'image': datasets.Image(decode=False)}))
    table.to_parquet(str(tmp_path/'t.parquet'))
    index = save_features('timm:test_vit@random#32', str(tmp_path/'t.parquet'), tmp_path/'x.npy')
    assert index.rows == [0] and index.paths == ['a.png']
    assert list(index.skipped) == ['row 1', 'b.png of row 2', 'b.png of row 3']


def test_parts_of_another_command_and_damaged_parts_are_named(world, tmp_path, refused, monkeypatch):
    spec, images, home = world
    monkeypatch.setattr(feature_files, 'PART_ROWS', 8)
    out, asked = tmp_path/'x.parquet', iter(range(99))
    with pytest.raises(Stopped): save_features(spec, str(images), out, what='grid', batch_size=3,
                                               stopped=lambda: next(asked) == 7)
    assert 'x.parquet.parts is of another request (what is grid' in refused(*flags(spec, images, out)[:-4])
    part = Path(f'{out}.parts')/parts_of(out)[0]
    whole = part.read_bytes()
    part.write_bytes(whole[:-9] + b'different')
    error = refused(*flags(spec, images, out))
    assert '000000.safetensors is damaged' in error and 'delete it, and the same command makes it again' in error
    part.unlink()
    cli.main(list(map(str, flags(spec, images, out))))
    assert same_files(out, home/'whole.parquet')


def test_two_commands_do_not_write_one_file(world, tmp_path, refused):
    spec, images, _ = world
    with lock(tmp_path/'x.npy.lock', 'x.npy'):
        assert 'x.npy is in use by ' in refused(*flags(spec, images, tmp_path/'x.npy'))


@pytest.mark.parametrize('change, message', [
    ({'--out': 'x.csv'}, '--out x.csv: features are written as .parquet, .safetensors, .npy'),
    ({'model': 'runs/none'}, 'runs/none is neither the folder of a run nor a teacher such as zoo:u2netp'),
    ({'model': 'zoo:u2net'}, "unknown zoo model 'u2net': did you mean u2netp?"),
    ({'model': '.'}, 'holds no student'),
    ({'--adaptor': 'clip'}, 'zoo:u2netp#32 is a teacher, and only students have adaptors'),
    ({'--size': '64'}, 'zoo:u2netp#32 says its size already: leave out --size'),
    ({'model': 'timm:mixer_s32_224@random', '--size': '32x64'}, 'timm:mixer_s32_224@random cannot see 32 × 64 pixels'),
    ({'model': 'hf:siglip2_vision_model@random'}, 'cannot see 224 × 224 pixels'),   # it wants more than images
    ({'--size': 'large'}, "size 'large' is neither a side such as 224"),
    ({'--batch-size': '0'}, '--batch-size is 0, but must be at least 1'),
    ({'--workers': '-1'}, '--workers is -1, but must be at least 0'),
    ({'--images': 'stream:zoo:photos'}, 'of a stream nobody knows how long it is'),
    ({'--images': '/nowhere'}, 'no such folder or file: /nowhere'),
])
def test_mistakes_end_with_one_line_and_leave_nothing(refused, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    given = {'model': 'zoo:u2netp#32', '--images': 'zoo:photos', '--out': 'x.npy'} | change
    assert message in refused('features', given.pop('model'), *(word for pair in given.items() for word in pair))
    assert not list(tmp_path.iterdir())


def test_adaptors_and_sizes_that_a_student_does_not_have(run, refused, tmp_path):
    def command(*more): return refused('features', run[0], '--images', 'zoo:photos', '--out', tmp_path/'x.npy', *more)
    assert "unknown adaptor 'u2net': did you mean u2netp?" in command('--adaptor', 'u2net')
    assert 'a student with patches of 16 cannot see 60 × 60 pixels' in command('--size', '60')
    assert not list(tmp_path.iterdir())


def test_a_grid_that_was_not_learned_is_not_written(run, refused, tmp_path):
    mine = shutil.copytree(run[0], tmp_path/'mine')
    recipe = open_recipe(mine)
    (mine/'recipe.toml').write_text(recipe_toml(replace(recipe, spatial_weights=(0.,))))
    asked = '--images', 'zoo:photos', '--out', tmp_path/'x.npy', '--adaptor', 'u2netp', '--what', 'grid'
    assert 'the student did not learn the grid of u2netp' in refused('features', mine, *asked)
    assert [path.name for path in tmp_path.iterdir()] == ['mine']


def test_a_teacher_sees_other_shapes_where_it_can(world, tmp_path):
    spec, images, _ = world
    cli.main(['features', spec.removesuffix('#32'), '--images', str(images), '--out', str(tmp_path/'x.npy'),
              '--what', 'grid', '--size', '32x64'])
    assert np.load(tmp_path/'x.npy').shape == (34, 2, 4, 64)


def test_a_folder_in_which_nothing_can_be_read(refused, tmp_path):
    (tmp_path/'images').mkdir()
    for name in ('a.png', 'b.png'): (tmp_path/'images'/name).write_text('no image')
    for command in (['features', 'zoo:u2netp#32', '--out', tmp_path/'x.npy'],
                    ['zero-shot', f'open_clip:{CLIP}@random', '--labels', 'cat', 'dog']):
        assert 'none of 2 images can be read; the first: ' in refused(*command, '--images', tmp_path/'images')


def test_features_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    broken = FeatureSource('broken', lambda x: Features(x.flatten(1)/0, x), (32, 32), torch.device('cpu'), '')
    with pytest.raises(ValueError, match='features of broken are not finite'): features.row_shape(broken, 'summary')


def much(folder, n, width):
    "The features of many images at once, and how much memory that took, in MB."
    def features_of(images): return Features(images.mean((1, 2, 3))[:, None].expand(-1, width), images)
    source = FeatureSource('wide', features_of, (32, 32), torch.device('cpu'), '')
    images = Dataset.from_dict({'image': open_images('zoo:photos')['image'][:1]*n})
    feature_files.PART_BYTES = 4 << 20
    def written(images, name):
        (folder/name).mkdir()
        features.write_parts(source, 'summary', images, folder/name, batch_size=4)
        for ending in ENDINGS: feature_files.join_parts(folder/name, folder/f'{name}{ending}', {})
    written(images.select(range(8)), 'few')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    written(images, 'many')
    print('grew by', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    "120 images of 1 MB of features each, in parts of 4 MB: all of them at once would be 120 MB."
    child = Children(1, tmp_path/'log', much, tmp_path, 120, 1 << 18)
    child.wait()
    assert int(child.output().split('grew by')[1]) < 40
    assert read_features(tmp_path/'many.npy')[0].shape == (120, 1 << 18)


def test_parts_cover_every_row_once():
    for n, shape in ((1, (5,)), (256, (5,)), (257, (5,)), (1000, (64, 64, 1024)), (3, (9999, 9999))):
        rows = part_rows(n, shape)
        assert [i for part in rows for i in part] == list(range(n))


# zero-shot

@pytest.fixture(scope='module')
def clip_run(tmp_path_factory):
    "A run with a CLIP of random weights, drawn from seed 3, and one without random weights, beside the file of it."
    home = tmp_path_factory.mktemp('clip')
    small = [*SMALL[SMALL.index('--size'):], '--seed', '3']
    torch.manual_seed(0)
    weights = open_clip.create_model(CLIP).state_dict()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, home/'clip.safetensors')
    for name, clip in (('random', 'random#64'), ('file', f'{home}/clip.safetensors')):
        spec = f'open_clip:{CLIP}@{clip}'
        cli.main(['distill', '--teachers', spec, 'zoo:u2netp#64', *small, '--steps', '2', '--out', str(home/name)])
    return home


LABELS = ['cat', 'fire engine', 'bridge', 'violin']


def by_hand(run, tower, images):
    "Cosines of every image with every label."
    student = Student.from_pretrained(run)
    crops = [centre_crop(decode(row), 64) for row in open_images(images)['image']]
    name = next(name for name in student.config['teachers'] if name != 'u2netp')
    with torch.no_grad(): x = F.normalize(student(torch.stack(crops)/255)[name].summary, dim=1)
    return x @ class_embeddings(tower, tower.tokenizer, LABELS).T


@pytest.mark.parametrize('name, spec', [('random', f'open_clip:{CLIP}@random#64'), ('file', 'open_clip:{}@{}')])
def test_labels_are_those_of_the_run_s_own_text_tower(clip_run, tmp_path, capsys, name, spec):
    images, table = small_images(tmp_path/'images', 4, 64), tmp_path/'labels.csv'
    tower = TextTower(spec.format(CLIP, clip_run/'clip.safetensors'), seed=3)
    expected = by_hand(clip_run/name, tower, images)
    cli.main(['zero-shot', str(clip_run/name), '--labels', *LABELS, '--images', images, '--top', '2',
              '--out', str(table)])
    printed = capsys.readouterr().out
    assert f'radio-nb evaluate {clip_run/name} --suite zero-shot --test FOLDER' in printed.splitlines()[-1]
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 8 and [row['rank'] for row in rows] == ['1', '2']*4
    for row, image in zip(rows, [i for i in range(4) for _ in range(2)]):
        cosines, which = expected[image], LABELS.index(row['label'])
        assert which == cosines.argsort(descending=True)[int(row['rank']) - 1] and row['image'] in printed
        assert float(row['cosine']) == pytest.approx(cosines[which].item(), abs=1e-4)
        assert float(row['probability']) == pytest.approx((tower.scale*cosines).softmax(0)[which].item(), abs=1e-3)


def test_random_text_towers_belong_to_the_seed_of_the_run(clip_run, tmp_path, monkeypatch):
    "In evaluate and in zero-shot alike; before, they were those of seed 0 and of another size of images."
    spec, seen = f'open_clip:{CLIP}@random#64', []
    teacher, tower = load_teacher(spec, seed=3), TextTower(spec, seed=3)
    whole = open_clip.create_model(CLIP, force_image_size=64)
    whole.load_state_dict({**{f'visual.{key}': value for key, value in teacher.model.state_dict().items()},
                           **tower.model.state_dict()})   # strict: the two halves are a whole
    with zero_shot.own_seed(f'3 open_clip:{CLIP}'): drawn = open_clip.create_model(CLIP, force_image_size=64)
    assert all(torch.equal(value, drawn.state_dict()[key]) for key, value in whole.state_dict().items())
    other = TextTower(spec).model.state_dict()
    assert not all(torch.equal(value, other[key]) for key, value in tower.model.state_dict().items())
    for label in ('cat', 'dog'): shutil.copytree(small_images(tmp_path/f'of {label}', 2, 64), tmp_path/'test'/label)
    def spy(*args, **kwargs): return seen.append(suites.text_directions(*args, **kwargs)) or seen[-1]
    monkeypatch.setattr(evaluate, 'text_directions', spy)
    run = shutil.copytree(clip_run/'random', tmp_path/'run')
    evaluate.evaluate(run, EvalData(test=str(tmp_path/'test')), ('zero-shot',), also=(f'open_clip:{CLIP}@random#32',))
    assert torch.equal(seen[0][spec], class_embeddings(tower, tower.tokenizer, ['cat', 'dog']))
    assert set(seen[0]) == {spec, f'open_clip:{CLIP}@random#32'}


def test_zero_shot_refuses(clip_run, run, refused, tmp_path):
    def command(*words, model=clip_run/'random', images='zoo:photos'):
        return refused('zero-shot', model, '--labels', *(words or LABELS), '--images', images)
    assert 'zero-shot needs a teacher that is open_clip:NAME/TAG' in command(model=run[0])
    assert 'zero-shot needs a teacher that is open_clip' in command('a', 'b', '--adaptor', 'u2netp')
    assert "unknown adaptor 'clap'" in command('a', 'b', '--adaptor', 'clap')
    assert 'zero-shot needs a teacher that is open_clip' in command(model='zoo:u2netp')
    assert '--labels: give two or more, each of them once' in command('cat')
    assert '--labels: give two or more, each of them once' in command('cat', 'cat')
    assert '--labels: give two or more, each of them once' in command('cat', ' cat')   # one class with half of each
    assert 'and none that is empty' in command('cat', '')
    assert '--top is 0, but must be at least 1' in command('a', 'b', '--top', '0')
    assert '--batch-size is 0, but must be at least 1' in command('a', 'b', '--batch-size', '0')
    assert 'labels are written as .csv' in command('a', 'b', '--out', tmp_path/'x.json')
    (tmp_path/'x.csv').write_text('precious')
    assert 'x.csv is there already' in command('a', 'b', '--out', tmp_path/'x.csv')
    assert (tmp_path/'x.csv').read_text() == 'precious'
    mine = shutil.copytree(clip_run/'file', tmp_path/'mine')
    text = (mine/'recipe.toml').read_text()
    torch.manual_seed(1)
    weights = open_clip.create_model(CLIP).state_dict()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path/'other.safetensors')
    (mine/'recipe.toml').write_text(text.replace(f'{clip_run}/clip.safetensors', f'{tmp_path}/other.safetensors'))
    assert 'teacher' in command(model=mine)   # its weights are not those that the student learned from


def test_a_teacher_names_images_itself(clip_run, tmp_path, capsys):
    images = small_images(tmp_path/'images', 3, 64)
    (tmp_path/'images'/'broken.jpg').write_text('no image')
    spec = f'open_clip:{CLIP}@{clip_run}/clip.safetensors'
    found, skipped = label_images(spec, LABELS, images, top=9, batch_size=2)
    assert len(found) == 3 and len(skipped) == 1 and all(len(image.labels) == 4 for image in found)
    for image in found: assert sum(image.probabilities) == pytest.approx(1, abs=1e-5)
    cli.main(['zero-shot', spec, '--images', images, '--labels', *LABELS])
    printed = capsys.readouterr().out
    assert '1 image was skipped' in printed and printed.splitlines()[-1].endswith('--images FOLDER')
