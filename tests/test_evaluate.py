"Evaluation as a user meets it: suites, what they leave behind, Ctrl-C, memory; and runs side by side."
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Children, command
from conftest import radio_nb
from datasets import Dataset
from datasets import Features as Columns
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata
from torch.testing import assert_close

import radio_nb as radio_nb_package
from radio_nb.data.images import open_images
from radio_nb.data.labelled import in_order, labelled_images
from radio_nb.evaluation import suites
from radio_nb.evaluation.compare import average_ranks, best_cells, compare_runs, comparison_table, ranks
from radio_nb.evaluation.knn import knn_accuracy
from radio_nb.evaluation.scores import EvalData, Score, load_scores, merged, save_scores
from radio_nb.evaluation.suites import (
    ReadableImages,
    extract,
    interleaved,
    own_features,
    shuffled_subset,
    student_eval_model,
    zero_shot_suite,
)
from radio_nb.front import cli
from radio_nb.front import evaluate as front_evaluate
from radio_nb.front.evaluate import by_seed
from radio_nb.models.student import Student
from radio_nb.models.zoo import photographs
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.training.recipe import Recipe, recipe_toml

quick = settings(max_examples=50, deadline=None)


def png(image):
    file = io.BytesIO()
    image.save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def pieces(n, side=64):
    "Random pieces of a photograph, a list for each of three."
    random = np.random.default_rng(0)
    for path in photographs()[:3]:
        photo = Image.open(path).convert('RGB')
        corners = [[int(random.integers(length - side)) for length in photo.size] for _ in range(n)]
        yield [photo.crop((x, y, x + side, y + side)) for x, y in corners]


@pytest.fixture(scope='session')
def labelled(tmp_path_factory):
    "Two folders with three classes."
    folder = tmp_path_factory.mktemp('labelled')
    for c, images in enumerate(pieces(18)):
        for i, image in enumerate(images):
            path = folder/('train' if i < 12 else 'test')/f'class_{c}'/f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return folder


@pytest.fixture(scope='session')
def masks(tmp_path_factory):
    "Two Parquet files: pieces of two photographs side by side, and which is where."
    folder, (left, right, _) = tmp_path_factory.mktemp('masks'), list(pieces(12))
    rows = []
    for a, b in zip(left, right):
        image, mask = Image.new('RGB', (64, 64)), Image.new('L', (64, 64))
        image.paste(a.crop((0, 0, 32, 64)), (0, 0))
        image.paste(b.crop((0, 0, 32, 64)), (32, 0))
        mask.paste(1, (32, 0, 64, 64))
        rows.append({'image': png(image), 'mask': png(mask)})
    columns = Columns({'image': ImageColumn(), 'mask': ImageColumn()})
    for name, part in {'train': rows[:8], 'test': rows[8:]}.items():
        Dataset.from_list(part, columns).to_parquet(folder/f'{name}.parquet')
    return folder


@pytest.fixture
def mine(run, tmp_path):
    "A copy of the finished run."
    return Path(shutil.copytree(run[0], tmp_path/'mine', ignore=shutil.ignore_patterns('checkpoints')))


def evaluate(out, *args): cli.main(['evaluate', *map(str, [out, *args])])
def found(out): return {(score.model, score.measure): score for score in load_scores(out)}


def test_all_suites_beside_teachers_and_others(mine, labelled, masks, capsys):
    evaluate(mine, '--suite', 'match', 'places', 'decoders', 'knn', 'linear', 'segmentation',
             '--images', 'zoo:photos', '--limit', 12, '--k', 5, '--train', labelled/'train', '--test', labelled/'test',
             '--masks', masks/'train.parquet', '--test-masks', masks/'test.parquet', '--teachers-too',
             '--also', 'timm:test_vit@random#64')
    scores, printed = found(mine), capsys.readouterr().out
    for model in ('student', 'u2netp', 'test_vit@random'):
        for measure in ('found again', 'knn', 'linear', 'segmentation mIoU'):
            assert 0 <= scores[model, measure].value <= 1
        assert -.1 < scores[model, 'fixed pattern'].value < 1
    assert {measure for who, measure in scores if who == 'student'} == {
        'explained, u2netp', 'mse, u2netp', 'cosine, u2netp', 'summary cosine, u2netp', 'error range, u2netp',
        'error range, normalized, u2netp', 'cka, u2netp', 'rankme, u2netp', 'found again', 'fixed pattern',
        'same answer, u2netp', 'knn', 'linear', 'segmentation mIoU'}
    assert 0 < scores['constant', 'same answer, u2netp'].value < 1
    assert ('test_vit@random', 'cka, u2netp') in scores and ('u2netp', 'cka, u2netp') not in scores
    assert ('u2netp', 'rankme, u2netp') in scores
    assert scores['student', 'knn'].total == 24 and scores['student', 'knn'].dataset.endswith('12 each, k = 5')
    assert all(score.n == score.total for score in scores.values())
    assert 'segmentation mIoU' in printed and 'test_vit@random' in printed   # a table does not hide random weights
    page = (mine/'report.html').read_text()
    assert page.count('<section id=evaluation>') == 1 == page.count('<h2>Evaluation</h2>')
    assert 'segmentation mIoU' in page


def test_another_model_does_not_take_the_name_of_a_teacher(mine):
    "Of one name, the model would not be looked at: what the teacher says would be taken for its own."
    evaluate(mine, '--images', 'zoo:photos', '--limit', 4, '--also', 'zoo:u2netp#96')
    assert found(mine)['zoo:u2netp#96', 'cka, u2netp'].value < .999


def test_another_model_does_not_take_the_name_of_the_student(mine, labelled):
    "Its weights may be in a file that is called so; the last score of a name would stand for both."
    import timm  # after radio_nb, so that torchvision can be imported
    spec = f"timm:test_vit@{mine/'other'/'student.safetensors'}#64"
    (mine/'other').mkdir()
    save_file(timm.create_model('test_vit').state_dict(), mine/'other'/'student.safetensors')
    data = '--suite', 'knn', '--train', labelled/'train', '--test', labelled/'test'
    evaluate(mine, *data)
    alone = found(mine)['student', 'knn']
    evaluate(mine, *data, '--also', spec)
    assert found(mine)['student', 'knn'] == alone and (spec, 'knn') in found(mine)


def test_what_is_known_of_one_size_stays_when_another_fails(mine, refused, monkeypatch):
    sizes = '--images', 'zoo:photos', '--limit', 4, '--sizes', 64, 96
    assert '--sizes 72x72: both sides must be a multiple of 16' in refused('evaluate', mine, *sizes, 72)
    assert not load_scores(mine)   # refused before anything was asked
    whole = suites.match_suite
    def once(*args):
        if load_scores(mine): raise BadInput('out of memory')
        return whole(*args)
    monkeypatch.setattr(front_evaluate, 'match_suite', once)
    assert 'out of memory' in refused('evaluate', mine, *sizes)
    assert {score.dataset for score in load_scores(mine)} == {'zoo:photos, 4 each at 64 × 64'}


def test_a_score_of_fewer_images_replaces_none_of_more():
    def of(n, value, total=100): return Score('student', 'knn', value, n, total, 'knn', 'a → b')
    for old, new, kept in ((of(100, .5), of(16, .1), .5), (of(16, .1), of(100, .5), .5), (of(16, .1), of(32, .2), .2),
                           (of(100, .5), of(100, .6), .6), (of(100, .5), of(90, .4, 90), .4)):
        assert [score.value for score in merged([old], [new])] == [kept]


def test_the_class_that_does_not_count_is_in_a_mask(mine, masks, refused):
    sets = '--suite', 'segmentation', '--masks', masks/'train.parquet', '--test-masks', masks/'test.parquet'
    for no in (-1, 256):
        assert f'--ignore is {no}, but must be a class in the masks' in refused('evaluate', mine, *sets, '--ignore', no)


def test_summaries_do_not_keep_the_tokens_of_which_they_are_a_view(labelled, monkeypatch):
    tokens = torch.rand(64, 9, 5)
    def features(images): return Features(tokens[:len(images), 0], tokens[:len(images), 1:, None])
    def encoded(encode, *_): assert encode(torch.rand(4, 3, 8, 8)).untyped_storage().nbytes() == 4*5*4
    monkeypatch.setattr(suites, 'extract', encoded)
    model = suites.EvalModel('a', features, (8, 8), torch.device('cpu'))
    assert not suites.labelled_suite(model, EvalData(train=str(labelled/'train'), test=str(labelled/'test'), k=3))


def test_the_vote_is_that_of_knn_accuracy(mine, labelled):
    evaluate(mine, '--suite', 'knn', '--train', labelled/'train', '--test', labelled/'test', '--k', 3)
    encode = own_features(Student.from_pretrained(mine))
    with torch.no_grad():
        both = (labelled_images(str(labelled/name)) for name in ('train', 'test'))
        (x, y), (q, truth) = ((torch.cat([encode(batch).summary for batch in in_order(images, 64)]), labels)
                              for images, labels, _ in both)
    assert_close(found(mine)['student', 'knn'].value, knn_accuracy(x, y, q, truth, 3))


def test_again_replaces_and_others_stay(mine, labelled):
    flags = ['--suite', 'knn', '--train', labelled/'train', '--test', labelled/'test']
    for k in (3, 4, 3): evaluate(mine, *flags, '--k', k)
    assert [score.dataset[-5:] for score in load_scores(mine)] == ['k = 3', 'k = 4']
    assert (mine/'report.html').read_text().count('<h2>Evaluation</h2>') == 1
    assert (mine/'report.html').read_text().endswith('</html>')
    (mine/'report.html').unlink()
    evaluate(mine, *flags, '--k', 3)   # nothing to bring up to date
    assert not (mine/'report.html').exists()


def test_a_report_from_before_gets_its_section(mine, labelled):
    page = (mine/'report.html').read_text()
    (mine/'report.html').write_text(page.replace('<section id=evaluation></section>', ''))
    evaluate(mine, '--suite', 'knn', '--train', labelled/'train', '--test', labelled/'test', '--k', 3)
    assert (mine/'report.html').read_text().endswith('</section></html>')


def test_the_training_images_are_not_needed(mine, labelled):
    recipe = (mine/'recipe.toml').read_text()
    (mine/'recipe.toml').write_text(recipe.replace('"zoo:photos"', '"/moved/away"'))
    evaluate(mine, '--images', labelled/'test')
    assert {who for who, _ in found(mine)} == {'student', 'constant', 'u2netp'}


def test_sizes(mine, labelled, capsys):
    evaluate(mine, '--images', labelled/'test', '--sizes', 64, '32x64')
    printed = capsys.readouterr().out
    assert 'at 64 × 64' in printed and 'at 32 × 64' in printed
    assert {score.dataset.rpartition(' at ')[2] for score in load_scores(mine)} == {'64 × 64', '32 × 64'}


def test_what_is_missing_is_named_by_its_flag(mine, refused, labelled, masks):
    train, test = labelled/'train', labelled/'test'
    missing = 'suite knn: say which labelled images to learn from: --train FOLDER'
    assert missing in refused('evaluate', mine, '--suite', 'knn')
    assert '--test FOLDER' in refused('evaluate', mine, '--suite', 'linear', '--train', labelled)
    assert '--masks FILE' in refused('evaluate', mine, '--suite', 'segmentation')
    assert '--test-masks FILE' in refused('evaluate', mine, '--suite', 'segmentation', '--masks', masks/'train.parquet')
    missing = 'no teacher of this run matches images and texts'
    assert missing in refused('evaluate', mine, '--suite', 'zero-shot', '--test', test)
    sets = ['--suite', 'knn', '--train', train, '--test', test]
    assert '--k is 50, but must be from 1 to 36' in refused('evaluate', mine, *sets, '--k', 50)
    assert 'did you mean' in refused('evaluate', mine, *sets, '--also', 'timm:resnet81')
    assert 'has no labels' in refused('evaluate', mine, '--suite', 'knn', '--train', train/'class_0', '--test', test)
    assert 'without stream:' in refused('evaluate', mine, '--images', f'stream:{test}')
    assert '--limit is -1' in refused('evaluate', mine, *sets, '--limit', -1)
    assert not (mine/'evaluation.json').exists()
    (mine/'evaluation.json').write_text('{')
    assert 'evaluation.json is damaged' in refused('evaluate', mine, *sets, '--k', 3)


def test_images_that_cannot_be_read_do_not_count(tmp_path, refused, mine):
    for i in range(3): Image.new('RGB', (40, 40), (i*80, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'bad.png').write_text('no image')
    readable = ReadableImages(open_images(str(tmp_path)), (32, 32))
    assert [len(batch) for batch in readable] == [3] and (readable.n, readable.total) == (3, 3)
    assert list(readable.skipped) == [str(tmp_path/'bad.png')]
    good, bad = png(Image.new('RGB', (40, 40))), {'bytes': b'no image', 'path': 'x.png'}
    columns = Columns({'image': ImageColumn(decode=False)})
    twice = ReadableImages(Dataset.from_dict({'image': [bad, good, bad]}, features=columns), (32, 32))
    assert [len(batch) for batch in twice] == [1] and (twice.n, twice.total) == (1, 1)
    (tmp_path/'all').mkdir()
    (tmp_path/'bad.png').rename(tmp_path/'all'/'bad.png')
    assert 'none of 1 images can be read; the first: ' in refused('evaluate', mine, '--images', tmp_path/'all')


@pytest.mark.parametrize('suite', ['match', 'places', 'decoders', 'knn', 'linear', 'segmentation'])
def test_features_that_are_not_finite_have_no_value(mine, refused, labelled, masks, suite):
    "A probe of NaN and infinity would give some number, and exit 0."
    weights = load_file(mine/'student.safetensors')
    name, = (name for name in weights if name.startswith('backbone') and name.endswith('.norm.weight'))   # the last one
    weights[name].fill_(3e38)   # finite itself; weights that are not are refused before
    save_file(weights, mine/'student.safetensors')
    said = refused('evaluate', mine, '--suite', suite, '--images', 'zoo:photos', '--limit', 4, '--k', 1,
                   '--train', labelled/'train', '--test', labelled/'test',
                   '--masks', masks/'train.parquet', '--test-masks', masks/'test.parquet')
    assert 'of student are not finite: its weights are damaged' in said and not load_scores(mine)


def test_evaluated_from_anywhere_and_without_trackers(tmp_path, monkeypatch, refused, labelled):
    "A weight file with a relative path is looked for where the run was started; the tracker is not here at all."
    import timm  # after radio_nb
    project, elsewhere = tmp_path/'project', tmp_path/'elsewhere'
    for folder in (project/'weights', elsewhere): folder.mkdir(parents=True)
    save_file(timm.create_model('test_vit', num_classes=0).state_dict(), project/'weights'/'mine.safetensors')
    flags = ['--teachers', 'timm:test_vit@weights/mine.safetensors#64', '--images', 'zoo:photos', '--size', 64,
             '--depth', 1, '--steps', 2, '--statistics-steps', 2, '--batch-size', 4, '--head-width', 16]
    done = radio_nb('distill', *flags, '--out', 'runs/a', cwd=project)
    assert done.returncode == 0, done.stderr
    run = project/'runs'/'a'
    recipe = (run/'recipe.toml').read_text()
    assert 'trackers = []' in recipe
    (run/'recipe.toml').write_text(recipe.replace('trackers = []', 'trackers = ["swanlab"]'))
    monkeypatch.chdir(elsewhere)
    evaluate(run, '--images', labelled/'test', '--teachers-too')
    assert ('student', 'explained, mine') in found(run)
    (project/'weights'/'mine.safetensors').unlink()
    said = refused('evaluate', run, '--images', labelled/'test')
    assert f'no such weight file: {project/"weights"/"mine.safetensors"}, as weights/mine.safetensors is rel' in said


def test_teachers_that_had_no_say_are_not_judged(tmp_path, labelled):
    "A head that was never trained has no value: not in the table of the run, and not in those of evaluate."
    run = radio_nb_package.distill(
        images='zoo:photos', teachers=['zoo:u2netp#64', 'timm:test_vit@random#64', 'timm:test_convnext@random#64'],
        spatial_weights=(1., 0., 0.), summary_weights=(1., 1., 0.), size=64, depth=1, steps=2, statistics_steps=2,
        batch_size=4, head_width=16, hold_out=2, watch_every=0, out=str(tmp_path/'run'), live=False)
    for by_student in run.match.values():
        assert list(by_student['student']) == ['u2netp', 'test_vit@random']
        assert list(by_student['student']['test_vit@random']) == ['summary_cosine']
    assert 'convnext' not in str(run) and '–' in str(run)
    page = run.report().read_text()
    assert 'From top to bottom: the image; u2netp, then the student for it.' in page and '<td>test_convnext' not in page
    evaluate(run.out, '--images', labelled/'test')
    measures = [measure for who, measure in found(run.out) if who == 'student' and 'u2netp' not in measure]
    assert measures == ['summary cosine, test_vit@random']


def interrupt(at, what, *args):
    "The command, sent SIGINT by the step `at` of the work called `what`."
    def progress(self, step, note='', before=suites.Progress.__call__):
        before(self, step, note)
        if self.what.startswith(what) and step == at: os.kill(os.getpid(), signal.SIGINT)
    suites.Progress.__call__ = progress
    suites.BATCH = 4
    command(*args)


@pytest.mark.parametrize('at, what, partial', [
    (6, 'summaries of student', {'knn': 24, 'linear': 24}),
    (1, 'summaries of student', {}),
    (5, 'zoo:photos', {'explained, u2netp': 5}),
    (14, 'summaries of u2netp', None),
    (3, 'linear probe of student', {}),   # the vote is known, and a probe that was not finished has no value
])
def test_ctrl_c_leaves_what_is_known(mine, labelled, tmp_path, at, what, partial):
    child = Children(1, tmp_path/'log', interrupt, at, what, 'evaluate', mine, '--suite', 'match', 'knn', 'linear',
                     '--teachers-too', '--images', 'zoo:photos', '--train', labelled/'train', '--test', labelled/'test')
    child.wait(130)
    scores, printed = found(mine), child.output()
    assert 'Traceback' not in printed and 'stopped; what was found until then is in' in printed
    if partial is None:   # in the last batch: all of it is known
        assert all(score.n == score.total for score in scores.values()) and ('u2netp', 'linear') in scores
        return
    if what.startswith('linear'):
        assert scores['student', 'knn'].n == scores['student', 'knn'].total and ('student', 'linear') not in scores
        return
    cut = {measure: score.n for (who, measure), score in scores.items() if who == 'student' and score.n < score.total}
    assert partial.items() <= cut.items()
    assert all(who == 'student' for who, measure in scores if measure in ('knn', 'linear'))   # nothing was begun later
    for n in partial.values(): assert f'({n} of ' in printed and f'({n} of ' in (mine/'report.html').read_text()


def test_memory_does_not_grow_with_the_images(mine, labelled, tmp_path):
    """Summaries are kept, images are not: 1000 more images of 64 × 64 would be 49 MB as numbers.

    In a process of its own, whose allocator gives large blocks back at once: otherwise the peak is that of its
    fragments, which come and go by tens of megabytes from run to run.
    """
    code = ('import resource, sys; from radio_nb.front.cli import main\n'
            'for folder in sys.argv[2:]:\n'
            '    main(["evaluate", sys.argv[1], "--suite", "knn", "--train", folder, "--test", folder])\n'
            '    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)')
    for n in (200, 1200):
        for c in range(2):
            (tmp_path/f'{n}'/f'{c}').mkdir(parents=True)
            first = shutil.copy(labelled/'train'/f'class_{c}'/'0.png', tmp_path/f'{n}'/f'{c}'/'0.png')
            for i in range(1, n//4): os.link(first, tmp_path/f'{n}'/f'{c}'/f'{i}.png')
    done = subprocess.run([sys.executable, '-c', code, mine, tmp_path/'200', tmp_path/'1200'], capture_output=True,
                          text=True, timeout=300, env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '131072'})
    assert done.returncode == 0, done.stderr
    few, many = (int(line.split()[1])/1024 for line in done.stdout.splitlines() if line.startswith('peak'))
    assert many - few < 10, (few, many)   # megabytes


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_sets_are_equally_far_along(counts):
    order = interleaved(*counts)
    assert [order.count(which) for which in range(len(counts))] == counts
    for end in range(len(order) + 1):
        shares = [order[:end].count(which)/n for which, n in enumerate(counts)]
        assert max(shares) - min(shares) <= 1/min(counts) + 1e-9


def test_nothing_is_found_without_images_of_every_set():
    streams = [((torch.ones(1, 1), torch.ones(1)) for _ in range(3)) for _ in range(2)]
    stops = iter([False, True])
    assert extract(lambda x: x, streams, [3, 3], lambda: next(stops)) is None


def test_a_limit_takes_the_beginning_of_one_order(labelled):
    images, labels, _ = labelled_images(str(labelled/'train'))
    (few, few_y), (more, more_y) = shuffled_subset(images, labels, 6), shuffled_subset(images, labels, 20)
    assert [row['image'] for row in few] == [row['image'] for row in more][:6] and few_y.tolist() == more_y.tolist()[:6]
    assert len(set(few_y.tolist())) > 1 and len(shuffled_subset(images)[0]) == 36
    assert all(f'class_{y}' in row['image']['path'] for y, row in zip(more_y, more))


@pytest.mark.parametrize('backbone, summaries, width',
                         [('test_vit', 3, 3*64), ('test_vit', 0, 64), ('convnext_atto', 2, 320)])
def test_the_summary_of_a_student(backbone, summaries, width):
    student = Student(backbone, {f't{i}': (4*(i < summaries), 6) for i in range(3)}).eval()
    with torch.no_grad(): summary, spatial = own_features(student)(torch.rand(2, 3, 64, 64))
    assert summary.shape == (2, width)
    if not summaries: assert_close(summary, spatial.mean((1, 2)))


def test_zero_shot_asks_the_head_of_a_clip_model(labelled):
    torch.manual_seed(0)
    spec = 'open_clip:ViT-B-32@random'
    student = Student('test_vit', {'clip': (5, 6), 'mute': (0, 6), 'other': (5, 6)}).eval()
    specs = {'clip': spec, 'mute': 'open_clip:ViT-B-16@random', 'other': 'zoo:u2netp'}
    model = student_eval_model(student, (64, 64), specs)
    assert list(model.texts) == [spec]
    images, labels, _ = labelled_images(str(labelled/'test'))
    with torch.no_grad(): summaries = torch.cat([student(batch)['clip'].summary for batch in in_order(images, 64)])
    directions = torch.stack([summaries[labels == c].mean(0) for c in range(3)])   # each class by its own mean
    score, = zero_shot_suite(model, EvalData(test=str(labelled/'test')), {spec: directions})
    nearest = torch.cosine_similarity(summaries[:, None], directions, dim=-1).argmax(1)
    wanted = (nearest == labels).double().mean().item()
    assert (score.measure, score.n) == ('zero-shot top1, ViT-B-32', 18)
    assert_close(score.value, wanted)
    assert zero_shot_suite(model._replace(texts={}), EvalData(test=str(labelled/'test')), {spec: directions}) == []


def test_zero_shot_needs_names(tmp_path):
    for c in range(2):
        (tmp_path/f'{c}').mkdir()
        Image.new('RGB', (32, 32)).save(tmp_path/f'{c}'/'a.png')
    with pytest.raises(BadInput, match='its classes are numbers, and zero-shot needs their names'):
        suites.class_names(str(tmp_path))
    for c in range(2): (tmp_path/f'{c}').rename(tmp_path/f'great_auk_{c}')
    assert suites.class_names(str(tmp_path)) == ['great auk 0', 'great auk 1']


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.booleans())
def test_ranks_are_those_of_scipy(values, lower):
    own = ranks({str(i): float(value) for i, value in enumerate(values)}, lower)
    assert list(own.values()) == rankdata(np.array(values)*(1 if lower else -1)).tolist()
    assert sum(own.values()) == len(values)*(len(values) + 1)/2


@pytest.mark.parametrize('lower', [False, True])
def test_what_is_not_a_number_comes_last(lower):
    assert ranks({'a': .5, 'b': float('nan'), 'c': .7, 'd': float('nan')}, lower) == \
        {'a': 2. - lower, 'b': 3.5, 'c': 1. + lower, 'd': 3.5}


def test_measures_that_some_lack_are_not_ranked():
    table = {'knn': {'a': .5, 'b': .6}, 'linear': {'a': .9}}
    assert average_ranks(table) == {'a': 2., 'b': 1.}
    assert average_ranks({'knn': {'a': 1.}, 'linear': {'b': 1.}}) == {}


BASE = Recipe(images='photos', teachers=('zoo:u2netp',), out='')


def test_runs_that_differ_in_more_than_the_seed_stay_apart():
    runs = {'a': BASE, 'b': replace(BASE, seed=1, out='elsewhere'),
            'c': replace(BASE, seed=2, lr=.1), 'd': replace(BASE, lr=.1)}
    assert by_seed(runs) == [['a', 'b'], ['c', 'd']]
    with pytest.raises(BadInput, match='b and e have the same recipe and seed'):
        by_seed({**runs, 'e': replace(BASE, seed=1, out='copy')})


def evaluated(folder, recipe, **values):
    "A run folder with these scores, by hand; a value and how many of 400 images it is of."
    folder.mkdir(parents=True)
    (folder/'recipe.toml').write_text(recipe_toml(recipe))
    suite = {'knn': 'knn', 'linear': 'linear', 'mse': 'match'}
    for name, found in values.items():
        value, n = found if isinstance(found, tuple) else (found, 400)
        measure = 'mse, clip' if name == 'mse' else name
        save_scores(folder, [Score('student', measure, value, n, 400, suite[name], 'pets')])
    save_scores(folder, [Score('clip', 'knn', .99, 400, 400, 'knn', 'pets')])
    return folder


def test_compare(tmp_path, capsys, monkeypatch):
    """By hand. knn: b .8 is first, a (.6 + .8)/2 = .7 and c .7 share 2.5. linear: a .5, b .4, c .3. mse, less is
    better: c .1, a .25, b .3.
    Averages: a (2.5 + 1 + 2)/3 = 1.83, b (1 + 2 + 3)/3 = 2, c (2.5 + 3 + 1)/3 = 2.17."""
    monkeypatch.chdir(tmp_path)
    runs = [evaluated(Path('a-0'), BASE, knn=.625, linear=.5, mse=.25),
            evaluated(Path('a-1'), replace(BASE, seed=1), knn=.875, linear=.5, mse=.25),
            evaluated(Path('b'), replace(BASE, method='pca'), knn=.875, linear=.4, mse=.3),
            evaluated(Path('c'), replace(BASE, method='zca'), knn=.75, linear=.3, mse=.1)]
    cli.main(['compare', *map(str, runs), '--out', 'all.json'])
    lines = {line.split('  ')[0]: line.split()[-5:] for line in capsys.readouterr().out.splitlines()}
    assert lines['knn on pets'] == ['0.750', '±', '0.177', '0.875', '0.750']
    assert lines['average rank'][-4] == 'lower' and lines['knn on pets'] != lines['mse, clip on pets']
    assert lines['average rank'][-3:] == ['1.83', '2.00', '2.17']
    assert lines['average rank, knn'][-3:] == ['2.50', '1.00', '2.50']
    written = json.loads(Path('all.json').read_text())
    assert written['table']['knn on pets']['a (2 seeds)'] == {'mean': .75, 'std': pytest.approx(.125*2**.5), 'n': 2}
    assert_close(written['average ranks']['all'], {'a (2 seeds)': 5.5/3, 'b': 2., 'c': 6.5/3})
    cli.main(['compare', 'b', 'c', '--out', 'all.html'])
    page = Path('all.html').read_text()
    assert '<td>knn [1]</td><td>higher</td><td><b>0.875</b></td><td>0.750</td>' in page and '<p>[1] pets</p>' in page
    assert '<td>mse, clip [1]</td><td>lower</td><td>0.300</td><td><b>0.100</b></td>' in page
    assert {p.name for p in Path().iterdir()} == {'a-0', 'a-1', 'b', 'c', 'all.json', 'all.html'}


def test_ranks_are_averaged_within_suites_first_and_not_over_different_units():
    """By hand. The match has two measures, both for a: its ranks there are 1 and 2. Neighbours are for b: 2 and 1.
    Over the suites both have 1.5; over all measures a would have 4/3. The normalized error range, far smaller for b,
    has no say: its unit is another for every method."""
    def scored(explained, mse, knn, error):
        named = {'explained, clip': explained, 'mse, clip': mse, 'error range, normalized, clip': error}
        match = [Score('student', name, value, 9, 9, 'match', 'pets') for name, value in named.items()]
        return [*match, Score('student', 'knn', knn, 9, 9, 'knn', 'pets')]
    compared = compare_runs({'a': scored(.6, .1, .7, 99.), 'b': scored(.5, .2, .8, 1.)}, [['a'], ['b']])
    assert compared.ranks == {'match': {'a': 1., 'b': 2.}, 'knn': {'a': 2., 'b': 1.}, 'all': {'a': 1.5, 'b': 1.5}}
    header, rows = comparison_table(compared)
    assert header == ['measure', 'better', 'a', 'b']
    assert [row[1] for row in rows] == ['higher', 'lower', '–', 'higher'] + ['lower']*3
    assert best_cells(compared) == {(0, 2), (1, 2), (3, 3), (4, 2), (5, 3), (6, 2), (6, 3)}


def test_partial_scores_are_not_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated(Path('a'), BASE, knn=(.9, 100), linear=.5)
    evaluated(Path('b'), replace(BASE, lr=.1), knn=.8, linear=.6)
    cli.main(['compare', 'a', 'b'])
    printed = capsys.readouterr().out
    assert 'left out: knn of a' in printed and '0.900' not in printed
    ranks = [line.split()[-2:] for line in printed.splitlines() if line.startswith('average rank')]
    assert ranks == [['2.00', '1.00']]*2


def test_compare_refuses(tmp_path, refused, mine):
    assert f'{mine} was not evaluated: radio-nb evaluate {mine} --images FOLDER does that' in refused('compare', mine)
    assert 'holds no run' in refused('compare', tmp_path/'nowhere')
    assert 'as .json or .html' in refused('compare', evaluated(tmp_path/'a', BASE, knn=.5), '--out', tmp_path/'all.txt')
    assert 'say which runs' in refused('compare')
    only = evaluated(tmp_path/'b', BASE, knn=(.5, 3))
    assert 'there is nothing to compare' in refused('compare', only)
