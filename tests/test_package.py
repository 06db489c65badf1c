"What holds the package together: imports, what is exported, the README, the wheel."
import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SIDEBAR = (ROOT/'nbs'/'sidebar.yml').read_text().splitlines()
BOOK = [ROOT/'nbs'/line.split('- ')[1] for line in SIDEBAR if '.ipynb' in line][1:]
CHAPTERS = [path for path in BOOK if path.parent.name != 'tutorials']
PARTS = list(dict.fromkeys(path.parent.name for path in CHAPTERS))


def cells(path): return [(''.join(c['source']), c) for c in json.loads(path.read_text())['cells']]


def module(path):
    "The module that a chapter exports to, such as 'training.trainer', or None."
    sources = [source for source, _ in cells(path)]
    return next((s.split()[-1] for s in sources if s.startswith('#| default_exp')), None) if any(
        s.startswith('#| export') for s in sources) else None


def file(name): return ROOT/'radio_nb'/(name.replace('.', '/') + '.py')


ORDER = [name for name in map(module, CHAPTERS) if name]


def imported(name):
    "The modules of the package that a module imports, and whether it does so when it is loaded, or in a function."
    tree = ast.parse(file(name).read_text())
    late = {id(node) for outer in ast.walk(tree) if isinstance(outer, (ast.FunctionDef, ast.If))
            for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level: other = '.'.join([*name.split('.')[:2 - node.level], node.module or ''])
        elif (node.module or '').startswith('radio_nb.'): other = node.module.removeprefix('radio_nb.')
        else: continue
        yield other, id(node) not in late


def test_the_sidebar_lists_every_chapter_in_its_order():
    assert set(BOOK) == set((ROOT/'nbs').rglob('*/*.ipynb'))
    assert CHAPTERS == sorted(CHAPTERS, key=lambda path: (PARTS.index(path.parent.name), path.name))
    assert [path.name[:2] for path in CHAPTERS] == [f'{i:02d}' for part in PARTS for i in range(
        len([path for path in CHAPTERS if path.parent.name == part]))]


def test_a_chapter_leads_to_the_next():
    "By its name, in the last paragraph; what stands behind the library can be read in any order."
    library = [path for path in CHAPTERS if path.parent.name != 'appendix']
    for path, after in zip(library, library[1:]):
        last = [text for text, cell in cells(path) if cell['cell_type'] == 'markdown'][-1].rpartition('\n\n')[2]
        assert f'`{after.stem[3:]}`' in last, f'{path} does not lead to {after}'


@pytest.mark.parametrize('name', ORDER)
def test_a_chapter_imports_only_from_those_before_it(name):
    for other, _ in imported(name): assert ORDER.index(other) < ORDER.index(name), f'{name} imports {other}'


def test_what_registers_networks_when_timm_is_imported_imports_nothing_here_that_imports_timm():
    "Whatever of ours asks for timm first is half imported at that moment."
    names = ', '.join(f'radio_nb.{other}' for other, _ in imported('models.eradio'))
    assert fresh(f'import {names}, sys; print("timm" in sys.modules)').stdout.strip() == 'False'


def test_evaluation_knows_no_training_and_cifd_is_loaded_only_where_a_recipe_asks_for_it():
    for name in ORDER:
        for other, at_once in imported(name):
            part, its = name.split('.')[0], other.split('.')[0]
            assert not (part == 'evaluation' and its in ('training', 'front')), f'{name} imports {other}'
            assert not (part != 'cifd' and its == 'cifd' and at_once), f'{name} imports {other} when it is loaded'


def test_every_module_comes_from_one_chapter():
    modules = {'.'.join(p.relative_to(ROOT/'radio_nb').with_suffix('').parts) for p in (ROOT/'radio_nb').rglob('*.py')
               if p.stem not in ('__init__', '__main__', '_modidx')}
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


@pytest.mark.parametrize('path', BOOK, ids=lambda p: p.stem)
def test_every_figure_is_stored(path):
    "A published page runs nothing, so a figure without an output is a gap."
    for source, cell in cells(path):
        drawn = r'(fig\.update_layout\(|layout\((bare\()?fig|image_grid\()'
        shown = re.search(rf'^(\S.*\b)?{drawn}', source, re.MULTILINE)   # not inside a function
        if cell['cell_type'] != 'code' or source.startswith('#| export') or not shown: continue
        pictures = [key for output in cell['outputs'] for key in output.get('data', {}) if key.startswith('image/')]
        assert pictures, f'{path.name}: run .ci/execute.py, there is no picture of\n{source[-200:]}'


def fresh(code): return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')


def test_the_package_needs_neither_nbdev_nor_extras():
    extras = {'nbdev', 'fastcore', 'execnb', 'jupyterlab', 'ipywidgets',
              'skimage', 'sklearn', 'foolbox', 'torchmetrics', 'pytest'}
    done = fresh('import radio_nb.front.cli, radio_nb.front.evaluate, radio_nb.front.run, sys; '
                 f'print({extras} & set(sys.modules))')
    assert done.stdout.strip() == 'set()', done.stdout + done.stderr


def test_importing_the_package_or_its_command_loads_nothing_heavy():
    heavy = ('torch', 'timm', 'open_clip', 'datasets', 'plotly', 'numpy')
    done = fresh(f'import radio_nb.front.cli, sys; print([m for m in {heavy} if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_a_student_needs_neither_open_clip_nor_datasets_nor_plotly():
    done = fresh('from radio_nb import Student; import sys; '
                 'print([m for m in ("open_clip", "datasets", "plotly") if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_figures_need_no_torch():
    "Every chapter may import them, those too that answer a mistake in a second."
    assert fresh('import radio_nb.start.figures, sys; print("torch" in sys.modules)').stdout.strip() == 'False'


def test_what_the_package_itself_offers_is_there_and_nothing_else():
    code = ('import radio_nb; '
            'print(all(callable(getattr(radio_nb, n)) for n in radio_nb.__all__), hasattr(radio_nb, "distil"))')
    assert fresh(code).stdout.split() == ['True', 'False']


@pytest.mark.parametrize('command', [['-m', 'radio_nb'], ['-c', 'from radio_nb.front.cli import main; main()']])
def test_the_command_says_its_version_and_its_flags(command):
    version = subprocess.run([sys.executable, *command, '--version'], capture_output=True, text=True).stdout
    assert version == 'radio-nb 0.1.0\n'
    assert 'distill' in subprocess.run([sys.executable, *command, '--help'], capture_output=True, text=True).stdout


def test_timm_and_open_clip_can_be_imported_after_it():
    assert fresh('import radio_nb, timm, open_clip, torchvision').returncode == 0


def test_the_readme_is_the_index():
    done = subprocess.run([sys.executable, ROOT/'.ci'/'readme.py', '--check'])
    assert done.returncode == 0, 'run python .ci/readme.py'


def test_the_table_of_the_readme_is_that_of_the_committed_run():
    from radio_nb.front.run_match import match_rows  # not above: the other tests need no torch
    results = map(json.loads, (ROOT/'nbs'/'tutorials'/'thirty_photographs.jsonl').read_text().splitlines())
    match, = (found['match'] for found in results if found['case'] == {'recipe': 'today', 'seed': 0})
    rows = [[teacher, images, *explained, summary] for teacher, images, *explained, _, summary in match_rows(match)]
    def text(value): # without −0.00
        return value if isinstance(value, str) else f'{round(value, 2) + 0:.2f}'.replace('nan', '–')
    table = [f'| {" | ".join(map(text, row))} |' for row in rows]
    assert len(table) == 6 and '\n'.join(table) in (ROOT/'README.md').read_text()


def test_the_site_configuration_is_where_nbdev_looks():
    assert os.readlink(ROOT/'nbs'/'_quarto.yml') == '../_quarto.yml'


def test_a_wheel_can_be_built_from_the_sdist(tmp_path):
    "All that setup.py reads must be in it."
    import tarfile
    copy = tmp_path/'source'
    subprocess.run(['git', 'clone', '-q', ROOT, copy], check=True)
    command = [sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive: archive.extractall(tmp_path/'sdist', filter='data')
    home = next((tmp_path/'sdist').iterdir())
    command = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0 and list(tmp_path.glob('*.whl')), done.stderr


def test_the_wheel_holds_modules_and_weights_and_its_metadata_the_extras(tmp_path):
    from zipfile import ZipFile
    copy = tmp_path/'source'
    subprocess.run(['git', 'clone', '-q', ROOT, copy], check=True)
    command = [sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel = ZipFile(next(tmp_path.glob('*.whl')))
    names = wheel.namelist()
    modules = {str(file(name).relative_to(ROOT)) for name in ORDER}
    recipes = [f'recipes/{name}.toml' for name in ('am-radio-h', 'c-radio-v4-so400m', 'radio-v2.5-b')]
    data = {f'radio_nb/{name}' for name in ('weights/u2netp.safetensors', *recipes, 'py.typed')}
    assert modules | data | {'radio_nb/__main__.py'} <= set(names)
    metadata = next(wheel.read(name).decode() for name in names if name.endswith('METADATA'))
    required = [line for line in metadata.splitlines() if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert not any(name in line for line in required for name in ('nbdev', 'fastcore', 'jupyterlab', 'scikit'))
    assert all(f'Provides-Extra: {extra}' in metadata for extra in ('zoo', 'notebooks', 'dev'))
    entry_points = next(wheel.read(name).decode() for name in names if name.endswith('entry_points.txt'))
    assert 'radio-nb = radio_nb.front.cli:main' in entry_points


def test_nothing_leaves_the_repository():
    "No chapter reads what lies outside it, except in cells that are run by hand."
    for path in CHAPTERS:
        for source, cell in cells(path):
            if cell['cell_type'] == 'code' and 'RADIO_NB_SHARED' in source:
                assert '#| slow' in source, f'{path.name}: {source[:80]}'


def test_every_promise_is_tried_by_a_test_that_there_is():
    "The table in the chapter on run folders."
    text = next(source for cell in json.loads((ROOT/'nbs/training/01_run_folder.ipynb').read_text())['cells']
                if '## What survives what' in (source := ''.join(cell['source'])))
    links = re.findall(r'\[`([\w./]+)`\]\(https://\S+?/blob/main/tests/([\w./]+)\)', text)
    assert len(links) >= 20 and len(links) == text.count('/blob/main/tests/')
    for name, file in links: assert name == file or f'\ndef {name}(' in (ROOT/'tests'/file).read_text(), name
