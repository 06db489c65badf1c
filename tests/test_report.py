"The report: what it says of runs that went well and of others, what it survives, and what it never lets through."
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import radio_nb
from PIL import Image

from radio_nb.data.files import read_json, write_json
from radio_nb.data.images import open_images
from radio_nb.evaluation.compare import compare_runs
from radio_nb.evaluation.scores import Score, load_scores, save_scores
from radio_nb.front.evaluate import comparison_page, open_recipe
from radio_nb.front.pictures import POINTS, loss_curves, plain_curve
from radio_nb.front.report import (
    loss_warnings,
    match_in_words,
    monitor_blocks,
    refresh_report,
    skipped_warning,
    words_blocks,
    write_report,
)
from radio_nb.front.run_match import compared_students, load_match, match_rows, match_run
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.preparation import prepare

nan = float('nan')


@pytest.fixture
def mine(run, tmp_path):
    "A copy of the finished run."
    return Path(shutil.copytree(run[0], tmp_path/'mine', ignore=shutil.ignore_patterns('checkpoints')))


@pytest.fixture(scope='module')
def ready(run): return prepare(open_recipe(run[0]))


def matched(crops, images=None, untrained=-.3, constant=-.02):
    "A match by hand: what the student explains of two teachers, on new crops and on new images."
    def by_student(values):
        names = dict(zip(('clip', 'sam'), values))
        return {'student': {name: {'explained': value} for name, value in names.items()},
                'untrained': {name: {'explained': untrained} for name in names},
                'constant': {name: {'explained': constant} for name in names}}
    return {'new crops': by_student(crops)} | ({'new images': by_student(images)} if images else {})


@pytest.mark.parametrize('match, said', [
    (matched((.6, .5), (.5, .4)), ['What it has learned of clip and sam holds for images that it never saw.']),
    (matched((.01, -.1), (.01, -.2)), ['Of clip and sam it has learned nothing: ']),
    (matched((.2, .2), (.2, .2), untrained=.19), ['Of clip and sam it has learned nothing: ']),
    (matched((.2, .2), (.2, .2), constant=.21), ['Of clip and sam it has learned nothing: ']),
    (matched((.9, .8), (-.1, 0.)), ['Of clip and sam it has memorized the training images: ']),
    (matched((.9, .8), (.3, .7)),
     ['Of clip it has memorized its images in part: ', 'What it has learned of sam holds']),
    (matched((.9, 0.)),
     ['Of sam it has learned nothing: ', 'Of clip it has learned something; no images were held out']),
    (matched((nan, .5), (nan, .4)), ['Its features for clip are not finite: ', 'What it has learned of sam holds']),
])
def test_the_verdict_follows_what_happened(match, said):
    "Learned, not learned, memorized and the rest: each has its own sentence, and no other one."
    text = match_in_words(match, '500 images', 1000)
    for sentence in said: assert sentence in text
    marks = ['holds for', 'learned nothing', 'memorized the training', 'in part', 'learned something', 'not finite']
    assert sum(mark in text for mark in marks) == len(said)


def test_a_range_and_a_single_number_in_words():
    text = match_in_words(matched((.6, .5), (.4, .4)), '1 image', 1)
    assert text.startswith('The student learned from 1 image for 1 step. On new crops of those images it explains '
                           'between 50% and 60% of the variance of the features of its teachers, and on images it '
                           'never saw 40%. ')


def course(**losses):
    "Lines of the metrics, by hand: the losses of a teacher by its kinds."
    return [{'step': step, 'teachers': {'clip': dict(zip(losses, values))}}
            for step, values in enumerate(zip(*losses.values()), 1)]


def test_losses_that_do_not_fall_raise_an_alarm():
    flat, falling, rising = [1.]*40, [.95**i for i in range(40)], [1 + .02*i for i in range(40)]
    assert loss_warnings(course(spatial=falling, summary=falling)) == []
    assert loss_warnings(course(spatial=falling, summary=flat)) == [
        'The summary loss of clip did not fall: it was 1 over the first tenth of the steps and 1 over the last.']
    assert loss_warnings(course(spatial=rising))[0].startswith('The spatial loss of clip rose: it was 1.03')
    assert loss_warnings(course(spatial=flat[:9])) == []   # of so few steps nothing can be said
    assert len(loss_warnings(course(spatial=falling[:20] + [nan]*20))) == 1   # which is not a fall


def test_losses_of_two_stages_are_not_compared():
    from radio_nb.training.recipe import Recipe, Stage
    lines = course(spatial=[.9**i for i in range(20)] + [2*.97**i for i in range(20)])   # in another unit
    recipe = Recipe('photos', ('zoo:u2netp',), 'runs/a', stages=(Stage(20), Stage(20)))
    def alarm(recipe): return ' rose: ' in ''.join(words_blocks(recipe, matched((.5, .5)), lines, 9, 0))
    assert alarm(replace(recipe, stages=())) and not alarm(recipe)


def test_many_skipped_images_raise_an_alarm():
    assert skipped_warning(30, 100).startswith('30 of 100 images (30%) could not be used, so it has seen less')
    assert skipped_warning(3, 100) == skipped_warning(3, None) == skipped_warning(0, 0) == ''


def test_a_run_of_six_steps_has_learned_nothing(run):
    "And its report says so, where it used to say of every run that it had learned its images more than their world."
    page = (run[0]/'report.html').read_text()
    assert 'Of u2netp it has learned nothing: ' in page and 'memorized' not in page


def broken(folder, n=3):
    folder.mkdir()
    for i in range(n): (folder/f'{i}.png').write_text('no image')
    return open_images(str(folder))


def test_held_out_images_that_cannot_be_read_end_no_run(mine, ready, tmp_path):
    "The match on new crops is still there, and so is the report, which says what happened."
    ready = ready._replace(held=broken(tmp_path/'broken'))
    recipe = replace(open_recipe(mine), hold_out=3)
    match = match_run(recipe, ready, mine, crops_seen=4)
    assert list(match) == ['new crops'] == list(load_match(mine))
    page = write_report(recipe, ready, mine, match).read_text()
    assert 'Of 3 images held out, 3 cannot be read.' in page and str(tmp_path/'broken'/'0.png') in page
    assert 'Features of training images' in page and '<img' in page
    mixed = tmp_path/'mixed'
    broken(mixed)
    Image.new('RGB', (64, 64), 'red').save(mixed/'good.png')
    match = match_run(recipe, ready._replace(held=open_images(str(mixed))), mine, crops_seen=4)
    assert list(match) == ['new crops', 'new images']


def test_a_run_whose_held_out_images_are_broken_has_its_report(tmp_path):
    "From the command line: 1 of 4 images is held out, and cannot be read."
    folder = tmp_path/'images'
    folder.mkdir()
    for i in range(4): Image.effect_noise((64, 64), 60).convert('RGB').save(folder/f'{i}.png')
    flags = ['--teachers', 'timm:test_vit@random#64', '--images', folder, '--size', 64, '--depth', 1, '--steps', 2,
             '--statistics-steps', 2, '--batch-size', 2, '--head-width', 16, '--hold-out', 1]
    from radio_nb.data.images import hold_out
    _, held = hold_out(open_images(str(folder)), 1, 0)
    Path(held[0]['image']['path']).write_text('no image')
    done = radio_nb('distill', *flags, '--out', tmp_path/'run')
    assert done.returncode == 0, done.stderr
    page = (tmp_path/'run'/'report.html').read_text()
    assert 'Of 1 image held out, 1 cannot be read.' in page
    assert 'test_vit@random' in page and list(load_match(tmp_path/'run')) == ['new crops']


DAMAGES = {
    'metrics.jsonl': [('', 'metrics.jsonl is lost or holds no whole line: there are no curves'),
                      ('{"step": 1, "tea', 'metrics.jsonl is lost or holds no whole line'),
                      ('[1]\n{"step": 2}\n', 'metrics.jsonl is lost or holds no whole line')],
    'skipped.json': [('{"a.png": "is', 'skipped.json is damaged'), ('[]', 'skipped.json is damaged')],
    'evaluation.json': [(text, 'evaluation.json is damaged') for text in ('{"scores": [', '{"scores": [3]}', '[]')]}


@pytest.mark.parametrize('file, text, said', [(file, *case) for file, cases in DAMAGES.items() for case in cases])
def test_a_damaged_file_spoils_only_its_part(mine, ready, file, text, said):
    (mine/file).write_text(text)
    page = write_report(open_recipe(mine), ready, mine, load_match(mine)).read_text()
    assert said in page and '<h2>Recipe</h2>' in page and '<img' in page and '<td>u2netp</td>' in page


def test_metrics_that_were_cut_short_or_lost_a_line(mine, ready):
    lines = (mine/'metrics.jsonl').read_text().splitlines(keepends=True)
    (mine/'metrics.jsonl').write_text(''.join(lines[:2] + lines[3:]))
    page = write_report(open_recipe(mine), ready, mine, load_match(mine)).read_text()
    assert 'metrics.jsonl has lost 1 line: the curves have a gap' in page and 'Losses of the grids' in page
    (mine/'metrics.jsonl').unlink()
    assert 'there are no curves' in write_report(open_recipe(mine), ready, mine, load_match(mine)).read_text()


def test_lost_information_is_named(mine, ready):
    page = write_report(replace(open_recipe(mine), information=(10.,)), ready, mine, load_match(mine)).read_text()
    assert 'What the rate–distortion modules achieve cannot be shown: ' in page and 'information.json' in page
    assert 'Where the time went' in page


@pytest.mark.parametrize('text', ['{"new crops": {"stu', '[]', '{"new crops": {}}',
                                  '{"new crops": {"student": {"a": 3}}}'])
def test_a_damaged_match_names_the_cure(mine, text):
    (mine/'match.json').write_text(text)
    with pytest.raises(BadInput, match=r'match.json is damaged \(.+\): delete it, and it is made'): load_match(mine)
    (mine/'match.json').unlink()
    assert load_match(mine) is None


@pytest.mark.parametrize('name, read', [('match.json', load_match), ('evaluation.json', load_scores)])
def test_a_number_that_a_disk_has_changed_is_not_shown(mine, name, read):
    if name == 'evaluation.json': save_scores(mine, [Score('student', 'knn', .25, 3, 3)])
    before, text = read(mine), (mine/name).read_text()
    at = next(i for i, c in enumerate(text) if c in '123456' and text[i-1] == '.')
    (mine/name).write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at+1:])   # one bit
    with pytest.raises(BadInput, match=f'{name} is damaged .its checksum is another'): read(mine)
    (mine/name).write_text(text)
    assert read(mine) == before


class Scripts(HTMLParser):
    "Counts the scripts and pictures of a page, and whatever has an attribute that runs."
    def __init__(self, page):
        super().__init__()
        self.tags, self.events = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.events += [name for name, _ in attributes if name.startswith('on')]


EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script><b>'


def dressed_pages(original, ready, run, name, images):
    "The report of a copy of a run whose teacher, images and folder are called otherwise, and a comparison."
    shutil.copytree(original, run)
    def renamed(text): return text.replace('"u2netp"', json.dumps(name))
    (run/'metrics.jsonl').write_text(renamed((run/'metrics.jsonl').read_text()))
    write_json(run/'match.json', json.loads(renamed(json.dumps(read_json(run/'match.json')))))
    (run/'skipped.json').write_text(json.dumps({images: images}))
    save_scores(run, [Score(name, f'knn, {name}', .5, 4, 9, 'knn', images)])
    named = dict(teachers=(f'timm:test_vit@{name}',), images=images, trackers=(name,), out=str(run))
    recipe = replace(open_recipe(run), **named)
    ready = ready._replace(teachers={name: ready.teachers['u2netp']})
    page = write_report(recipe, ready, run, load_match(run)).read_text()
    refresh_report(run)
    assert (run/'report.html').read_text() == page
    partial = {f'{images}/{run}': [Score('student', name, .5, 9, 9, 'x', images)],
               name: [Score('student', 'knn', .5, 3, 9, 'x', images), Score('student', name, .5, 9, 9, 'x', images)]}
    return page, comparison_page(compare_runs(partial, [[one] for one in partial]))


def test_nothing_that_a_user_wrote_becomes_markup(mine, ready, tmp_path):
    "A run in a folder, teachers and images with names like that: the page has as many scripts as with tame ones."
    tame = dressed_pages(mine, ready, tmp_path/'tame', 'clip', 'photos')
    wild = dressed_pages(mine, ready, tmp_path/EVIL.replace('/', ''), EVIL, f'photos/{EVIL}')
    for one, other in zip(tame, wild):
        assert Scripts(one).tags == Scripts(other).tags and not Scripts(other).events
        assert '<script>alert' not in other and EVIL not in other
    assert r'\u003cb\u003e' not in wild[0]   # plotly would take it for bold type


def test_tables_show_a_dash_for_what_is_not_known():
    match = {'new images': {'student': {'clip': {'summary_cosine': .5}}, 'constant': {'clip': {'summary_cosine': nan}}}}
    row, = match_rows(match)
    assert row[:2] == ['clip', 'new images'] and torch.tensor(row[2:5]).isnan().all() and row[5] == .5


def test_a_run_that_went_on_from_another_is_compared_with_what_it_began_with(mine, ready):
    recipe, images = open_recipe(mine), torch.rand(2, 3, 64, 64)
    first = compared_students(recipe, ready, mine)
    more = compared_students(replace(recipe, init=str(mine)), ready, mine)
    with torch.no_grad(): grids = [one(images)['u2netp'].spatial for one in (more['untrained'], more['student'],
                                                                             first['untrained'])]
    assert torch.equal(*grids[:2]) and not torch.equal(*grids[1:])


@pytest.mark.parametrize('found', ['nothing', 'another student'])
def test_a_run_whose_beginning_is_gone_is_compared_with_an_untrained_student(mine, ready, tmp_path, capsys, found):
    recipe, images = open_recipe(mine), torch.rand(2, 3, 64, 64)
    other = Student('vit_tiny_patch16_224', {'u2netp': (0, 64)}, depth=2)
    if found == 'another student': other.save_pretrained(tmp_path)
    more = compared_students(replace(recipe, init=str(tmp_path)), ready, mine)
    first = compared_students(recipe, ready, mine)
    with torch.no_grad(): grids = [one['untrained'](images)['u2netp'].spatial for one in (more, first)]
    assert torch.equal(*grids) and 'the baseline is an untrained student instead' in capsys.readouterr().err


def test_gradient_norms_stand_under_their_teachers():
    "Teachers come and go with the stages."
    lines = [{'step': step, 'seconds': {}, 'gradient_norms': norms} for step, norms in
             ((1, {'a': 1.}), (2, {'b': 2.}), (3, {'b': 3., 'a': 4.}))]
    table = monitor_blocks(lines)[-1]
    rows = [re.findall(r'<t[hd][^>]*>([^<]*)<', row) for row in table.split('<tr>')[1:]]
    assert rows == [['step', 'a', 'b'], ['1', '1.000', '–'], ['2', '–', '2.000'], ['3', '4.000', '3.000']]


def test_a_long_run_has_curves_that_a_browser_can_draw():
    lines = [{'step': step, 'loss': 1/(1 + step), 'teachers': {'a': {'spatial': 1/(1 + step)}}}
             for step in range(100_001)]
    for fig in (loss_curves(lines, 'spatial'), plain_curve(lines, 'loss', 'loss')):
        for trace in fig.data: assert 1000 < len(trace.x) == len(trace.y) <= POINTS and trace.x[0] == 0


def test_a_picture_to_click_on_stands_in_the_report_and_needs_no_network(run):
    "Its data are in the page, and a still picture for whoever runs no scripts; sliders and lists work by keyboard."
    page = (run[0]/'report.html').read_text()
    part = page.partition('<section class=similarity>')[2].partition('</section>')[0]
    data = json.loads(part.partition('application/json">')[2].partition('</script>')[0])
    assert data['teachers'] == ['u2netp'] and len(data['images']) == 4
    assert {len(image['grids'][0]) for image in data['images']} == {2}
    assert '<div class=still><figure><img alt="How like' in part and part.count('<input type=range') == 2
    assert part.count('<canvas') == part.count('aria-label="') == 3
    assert '://' not in re.sub(r'data:image[^"]*', '', part) and len(part) < 300_000
    bare = re.sub(r'<script>/\*\*.*?</script>', '', page, flags=re.DOTALL)   # plotly itself
    assert len(bare) < 1_000_000
