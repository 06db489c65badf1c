"The site, as .ci/preview builds it: every page is there, every link leads somewhere, nothing needs eyes or a network."
import ast
import json
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

pytest.importorskip('smalldocs')
BOOK = re.findall(r'- (\S+\.ipynb)', (ROOT/'nbs'/'sidebar.yml').read_text())


def page_of(chapter): return re.sub(r'(\d+_)?(\w+)\.ipynb', r'\2.html', chapter)


class Page(HTMLParser):
    "What a page links to, what it loads, its pictures, and the places that one can link to."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.pictures, self.ids = [], [], [], set()
        self.text = path.read_text(encoding='utf-8')
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get('id'))
        if tag == 'a' and given.get('href'): self.links.append(given['href'])
        if tag == 'img': self.pictures.append(given.get('alt') or '')
        if tag == 'link' and given.get('rel') not in ('canonical', 'prev', 'next'): self.loads.append(given['href'])
        if tag in ('script', 'img', 'iframe', 'source', 'video') and given.get('src'): self.loads.append(given['src'])


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run([sys.executable, ROOT/'.ci'/'preview', folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope='module')
def pages(site): return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob('*.html')}


def test_every_chapter_has_its_page_and_every_page_its_place_in_the_book(pages):
    assert {page_of(chapter) for chapter in BOOK} == set(pages)


def test_every_internal_link_leads_somewhere(site, pages):
    lost, home = [], site.resolve()
    @cache
    def target(folder, path): # 17,000 links lead to a few hundred places
        file = home/folder/unquote(path)
        return file.resolve().relative_to(home).as_posix() if file.exists() else None
    for name, page in pages.items():
        for link in page.links + page.loads:
            to = urlsplit(link)
            if to.scheme or to.netloc: continue
            other = target(Path(name).parent.as_posix(), to.path) if to.path else name
            if other is None: lost.append(f'{name}: {link}')
            elif to.fragment and unquote(to.fragment) not in pages[other].ids: lost.append(f'{name}: {link}')
    assert not lost, '\n'.join(lost)


def test_every_picture_says_in_words_what_it_shows(pages):
    for name, page in pages.items():
        for alt in page.pictures: assert len(alt.split()) > 1, f'{name} has a picture with the text {alt!r}'
    assert sum(len(page.pictures) for page in pages.values()) > 50


def test_no_page_needs_the_network(site, pages):
    for name, page in pages.items():
        for source in page.loads: assert not re.match('(https?:)?//', source), f'{name} loads {source}'
        assert not re.search(r'(import\s[^\n]*from\s*|@import\s*|url\()[\'"]?https?:', page.text), name
        assert 'class="math ' not in page.text, f'{name} has a formula that is not MathML'
    for style in site.rglob('*.css'): assert not re.search(r'url\([\'"]?https?:', style.read_text()), style


def test_every_public_function_is_documented_on_the_page_of_its_chapter(pages):
    for path in (ROOT/'radio_nb').glob('*/*.py'):
        source = path.read_text()
        chapter = re.search(r'File to edit: \.\./\.\./nbs/(\S+\.ipynb)', source)
        if not chapter: continue   # __init__.py
        page = page_of(chapter[1])
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                assert node.name.lower() in pages[page].ids, f'{node.name} is not on {page}'


def test_the_index_shows_on_one_screen_what_this_is(pages):
    _, _, main = pages['index.html'].text.partition('<main')
    before, _, _ = main.partition('<h2')
    assert 'AM-RADIO' in before and 'PHI-S' in before and 'images/demo.jpg' in before


@pytest.mark.parametrize('chapter', BOOK)
def test_a_chapter_opens_with_a_cell_for_title_and_subtitle_alone(chapter):
    "nbdev makes the page's head of this cell; what else is in it would not be on the site."
    cells = json.loads((ROOT/'nbs'/chapter).read_text())['cells']
    first = ''.join(next(cell['source'] for cell in cells if cell['cell_type'] == 'markdown'))
    assert re.fullmatch(r'# .+\n\n> .+\n*', first), first


def test_the_index_and_the_navigation_name_only_what_there_is():
    index = (ROOT/'nbs'/'index.ipynb').read_text()
    for chapter in BOOK[1:]: assert f']({chapter})' in index, f'the index does not list {chapter}'
    for chapter in re.findall(r'href: (\S+\.ipynb)', (ROOT/'_quarto.yml').read_text()): assert chapter in BOOK


def test_a_folder_with_something_else_is_not_replaced(tmp_path):
    (tmp_path/'thesis.txt').write_text('words')
    done = subprocess.run([sys.executable, ROOT/'.ci'/'preview', tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and 'holds something else' in done.stderr and Path(tmp_path/'thesis.txt').exists()
