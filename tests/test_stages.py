"Stages and the parts of a batch: what the command makes of them, and what their weights must add up to."
import json
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from children import Children, command, small_images
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from radio_nb.data.crops import Batch, Crops, padded_crop, random_crop
from radio_nb.data.files import Stopped
from radio_nb.data.images import open_images
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.targets.moments import Moments
from radio_nb.targets.normalizers import Normalizer
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.preparation import Inputs, new_distill_step, new_student
from radio_nb.training.recipe import Partition, Recipe, Stage, read_recipe
from radio_nb.training.stages import BatchPartition, StagePlan, plan_stages
from radio_nb.training.statistics import Source, check_counts, load_normalizers, take_statistics
from radio_nb.training.train import Callbacks, run_recipe, take_up
from radio_nb.training.trainer import DistillStep, Trainer

TOML = '''
images = "{images}"
teachers = ["zoo:u2netp#64", "zoo:u2netp#96"]
out = "{out}"
depth = 1
head_width = 32
batch_size = 4
hold_out = 2
statistics_steps = 2
device = "cpu"
ema = 0.5
checkpoint_every = 1
keep = 9

[[stages]]
steps = 2
teachers = ["zoo:u2netp#64"]
size = 64

[[stages]]
steps = 2
[[stages.partitions]]
share = 0.5
size = 224
[[stages.partitions]]
share = 0.25
size = [160, 288]
[[stages.partitions]]
share = 0.25
size = 512
teachers = ["zoo:u2netp#96"]

[[stages]]
steps = 2
size = 64
restart_statistics = false
restart_lr = false
'''


@pytest.fixture(scope='module')
def staged(tmp_path_factory):
    "The recipe and folder of a run in stages, and what the command printed."
    home = tmp_path_factory.mktemp('stages')
    file, out = home/'stages.toml', home/'run'
    file.write_text(TOML.format(images=small_images(home/'images', 14), out=out))
    child = Children(1, home/'log', command, 'distill', '--recipe', file)
    child.wait()
    return Recipe(**read_recipe(file)), out, child.output()


def test_stages_of_three_sizes_in_one_batch_run_from_a_file(staged):
    recipe, out, printed = staged
    table = [line.split() for line in printed.splitlines() if line.startswith('zoo:u2netp')]
    assert {row[0] for row in table} == set(recipe.teachers)
    assert len(table) == 4   # two teachers, new crops and new images
    assert 'The report is' in printed and (out/'report.html').stat().st_size > 10_000
    lines = [json.loads(line) for line in (out/'metrics.jsonl').open()]
    assert [list(line['teachers']) for line in lines] == [['zoo:u2netp#64']]*2 + [list(recipe.teachers)]*4
    assert lines[1]['lr'] < recipe.lr/10 and max(lines[2]['lr'], lines[3]['lr']) > recipe.lr/2   # it rises again
    parts = plan_stages(recipe, list(recipe.teachers))[1].parts
    assert [part.size for part in parts] == [(224, 224), (160, 288), (512, 512)]


@pytest.mark.parametrize('step, statistics', [(2, 'gone'), (2, 'damaged'), (3, 'there'), (4, 'there')])
def test_a_run_goes_on_at_a_boundary_to_the_same_bits(staged, tmp_path, step, statistics):
    recipe, out, _ = staged
    again = replace(recipe, out=str(tmp_path/'run'))
    shutil.copytree(out, again.out)
    (tmp_path/'run'/'recipe.toml').write_text((out/'recipe.toml').read_text().replace(str(out), again.out))
    for name in ('student.safetensors', 'match.json', 'report.html'): (tmp_path/'run'/name).unlink()
    for later in range(step + 1, 7): (tmp_path/'run'/'checkpoints'/f'{later:08d}.pt').unlink()
    measured = tmp_path/'run'/'statistics-2.safetensors'
    if statistics == 'gone': measured.unlink()
    if statistics == 'damaged': measured.write_bytes(measured.read_bytes()[:-100])
    run_recipe(again, resume=True)
    assert (tmp_path/'run'/'student.safetensors').read_bytes() == (out/'student.safetensors').read_bytes()


def test_a_signal_while_the_last_checkpoint_of_a_stage_is_written_is_obeyed(tmp_path):
    def stop(run):
        if run.step == 2: signal.raise_signal(signal.SIGTERM)
    recipe = Recipe(small_images(tmp_path/'images', 8), ('zoo:u2netp#64',), str(tmp_path/'run'), depth=1, head_width=32,
                    size=64, batch_size=4, hold_out=2, statistics_steps=2, device='cpu', stages=(Stage(2), Stage(2)))
    with pytest.raises(Stopped, match='stopped after step 2 of 4'):
        run_recipe(recipe, callbacks=Callbacks(on_checkpoint=stop))


def denormalized(student, name, normalizer, images):
    "A student's grid for a teacher, in the teacher's own space."
    return normalizer.inverse(student(images)[name].spatial)


def test_new_statistics_leave_the_student_s_outputs(staged):
    "At the boundary of the run above, with the trainer's own step over it."
    recipe, out, _ = staged
    plan, widths = plan_stages(recipe, list(recipe.teachers)), Student.from_pretrained(out).config['teachers']
    trainer = Trainer(new_distill_step(recipe, new_student(recipe, widths), out), recipe, torch.device('cpu'))
    trainer.load_state_dict(torch.load(out/'checkpoints'/'00000002.pt', weights_only=True)['trainer'])
    old, new = (load_normalizers(widths, out, at) for at in (1, 2))
    name, images = recipe.teachers[0], torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert list(old) == [name] and list(new) == list(recipe.teachers)
    assert (old[name].mean - new[name].mean).abs().max() > 1e-3   # it was measured on other crops
    def outputs(normalizer):
        with torch.no_grad():
            return [denormalized(student.eval(), name, normalizer, images) for student in trainer.state.students()]
    before = outputs(old[name])
    optimizer = trainer.state.optimizer
    trainer.start_stage(plan[1], [], new, old)
    assert trainer.state.optimizer is not optimizer and len(before) == 2   # the student and its average
    for a, b in zip(before, outputs(new[name])):
        torch.testing.assert_close(a, b, atol=1e-3*a.abs().max().item(), rtol=0)
    with torch.no_grad(): wrong = denormalized(trainer.student, name, old[name], images)
    assert (wrong - before[0]).abs().max() > 1e-2*before[0].abs().max()   # so that the test above means something


def test_a_checkpoint_of_another_version_is_named(staged):
    recipe, out, _ = staged
    widths = Student.from_pretrained(out).config['teachers']
    trainer = Trainer(new_distill_step(recipe, new_student(recipe, widths), out), recipe, torch.device('cpu'))
    state = torch.load(out/'checkpoints'/'00000002.pt', weights_only=True)
    gone, _ = state['trainer']['weights'].popitem()
    with pytest.raises(BadInput, match=f'its checkpoint is not of this version of radio_nb .*{gone}'):
        take_up(SimpleNamespace(trainer=trainer, state=state, out=out))
    state = torch.load(out/'checkpoints'/'00000002.pt', weights_only=True)
    state['trainer']['optimizer']['param_groups'].pop()
    with pytest.raises(BadInput, match='its checkpoint is not of this version of radio_nb'):
        take_up(SimpleNamespace(trainer=trainer, state=state, out=out))


@st.composite
def cut_batches(draw):
    "A batch size, shares of it, and some of three teachers for each, so that everyone sees something."
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    groups = [tuple(draw(st.lists(st.sampled_from('abc'), min_size=1, max_size=3, unique=True))) for _ in counts]
    return counts, groups, draw(st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(cut_batches())
def test_over_all_rotations_the_weighted_losses_are_those_of_the_whole_batch(case):
    "Every image stands at every position once; a teacher that sees half of them then counts as if it saw all."
    counts, groups, seed = case
    n, names = sum(counts), sorted({name for group in groups for name in group})
    stage = Stage(1, partitions=tuple(Partition(count/n, 32, group) for count, group in zip(counts, groups)))
    parts = plan_stages(Recipe('zoo:photos', tuple(names), 'x', batch_size=n, stages=(stage,)), names)[0].parts
    random = torch.Generator().manual_seed(seed)
    def drawn():
        shapes = (n, 5), (n, 2, 2, 3)
        return {name: Features(*(torch.randn(*shape, generator=random) for shape in shapes)) for name in names}
    outputs, targets, ones = drawn(), drawn(), dict.fromkeys(names, 1.)
    loss = MultiTeacherLoss('phi-s', ones, ones)
    total = 0
    for shift in range(n):
        order = torch.arange(n).roll(shift)
        def take(features, part, order=order):
            rows = order[slice(*part.span)]
            return {name: Features(*(tensor[rows] for tensor in features[name])) for name in part.weights}
        total += sum(loss(take(outputs, part), take(targets, part), scale=part.weights)[0] for part in parts)/n
    torch.testing.assert_close(total, loss(outputs, targets)[0])
    for name in names: assert sum(part.weights.get(name, 0) for part in parts) == pytest.approx(1)


class Few(torch.nn.Module):
    "A student of one layer."
    def __init__(self, width):
        super().__init__()
        self.backbone, self.width = torch.nn.Conv2d(3, width, 8, 8), width

    def no_weight_decay(self): return set()

    def forward(self, images):
        grid = self.backbone(images)
        return {'fickle': Features(grid.mean((2, 3)), grid.movedim(1, -1))}


def test_a_teacher_that_changes_its_width_within_a_run_is_named():
    "Any callable may be a teacher; this one gives 5 channels from its third batch on."
    asked = []
    def fickle(images):
        asked.append(len(images))
        width = 3 if len(asked) < 3 else 5
        return Features(torch.rand(len(images), 3), torch.rand(len(images), 4, 4, width))
    part = BatchPartition((0, 2), (32, 32), 1., {'fickle': 1.})
    recipe = Recipe('zoo:photos', ('fickle',), '', steps=5, batch_size=2, size=32)
    loss = MultiTeacherLoss('phi-s', {'fickle': 1.}, {'fickle': 1.})
    trainer = Trainer(DistillStep(Few(3), loss), recipe, torch.device('cpu'))
    plan = StagePlan(0, 5, (part,), (0, 5), ('fickle',))
    normalizer = Normalizer(torch.zeros(3), torch.eye(3), torch.eye(3))
    trainer.start_stage(plan, [Source(part, None, {'fickle': fickle})], {'fickle': normalizer})
    batch = Batch(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), {}, torch.tensor([-1, -1]))
    for _ in range(2): trainer(batch)
    before = {key: tensor.clone() for key, tensor in trainer.state_dict()['weights'].items()}
    message = 'step 2: teacher fickle gives 5 channels, and gave 3 when its statistics were taken'
    with pytest.raises(BadInput, match=message): trainer(batch)
    weights = trainer.state_dict()['weights']
    assert trainer.step == 2 and all(torch.equal(before[key], tensor) for key, tensor in weights.items())


def patch_teacher(images):
    "Averages of patches of 8 pixels, which see nothing of their neighbours."
    grid = torch.nn.functional.avg_pool2d(images, 8).movedim(1, -1)
    return Features(grid.mean((1, 2)), grid)


def left_half(colour, masked=True):
    "A crop whose right half is padding, but for eight columns that belong to no whole patch."
    def crop(image, size, random):
        pixels = random_crop(image, size, random)
        mask = torch.arange(pixels.shape[-1]).expand(pixels.shape[-2:]) < 36
        padded = pixels.masked_fill(~mask, colour)
        return (padded, mask) if masked else padded
    return crop


def statistics_of(out, crop, **fields):
    "What a run would write of `patch_teacher` for such crops."
    out.mkdir()
    recipe = Recipe('zoo:photos', ('zoo:patches',), str(out), size=64, batch_size=4, statistics_steps=3, **fields)
    plan, crops = plan_stages(recipe, ['patches'])[0], Crops(open_images('zoo:photos'), 64, crop=crop)
    source = Source(plan.parts[0], crops, {'patches': patch_teacher})
    take_statistics(recipe, plan, [source], out, new_accelerator(torch.device('cpu')), torch.device('cpu'))
    return load_file(out/'statistics.safetensors')


@pytest.mark.parametrize('processes, accumulate, complaint', [
    (8, 1, '60 images of a batch cannot be shared out among 8'), (4, 2, 'accumulate: 15 images of a process')])
def test_parts_that_cannot_be_shared_out(processes, accumulate, complaint):
    part = BatchPartition((0, 60), (64, 64), 60/64, {})
    assert part.microbatch(4, 5) == 3
    with pytest.raises(BadInput, match=complaint): part.microbatch(processes, accumulate)


def test_statistics_leave_out_the_padding(tmp_path):
    "They are those of the region that is not padded, and normalizers and modules are fitted to it alone."
    information = {'information': (10., 1.), 'information_steps': 3}
    black, white = (statistics_of(tmp_path/str(c), left_half(c), **information) for c in (0, 255))
    crops, vectors = Crops(open_images('zoo:photos'), 64), []
    for i in range(12): vectors.append(patch_teacher(crops[i].image[None]/255).spatial[0, :, :4].reshape(-1, 3))
    vectors = torch.cat(vectors).double()
    torch.testing.assert_close(black['patches.mean'], vectors.mean(0))
    torch.testing.assert_close(black['patches.variance'], vectors.var(0, correction=0))
    for key in black:
        if not key.endswith('summary'): assert torch.equal(black[key], white[key]), key   # a summary sees everything
    unmasked = statistics_of(tmp_path/'unmasked', left_half(255, masked=False))
    assert (unmasked['patches.variance'] > 1.5*black['patches.variance']).all()


def test_masks_that_leave_nothing_are_refused_with_the_teacher_s_name(tmp_path):
    def nothing(image, size, random): return random_crop(image, size, random), torch.zeros(64, 64, dtype=torch.bool)
    with pytest.raises(BadInput, match='teacher patches: no patch of its grid lies within an image'):
        statistics_of(tmp_path/'nothing', nothing)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_run_learns_from_padded_crops(tmp_path, accumulate):
    "From a crop that pads to a finished student, with the masks cut into microbatches."
    recipe = Recipe('zoo:photos', ('zoo:u2netp#64',), str(tmp_path/'run'), size=64, batch_size=4, statistics_steps=2,
                    steps=2, depth=1, head_width=16, device='cpu', accumulate=accumulate, information=(10.,),
                    information_steps=2, watch_every=1)
    run_recipe(recipe, inputs=Inputs(crop=padded_crop))
    assert (tmp_path/'run'/'student.safetensors').exists()


@pytest.mark.parametrize('method, warns', [('zca', True), ('pca', True), ('hca', True), ('phi-s', False),
                                           ('standardize', False), ('mse', False)])
def test_too_few_statistics_for_a_method_are_named_with_the_cure(tmp_path, capsys, method, warns):
    "Here 3 × 4 images of 8 × 8 positions are 256 vectors for each of 3 channels, and 3 × 4 of one position are 4."
    statistics_of(tmp_path/'enough', random_crop, method=method)
    assert 'fitted from' not in capsys.readouterr().err
    few = Moments(3, 'teacher patches').update(torch.randn(12, 3))
    check_counts(Recipe('', ('',), '', method=method, statistics_steps=3), 'patches', few)
    error = capsys.readouterr().err
    assert bool(error) == warns
    if warns:
        assert error == (f'teacher patches: {method} is fitted from 4 vectors for each of 3 channels, and wants 50 or '
                         'more: try --statistics-steps 38\n')
