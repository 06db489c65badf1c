"What a run folder promises (see the table in the chapter `run_folder`): locks, ingredients, signals, disks, odd names."
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Children, command, other_teacher, small_images
from conftest import SMALL

import radio_nb
from radio_nb.data.crops import centre_crop
from radio_nb.data.files import atomic_write, lock
from radio_nb.front import cli
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.preparation import Inputs, new_student
from radio_nb.training.recipe import Recipe, Stage
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.train import Callbacks, run_recipe


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('promises')
    small_images(home/'images', 8, 48)
    other_teacher(home/'small.safetensors')
    return home


def recipe_at(home, folder):
    return Recipe(images=str(home/'images'), teachers=(f'timm:test_vit@{home}/small.safetensors#32',),
                  out=str(folder/'run'), student='test_vit', depth=1, size=32, head_width=8, steps=4, batch_size=2,
                  statistics_steps=2, device='cpu', checkpoint_every=1, watch_every=0, hold_out=2)


@pytest.fixture
def recipe(home, tmp_path): return recipe_at(home, tmp_path)


@pytest.fixture(scope='module')
def whole(home, tmp_path_factory):
    "The run of the recipe that nothing has happened to."
    return run_recipe(recipe_at(home, tmp_path_factory.mktemp('whole')))


def stop_at(step):
    def stop(run):
        if run.step == step: raise KeyboardInterrupt
    return Callbacks(on_checkpoint=stop)


def half_done(recipe):
    "Run two of four steps."
    with pytest.raises(KeyboardInterrupt): run_recipe(recipe, callbacks=stop_at(2))
    return Path(recipe.out)


def flags(recipe, **changes): return ['distill', *cli.as_flags(vars(replace(recipe, **changes)))]


# one at a time

def test_two_runs_at_once_in_one_folder(recipe, tmp_path):
    "One works, the other says who has it."
    both = [Children(1, tmp_path/name, command, *flags(recipe, steps=150, checkpoint_every=50)) for name in 'ab']
    for runs in both: runs.processes[0].join(120)
    codes = [runs.processes[0].exitcode for runs in both]
    assert sorted(codes) == [0, 2], [runs.output() for runs in both]
    loser, winner = both[codes.index(2)], both[codes.index(0)]
    last = loser.output().strip().splitlines()[-1]
    assert f'is in use by process {winner.processes[0].pid} on ' in last or 'holds an unfinished run' in last
    assert load_checkpoint(tmp_path/'run'/'checkpoints')['step'] == 150


def test_a_running_run_cannot_be_resumed_by_another(recipe, tmp_path):
    first = Children(1, tmp_path/'first', command, *flags(recipe, steps=2000))
    while not list(tmp_path.glob('run/checkpoints/*.pt')):
        assert first.alive(), first.output()
        time.sleep(.01)
    with pytest.raises(BadInput, match=f'in use by process {first.processes[0].pid} on '):
        run_recipe(replace(recipe, steps=2000), resume=True)
    first.processes[0].kill()   # its lock file stays, its lock does not
    first.processes[0].join()
    assert (tmp_path/'run'/'run.lock').exists()
    with lock(tmp_path/'run'/'run.lock', 'the run'): pass


def test_a_folder_without_a_checkpoint_may_be_used_again(recipe):
    "Also by another recipe: what was measured for the first is forgotten."
    with pytest.raises(BadInput, match='step 0: the norm'):   # after the statistics
        import radio_nb.training.trainer as trainer
        before, trainer.TrainState.optimizer_step = trainer.TrainState.optimizer_step, _fails
        try: run_recipe(replace(recipe, method='pca'))
        finally: trainer.TrainState.optimizer_step = before
    assert (Path(recipe.out)/'statistics.safetensors').exists()
    fresh = run_recipe(replace(recipe, out=recipe.out + '-fresh'))
    again = run_recipe(recipe)
    for name in ('statistics.safetensors', 'student.safetensors'):
        assert (again/name).read_bytes() == (fresh/name).read_bytes()


def _fails(self, lr, step): raise BadInput(f'step {step}: the norm is said to be wrong')


@pytest.mark.parametrize('wrong, message', [({'student': 'vit_tinyy'}, 'unknown timm model'), ({'size': 33}, 'patches'),
                                            ({'accumulate': 3}, 'accumulate: 2 images'),
                                            ({'student': 'efficientnet_b0', 'depth': 0, 'batch_size': 1},
                                             'batch normalization')])
def test_student_sizes_and_images_are_checked_before_anything_is_measured(recipe, wrong, message, home, tmp_path):
    with pytest.raises(BadInput, match=message): run_recipe(replace(recipe, **wrong))
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'a.png').write_text('no image')
    with pytest.raises(BadInput, match='can be used; the first'):
        run_recipe(replace(recipe, images=str(tmp_path/'bad'), hold_out=0))
    assert not Path(recipe.out).exists()


# the same ingredients

def test_other_weights_are_noticed(recipe, home, tmp_path):
    spec = recipe.teachers[0].replace(str(home), str(tmp_path))
    shutil.copy(home/'small.safetensors', tmp_path)
    recipe = replace(recipe, teachers=(spec,))
    half_done(recipe)
    tensors, _ = radio_nb.models.tensor_files.load_tensors(tmp_path/'small.safetensors')
    next(iter(tensors.values())).add_(1e-3)
    radio_nb.models.tensor_files.save_tensors(tmp_path/'small.safetensors', tensors)
    with pytest.raises(BadInput, match='teacher small changed since the run in .* began'):
        run_recipe(recipe, resume=True)
    shutil.copy(home/'small.safetensors', tmp_path)
    run_recipe(recipe, resume=True)   # nothing was lost


@pytest.mark.parametrize('change', ['renamed', 'other', 'more'])
def test_other_images_are_noticed(recipe, home, tmp_path, change):
    images = shutil.copytree(home/'images', tmp_path/'images')
    recipe = replace(recipe, images=str(images))
    half_done(recipe)
    if change == 'renamed': (images/'00.png').rename(images/'zz.png')
    if change == 'other': shutil.copy(images/'00.png', images/'03.png')
    if change == 'more': shutil.copy(images/'00.png', images/'99.png')
    with pytest.raises(BadInput, match=f'images {images} changed since the run in .* began'):
        run_recipe(recipe, resume=True)


def test_random_teachers_are_the_same_when_they_are_judged(recipe, tmp_path, capsys):
    "And every table says that their weights are random."
    recipe = replace(recipe, teachers=('timm:test_vit@random#32',), steps=60, lr=3e-3, checkpoint_every=60)
    cli.main(flags(recipe))
    match = json.loads((tmp_path/'run'/'match.json').read_text())['new crops']
    assert list(match['student']) == ['test_vit@random'] and 'test_vit@random' in capsys.readouterr().out
    # against a teacher drawn anew, the mean of the old one would explain far less than nothing
    assert match['constant']['test_vit@random']['explained'] > -.5
    assert match['student']['test_vit@random']['explained'] > match['constant']['test_vit@random']['explained']


@pytest.mark.parametrize('byte', range(3))
def test_a_flipped_bit_in_a_checkpoint_is_noticed(recipe, whole, byte, capsys):
    "In the smallest tensors as in the largest."
    out = half_done(recipe)
    path = out/'checkpoints'/'00000002.pt'
    data, size = bytearray(path.read_bytes()), path.stat().st_size
    data[[size//3, size//2, 2*size//3][byte]] ^= 4
    path.write_bytes(data)
    run_recipe(recipe, resume=True)
    assert 'is damaged' in capsys.readouterr().err
    assert (out/'student.safetensors').read_bytes() == (whole/'student.safetensors').read_bytes()


@pytest.mark.parametrize('how', ['cut', 'flipped', 'empty', 'other'])
def test_damaged_statistics_are_measured_again_to_the_same_bits(recipe, whole, how, capsys):
    out = half_done(recipe)
    path = out/'statistics.safetensors'
    data = bytearray(path.read_bytes())
    if how == 'flipped': data[-5] ^= 1
    path.write_bytes({'cut': data[:-9], 'flipped': data, 'empty': b'', 'other': b'not a file of tensors'}[how])
    run_recipe(recipe, resume=True)
    assert 'is damaged' in (said := capsys.readouterr().err) and 'the teachers are measured again' in said
    for name in ('statistics.safetensors', 'student.safetensors'):
        assert (out/name).read_bytes() == (whole/name).read_bytes()


def test_a_lost_recipe_is_written_again(recipe, whole):
    out = half_done(recipe)
    (out/'recipe.toml').write_text((out/'recipe.toml').read_text()[:100])
    with pytest.raises(BadInput, match='steps is 5 here and 4 there'): run_recipe(replace(recipe, steps=5), resume=True)
    run_recipe(recipe, resume=True)
    assert (out/'student.safetensors').read_bytes() == (whole/'student.safetensors').read_bytes()


def test_a_log_that_was_cut_short_is_named(recipe, capsys):
    out = half_done(recipe)
    (out/'metrics.jsonl').write_text((out/'metrics.jsonl').read_text()[:-30])
    run_recipe(recipe, resume=True)
    assert 'has lost 1 of 2 lines' in capsys.readouterr().err
    assert [json.loads(line)['step'] for line in (out/'metrics.jsonl').open()] == [1, 3, 4]


# signals

def started(tmp_path, recipe, name, **changes):
    return Children(1, tmp_path/name, command, *flags(recipe, **changes))


def wait_until(there, child):
    while not there():
        assert child.alive(), child.output()
        time.sleep(.002)


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_steps_leaves_a_checkpoint(recipe, tmp_path, sig):
    child = started(tmp_path, recipe, 'log', steps=3000, checkpoint_every=1000)
    wait_until(lambda: (log := tmp_path/'run'/'metrics.jsonl').exists() and log.stat().st_size, child)
    os.kill(child.processes[0].pid, sig)
    child.wait(130)
    last = child.output().strip().splitlines()[-1]
    assert 'stopped after step' in last and 'add --resume to go on: radio-nb distill' in last
    assert load_checkpoint(tmp_path/'run'/'checkpoints')['step'] >= 1


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_statistics_is_not_silent(recipe, tmp_path, sig):
    child = started(tmp_path, recipe, 'log', statistics_steps=5000)
    wait_until(lambda: (tmp_path/'run'/'inputs.json').exists(), child)
    os.kill(child.processes[0].pid, sig)
    child.wait(130)
    assert 'interrupted; no step was saved; the same command begins again' in child.output()


def test_a_signal_while_the_student_is_judged_says_that_it_is_there(recipe, tmp_path):
    child = started(tmp_path, recipe, 'log')
    wait_until(lambda: (tmp_path/'run'/'student.safetensors').exists(), child)
    os.kill(child.processes[0].pid, signal.SIGINT)
    child.processes[0].join(60)
    if child.processes[0].exitcode == 0: pytest.skip('it was over before')
    assert 'holds the finished student; the same command makes what is missing' in child.output()
    cli.main(flags(recipe))
    assert (tmp_path/'run'/'report.html').exists()


# disks, memory and names

@pytest.mark.parametrize('kilobytes', [1, 4, 20])
def test_a_disk_that_is_full_before_the_first_step(recipe, tmp_path, kilobytes):
    "A limit on the size of files stands in for it."
    done = shell(f'ulimit -f {kilobytes}; exec $RADIO {shlex.join(map(str, flags(recipe)))}')
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith('radio-nb: ') and 'Traceback' not in done.stderr
    assert 'could not be written' in last or 'File too large' in last
    cli.main(flags(recipe))   # with room again


def test_an_out_that_cannot_be_a_folder(recipe, refused, tmp_path):
    (tmp_path/'file').write_text('mine')
    (tmp_path/'loop').symlink_to('loop')
    for out in ('file', 'file/run', 'loop', 'loop/run', 'x'*300):
        assert str(tmp_path/out)[:60] in refused(*flags(recipe, out=str(tmp_path/out)))
    assert 'out' in refused(*flags(recipe, out=''))
    assert (tmp_path/'file').read_text() == 'mine'


def test_images_that_are_a_fifo_or_have_no_name_in_utf_8(recipe, refused, tmp_path, home, capsys):
    os.mkfifo(tmp_path/'fifo')
    assert str(tmp_path/'fifo') in refused(*flags(recipe, images=str(tmp_path/'fifo')))
    images = shutil.copytree(home/'images', tmp_path/'images')
    os.rename(os.fsencode(images/'00.png'), os.fsencode(images) + b'/\xff\xfe.png')
    with open(os.fsencode(images) + b'/\xfd.png', 'wb') as file: file.write(b'no image')
    cli.main(flags(recipe, images=str(images)))
    assert (tmp_path/'run'/'report.html').exists() and '\n1 image was skipped; ' in capsys.readouterr().out


def shell(line, **env):
    return subprocess.run(['bash', '-c', line], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'RADIO': f'{sys.executable} -m radio_nb'} | env)


def test_a_reader_that_has_seen_enough(tmp_path):
    done = shell('$RADIO teachers | head -1')
    assert done.stdout.startswith('teacher') and 'Traceback' not in done.stderr


def test_a_terminal_that_knows_ascii_only(tmp_path):
    "A pixel is written ×, which ASCII does not have."
    line = f'$RADIO distill {" ".join(map(str, SMALL))} --size 33 --out {tmp_path}/run'
    done = shell(line, PYTHONIOENCODING='ascii', LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'patches of 16' in done.stderr


def test_too_little_memory_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        def fails(*args, error=error, **kwargs): raise error
        monkeypatch.setattr('radio_nb.training.train.prepare', fails)
        with pytest.raises(SystemExit) as exit: cli.main(['distill', *SMALL, '--out', str(tmp_path/'run')])
        assert exit.value.code == 2 and 'out of memory' in capsys.readouterr().err.splitlines()[-1]


def test_the_last_lines_name_the_next_step(recipe, capsys):
    cli.main(flags(recipe))
    assert f'radio-nb evaluate {recipe.out} --images FOLDER' in capsys.readouterr().out.splitlines()[-1]
    cli.main([*flags(recipe, out=recipe.out + '-quiet', views=2, cache=recipe.out + '-cache'), '--quiet'])
    quiet = capsys.readouterr()
    assert not quiet.out and ' left ' not in quiet.err
    cli.main(flags(recipe, out=recipe.out + '-again'))
    assert 'distil 4/4' in capsys.readouterr().err   # not quiet for ever


def test_a_finished_run_can_be_made_longer(recipe):
    "By another that goes on from its student: its first step finds the losses at which the other ended."
    long = replace(recipe, steps=80, lr=3e-3, batch_size=4, checkpoint_every=80)
    first = run_recipe(long)
    more = replace(long, out=recipe.out + '-more', init=str(first), lr=1e-4, warmup=0.)
    second = run_recipe(more)
    def losses(out): return [json.loads(line)['loss'] for line in (out/'metrics.jsonl').open()]
    ended = sum(losses(first)[-10:])/10
    assert losses(first)[0] > 1.3*ended and abs(losses(second)[0] - ended) < .3*ended
    assert sum(losses(second)[-10:])/10 < 1.02*ended
    with pytest.raises(BadInput, match='init: the student of .* has head_width 8, and this one 16'):
        run_recipe(replace(more, out=recipe.out + '-other', head_width=16))
    with pytest.raises(BadInput, match='nowhere holds no student'):
        run_recipe(replace(more, out=recipe.out + '-other', init='nowhere'))


def test_a_run_goes_on_from_another_with_a_teacher_that_comes_later(recipe, home):
    "Its head is brought into the space of the targets when it is measured."
    two = replace(recipe, teachers=(*recipe.teachers, 'zoo:u2netp#32'), hold_out=0, statistics_steps=30)
    first = run_recipe(replace(two, steps=40, lr=3e-3, checkpoint_every=40))
    saved, images, gaps = Student.from_pretrained(first), torch.rand(2, 3, 32, 32), []
    def compare(run):
        "What the student gives in training, brought back into the teachers' space, with what the saved one gives."
        run.student.eval()
        with torch.no_grad(): now = run.student(images)
        for name, normalizer in run.trainer.normalizers.items():
            own, before = normalizer.inverse(now[name].spatial), saved(images)[name].spatial
            gaps.append(((own - before).norm()/before.norm()).item())
    stages = (Stage(2, teachers=('small',)), Stage(2))
    second = run_recipe(replace(two, out=recipe.out + '-more', init=str(first), stages=stages, lr=1e-7),
                        callbacks=Callbacks(on_step=compare))
    assert len(gaps) == 1 + 1 + 2 + 2 and max(gaps) < 1e-3
    shutil.rmtree(first)   # is not needed any more
    assert radio_nb.Run(second).match


def test_a_run_that_is_ended_before_a_teacher_took_part(recipe, capsys):
    two = replace(recipe, teachers=(*recipe.teachers, 'zoo:u2netp#32'),
                  stages=(Stage(3, teachers=('small',)), Stage(3)))
    run_recipe(two, callbacks=Callbacks(on_step=lambda run: run.stop()))
    assert 'the run ended before teacher u2netp took part' in capsys.readouterr().err
    run = radio_nb.Run(two.out)
    assert list(run.match['new crops']['student']) == ['small'] and run.report().exists()


@pytest.mark.parametrize('step', [1, 2])
def test_who_is_told_of_a_checkpoint_may_end_the_run_there(recipe, step):
    two = replace(recipe, teachers=(*recipe.teachers, 'zoo:u2netp#32'),
                  stages=(Stage(2, teachers=('small',)), Stage(2)))
    def enough(run):
        if run.step == step: run.stop()
    out = run_recipe(two, callbacks=Callbacks(on_checkpoint=enough))
    assert len(radio_nb.Run(out).metrics) == step and [*out.glob('statistics*')] == [out/'statistics.safetensors']


def test_half_a_checkpoint_does_not_stay(recipe):
    out = half_done(recipe)
    (out/'checkpoints'/'00000137.part').write_bytes(b'half')
    run_recipe(recipe, resume=True)
    assert not [*out.rglob('*.part')]


def test_damaged_statistics_of_an_earlier_stage_are_not_needed(recipe):
    two = replace(recipe, stages=(Stage(1), Stage(3)))
    out = half_done(two)
    (out/'statistics.safetensors').write_bytes(b'damaged')
    run_recipe(two, resume=True)
    assert Student.from_pretrained(out)


def test_gradients_are_watched_at_sizes_that_the_last_window_does_not_tile(recipe):
    two = replace(recipe, student='vit_tiny_patch16_224', windows=(3,), watch_every=1,
                  stages=(Stage(1, size=96), Stage(2, size=64)))
    assert all('gradient_norms' in line for line in radio_nb.Run(run_recipe(two)).metrics)


@pytest.mark.parametrize('change, complaint', [
    (dict(windows=(3, 0)), r'windows: 3 × 3 patches tile no grid of this run, which are 2 × 2'),
    (dict(depth=24), 'depth: .* has 12 blocks, not 24')])
def test_options_that_would_do_nothing_are_refused(recipe, change, complaint):
    with pytest.raises(BadInput, match=complaint):
        run_recipe(replace(recipe, **dict(student='vit_tiny_patch16_224') | change))


def test_a_frozen_backbone_keeps_its_statistics(recipe):
    frozen = replace(recipe, student='cifar_resnet8', stride=4, depth=0, heads_only=4)
    before = new_student(frozen, {'small': (64, 64)}).backbone.state_dict()
    after = Student.from_pretrained(run_recipe(frozen)).backbone.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_another_crop_is_noticed(recipe):
    half_done(recipe)
    with pytest.raises(BadInput, match='the crop changed since the run in .* began'):
        run_recipe(recipe, resume=True, inputs=Inputs(crop=centre_crop))


def test_a_folder_with_a_recipe_of_one_s_own_is_left_alone(recipe, tmp_path, refused):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'recipe.toml').write_text('# mine\nsteps = 4\n')
    assert 'is not empty and holds no run' in refused(*flags(recipe))
    assert (tmp_path/'run'/'recipe.toml').read_text().startswith('# mine')


def test_a_file_system_without_locks_is_named_and_used(recipe, monkeypatch, capsys):
    "And another user's lock is neither taken nor removed."
    def none(*_): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr('radio_nb.data.files.fcntl.flock', none)
    run_recipe(recipe)
    assert 'this file system has no locks' in capsys.readouterr().err
    def denied(*_): raise OSError(errno.EPERM, 'Operation not permitted')
    monkeypatch.setattr('radio_nb.data.files.fcntl.flock', denied)
    path = Path(recipe.out)/'theirs'
    path.write_text('{}')
    with pytest.raises(BadInput, match='theirs cannot be locked .Operation not permitted'):
        with lock(path, 'it'): pass
    assert path.exists()


def test_a_copy_of_this_process_does_not_keep_the_lock(tmp_path):
    "As a process that decodes images would, whose parent is killed."
    with lock(tmp_path/'x', 'it'):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with lock(tmp_path/'x', 'it'): pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_processes_that_write_one_file_both_write_it_whole(tmp_path):
    writers = [Children(1, tmp_path/f'{i}', _writes, tmp_path/'file.json', i) for i in range(2)]
    for writer in writers: writer.wait()
    assert set((tmp_path/'file.json').read_text()) in ({'0'}, {'1'})


def _writes(path, i):
    for _ in range(200): atomic_write(path, str(i)*10_000)


def test_lists_and_paths_are_taken_in_python(recipe, home):
    values = vars(recipe) | {'teachers': list(recipe.teachers), 'summary_weights': [1.], 'out': Path(recipe.out)}
    assert radio_nb.distill(**values, live=False).recipe.summary_weights == (1.,)
