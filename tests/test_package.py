"What holds the package together: imports, what is exported, the README, the wheel."
import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))


def cells(path): return [(''.join(c['source']), c) for c in json.loads(path.read_text())['cells']]


def module(path):
    "The module that a chapter exports to, or None."
    sources = [source for source, _ in cells(path)]
    return next((s.split()[-1] for s in sources if s.startswith('#| default_exp')), None) if any(
        s.startswith('#| export') for s in sources) else None


ORDER = [name for name in map(module, CHAPTERS) if name]


@pytest.mark.parametrize('name', ORDER)
def test_a_chapter_imports_only_from_those_before_it(name):
    tree = ast.parse((ROOT/'radio_nb'/f'{name}.py').read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for other in imported:
        other = other.removeprefix('radio_nb.')
        if other in ORDER: assert ORDER.index(other) < ORDER.index(name), f'{name} imports {other}'


def test_every_module_comes_from_one_chapter():
    modules = {p.stem for p in (ROOT/'radio_nb').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_opens_with_a_title_and_stays_small(path):
    first = next(source for source, cell in cells(path) if cell['cell_type'] == 'markdown')
    assert first.startswith('# ') and '\n> ' in first
    assert path.stat().st_size < 400_000
    assert max((s.count('\n') for s, _ in cells(path) if s.startswith('#| export')), default=0) <= 60


def keys(value):
    "All keys in nested lists and dictionaries."
    if isinstance(value, dict): return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_no_output_breaks_the_site(path):
    "nbdev takes every key `source` for that of a cell, and plotly uses it for pixels."
    assert not any('source' in keys(cell.get('outputs', [])) for _, cell in cells(path))


@pytest.mark.parametrize('path', [*CHAPTERS, *(ROOT/'nbs'/'tutorials').glob('*.ipynb')], ids=lambda p: p.stem)
def test_every_figure_is_stored(path):
    "A published page runs nothing, so a figure without an output is a gap."
    for source, cell in cells(path):
        shown = re.search(r'^(\S.*\b)?fig\.update_layout\(', source, re.MULTILINE)   # not inside a function
        if cell['cell_type'] != 'code' or source.startswith('#| export') or not shown: continue
        pictures = [key for output in cell['outputs'] for key in output.get('data', {}) if key.startswith('image/')]
        assert pictures, f'{path.name}: run .ci/execute.py, there is no picture of\n{source[-200:]}'


def fresh(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')


def test_the_package_needs_neither_nbdev_nor_extras():
    extras = {'nbdev', 'fastcore', 'execnb', 'jupyterlab', 'ipywidgets', 'skimage', 'sklearn', 'foolbox', 'torchmetrics', 'pytest'}
    done = fresh(f'import radio_nb.cli, sys; print({extras} & set(sys.modules))')
    assert done.stdout.strip() == 'set()', done.stdout + done.stderr


def test_importing_the_package_is_light():
    done = fresh('import radio_nb, sys; print([m for m in ("timm", "open_clip", "datasets", "plotly") if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_timm_and_open_clip_can_be_imported_after_it():
    assert fresh('import radio_nb, timm, open_clip, torchvision').returncode == 0


def test_the_readme_is_the_index():
    assert subprocess.run([sys.executable, ROOT/'.ci'/'readme.py', '--check']).returncode == 0, 'run python .ci/readme.py'


def test_the_site_configuration_is_where_nbdev_looks():
    assert os.readlink(ROOT/'nbs'/'_quarto.yml') == '../_quarto.yml'


def test_the_wheel_holds_modules_and_weights_and_its_metadata_the_extras(tmp_path):
    from zipfile import ZipFile
    copy = tmp_path/'source'
    subprocess.run(['git', 'clone', '-q', ROOT, copy], check=True)
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = ZipFile(next(tmp_path.glob('*.whl')))
    names = wheel.namelist()
    assert {f'radio_nb/{name}.py' for name in ORDER} <= set(names) and 'radio_nb/weights/u2netp.safetensors' in names
    metadata = next(wheel.read(name).decode() for name in names if name.endswith('METADATA'))
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert not any(name in line for line in required for name in ('nbdev', 'fastcore', 'jupyterlab', 'scikit'))
    assert all(f'Provides-Extra: {extra}' in metadata for extra in ('zoo', 'notebooks', 'dev'))
    assert 'radio-nb = radio_nb.cli:main' in next(wheel.read(name).decode() for name in names if name.endswith('entry_points.txt'))


def test_nothing_leaves_the_repository():
    "No chapter reads what lies outside it, except in cells that are run by hand."
    for path in CHAPTERS:
        for source, cell in cells(path):
            if cell['cell_type'] == 'code' and 'RADIO_NB_SHARED' in source: assert '#| slow' in source, f'{path.name}: {source[:80]}'
