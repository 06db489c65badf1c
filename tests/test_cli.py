"The command line as a user meets it: what it prints, its exit codes, what it leaves behind."
import io
import json
import re
import shutil
from dataclasses import fields
from typing import get_origin

import numpy as np
import pytest
import torch
from conftest import SMALL
from conftest import radio_nb as command
from PIL import Image
from safetensors.torch import save_file

import radio_nb
from radio_nb.data.images import decode, open_images
from radio_nb.front import cli
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.recipe import Recipe


def replaced(flag, *values):
    "The flags of the small run with one of them changed."
    at = SMALL.index(flag)
    return [*SMALL[:at + 1], *map(str, values), *SMALL[at + 2:]]


def test_a_run_leaves_what_it_promises(run):
    out, done = run
    assert {'recipe.toml', 'metrics.jsonl', 'match.json', 'report.html', 'student.safetensors', 'config.json',
            'statistics.safetensors', 'checkpoints'} <= {p.name for p in out.iterdir()}
    lines = [json.loads(line) for line in (out/'metrics.jsonl').open()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]['teachers']['u2netp']) == {'summary', 'spatial'}
    assert 'explained' in done.stdout and 'steps = 6' in done.stdout
    assert '\r' not in done.stderr and 'distil 6/6' in done.stderr   # plain lines where there is no terminal


def test_the_student_loads_without_teachers_and_speaks_their_language(run):
    out, _ = run
    features = Student.from_pretrained(out)(torch.rand(2, 3, 96, 64))['u2netp']
    assert features.summary.shape == (2, 64) and features.spatial.shape == (2, 6, 4, 64)


def test_the_report_needs_nothing_else(run):
    html = (run[0]/'report.html').read_text()
    page = re.sub('<script.*?</script>', '', html, flags=re.DOTALL)
    assert 'src="http' not in page and 'href="http' not in page and '<script src' not in html
    assert page.count('data:image/png') == 2 and 'explained' in page   # the maps, and how patches resemble each other


def test_a_finished_run_shows_its_table_again(run):
    out, first = run
    again = command('distill', *SMALL, '--out', out)
    assert again.returncode == 0 and 'finished' in again.stdout
    table = [line for line in first.stdout.splitlines() if line.startswith('u2netp')]
    assert table and all(line in again.stdout for line in table)


def test_the_same_recipe_gives_the_same_numbers(run, tmp_path):
    out, _ = run
    cli.main(['distill', *SMALL, '--out', str(tmp_path/'again')])
    assert json.loads((tmp_path/'again'/'match.json').read_text()) == json.loads((out/'match.json').read_text())


def test_another_recipe_in_the_same_folder_is_refused(run, refused):
    out, _ = run
    assert 'steps is 7 here and 6 there' in refused('distill', *replaced('--steps', 7), '--out', out)
    assert 'steps is 7 here and 6 there' in refused('distill', *replaced('--steps', 7), '--out', out, '--resume')


def test_a_folder_with_other_things_is_left_alone(refused, tmp_path):
    (tmp_path/'thesis.txt').write_text('precious')
    assert 'is not empty and holds no run' in refused('distill', *SMALL, '--out', tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_evaluate(run, tmp_path, capsys):
    mine, images = shutil.copytree(run[0], tmp_path/'run'), tmp_path/'images'   # a copy, because it writes there
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)).save(images/'noise.png')
    (images/'broken.jpg').write_text('no image')
    cli.main(['evaluate', str(mine), '--images', str(images)])
    printed = capsys.readouterr().out
    assert 'u2netp' in printed and 'broken.jpg: cannot be identified' in printed


def test_evaluate_refuses(run, refused, tmp_path):
    assert 'holds no finished run' in refused('evaluate', tmp_path, '--images', 'zoo:photos')
    assert 'no such folder' in refused('evaluate', run[0], '--images', '/nowhere')
    assert '--images FOLDER' in refused('evaluate', run[0])


def test_recipe_files(refused, tmp_path, capsys):
    recipe = tmp_path/'mine.toml'
    recipe.write_text('imges = "x"')
    error = refused('distill', '--recipe', recipe)
    assert "mine.toml: unknown field of a recipe 'imges': did you mean images" in error
    recipe.write_text('images = ')
    assert 'is not TOML' in refused('distill', '--recipe', recipe)
    assert 'no such recipe: nowhere.toml' in refused('distill', '--recipe', 'nowhere.toml')
    for line, complaint in (('steps = "many"', "steps is 'many', but must be a whole number at least 1"),
                            ('lr = "0.1"', "lr is '0.1', but must be a number greater than 0"),
                            ('lr = nan', "lr is 'nan', but must be a number greater than 0"),
                            ('shard = "false"', "shard is 'false', but must be true or false"),
                            ('warmup = 1', r"warmup is '1', but must be a number in [0, 1)"),
                            ('summary_weights = [-1]', 'summary_weights is'),
                            ('teachers = "x"', 'teachers is'),
                            ('[[stages]]\nsteps = 1\nsize = [1, 2, 3]', 'size is'),
                            ('stages = 3', 'stages must be tables'),
                            ('[[stages]]\nsteps = 1\n[[stages.partitions]]\nshare = "1"', 'share is'),
                            ('[[stages]]\nsteps = 1\n[[stages.partitions]]\nsize = 1', 'a partition needs share')):
        recipe.write_text(line)
        assert f'mine.toml: {complaint}' in refused('distill', '--recipe', recipe)
    recipe.write_bytes('images = "é"'.encode('latin-1'))
    assert 'is not TOML in UTF-8' in refused('distill', '--recipe', recipe)
    stages = '[[stages]]\nsteps = 1\n'
    recipe.write_bytes(b'\xef\xbb\xbfimages = "zoo:photos"\nteachers = ["zoo:u2netp"]\nout = "x"\n' + stages.encode())
    assert '--steps: the stages of the recipe say' in refused('distill', '--recipe', recipe, '--steps', 3)   # BOM, too
    recipe.write_text('sizes = [64, 96]\n')
    assert '--sizes' not in cli.expand(['plan', '--recipe', str(recipe), '--size', '64'])
    recipe.write_text('[[stages]]\nsteps = 3\nsizes = [64, 96]\n')
    assert '--size: the stages of the recipe have sizes' in refused('plan', '--recipe', recipe, '--size', 64)


def test_a_name_that_would_steer_the_terminal_is_shown_and_not_obeyed(refused, tmp_path):
    "Python and editors break lines at these characters, too (found by the fuzzer)."
    said = refused('distill', *SMALL, '--out', tmp_path/'run', '--init', 'a\x1cb\x85c\n\x1b[2Jd')
    assert r'a\x1cb\x85c\n\x1b[2Jd' in said


@pytest.mark.parametrize('flag, value', [
    ('size', 0), ('size', -64), ('lr', 0), ('lr', 'nan'), ('lr', 'inf'), ('lr', 1e112), ('warmup', 1), ('warmup', -.1),
    ('clip', 0), ('clip', -1), ('weight-decay', -1), ('spatial-weights', -1), ('hold-out', -1), ('keep', 0),
    ('keep', -1), ('ema', 1), ('ema', -.5), ('depth', -1), ('head-blocks', -1), ('heads-only', -1),
    ('teacher-dropout', 1.1), ('steps', 0),
    ('statistics-steps', 0), ('accumulate', 0), ('workers', -1), ('views', -1), ('seed', -1), ('seed', 2**40),
    ('batch-size', 0), ('checkpoint-every', 0), ('watch-every', -1), ('information', 0), ('kd-dropout', 1),
    ('bottleneck', -1), ('head-width', -8), ('windows', -1), ('balance-lr', 0)])
def test_values_that_make_no_sense_are_refused_in_one_line(refused, tmp_path, flag, value):
    "From flags, from a file and from Python."
    name = flag.replace('-', '_')
    many = get_origin({field.name: field.type for field in fields(Recipe)}[name]) is tuple
    complaint = refused('distill', *SMALL, f'--{flag}', value, '--out', tmp_path/'run')
    assert f'{name} is ' in complaint and 'but must be' in complaint
    with pytest.raises(BadInput, match=f'^{name} is .*but must be '):
        number = float(value)
        number = int(number) if number == number and abs(number) < 1e99 and number == int(number) else number
        radio_nb.distill(images='zoo:photos', teachers='zoo:u2netp', **{name: (number,) if many else number})
    assert not (tmp_path/'run').exists()


def test_what_this_machine_does_not_have(refused, tmp_path):
    for flag, value, complaint in (('device', 'gpu', "device: there is no 'gpu'"), ('device', 'meta', "no 'meta'"),
                                   ('teacher-device', 'cuda:99', "no 'cuda:99'"),
                                   ('compile', 'inducter', "backend of torch.compile 'inducter': did you mean")):
        assert complaint in refused('distill', *SMALL, f'--{flag}', value, '--out', tmp_path/'run')


def test_images_that_are_not_there(refused, tmp_path):
    assert 'no such folder or file: /nowhere' in refused(
        'distill', *replaced('--images', '/nowhere'), '--out', tmp_path/'run')
    (tmp_path/'empty').mkdir()
    assert 'holds neither an image nor a Parquet' in refused(
        'distill', *replaced('--images', tmp_path/'empty'), '--out', tmp_path/'run')
    (tmp_path/'all_bad').mkdir()
    for i in range(3): (tmp_path/'all_bad'/f'{i}.jpg').touch()
    assert 'nothing would be left' in refused('distill', *replaced('--hold-out', 38), '--out', tmp_path/'run')
    bad = [*replaced('--images', tmp_path/'all_bad'), '--hold-out', 0]
    assert 'can be used; the first' in refused('distill', *bad, '--out', tmp_path/'run')


def test_teachers_that_do_not_work(refused, tmp_path):
    def teacher(spec): return refused('distill', *replaced('--teachers', spec), '--out', tmp_path/'run')
    assert "unknown zoo model 'u2net': did you mean u2netp" in teacher('zoo:u2net')
    assert 'did you mean' in teacher('timm:resnet81') and 'not of the form' in teacher('resnet18')
    assert 'no such weight file: gone.pth' in teacher('timm:resnet18@gone.pth')
    assert 'give a local file: timm:resnet18@PATH' in teacher('timm:resnet18')
    save_file({'conv1.weight': torch.zeros(1)}, tmp_path/'wrong.safetensors')
    error = teacher(f'timm:resnet18@{tmp_path}/wrong.safetensors')
    assert 'missing: ' in error and 'conv1.weight (1,) for (64, 3, 7, 7)' in error
    assert 'listed twice' in refused(
        'distill', *replaced('--teachers', 'zoo:u2netp', 'zoo:u2netp'), '--out', tmp_path/'run')
    assert '2 numbers for 1 teachers' in refused('distill', *SMALL, '--summary-weights', 1, 2, '--out', tmp_path/'run')


def test_nothing_is_left_behind_by_a_refused_run(refused, tmp_path):
    refused('distill', *replaced('--teachers', 'zoo:u2net'), '--out', tmp_path/'run')
    cli.main(['distill', *SMALL, '--out', str(tmp_path/'run')])   # the same folder can still be used


def test_weights_that_would_run_code(refused, tmp_path):
    class Bomb:
        def __reduce__(self): return (open, (str(tmp_path/'exploded'), 'w'))
    torch.save({'state_dict': Bomb()}, tmp_path/'bomb.pth')
    bomb = replaced('--teachers', f'timm:resnet18@{tmp_path}/bomb.pth')
    assert 'is not a file of weights that can be read safely' in refused('distill', *bomb, '--out', tmp_path/'run')
    assert not (tmp_path/'exploded').exists()


def test_bad_images_are_counted_and_reported(tmp_path):
    folder, rng = tmp_path/'images', np.random.default_rng(0)
    (folder/'deep').mkdir(parents=True)
    pixels = rng.integers(0, 256, (80, 90, 3), np.uint8)
    for i in range(3): Image.fromarray(rng.integers(0, 256, (80, 90, 3), np.uint8)).save(folder/'deep'/f'good{i}.png')
    Image.fromarray(pixels).convert('CMYK').save(folder/'cmyk.jpg')
    Image.fromarray(pixels[..., 0].astype(np.uint16)*257).save(folder/'sixteen.png')
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).quantize(16).save(folder/'palette.png')
    Image.fromarray(pixels[:1, :1]).save(folder/'pixel.png')
    (folder/'text.jpg').write_text('not an image')
    (folder/'zero.jpg').touch()
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, 'JPEG')
    (folder/'cut.jpg').write_bytes(jpeg.getvalue()[:len(jpeg.getvalue())//2])
    cli.main(['distill', *replaced('--images', folder), '--hold-out', '0', '--out', str(tmp_path/'run')])
    skipped = json.loads((tmp_path/'run'/'skipped.json').read_text())
    assert {p.rpartition('/')[2] for p in skipped} == {'pixel.png', 'text.jpg', 'zero.jpg', 'cut.jpg'}
    assert '4 images could not be used' in (tmp_path/'run'/'report.html').read_text()


@pytest.mark.parametrize('column', ['image', 'picture'])
def test_parquet(tmp_path, column):
    from datasets import Dataset, Features, Value
    from datasets import Image as Column
    jpegs = []
    for i in range(6):
        jpeg = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(jpeg, 'PNG')
        jpegs.append({'bytes': jpeg.getvalue(), 'path': None})
    columns = Features({'label': Value('int64'), column: Column()})
    Dataset.from_dict({'label': range(6), column: jpegs}, features=columns).to_parquet(tmp_path/'some.parquet')
    images = open_images(str(tmp_path/'some.parquet'))
    assert images.column_names == ['image'] and decode(images[0]['image']).size == (32, 32)
    cli.main(['distill', *replaced('--images', tmp_path/'some.parquet'), '--hold-out', '2',
              '--out', str(tmp_path/'run')])
    assert (tmp_path/'run'/'report.html').exists()


def test_teachers_are_listed(capsys):
    cli.main(['teachers'])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['zoo:u2netp', '64', '320', 'px'] in [line[:4] for line in lines]
    assert all(line[-1] in ('yes', 'no') for line in lines if line and ':' in line[0] and line[0] != 'Any')


def test_listeners_are_listed_with_what_they_need(capsys):
    from radio_nb.listening.listeners import LISTENERS  # with all that it imports
    cli.main(['listeners'])
    out = capsys.readouterr().out
    lines = {line.split('  ')[0]: line for line in out.splitlines()}
    assert lines.keys() >= LISTENERS.keys() and 'logits, labels' in lines['pld']
    assert 'temperature = 4.0' in lines['kd'] and '[[listen]]' in out and 'warm-up' in out


@pytest.mark.parametrize('command', ['plan', 'distill', 'evaluate', 'compare', 'features', 'zero-shot', 'export'])
def test_every_flag_is_explained(command, capsys, monkeypatch):
    "tyro shows the comments behind the fields of a dataclass, and none of those behind the parameters of a function."
    monkeypatch.setenv('COLUMNS', '250')
    with pytest.raises(SystemExit): cli.main([command, '--help'])
    place, *flags = re.split(r'\n\W*(?=--[a-z])', capsys.readouterr().out.partition('positional arguments')[2])
    assert flags
    for flag in [place, *flags]:
        words = re.sub(r'--\S+|\{.*?\}|\((default|required)[^)]*\)|.* options .*', '', flag)
        assert re.search('[a-z]+ [a-z]+', words), flag


def test_demo_stands_directly_behind_the_command(tmp_path, refused):
    said = refused('distill', '--images', 'zoo:photos', '--teachers', 'zoo:u2netp', '--out', tmp_path/'run', 'demo')
    assert 'demo: put it directly behind the command' in said and not (tmp_path/'run').exists()


def test_what_a_command_would_not_look_at_is_refused(run, refused):
    assert '--sizes is for suite match' in refused('evaluate', run[0], '--suite', 'places', '--images', 'zoo:photos',
                                                   '--sizes', 64)
    assert 'asks no other models' in refused('evaluate', run[0], '--suite', 'decoders', '--images', 'zoo:photos',
                                             '--teachers-too')
    assert 'in the folder of a run' in refused('compare', run[0], run[0], '--out', run[0]/'evaluation.json')
