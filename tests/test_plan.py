"What `plan` says, beside what torch's own counter and profiler see in real steps."
import re
import socket
from collections import Counter
from dataclasses import replace

import pytest
import torch
from children import small_images
from torch._C._profiler import _EventType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from radio_nb.data.crops import Batch
from radio_nb.front import cli
from radio_nb.models.specs import check_spec
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.counting import MORE_FORMULAS, blank_normalizer, untrained_step, untrained_teachers
from radio_nb.training.plan import (
    DEVICES,
    Device,
    cache_too_large,
    duration,
    find_devices,
    in_units,
    network_rows,
    plan_notes,
    plan_recipe,
    too_large,
)
from radio_nb.training.recipe import RECIPES, Listen, Partition, Recipe, Stage, read_recipe, teacher_names
from radio_nb.training.stages import check_recipe
from radio_nb.training.statistics import Source, crop_sides
from radio_nb.training.train import run_recipe
from radio_nb.training.trainer import Trainer

PLAN = ['plan', '--teachers', 'timm:cifar_resnet8@random#64', '--size', '64', '--depth', '1', '--head-width', '32']
TINY, U2 = 'timm:cifar_resnet8@random#64', 'zoo:u2netp#64'
VIT = 'timm:vit_tiny_patch16_224.augreg_in21k'


def small(**fields):
    "A recipe that takes a second."
    base = dict(images='zoo:photos', teachers=(TINY,), out='', size=64, depth=2, head_width=64, batch_size=4)
    return Recipe(**base | fields)


CASES = {
    'a transformer': small(teachers=(U2,)),
    'several teachers': small(teachers=(f'{VIT}#64', 'open_clip:ViT-S-32@random', 'timm:resnet18.a1_in1k#64')),
    'bfloat16 in microbatches': small(precision='bfloat16', accumulate=2, batch_size=8, ema=.9, optimizer='lamb'),
    'a pyramid': small(student='convnext_atto', depth=0, size=96),
    'a stem': small(stem='zoo:efficientnet-lite0', balance='uncertainty'),
    'partitions': small(teachers=(U2, f'{VIT}#96'), batch_size=8, stages=(Stage(3, partitions=(
        Partition(.75, teachers=('u2netp',)), Partition(.25, 96, ('vit_tiny_patch16_224.augreg_in21k',)))),)),
    'a cache, and heads that see more': small(views=2, cache='anywhere', head_attention=1, ladder=True),
    'rate-distortion modules': small(information=(10., 1.), kd_dropout=0.),
}


def real_step(recipe, window=None):
    "A step of the trainer with real tensors; the first, which makes the optimizer's state, is done."
    stage, device, sources, batches = check_recipe(recipe)[0], torch.device('cpu'), [], []
    teachers = untrained_teachers(recipe)
    widths = {name: teacher.widths() for name, teacher in teachers.items()}
    for part in stage.parts:
        here, n = {name: teachers[name] for name in part.weights}, part.span[1] - part.span[0]
        grey = {name: teacher(torch.full((n, 3, 32, 32), .5)) for name, teacher in here.items()} if recipe.cache else {}
        size = part.size if recipe.cache else crop_sides(part.size, [teacher.size for teacher in here.values()])
        cached = {name: lambda rows, features=features: features for name, features in grey.items()}
        sources.append(Source(part, None, here, cached))
        batches.append(Batch(torch.randint(256, (n, 3, *size)).byte(), {}, torch.arange(n)))
    trainer = Trainer(untrained_step(recipe, widths), recipe, device)
    trainer.start_stage(stage, sources, {name: blank_normalizer(recipe.method, w) for name, (_, w) in widths.items()})
    if window is not None: trainer.student.backbone.windows, trainer.student.backbone.window = (), window
    trainer(*batches)
    return lambda: trainer(*batches)


def counted(step):
    "What torch's counter sees, with the formulas that it lacks."
    with FlopCounterMode(display=False, custom_mapping=MORE_FORMULAS) as counter: step()
    return counter.get_total_flops()


def events(nodes):
    "All events of a profile, with those within them."
    for node in nodes:
        yield node
        yield from events(node.children)


def most_bytes(step):
    "What torch's profiler sees of its allocator: the most that was there at once and not before the step."
    with profile(profile_memory=True) as seen: step()
    found = [event for event in events(seen.profiler.kineto_results.experimental_event_tree())
             if event.tag == _EventType.Allocation]
    blocks, now, most = {}, 0, 0
    for event in sorted(found, key=lambda event: event.start_time_ns):
        block = event.extra_fields
        if block.alloc_size > 0: blocks[block.ptr] = block.alloc_size
        now += block.alloc_size if block.alloc_size > 0 else -blocks.pop(block.ptr, 0)   # 0 for one from before
        most = max(most, now)
    return most


@pytest.mark.parametrize('case', CASES)
def test_arithmetic_and_memory_are_those_of_a_real_step(case):
    "The arithmetic within 2 %; memory within 20 %, of transformers within 10 %, weights and moments left out."
    plan, step = plan_recipe(CASES[case], images=9), real_step(CASES[case])
    assert sum(plan.step().values()) == pytest.approx(counted(step), rel=.02)
    if case in ('several teachers', 'a stem'): return   # convolutions' kernels have scratch of their own
    allocated = plan.memory.gradients + plan.memory.activations
    kept, seen = sum(plan.memory) - allocated, most_bytes(step)
    if case == 'a pyramid': assert kept + allocated == pytest.approx(kept + seen, rel=.2)
    else: assert allocated == pytest.approx(seen, rel=.1)


def test_what_is_in_bfloat16_and_what_is_not():
    "Teachers compute in float32, the student's products in bfloat16."
    plan = plan_recipe(CASES['bfloat16 in microbatches'])
    (_, (cost,)), = plan.stages
    assert set(cost.teachers['cifar_resnet8@random']) == {'float32'}
    assert cost.training['bfloat16'] > 20*(cost.training['float32'] - 2*cost.images) > 0


def test_weights_moments_and_averages_are_counted_one_by_one():
    plan = plan_recipe(small())
    ema, ddp = plan_recipe(small(ema=.9)), plan_recipe(small(batch_size=8), processes=2)
    shards = plan_recipe(small(batch_size=8, shard=True), processes=2)
    learned = 4*plan.parameters['student']
    assert plan.memory.gradients == learned and plan.memory.optimizer == 2*learned
    assert plan.memory.teachers == pytest.approx(4*plan.parameters['cifar_resnet8@random'], rel=.02)
    assert ema.memory.student - plan.memory.student == pytest.approx(learned, rel=.01)
    assert ddp.memory == plan.memory._replace(gradients=2*learned)
    assert shards.memory.optimizer == learned and shards.memory.activations == plan.memory.activations
    elsewhere = plan_recipe(small(teacher_device='cuda:1'))
    assert elsewhere.memory.teachers == 0 and elsewhere.memory.activations <= plan.memory.activations


def test_the_mean_over_windows():
    plans = [plan_recipe(small(size=128, depth=4, windows=sides)) for sides in ((2,), (4,), (2, 4), (0,), ())]
    two, four, mean, none, whole = [sum(plan.step().values()) for plan in plans]
    assert two == pytest.approx(counted(real_step(plans[0].recipe, 2)), rel=.02) and two != four
    assert mean == pytest.approx((two + four)/2) and none == whole
    with pytest.raises(BadInput, match='windows: 16 × 16 patches tile no grid of this run, which are 8 × 8'):
        plan_recipe(small(size=128, depth=4, windows=(16,)))


def test_a_run_is_its_stages_and_what_comes_before_them():
    recipe = small(stages=(Stage(10), Stage(5, size=96, restart_statistics=False)), statistics_steps=3)
    plan = plan_recipe(recipe)
    (_, (first,)), _ = plan.stages
    statistics = 3*4*sum(first.teachers['cifar_resnet8@random'].values())
    total = 10*sum(plan.step(0).values()) + 5*sum(plan.step(1).values()) + statistics
    assert sum(plan.total().values()) == pytest.approx(total)
    names, *_, shares = zip(*network_rows(plan))
    assert names == ('cifar_resnet8@random', 'student', 'student') and 98 <= sum(int(n[:-1]) for n in shares) <= 102


def test_a_cache_is_filled_once():
    plan = plan_recipe(small(views=3, cache='anywhere', hold_out=6), images=100)
    (_, (cost,)), = plan.stages
    assert plan.step() == Counter({kind: 4*n for kind, n in cost.training.items()})
    assert plan.before()['float32'] == pytest.approx(300*cost.teachers['cifar_resnet8@random']['float32'])
    assert plan.crop_bytes() == 2*(64 + 16*16*64) + 4   # a summary, a grid, a checksum
    assert any('all 300 of them' in note for note in plan_notes(plan, []))
    assert re.search(r'try --views \d|another cache', cache_too_large(plan._replace(images=10**15)))
    assert not cache_too_large(plan)


def test_images_are_counted_where_they_are_at_hand():
    assert plan_recipe(small(hold_out=8)).images == 30
    assert plan_recipe(small(images='hf:somebody/something')).images == 0


def test_what_is_proposed_fits():
    recipe = small(batch_size=16)
    plan = plan_recipe(recipe)
    tight = Device('tight', 1, 1, memory=(sum(plan.memory) - .6*plan.memory.activations)/1e9)
    assert 'try --accumulate 4' in too_large(plan, tight)
    assert not too_large(plan_recipe(small(batch_size=16, accumulate=4)), tight)
    assert 'a smaller student' in too_large(plan, tight._replace(memory=1e-3))
    assert not too_large(plan, tight._replace(memory=0.)) and not too_large(plan, tight._replace(memory=9.))


@pytest.mark.parametrize('processes, fields', [
    (1, {'mosaic': ('u2netp',)}), (1, {'teachers': (TINY,), 'listen': (Listen('infonce'),)}), (2, {}),
    (2, {'hold_out': 4, 'evaluate_every': 2}), (2, {'spectral': True}), (2, {'damp': .1}), (2, {'ema': .9}),
    (1, {'student': 'regnetx_002', 'depth': 0, 'batch_size': 4})])
def test_what_would_make_room_is_what_distill_takes(processes, fields):
    plan = plan_recipe(small(**{'teachers': (U2,), 'batch_size': 16} | fields), processes)
    for share in (.25, .5, .75, .95):
        cure = too_large(plan, Device('tight', 1, 1, memory=share*sum(plan.memory)/1e9))
        pieces = re.search(r'--accumulate (\d+)', cure)
        own = replace(plan.recipe, shard='--shard' in cure, accumulate=int(pieces[1]) if pieces else 1)
        check_recipe(own)
        if processes == 1: plan_recipe(own)


def test_nothing_is_fetched(monkeypatch):
    def connect(*args): raise AssertionError('somebody asked the network')
    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    plan = plan_recipe(small(teachers=(VIT, 'open_clip:ViT-B-32/openai'), student=VIT))
    assert plan.parameters['vit_tiny_patch16_224.augreg_in21k'] > 5e6
    with pytest.raises(BadInput, match='hf:nobody/nothing'): plan_recipe(small(teachers=('hf:nobody/nothing',)))


def test_units():
    assert [in_units(n, 'B') for n in (0, 999, 1234, 99_960, 1.5e12, 2e21)] == [
        '0 B', '999 B', '1.23 kB', '100 kB', '1.50 TB', '2 ZB']
    assert [duration(s) for s in (.02, 1.234, 200, 1e4)] == ['20 ms', '1.23 s', '3.3 min', '166.7 min']
    assert find_devices('cpu', watts=9.) == [DEVICES['cpu']._replace(watts=9.)] and len(find_devices()) == len(DEVICES)


def test_packaged_recipes_make_sense():
    for file in RECIPES.glob('*.toml'):
        recipe = Recipe(**read_recipe(file.stem) | dict(images='zoo:photos', out=''))
        assert check_recipe(recipe) and 'ours' in file.read_text()
        for spec in recipe.teachers: check_spec(spec)


def reduced(recipe, images, out):
    "A recipe with small networks and images, a step of each stage, and everything else as it is."
    small = [f'timm:{name}@random#64' for name in ('test_vit', 'test_vit2', 'test_vit3', 'test_efficientnet')]
    named = dict(zip(teacher_names(recipe.teachers), teacher_names(tuple(small[:len(recipe.teachers)]))))
    def half(side): return side//32*16
    def own(level, **fields):
        sizes = tuple(map(half, level.sizes))
        return replace(level, size=half(level.size), sizes=sizes, **fields)
    stages = tuple(own(stage, steps=1, partitions=tuple(
        own(part, teachers=tuple(named[name] for name in part.teachers)) for part in stage.partitions))
        for stage in recipe.stages)
    batch = next(n for n in (8, 9) if all(abs(part.share*n - round(part.share*n)) < 1e-6
                                          for stage in stages for part in stage.partitions))
    return replace(recipe, images=images, out=out, teachers=tuple(small[:len(named)]), student='vit_tiny_patch16_224',
                   depth=1, head_width=16, flexible=tuple(named[name] for name in recipe.flexible), stages=stages,
                   batch_size=batch, statistics_steps=1, heads_only=1, device='cpu')


@pytest.mark.parametrize('name', sorted(file.stem for file in RECIPES.glob('*.toml')))
def test_packaged_recipes_start(name, tmp_path):
    recipe = Recipe(**read_recipe(name) | dict(images='zoo:photos', out=''))
    small = reduced(recipe, small_images(tmp_path/'images', 9), str(tmp_path/'run'))
    assert Student.from_pretrained(run_recipe(small)).config['teachers']


def test_the_command(capsys):
    cli.main([*PLAN, '--on', 'cpu', '--image-count', '50', '--memory', '0.01', '--images', '/not/here/yet'])
    out = capsys.readouterr().out
    assert 'cifar_resnet8' in out and 'student' in out and 'Each of 50 images is seen 320 times' in out
    assert 'do not fit into 0.01' in out and 'distill in place of plan' in out


def test_the_command_measures_this_machine(capsys):
    cli.main([*PLAN, '--images', 'zoo:photos', '--calibrate', '--batch-size', '2', '--device', 'cpu'])
    assert re.search(r'this machine .* (s|min|h) ', capsys.readouterr().out)


def test_the_command_refuses(refused):
    teacher = PLAN[1:]
    assert 'no teachers' in refused('plan')
    assert "unknown device 'H9'" in refused('plan', *teacher, '--on', 'H9')
    assert 'memory is' in refused('plan', *teacher, '--memory', '-1')
    assert 'processes is' in refused('plan', *teacher, '--processes', '0')
    assert '16 images of a batch cannot be shared out among 3' in refused('plan', *teacher, '--processes', '3')
    assert 'real steps need images' in refused('plan', *teacher, '--calibrate')
    assert 'no such folder' in refused('plan', *teacher, '--images', '/not/here')
    assert 'unknown zoo model' in refused('plan', '--teachers', 'zoo:u2')
    assert 'no such folder' in refused('distill', '--recipe', 'am-radio-h', '--images', '/not/here', '--out', 'x')
    for command in ('plan', 'distill'):
        assert 'packaged: am-radio-h' in refused(command, '--recipe', 'am-radio-x')
        assert 'demo and --recipe are two recipes' in refused(command, 'demo', '--recipe', 'am-radio-h')
        assert 'no such recipe: am-radio-x.toml' in refused(command, '--recipe', 'am-radio-x.toml')


def test_teachers_on_the_students_own_device_count_whatever_it_is_called():
    plans = [plan_recipe(small(device=device, teacher_device=teachers)) for device, teachers in
             (('auto', ''), ('auto', 'cuda'), ('cuda:0', 'cuda'), ('cuda', 'auto'))]
    assert plans[0].memory.teachers > 0 and all(plan.memory == plans[0].memory for plan in plans)
