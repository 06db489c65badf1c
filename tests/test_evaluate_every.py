"A student that is evaluated in the course of its run: it is the same student, and the best is kept."
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from children import Children, command, other_teacher, small_images

from radio_nb.front import cli
from radio_nb.front.report import best_in_words
from radio_nb.front.run import LiveCurves, Run, distill
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.monitor import StepLog
from radio_nb.training.recipe import Recipe, Stage
from radio_nb.training.train import keep_best, run_recipe


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('evaluate')
    small_images(home/'images', 10, 48)
    (home/'labelled').mkdir()
    for name in 'ab': small_images(home/'labelled'/name, 3, 48)
    other_teacher(home/'small.safetensors')
    return home


@pytest.fixture(scope='module')
def recipe(home):
    return Recipe(images=str(home/'images'), teachers=(f'timm:test_vit@{home}/small.safetensors#32',),
                  out=str(home/'plain'), student='test_vit', depth=1, size=32, head_width=8, steps=7, batch_size=2,
                  statistics_steps=2, device='cpu', checkpoint_every=2, watch_every=3, hold_out=4, ema=.5, keep=9,
                  lr=.1, warmup=.9)


@pytest.fixture(scope='module')
def watched(home, recipe):
    "The same, evaluated in every second step."
    labelled = str(home/'labelled')
    return replace(recipe, out=str(home/'watched'), evaluate_every=2, evaluate_train=labelled, evaluate_test=labelled,
                   keep_best='explained')


@pytest.fixture(scope='module')
def runs(recipe, watched): return [distill(one, live=False) for one in (recipe, watched)]


def draw_everywhere(run, student):
    "What an evaluation of somebody's own might do."
    return {'knn': random.random() + np.random.rand() + torch.rand(()).item()}


def student_bytes(out, folder=''): return (Path(out)/folder/'student.safetensors').read_bytes()


def lines_of(out):
    "The log without times."
    return [{key: value for key, value in json.loads(line).items() if key != 'seconds'}
            for line in (Path(out)/'metrics.jsonl').open()]


def explained(line): return line['evaluation']['match']['small']['explained']


def test_a_run_that_is_evaluated_trains_the_same_student(runs):
    "To the last bit, and logs the same losses."
    plain, watched = runs
    assert student_bytes(plain.out) == student_bytes(watched.out)
    lines = lines_of(watched.out)
    assert [line['step'] for line in lines if 'evaluation' in line] == [2, 4, 6, 7]
    assert [{key: line[key] for key in line if key != 'evaluation'} for line in lines] == lines_of(plain.out)


def test_an_evaluation_may_draw_random_numbers(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr('radio_nb.front.run.WhileTraining', lambda recipe: draw_everywhere)
    before = random.getstate(), np.random.get_state()[1].tolist()
    run = distill(replace(recipe, out=str(tmp_path/'run'), evaluate_every=1), live=False)
    assert student_bytes(run.out) == student_bytes(recipe.out)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_what_is_measured_on_the_way_is_what_is_measured_at_the_end(runs):
    _, run = runs
    last, end = lines_of(run.out)[-1]['evaluation'], run.match['new images']['student']['small']
    assert last['match'] == {'small': {measure: end[measure] for measure in ('explained', 'cosine', 'summary_cosine')}}
    assert 0 <= last['knn'] <= 1


def test_the_best_student_is_kept_beside_the_last(runs, watched, tmp_path):
    "It is the student that a run of so many steps would have ended with."
    _, run = runs
    best = max((line for line in lines_of(run.out) if 'evaluation' in line), key=explained)
    kept = json.loads((run.out/'best'/'best.json').read_text())
    assert (kept['step'], kept['value']) == (best['step'], explained(best)) and kept['step'] < 7
    assert f'is that of step {kept["step"]}, in the folder best' in best_in_words(run.out)
    def stop(run):
        if run.step == kept['step']: run.stop()
    early = distill(replace(watched, out=str(tmp_path/'early')), on_step=stop, live=False)
    assert student_bytes(early.out) == student_bytes(run.out, 'best')
    assert Run(run.out).best.state_dict().keys() == run.student.state_dict().keys()


def test_the_best_student_has_a_run_folder_of_its_own(runs, home, capsys):
    best = str(runs[1].out/'best')
    cli.main(['evaluate', best, '--images', str(home/'images')])
    cli.main(['export', best, '--format', 'timm'])
    assert 'gives what the student does' in capsys.readouterr().out


def test_the_report_shows_how_it_went(runs):
    plain, watched = runs
    assert 'Evaluated in the course of training' not in plain.report().read_text()
    page = watched.report().read_text()
    assert 'Evaluated in the course of training' in page and 'accuracy of kNN' in page and 'the folder best' in page
    assert list(watched.curves('explained').data[0].x) == [2, 4, 6, 7]
    with pytest.raises(BadInput, match='holds no student'): _ = plain.best


class Broken(Exception):
    "Stands in for a kill."


@pytest.mark.parametrize('last', [2, 5, 7])
def test_the_best_student_of_a_run_that_was_broken_off_is_that_of_a_whole_one(runs, watched, tmp_path, last):
    "Steps after the last checkpoint are made again, and what was the best in them is forgotten."
    whole, recipe = runs[1].out, replace(watched, out=str(tmp_path/'run'))
    def stop(run):
        if run.step == last: raise Broken
    with pytest.raises(Broken): distill(recipe, on_step=stop, live=False)
    distill(recipe, resume=True, live=False)
    for folder in ('', 'best'): assert student_bytes(recipe.out, folder) == student_bytes(whole, folder)
    assert lines_of(recipe.out) == lines_of(whole)


def test_two_processes_evaluate_and_train_the_same_student(recipe, watched, tmp_path):
    "One of them evaluates, and the other waits."
    out = [replace(one, out=str(tmp_path/name)) for name, one in (('plain', recipe), ('watched', watched))]
    children = [Children(2, tmp_path/Path(one.out).name, command, 'distill', *cli.as_flags(vars(one)))
                for one in out]
    for both in children: both.wait()
    plain, evaluated = (Path(one.out) for one in out)
    assert student_bytes(plain) == student_bytes(evaluated)
    assert [line['step'] for line in lines_of(evaluated) if 'evaluation' in line] == [2, 4, 6, 7]
    end = json.loads((evaluated/'match.json').read_text())['new images']['student']['small']
    assert explained(lines_of(evaluated)[-1]) == end['explained']
    assert 'The best student by explained' in children[1].output() and student_bytes(evaluated, 'best')


class Moment:
    "What `keep_best` asks of a run."
    def __init__(self, recipe): self.recipe, self.step, self.best = recipe, 0, None

    def evaluated(self, **explained):
        self.step += 1
        keep_best(self, torch.nn.Linear(1, 1), {'match': {name: {'explained': v} for name, v in explained.items()}})
        return self.best['step'] if self.best else None


def test_the_best_is_the_first_of_equals_among_students_of_the_same_teachers(watched):
    run = Moment(watched)
    assert run.evaluated() is None
    assert [run.evaluated(a=.2), run.evaluated(a=.3), run.evaluated(a=.3), run.evaluated(a=.1)] == [2, 3, 3, 3]
    assert [run.evaluated(a=.3, b=-1.), run.evaluated(a=.2, b=-.8)] == [6, 7]   # another teacher took part


def test_a_teacher_that_joins_later_is_measured_from_then_on(home, watched, tmp_path):
    "With a teacher that has no grid to learn, too."
    first, second = watched.teachers[0], watched.teachers[0].replace('#32', '#48')
    names = [first, second]
    run = distill(replace(watched, out=str(tmp_path/'run'), teachers=(first, second), hold_out=2, evaluate_train='',
                          evaluate_test='', spatial_weights=(1., 0.),
                          stages=(Stage(2, teachers=(names[0],)), Stage(2))), live=False)
    found = [line['evaluation']['match'] for line in lines_of(run.out) if 'evaluation' in line]
    assert [list(match) for match in found] == [names[:1], names]
    assert list(found[-1][names[1]]) == ['summary_cosine']
    assert Student.from_pretrained(run.out/'best').config == run.student.config


def test_mistakes_are_known_before_a_folder_is_made(home, watched, tmp_path):
    out = tmp_path/'run'
    def refused(message, **changes):
        with pytest.raises(BadInput, match=message): distill(replace(watched, out=str(out), **changes), live=False)
        assert not out.exists()
    refused('no such folder or file: nowhere', evaluate_train='nowhere')
    refused('has no labels', evaluate_test=str(home/'images'))
    refused('no images to evaluate on', hold_out=0, evaluate_train='', evaluate_test='', keep_best='')
    refused('explained is measured on images held out', hold_out=0)
    with pytest.raises(BadInput, match='unknown keep_best'): replace(watched, keep_best='loss')
    with pytest.raises(BadInput, match='nobody says what to measure'): run_recipe(replace(watched, out=str(out)))


class Steps:
    "A run as `LiveCurves` sees it."
    total = 4

    def to(self, step, **metrics):
        self.step = step
        self.log = StepLog(step, [('teachers', 'clip', 'spatial')], torch.tensor([1/step])).add(**metrics)
        return self


def test_the_live_figure_follows_the_match(monkeypatch):
    "Beside the losses; with the rate and the time left in its title."
    live, drawn = LiveCurves(every=0.), []
    monkeypatch.setattr(live, 'draw', lambda total: drawn.append((live.title(total), live.curves())))
    live(Steps().to(1))
    live(Steps().to(2, evaluation={'match': {'clip': {'explained': .4}}, 'knn': .1}))
    title, curves = drawn[-1]
    assert curves == {'clip': ([1, 2], [1., .5]), 'clip explained': ([2], [.4])}
    assert title.startswith('step 2 of 4, ') and title.endswith(' left')
