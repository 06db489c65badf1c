"Who else gets the metrics of a run."
import os
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from children import Children, small_images, train
from conftest import SMALL
from test_kills import losses

from radio_nb.front import cli
from radio_nb.training.recipe import Recipe
from radio_nb.training.train import run_recipe

pytest.importorskip('tensorboard')
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


def recipe_at(home, **fields):
    return Recipe(images=small_images(home/'images', 8), teachers=('zoo:u2netp#64',), out=str(home/'run'), depth=1,
                  size=64, head_width=32, batch_size=4, statistics_steps=2, device='cpu', trackers=('tensorboard',),
                  **fields)


def scalars(out, tag):
    "The steps and values of a number in all event files of a run."
    found = {}
    for file in sorted((Path(out)/'radio_nb').glob('events.out.tfevents.*')):
        events = EventAccumulator(str(file)).Reload()
        if tag in events.Tags()['scalars']: found |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def test_tensorboard_gets_what_the_log_gets(tmp_path):
    recipe = recipe_at(tmp_path, steps=3)
    run_recipe(recipe)
    log = losses(Path(recipe.out))
    assert scalars(recipe.out, 'loss') == {line['step']: pytest.approx(line['loss']) for line in log}
    spatial = {line['step']: pytest.approx(line['teachers']['u2netp']['spatial']) for line in log}
    assert scalars(recipe.out, 'teachers/u2netp/spatial') == spatial
    assert not [file.path for file in psutil.Process().open_files() if recipe.out in file.path]


def test_a_run_that_is_stopped_has_handed_on_everything(tmp_path):
    "The writer of TensorBoard keeps numbers back for two minutes; a run that ends before must make it write them."
    recipe = recipe_at(tmp_path, steps=400)
    child, metrics = Children(1, tmp_path/'log', train, recipe), Path(recipe.out)/'metrics.jsonl'
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3: assert child.alive(), child.output()
    os.kill(child.processes[0].pid, signal.SIGTERM)
    child.wait(code=130)
    done = [line['step'] for line in losses(Path(recipe.out))]
    assert list(scalars(recipe.out, 'loss')) == done and len(done) >= 3


@pytest.mark.parametrize('name, error', [('tensorbord', 'did you mean tensorboard'),
                                         ('aim', 'aim is not installed: pip install aim')])
def test_a_tracker_that_is_not_there_is_refused(tmp_path, capsys, name, error):
    flags = [*SMALL, '--trackers', name, '--out', str(tmp_path/'run')]
    with pytest.raises(SystemExit) as exit: cli.main(['distill', *flags])
    printed = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and error in printed and '\n' not in printed
    assert not (tmp_path/'run').exists()


def test_trackers_do_not_make_another_run(tmp_path):
    "They may be named when a run goes on."
    recipe = recipe_at(tmp_path, steps=2)
    run_recipe(replace(recipe, trackers=()))
    (tmp_path/'run'/'student.safetensors').unlink()
    (tmp_path/'run'/'checkpoints'/'00000002.pt').unlink()
    run_recipe(recipe, resume=True)
    assert list(scalars(recipe.out, 'loss')) == [1, 2]


def test_trackers_are_told_the_project_the_run_and_numbers_as_numbers(tmp_path, monkeypatch):
    "Row 33: the project was fixed, the run had no name, and every number was a text."
    from radio_nb.training.train import start_trackers
    told = {}
    class Accelerator:
        def init_trackers(self, project, config, names): told.update(project=project, config=config, names=names)
    class Running:
        recipe = Recipe('zoo:photos', ('zoo:u2netp',), 'runs/mine', project='birds', trackers=('wandb', 'tensorboard'))
        out, accelerator = tmp_path/'mine', Accelerator()
    start_trackers(Running())
    assert told['project'] == 'birds' and told['names'] == {'wandb': {'name': 'mine'}}
    assert told['config']['lr'] == 1e-3 and told['config']['steps'] == 1000 and told['config']['draft'] is False
    assert all(isinstance(value, (int, float, str)) for value in told['config'].values())
