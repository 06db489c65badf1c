"What stands before a teacher's heads: blocks that see the whole grid, a ladder of heads, and what both must survive."
import json  # noqa: I001
from dataclasses import replace
from pathlib import Path

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import pytest
import torch
from children import Children, small_images, train_double
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from radio_nb.models.student import LadderHead, Projector, Student, fold_heads
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.moments import Moments
from radio_nb.targets.normalizers import Normalizer
from radio_nb.targets.phi_s import fit_normalizer
from radio_nb.training.plan import plan_recipe
from radio_nb.training.recipe import Recipe
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.stages import check_recipe
from radio_nb.training.preparation import go_on_from, saved_student
from radio_nb.training.train import run_recipe
from radio_nb.training.trainer import retarget

TEACHERS = {'clip': (24, 40), 'sam': (0, 16)}
BOTH = {'head_attention': 1, 'ladder': True}


def small(name='vit_tiny_patch16_224', **options):
    torch.manual_seed(0)
    depth = {'depth': 3} if name.startswith('vit') else {}
    return Student(name, TEACHERS, head_width=32, **depth, **options)


def normalizer(width, method='phi-s'):
    "Of features with a mean far from 0."
    features = torch.randn(400, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64) + 30
    return fit_normalizer(method, Moments(width).update(features))


def outputs(student, images):
    with torch.inference_mode(): return {name: [*features] for name, features in student(images).items()}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(0, 2))
def test_attention_heads_divide_the_width_and_have_about_64_channels(width, blocks):
    projector = Projector(width, blocks)
    for block in projector: assert width % block.attn.num_heads == 0 and block.attn.num_heads <= max(1, width//64)
    token, grid = projector(torch.randn(2, width), torch.randn(2, 2, 3, width))
    assert token.shape == (2, width) and grid.shape == (2, 2, 3, width)


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'resnet10t'])
def test_a_teacher_asked_alone_gets_what_it_gets_among_others(name):
    "Its blocks are its own, with its class token where it has one."
    student = small(name, head_attention=1, **({'ladder': True} if name.startswith('vit') else {})).eval()
    for block in student.projectors.modules():   # as of training: what a block adds is seen
        if hasattr(block, 'gamma'): block.gamma.data.fill_(1.)
    images = torch.rand(2, 3, 64, 96)
    everyone = outputs(student, images)
    for teacher in TEACHERS:
        with torch.inference_mode(): alone, = student(images, [teacher]).values()
        assert_close(tuple(alone), tuple(everyone[teacher]))
    assert everyone['sam'][0].shape == (2, 0) and everyone['clip'][0].shape == (2, 24)
    student.projectors[0][0].mlp.fc2.bias.data += 1
    moved = outputs(student, images)
    for old, new in zip(everyone['clip'], moved['clip']): assert (old - new).abs().max() > 1e-3
    assert torch.equal(everyone['sam'][1], moved['sam'][1])


@pytest.mark.parametrize('side', [0, 2, 4])
def test_the_last_of_a_ladders_layers_is_what_the_backbone_gives_with_windows_too(side):
    student, images = small(ladder=True, windows=(2, 4)).eval(), torch.rand(1, 3, 64, 128)
    student.backbone.window, seen = side, []
    def see(block, given, out): seen.append(out)
    hooks = [block.register_forward_hook(see) for block in student.backbone.blocks]
    with torch.inference_mode(): *inner, last = student.layers(images)
    for hook in hooks: hook.remove()
    with torch.inference_mode(): assert all(map(torch.equal, last, student.backbone(images)))
    assert len(inner) == 2 and not any(layer.spatial.shape != last.spatial.shape for layer in inner)
    if side: return
    for layer, out in zip(inner, seen): assert torch.equal(layer.spatial.flatten(1, 2), out[:, 8:])


def test_a_layer_inside_windows_has_its_patches_in_their_places():
    "After the first block, which attends inside windows, only the window with a patch that differs does."
    student = small(ladder=True, windows=(2,)).eval()
    student.backbone.window = 2
    images = torch.rand(1, 3, 64, 128)
    other = images.clone()
    other[..., 16:32, 80:96] += .5   # the patch in row 1 and column 5
    with torch.inference_mode(): one, two = (student.layers(x)[0].spatial for x in (images, other))
    away = (one - two).abs().amax(-1)[0]
    window = away[0:2, 4:6].clone()
    away[0:2, 4:6] = 0
    assert window.min() > 0 and window.argmax() == 3 and away.max() == 0


@pytest.mark.parametrize('method', ['phi-s', 'standardize', 'zca'])
def test_all_last_layers_fold_and_change_their_targets(method):
    student = small(**BOTH).eval().double()
    for block in student.modules():
        if isinstance(block, torch.nn.Linear): torch.nn.init.normal_(block.bias)
    images, own = torch.rand(2, 3, 48, 64).double(), {name: normalizer(w, method) for name, (_, w) in TEACHERS.items()}
    before = outputs(student, images)
    def denormalized(name):
        theta, mean = own[name].inverse_weight.double(), own[name].mean.double()
        x = before[name][1]
        return (x @ theta.T if theta.ndim == 2 else x*theta) + mean
    expected = {name: denormalized(name) for name in TEACHERS}
    after = outputs(fold_heads(student, own), images)
    for name in TEACHERS:
        assert_close(after[name][1], expected[name], rtol=1e-9, atol=1e-9)
        assert torch.equal(after[name][0], before[name][0])


def test_a_ladder_changes_its_targets_and_not_what_it_means():
    student, images = small(**BOTH).eval(), torch.rand(2, 3, 48, 64)
    old, new = ({name: normalizer(width, method) for name, (_, width) in TEACHERS.items()}
                for method in ('standardize', 'phi-s'))
    before = outputs(student, images)
    for name, head in zip(TEACHERS, student.spatial_heads): retarget(head[-1], old[name], new[name])
    after = outputs(student, images)
    for name in TEACHERS:
        one, two = old[name].inverse(before[name][1]), new[name].inverse(after[name][1])
        assert (one - two).abs().max() < 1e-4*one.abs().max()


def test_one_bias_is_folded_once():
    "Two rungs, both of which say 1: with Θ = 2 and μ = 5 that is 2·2 + 5."
    head = LadderHead(4, 8, 1, below=1)
    torch.nn.init.zeros_(head[-1].weight)
    torch.nn.init.constant_(head[-1].bias, 2.)
    folded = head.folded(Normalizer(torch.tensor([5.]), torch.tensor(.5), torch.tensor(2.)))
    assert_close(folded([torch.randn(3, 4)]*2), torch.full((3, 1), 9.))


def test_it_is_saved_and_old_folders_are_read(tmp_path):
    images = torch.rand(1, 3, 48, 32)
    for i, options in enumerate((BOTH, {})):
        student = small(**options).eval()
        student.save_pretrained(tmp_path/str(i))
        loaded = Student.from_pretrained(tmp_path/str(i))
        ours, theirs = outputs(student, images), outputs(loaded, images)
        for name in TEACHERS: assert all(map(torch.equal, ours[name], theirs[name]))
    path = tmp_path/'1'/'config.json'
    config = json.loads(path.read_text())
    assert [config.pop(key) for key in BOTH] == [0, False]
    path.write_text(json.dumps(config))
    old = Student.from_pretrained(tmp_path/'1')
    assert old.config.items() >= {'head_attention': 0, 'ladder': False}.items()
    assert not any(key.startswith('projectors') for key in old.state_dict())


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('heads')
    return Recipe(small_images(home/'images', 12), ('zoo:efficientnet-lite0/-2#64',), str(home/'run'), size=64, depth=2,
                  head_width=16, steps=4, batch_size=4, statistics_steps=2, checkpoint_every=2, device='cpu', ema=.5,
                  mesa=.5, watch_every=2, checkpoint_activations=True, **BOTH)


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def test_shards_train_the_same_student(recipe, tmp_path):
    plain = replace(recipe, ema=0., mesa=0., watch_every=0)
    ways = {'one': (1, False), 'shards': (2, True)}
    children = [Children(n, tmp_path/f'{name}-log', train_double, replace(plain, out=str(tmp_path/name), shard=shard))
                for name, (n, shard) in ways.items()]
    for child in children: child.wait()
    one, two = (load_checkpoint(tmp_path/name/'checkpoints')['trainer']['weights'] for name in ways)
    assert one.keys() == two.keys() and any('projectors' in key for key in one)
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5


def test_checkpoints_change_nothing_but_memory(recipe, out, tmp_path):
    other = run_recipe(replace(recipe, out=str(tmp_path/'run'), checkpoint_activations=False))
    assert (other/'student.safetensors').read_bytes() == (Path(out)/'student.safetensors').read_bytes()
    fields = {'size': 256, 'depth': 1, 'batch_size': 32, 'head_attention': 4, 'ladder': False, 'mesa': 0.}
    more, less = (plan_recipe(replace(recipe, checkpoint_activations=on, **fields)).memory for on in (False, True))
    assert less.activations < .6*more.activations


def test_another_run_begins_where_this_one_ended(recipe, out):
    "Its heads give normalized features again, and those are the same."
    widths = {name: tuple(w) for name, w in json.loads((Path(out)/'config.json').read_text())['teachers'].items()}
    (name, (_, width)), = widths.items()
    again = replace(recipe, init=str(out))
    options = {'depth': 2, 'head_width': 16}
    student = Student('vit_tiny_patch16_224', widths, **options, **BOTH).eval()
    saved, own = saved_student(again, student), normalizer(width)
    go_on_from(student, saved, {name: own})
    images = torch.rand(2, 3, 64, 64)
    theirs, ours = outputs(saved, images)[name], outputs(student, images)[name]
    assert torch.equal(theirs[0], ours[0])
    assert_close(own.inverse(ours[1]), theirs[1], rtol=1e-3, atol=1e-3)
    for other in ({'head_attention': 2, 'ladder': True}, {'head_attention': 1}):
        with pytest.raises(BadInput, match='init: the student of .* has (head_attention 1|ladder True), and this one'):
            saved_student(again, Student('vit_tiny_patch16_224', widths, **options, **other))


def test_their_arithmetic_is_planned(recipe):
    def step(**fields): return sum(plan_recipe(replace(recipe, mesa=0., **fields)).step().values())
    none, one, two, ladder = (step(checkpoint_activations=False, head_attention=n, ladder=ladder)
                              for n, ladder in ((0, False), (1, False), (2, False), (0, True)))
    assert two - one == pytest.approx(one - none, rel=.01) and one > none
    assert ladder > none


def test_what_cannot_be_is_refused(recipe):
    with pytest.raises(BadInput, match='^ladder is for vision transformers, and resnet10t is not one: leave it out$'):
        small('resnet10t', ladder=True)
    inner = replace(recipe, information=(10.,))
    with pytest.raises(BadInput, match='ladder: inner blocks would go round the bottleneck: add --bottleneck 0'):
        check_recipe(inner)
    assert check_recipe(replace(inner, bottleneck=0.)) and check_recipe(replace(inner, ladder=False))
    for wrong in ({'head_attention': -1}, {'ladder': 1}):
        with pytest.raises(BadInput, match=f'{next(iter(wrong))} is'): replace(recipe, **wrong)
