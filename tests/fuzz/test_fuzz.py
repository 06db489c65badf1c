"""Whatever one does to a run, it gives the result of an undisturbed one, or one line that names the thing.

A quick share runs with the other tests. `pytest tests/fuzz --fuzz 10000` makes about so many invocations."""
import json
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import MISSING, fields
from typing import Annotated, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from fuzz import world as fuzz
from fuzz.world import World, command, damage, repaired, result
from radio_nb.data import files
from radio_nb.training.recipe import Recipe, recipe_toml
from radio_nb.training.run_folder import finished

quick = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None,
                 phases=[Phase.explicit, Phase.generate])   # an example may take a second: none is made smaller


@pytest.fixture(scope='module')
def world(tmp_path_factory): return World(tmp_path_factory.mktemp('fuzz'))


@pytest.fixture(scope='module')
def whole(world):
    "The folder of an undisturbed run, and what it found."
    out = world.fresh()
    assert command(*world.flags(out))[0] == 0
    return out, result(out)


@pytest.fixture(autouse=True)
def elsewhere(world, monkeypatch): monkeypatch.chdir(world.home)   # a cache may be called x


@pytest.fixture(scope='module', autouse=True)
def count():
    yield
    print(f'\n{fuzz.RUNS} invocations')


def share(pytestconfig, part, least):
    "How many examples a test makes of all invocations that were asked for."
    asked = pytestconfig.getoption('--fuzz')
    return int(asked*part) if asked else least


@pytest.fixture
def dice(pytestconfig, request): return random.Random(f'{request.node.name} {pytestconfig.getoption("--fuzz-seed")}')


# recipes

NONSENSE = st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.booleans(), st.none(),
                     st.lists(st.one_of(st.integers(-3, 3), st.text(max_size=3)), max_size=3).map(tuple))
SMALL = {int: st.integers(-2, 4), float: st.floats(-.5, 1.5), str: st.sampled_from(['', 'cpu', 'x', '/', '\0', 'é']),
         bool: st.booleans()}


def values_of(kind):
    "Values of the type of a field, in and out of its range."
    if get_origin(kind) is Annotated: return values_of(get_args(kind)[0])
    if get_origin(kind) is Literal: return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple: return st.lists(values_of(get_args(kind)[0]), max_size=2).map(tuple)
    return SMALL.get(kind, st.just(()))


LEFT_OUT = ('images', 'teachers', 'out', 'stages', 'listen', 'trackers')
CHOSEN = [field for field in fields(Recipe) if field.name not in LEFT_OUT]
ONE = st.sampled_from(CHOSEN).flatmap(lambda field: st.tuples(
    st.just(field.name), st.one_of(values_of(field.type), values_of(field.type), NONSENSE)))
CHANGES = st.lists(ONE, min_size=1, max_size=3).map(dict)
SLOW = {'compile': ('',), 'steps': range(9), 'batch_size': range(9), 'workers': range(1), 'information_steps': range(9),
        'statistics_steps': range(9), 'views': range(9), 'size': (16, 32, 48), 'head_blocks': range(3),
        'head_attention': range(3)}


def bearable(changes):
    "Whether a run with these values is over in a moment, if it begins at all."
    for name, value in changes.items():
        if type(value) is int and value > 0 and value not in SLOW.get(name, range(2000)): return False
    return not changes.get('compile')


def toml(values):
    "Fields as a file; None where a file cannot hold them."
    import tomli_w
    try: return tomli_w.dumps(values)
    except (TypeError, ValueError, AttributeError): return None


def test_recipes(world, pytestconfig):
    "Flags, files and Python agree on what makes sense; what makes sense runs, and runs again to the same student."
    @seed(pytestconfig.getoption('--fuzz-seed'))
    @settings(quick, max_examples=share(pytestconfig, .2, 20))
    @given(CHANGES.filter(bearable), st.randoms())
    def check(changes, dice):
        out = world.fresh()
        file, text = world.fresh().with_suffix('.toml'), toml(world.values | {'out': str(out)} | changes)
        try: Recipe(**world.values | {'out': str(out)} | changes)
        except ValueError: sensible = False
        else: sensible = True
        codes = []
        if text is not None:
            try: file.write_text(text)
            except UnicodeEncodeError: return
            codes.append(command('distill', '--recipe', file)[0])
            assert sensible or codes == [2]   # what no recipe may be is refused in a file, too
            if codes == [0]: assert finished(out)
        if codes == [0] and dice.random() < .3:
            first = result(out)
            shutil.rmtree(out)
            assert command('distill', '--recipe', file)[0] == 0 and result(out) == first
        # what flags cannot say stays as it was, short above all
        flags = world.flags(world.fresh(), **{key: value for key, value in changes.items() if value not in (None, ())})
        if not sensible and not any('\0' in flag for flag in flags): command(*flags)
        shutil.rmtree(out, ignore_errors=True)
    check()


def test_files_that_are_no_recipe(world, pytestconfig, dice):
    text = recipe_toml(Recipe(**world.values, out=str(world.fresh()))).encode()
    file = world.fresh().with_suffix('.toml')
    for _ in range(share(pytestconfig, .1, 10)):
        file.write_bytes(text)
        damage(file, dice)
        defaults = {field.name: field.default for field in fields(Recipe)}
        try: small = file.is_file() and bearable(defaults | recipe_values(file))
        except ValueError: small = True
        if small: command('distill', '--recipe', file)
        if file.is_dir(): file.rmdir()


def recipe_values(file):
    "What a damaged file still says, as far as it can be read."
    from radio_nb.training.recipe import read_recipe
    return read_recipe(file)


# images

def spoil(folder, dice):
    "Damage a folder of images; the names of those that can still be used."
    for path in sorted(folder.iterdir()):
        kind = dice.choice(['whole', 'whole', 'damaged', 'fifo', 'link', 'folder', 'small', 'name', 'mode'])
        if kind == 'damaged': damage(path, dice)
        if kind in ('fifo', 'link', 'folder'): path.unlink()
        if kind == 'fifo': os.mkfifo(path)
        if kind == 'link': path.symlink_to(dice.choice([path, 'nowhere.png', '/dev/null']))
        if kind == 'folder': path.mkdir()
        if kind == 'small': Image.new('RGB', (dice.choice([1, 9]), 9)).save(path)
        if kind == 'name': path.rename(os.fsdecode(os.fsencode(path.parent) + b'/\xff\xfe' + os.fsencode(path.name)))
        mode = dice.choice(['1', 'L', 'I', 'F', 'P', 'LA'])
        if kind == 'mode': Image.new(mode, (40, 40)).save(path.with_suffix('.tiff'))


def test_images(world, pytestconfig, dice):
    "Bad images are skipped and reported, or the run is refused; and a run of the same folder gives the same."
    for _ in range(share(pytestconfig, .1, 10)):
        folder, out = world.fresh(), world.fresh()
        shutil.copytree(world.values['images'], folder)
        spoil(folder, dice)
        flags = world.flags(out, images=str(folder), hold_out=dice.choice([0, 1, 2]))
        code, _, last = command(*flags)
        if code == 0:
            assert finished(out) and (out/'report.html').exists()
            if dice.random() < .3:
                again, hold_out = world.fresh(), recipe_values(out/'recipe.toml')['hold_out']
                assert command(*world.flags(again, images=str(folder), hold_out=hold_out))[0] == 0
                assert result(again) == result(out)
        else: assert 'image' in last or 'hold out' in last or str(folder) in last, last
        for path in (folder, out): shutil.rmtree(path, ignore_errors=True)


# run folders

def unfinished(whole, world):
    "A copy of the run as it was after its second step."
    out = world.fresh()
    shutil.copytree(whole, out)
    for name in ('student.safetensors', 'config.json', 'match.json', 'report.html', 'checkpoints/00000003.pt'):
        (out/name).unlink()
    return out


def a_file(out, dice):
    "One of the files of a run."
    return dice.choice(sorted(path for path in out.rglob('*') if path.is_file()))


def same(found, expected, file):
    "Whether a result is the undisturbed one; of a damaged log the lost lines may be missing."
    return found == expected or file.name == 'metrics.jsonl' and (found[0], found[2]) == (expected[0], expected[2])


def test_run_folders(world, whole, pytestconfig, dice):
    "A damaged unfinished run ends at the same student, or says what is wrong, and goes on when that is put right."
    for _ in range(share(pytestconfig, .2, 20)):
        out = unfinished(whole[0], world)
        flags = [*world.flags(out), '--resume']
        file = a_file(out, dice)
        before, kind = file.read_bytes(), damage(file, dice)
        code, _, last = command(*flags)
        if code:
            assert str(out) in last, (file.name, kind, last)
            repaired(file, before)
            code = command(*flags)[0]
        assert code == 0 and same(result(out), whole[1], file), (file.name, kind)
        shutil.rmtree(out)


def table_of(found, out):
    "What a command printed, without the lines that name files of the run: of these some may be missing."
    return [line for line in found[1].splitlines() if str(out) not in line]


def test_finished_folders(world, whole, pytestconfig, dice):
    "A damaged finished run shows the same result, or says what is wrong."
    evaluate = ['--images', world.values['images'], '--suite', 'match']
    table = command(*world.flags(whole[0]))[1]
    for _ in range(share(pytestconfig, .12, 10)):
        out = world.fresh()
        shutil.copytree(whole[0], out)
        scores = table_of(command('evaluate', out, *evaluate), out)
        file = a_file(out, dice)
        before, kind = file.read_bytes(), damage(file, dice)
        code, _, last = found = command('evaluate', out, *evaluate)
        if code == 0: assert table_of(found, out) == scores, (file.name, kind)
        else: assert str(out) in last, (file.name, kind, last)
        code, printed, last = command(*world.flags(out))
        if code == 0: assert printed.replace(str(out), str(whole[0])) == table, (file.name, kind)
        else: assert str(out) in last, (file.name, kind, last)
        repaired(file, before)
        assert result(out)[0] == whole[1][0]
        shutil.rmtree(out)


def test_foreign_files(world, whole, pytestconfig, dice):
    "Files that are not of the run are left alone and change nothing."
    names = ['checkpoints/best.pt', 'checkpoints/0.pt', 'checkpoints/x.part', 'notes.txt', 'statistics-x.safetensors',
             'checkpoints/00000009.pt', 'runs.lock', '.DS_Store', 'match.json.part']
    for name in names:
        out = unfinished(whole[0], world)
        (out/name).write_bytes(dice.randbytes(50))
        assert command(*world.flags(out), '--resume')[0] == 0 and result(out) == whole[1], name
        shutil.rmtree(out)


# caches

def test_caches(world, pytestconfig, dice):
    "Features that were damaged on the disk are noticed: they are computed again, or somebody is told."
    cache = world.fresh()
    first = world.fresh()
    assert command(*world.flags(first, views=2, cache=str(cache)))[0] == 0
    expected = result(first)
    for _ in range(share(pytestconfig, .1, 10)):
        used, out = world.fresh(), world.fresh()
        shutil.copytree(cache, used)
        file = a_file(used, dice)
        before, kind = file.read_bytes(), damage(file, dice)
        flags = world.flags(out, views=2, cache=str(used))
        code, _, last = command(*flags)
        if code:
            assert str(used) in last, (file.name, kind, last)
            repaired(file, before)
            code = command(*flags, '--resume')[0]
        assert code == 0 and result(out) == expected, (file.name, kind)
        for path in (used, out): shutil.rmtree(path)


# kills

class Killed(BaseException):
    "Stands in for a kill, as sudden as Python allows."


def interrupted(flags, seconds, sig):
    "Exit code and last line of a run that gets a signal after some seconds; no code where it was killed."
    def die(*_): raise Killed
    before = signal.signal(signal.SIGUSR1, die)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), sig))
    timer.start()
    try: return command(*flags)[::2]
    except (Killed, SystemError):   # the second where it falls into Python's own compiler
        files._close_all()   # as the kernel does where a process really dies
        return None, ''
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_kills(world, whole, pytestconfig, dice):
    "A run that is stopped or killed again and again ends at the student of one that was not."
    begun = time.time()
    command(*world.flags(world.fresh()))
    seconds = time.time() - begun
    for _ in range(share(pytestconfig, .05, 5)):
        out, code, tries = world.fresh(), None, 0
        while code != 0:
            sig = dice.choice([signal.SIGUSR1, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            flags = [*world.flags(out), *(['--resume'] if tries else [])]
            wait = dice.uniform(0, 1.1)*seconds
            code, last = interrupted(flags, wait, sig) if tries < 6 else command(*flags)[::2]
            tries += 1
            assert code != 2 and tries < 9, (code, tries, last)
        assert result(out) == whole[1]
        shutil.rmtree(out)


def test_everything_has_a_default_but_three():
    "What the fuzzer leaves out are the fields that it fills in itself."
    assert [field.name for field in fields(Recipe) if field.default is MISSING] == ['images', 'teachers', 'out']
    assert json.dumps([field.name for field in CHOSEN])
