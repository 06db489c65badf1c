"The student: windows and pyramids against oracles, what the optimizer decays, and that it compiles and exports."
import io  # noqa: I001
import json
import subprocess
import sys

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import numpy as np
import pytest
import timm
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.models.vision_transformer import Block
from timm.optim import create_optimizer_v2
from torch import nn
from torch.testing import assert_close

from radio_nb.cifd.controlled_flow import TokenBottleneck
from radio_nb.front.cli import main
from radio_nb.data.images import to_rgb
from radio_nb.models.backbones import StochasticDepth, TimmNetwork, Transformer, find_network, new_backbone
from radio_nb.models.eradio import ERadio
from radio_nb.models.randomness import rng_shard
from radio_nb.models.student import Head, Student, check_microbatch
from radio_nb.models.tokens import from_windows, into_windows, windowed, windowed_blocks
from radio_nb.targets.bad_input import BadInput

TEACHERS = {'clip': (24, 40), 'sam': (0, 16)}


def small(name='vit_tiny_patch16_224', bottleneck=False, **options):
    torch.manual_seed(0)
    depth = {'depth': 3} if name.startswith('vit') else {}
    student = Student(name, TEACHERS, head_width=32, **depth, **options)
    if bottleneck: student.neck = TokenBottleneck(student.backbone.dim)
    return student


def test_a_part_of_a_batch_leaves_out_the_blocks_that_the_whole_leaves_out():
    x, depth = torch.rand(6, 2, 3), StochasticDepth(.5)
    def drawn(rank, world):
        torch.manual_seed(0)
        with rng_shard(rank, world): return depth(x[rank::world])
    whole = drawn(0, 1)
    assert set(whole.flatten(1).eq(0).all(1).tolist()) == {True, False}
    assert_close(whole[whole != 0], 2*x[whole != 0])
    for world in (2, 3):
        for rank in range(world): assert torch.equal(drawn(rank, world), whole[rank::world])
    assert torch.equal(depth.eval()(x), x)
    swin = new_backbone('swinv2_tiny_window8_256', 1)
    assert not any(isinstance(module, timm.layers.DropPath) for module in swin.modules())
    assert any(isinstance(module, StochasticDepth) for module in swin.modules())


def test_what_is_no_picture_and_no_batch_is_named():
    student = Student('vit_tiny_patch16_224', {'a': (4, 8)}, depth=1)
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, 'JPEG')
    with pytest.raises(BadInput, match='this picture cannot be read: image file is truncated'):
        student.preprocess(Image.open(io.BytesIO(file.getvalue()[:1000])))
    with pytest.raises(BadInput, match='a picture is what PIL.Image.open gives, not ndarray'):
        student.preprocess(np.zeros((64, 64, 3), np.uint8))
    for shape in ((3, 64, 64), (1, 4, 64, 64)):
        with pytest.raises(BadInput, match=r'must be a batch of shape \(B, 3, H, W\), not'): student(torch.rand(shape))
    with pytest.raises(BadInput, match='a student needs a teacher'): Student('vit_tiny_patch16_224', {})


def test_a_transformer_that_averages_ends_in_its_normalization_too():
    grid = new_backbone('vit_wee_patch16_reg1_gap_256', 1, depth=1).eval()(torch.rand(1, 3, 32, 32)).spatial
    assert_close(grid.mean(-1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
    assert_close(grid.var(-1, correction=0), torch.ones(1, 2, 2), atol=1e-3, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_windows_are_the_tiles_of_the_grid_and_the_order_is_undone(rows, columns, side):
    h, w = rows*side, columns*side
    patches = torch.randn(2, h*w, 3)
    ordered, grid = into_windows(patches, h, w, side), patches.unflatten(1, (h, w))
    tiles = [grid[:, r:r + side, c:c + side].flatten(1, 2) for r in range(0, h, side) for c in range(0, w, side)]
    assert torch.equal(ordered, torch.cat(tiles, 1))
    assert torch.equal(from_windows(ordered, h, w, side), patches)


def test_a_windowed_block_is_attention_with_a_mask():
    torch.manual_seed(0)
    block = Block(16, 2).eval()
    tokens, window = torch.randn(2, 36, 16), torch.arange(36)//9
    mask = torch.where(window[:, None] == window, 0., -torch.inf)
    assert_close(windowed(block, tokens, 0, 9), block(tokens, attn_mask=mask))


def test_copies_of_the_prefix_are_averaged():
    torch.manual_seed(0)
    block = Block(16, 2).eval()
    tokens = torch.randn(1, 5 + 3*4, 16)
    each = torch.stack([block(torch.cat([tokens[:, :5], window], 1)) for window in tokens[:, 5:].split(4, 1)])
    out = windowed(block, tokens, 5, 4)
    assert_close(out[:, :5], each[:, :, :5].mean(0))
    assert_close(out[:, 5:], torch.cat([*each[:, :, 5:]], 1))


@pytest.mark.parametrize('n_blocks, everywhere', [
    (1, [0]), (4, [1, 3]), (5, [1, 3, 4]), (12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (27, [5, 11, 17, 23, 26])])
def test_the_last_block_of_a_group_and_of_all_sees_everything(n_blocks, everywhere):
    lengths = []
    class Spy(nn.Module):
        def forward(self, x):
            lengths.append(x.shape[1])
            return x
    windowed_blocks(nn.Sequential(*(Spy() for _ in range(n_blocks))), torch.randn(1, 2 + 64, 4), 2, (8, 8), 4)
    assert [i for i, length in enumerate(lengths) if length == 2 + 64] == everywhere
    assert set(lengths) <= {2 + 64, 2 + 16}


def test_one_window_for_the_whole_grid_is_global_attention():
    student, images = small().eval(), torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        everywhere = student(images)['clip']
        student.backbone.window = 6
        for one, other in zip(student(images)['clip'], everywhere): assert_close(one, other)
        student.backbone.window = 2
        assert (student(images)['clip'].spatial - everywhere.spatial).abs().max() > 1e-3


def test_windows_are_drawn_in_training_alike_for_one_seed_and_not_in_evaluation():
    student, images, sides = small(windows=(2, 4, 5)), torch.rand(1, 3, 64, 128), []
    draw = student.backbone.draw_window
    student.backbone.draw_window = lambda h, w: sides.append(draw(h, w)) or sides[-1]
    for _ in range(2):
        torch.manual_seed(3)
        for _ in range(12): student(images)
    assert sides[:12] == sides[12:] and set(sides) == {2, 4}
    student.eval()(images)
    assert len(sides) == 24


def test_the_windows_that_fit():
    backbone = Transformer(find_network('vit_tiny_patch16_224'), 1, depth=1, windows=(0, 4, 7, 8))
    for grid, fitting in {(8, 8): {0, 4}, (8, 16): {0, 4, 8}, (14, 14): {0, 7}, (5, 5): {0}}.items():
        assert {backbone.draw_window(*grid) for _ in range(60)} == fitting


def test_without_windows_nothing_is_drawn_for_them():
    backbone, before = small().backbone, torch.get_rng_state()
    assert backbone.draw_window(8, 8) == 0 and torch.equal(torch.get_rng_state(), before)


def test_a_plain_head_loads_what_the_head_of_version_0_1_wrote():
    assert list(Head(4, 6, 2).state_dict()) == ['0.weight', '0.bias', '1.weight', '1.bias', '3.weight', '3.bias']


def test_a_deep_head_is_mlp2():
    torch.manual_seed(0)
    head, x = Head(4, 6, 2, blocks=2), torch.randn(3, 4)
    weights = head.state_dict()
    def linear(x, name): return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']
    def active(x): return nn.functional.gelu(nn.functional.layer_norm(x, (6,)))
    hidden = linear(x, '0')
    for block in '12': hidden = hidden + linear(active(hidden), f'{block}.2')
    assert_close(head(x), linear(active(hidden), '5'))


def test_the_optimizer_does_not_decay_tokens_and_positions():
    student = small()
    groups = create_optimizer_v2(student, 'adamw', 1e-3, .02).param_groups
    rate = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    spared = {name for name, p in student.named_parameters() if rate[id(p)] == 0 and p.ndim > 1}
    assert spared == {'backbone.prefix', 'backbone.positions.table'} == student.no_weight_decay()
    assert rate[id(student.spatial_heads[0][0].weight)] == .02


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'resnet10t'])
def test_with_heads_only_the_backbone_gets_no_gradient(name):
    student, images = small(name, bottleneck=True), torch.rand(2, 3, 64, 64)
    def learners():
        student.zero_grad(set_to_none=True)
        sum(part.sum() for features in student(images).values() for part in features).backward()
        return {parameter.partition('.')[0] for parameter, p in student.named_parameters() if p.grad is not None}
    student.heads_only = True
    assert learners() == {'summary_heads', 'spatial_heads'}
    student.heads_only = False
    assert 'backbone' in learners()


@pytest.mark.parametrize('name', [
    'resnet10t', 'convnext_atto', 'efficientnet_lite0', 'fastvit_t8', 'regnetx_002', 'mobilenetv3_small_050',
    'eradio_xt', 'swinv2_tiny_window8_256'])
def test_a_pyramid_uses_every_parameter_and_comes_back_from_its_folder(name, tmp_path):
    student, images = small(name), torch.rand(2, 3, 64, 96)
    outputs = student(images)
    sum(part.square().sum() for features in outputs.values() for part in features).backward()
    assert not [parameter for parameter, p in student.named_parameters() if p.grad is None]
    assert outputs['sam'].spatial.shape == (2, 4, 6, 16) and outputs['clip'].summary.shape == (2, 24)
    student.eval().save_pretrained(tmp_path)
    reloaded = Student.from_pretrained(tmp_path)
    with torch.inference_mode(): assert torch.equal(reloaded(images)['clip'].spatial, student(images)['clip'].spatial)


def test_a_pyramid_is_its_stages_put_together_by_hand():
    backbone, images = new_backbone('convnext_atto', 2).eval(), torch.rand(2, 3, 64, 96)
    network = backbone.stages.model
    def unit(x): return nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1)
    with torch.inference_mode():
        x = network.stem((images - backbone.mean)/backbone.std)
        for stage in network.stages[:3]: x = stage(x)
        fine, coarse = unit(x), unit(network.stages[3](x))
        grid = nn.functional.conv2d(fine, backbone.proj.weight, backbone.proj.bias)
        # each position of the coarse map is written to 2 × 2 positions of the fine one
        up = torch.einsum('bchw,cdij->bdhiwj', coarse, backbone.up.weight).flatten(4).flatten(2, 3)
        grid = backbone.norm((grid + up + backbone.up.bias[:, None, None]).movedim(1, -1))
        summary, spatial = backbone(images)
    assert_close(spatial, grid, rtol=1e-4, atol=1e-4)
    assert_close(summary[:, 0], backbone.norm(coarse.mean((2, 3))), rtol=1e-4, atol=1e-4)
    assert torch.equal(summary[:, 0], summary[:, 1])


def test_batch_normalization_learns_in_a_pyramid_and_rests_in_a_stem():
    def moved(student):
        norm = next(m for m in student.modules() if isinstance(m, nn.BatchNorm2d))
        before = norm.running_mean.clone()
        student.train()(torch.rand(2, 3, 64, 64))
        return not torch.equal(norm.running_mean, before)
    assert moved(small('resnet10t')) and not moved(small(stem='resnet10t'))


def test_weights_from_a_file_fill_a_pyramid(tmp_path):
    from safetensors.torch import save_file
    donor = find_network('resnet10t').model
    save_file(donor.state_dict(), tmp_path/'weights.safetensors')
    student = small(f'timm:resnet10t@{tmp_path/"weights.safetensors"}')
    assert torch.equal(student.backbone.stages.model.layer4[0].conv1.weight, donor.layer4[0].conv1.weight)
    assert student.config['backbone'] == 'resnet10t'


@pytest.mark.parametrize('name, options, message', [
    ('vit_tiny_r_s16_p8_224', {}, 'not a plain vision transformer.* convnext_atto'),
    ('inception_v3', {}, 'does not see images of any size'),
    ('resnet10t', {'stem': 'resnet10t'}, 'stem is for vision transformers'),
    ('vit_tiny_patch16_224', {'windows': (4, -2)}, 'give the sides of windows in patches, or 0 for none'),
    ('resnet10t', {'windows': (4,)}, 'windows is for vision transformers'),
    ('open_clip:ViT-B-16@random', {}, 'starts from a timm network'),
    ('vit_tiny_patch16_224', {'stem': 'xcit_nano_12_p8_224'}, 'xcit_nano_12_p8_224 has no stage of stride 16'),
])
def test_what_cannot_be_a_student_says_why(name, options, message):
    with pytest.raises(BadInput, match=message): Student(name, TEACHERS, **options)


def test_the_command_line_trains_a_pyramid(tmp_path):
    pyramid = '--student', 'resnet10t', '--depth', '0', '--precision', 'bfloat16', '--steps', '2'
    main(['distill', *SMALL, *pyramid, '--out', str(tmp_path/'run')])
    student = Student.from_pretrained(tmp_path/'run')
    assert student.config['backbone'] == 'resnet10t' and (tmp_path/'run'/'report.html').exists()
    with torch.inference_mode(): assert student(torch.rand(1, 3, 64, 96))['u2netp'].spatial.isfinite().all()


@pytest.mark.parametrize('name, options, side', [
    ('vit_tiny_patch16_224', {'stride': 4}, 8), ('vit_tiny_patch16_224', {'stride': 8, 'stem': 'resnet10t'}, 4),
    ('convnext_atto', {'stride': 4}, 8), ('resnet10t', {'stride': 32}, 1), ('cifar_resnet8', {'stride': 2}, 16),
    ('cifar_resnet8', {}, 8)])
def test_a_student_of_small_images_has_the_stride_asked_for_and_comes_back(name, options, side, tmp_path):
    student, images = small(name, **options).eval(), torch.rand(2, 3, 32, 32)
    with torch.inference_mode(): grid = student(images)['sam'].spatial
    assert grid.shape == (2, side, side, 16)
    student.save_pretrained(tmp_path)
    with torch.inference_mode(): assert_close(Student.from_pretrained(tmp_path)(images)['sam'].spatial, grid)


def test_an_e_radio_is_distilled_saved_and_loaded(tmp_path):
    run = radio_nb.distill(images='zoo:photos', teachers=['zoo:u2netp#64'], student='eradio_xt', size=64, steps=4,
                           statistics_steps=2, batch_size=4, head_width=16, hold_out=4, out=str(tmp_path/'run'))
    student, images = radio_nb.create(tmp_path/'run'), torch.rand(2, 3, 64, 96)
    assert student.config['backbone'] == 'eradio_xt' and student.backbone.stages.model.neck is None
    with torch.inference_mode():
        grid = student(images)['u2netp'].spatial
        assert grid.shape == (2, 4, 6, 64) and torch.equal(grid, run.student.cpu().eval()(images)['u2netp'].spatial)


def test_an_e_radio_compiles_to_one_graph_where_windows_tile_the_map_and_where_they_do_not():
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = ERadio(16, (1, 1, 2, 1), num_classes=3)
    compiled = torch.compile(network, fullgraph=True, backend='aot_eager', dynamic=False)
    for size in ((224, 224), (150, 200)):
        images = torch.rand(2, 3, *size)
        assert_close(compiled(images), network(images))


@pytest.mark.parametrize('first', ['radio_nb', 'timm'])
def test_timm_knows_e_radio_whichever_of_the_two_is_imported_first(first):
    "Asking where timm lies, as `architectures` does, must not use the moment up."
    script = ('import sys, importlib, importlib.util, radio_nb; importlib.util.find_spec("timm")\n'
              'ours = [f for f in sys.meta_path if type(f).__name__ == "_AfterTimm"]\n'
              'if sys.argv[1] == "timm": sys.meta_path.remove(*ours)\n'
              'import timm; before = timm.is_model("eradio_t"); importlib.reload(radio_nb)\n'
              'print(before, timm.create_model("eradio_xt", num_classes=0).num_features)')
    done = subprocess.run([sys.executable, '-c', script, first], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(first == 'radio_nb'), '256']


def test_smaller_patches_are_resampled_from_the_larger():
    from timm.layers import resample_patch_embed
    network = find_network('vit_tiny_patch16_224')
    weight = resample_patch_embed(network.model.patch_embed.proj.weight.detach(), (8, 8))
    backbone = Transformer(network, 1, stride=8)
    assert torch.equal(backbone.embed.weight, weight) and backbone.embed.stride == (8, 8)


def test_the_last_stage_alone_is_the_grid_where_there_is_no_coarser_one():
    backbone, images = new_backbone('cifar_resnet8', 2).eval(), torch.rand(2, 3, 32, 48)
    with torch.inference_mode():
        last = backbone.stages.model.forward_features((images - backbone.mean)/backbone.std).movedim(1, -1)
        last = backbone.norm(nn.functional.layer_norm(last, (64,), eps=1e-6))
        summary, spatial = backbone(images)
    assert_close(spatial, last, rtol=1e-4, atol=1e-4)
    assert summary.shape == (2, 2, 64)


def test_a_pyramid_names_the_sides_it_needs():
    with pytest.raises(BadInput, match='patches of 32 cannot see 48 × 64 pixels: make both sides a multiple of 32'):
        small('resnet10t')(torch.rand(1, 3, 48, 64))


COMPILED = [('vit_tiny_patch16_224', {}),
            ('vit_tiny_patch16_224', {'stem': 'resnet10t', 'bottleneck': True, 'head_attention': 1, 'ladder': True}),
            ('resnet10t', {'head_blocks': 1, 'head_attention': 1})]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name, options', COMPILED)
def test_it_compiles_to_one_graph_that_draws_what_it_would_have_drawn(name, options, training):
    torch._dynamo.reset()
    student, images = small(name, **options).train(training), torch.rand(2, 3, 64, 96)
    compiled = torch.compile(student, fullgraph=True, backend='aot_eager')
    outputs = []
    for model in (student, compiled):
        torch.manual_seed(1)
        outputs.append(model(images))
    for teacher in TEACHERS: assert_close(tuple(outputs[1][teacher]), tuple(outputs[0][teacher]))
    if training: sum(part.sum() for features in outputs[1].values() for part in features).backward()


def test_windows_compile_when_they_are_drawn_before():
    torch._dynamo.reset()
    student, images = small(windows=(2, 4)), torch.rand(1, 3, 64, 128)
    compiled = torch.compile(student, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            student.backbone.window = None
            plain = student(images)['clip'].spatial
            torch.manual_seed(seed)
            student.backbone.window = student.backbone.draw_window(4, 8)
            assert_close(compiled(images)['clip'].spatial, plain)


@pytest.mark.parametrize('name, options', [*COMPILED, ('convnext_atto', {})])
def test_it_exports(name, options):
    student, images = small(name, **options).eval(), torch.rand(2, 3, 64, 96)
    program = torch.export.export(student, (images,)).module()
    with torch.inference_mode(): theirs, ours = program(images), student(images)
    for teacher in TEACHERS: assert_close(tuple(theirs[teacher]), tuple(ours[teacher]))


def test_a_student_is_loaded_without_what_only_training_and_reports_need():
    script = ('import sys; from radio_nb.models.student import Student; '
              'print({"open_clip", "datasets", "plotly", "radio_nb.cifd"} & sys.modules.keys())')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert done.stdout == 'set()\n'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name, options', [
    ('vit_tiny_patch16_224', {}), ('vit_tiny_patch16_224', {'stem': 'resnet10t', 'windows': (2,)}), ('resnet10t', {})])
def test_it_runs_in_half_of_the_precision_on_a_cpu(name, options, training):
    "Row 28: positions could not be resized in bfloat16 there. Images of any precision will do."
    student, images = small(name, **options).train(training), torch.rand(2, 3, 64, 96)
    torch.manual_seed(1)
    with torch.no_grad(): expected = student(images)['clip'].spatial
    student.to(torch.bfloat16)
    for pixels in (images, images.bfloat16(), images.double()):
        torch.manual_seed(1)
        with torch.no_grad(): spatial = student(pixels)['clip'].spatial
        assert spatial.dtype == torch.bfloat16
        if not training: assert (spatial - expected).norm() < .05*expected.norm()


def test_positions_of_double_precision_keep_it():
    backbone = small().double().eval().backbone
    with torch.inference_mode(): positions = backbone.positions(1, 5, 7)
    assert positions.dtype == torch.float64 and (positions - positions.float()).abs().max() > 0
    assert backbone.train().positions(2, 5, 7).dtype == torch.float64


@pytest.mark.parametrize('name, options', [*COMPILED, ('convnext_atto', {})])
def test_an_exported_student_takes_batches_of_any_size(name, options):
    "Row 28: the length of the batch was frozen by a teacher without a summary."
    student = small(name, **options).eval()
    sizes = {'images': {0: torch.export.Dim('batch', max=64)}}
    program = torch.export.export(student, (torch.rand(2, 3, 64, 96),), dynamic_shapes=sizes).module()
    for n in (1, 2, 7):
        images = torch.rand(n, 3, 64, 96)
        with torch.inference_mode(): theirs, ours = program(images), student(images)
        for teacher in TEACHERS: assert_close(tuple(theirs[teacher]), tuple(ours[teacher]))


def test_onnx_with_a_batch_of_any_size(tmp_path):
    "Row 28."
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = small().eval()
        def forward(self, images): return self.student(images)['sam'].spatial
    flat, sizes = Flat(), {'images': {0: torch.export.Dim('batch', max=64)}}
    torch.onnx.export(flat, (torch.rand(2, 3, 64, 96),), tmp_path/'student.onnx', dynamo=True, dynamic_shapes=sizes)
    session = runtime.InferenceSession(tmp_path/'student.onnx')
    for n in (1, 2, 7):
        images = torch.rand(n, 3, 64, 96)
        theirs, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.inference_mode(): assert_close(torch.from_numpy(theirs), flat(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, options, learns', [
    ('resnet10t', {}, True), ('convnext_atto', {}, False), ('vit_tiny_patch16_224', {}, False),
    ('vit_tiny_patch16_224', {'stem': 'resnet10t'}, False), ('mobilenetv3_small_050', {}, True)])
def test_a_single_image_is_refused_where_batch_normalization_learns(name, options, learns):
    "Row 25; a stem rests, whether it has been told so yet or not."
    student = small(name, **options)
    check_microbatch(student, 2)
    if not learns: return check_microbatch(student, 1)
    with pytest.raises(BadInput, match='cannot learn from 1 image at a time: raise batch_size or lower accumulate'):
        check_microbatch(student, 1)


def cut(path, size): path.write_bytes(path.read_bytes()[:size])


def changed(path, **values): path.write_text(json.dumps(json.loads(path.read_text()) | values))


SPOILED = {
    'no weights': (lambda f: (f/'student.safetensors').unlink(), 'no such file: .*student.safetensors: copy the'),
    'half of the weights': (lambda f: cut(f/'student.safetensors', 9999), 'student.safetensors is damaged'),
    'no byte of weights': (lambda f: cut(f/'student.safetensors', 0), 'student.safetensors is damaged'),
    'half a configuration': (lambda f: (f/'config.json').write_text('{"backbone": "vit'), 'config.json is damaged'),
    'a configuration of something else': (lambda f: (f/'config.json').write_text('{"model_type": "bert"}'),
                                          'config.json describes no student: it names no backbone'),
    'a list': (lambda f: (f/'config.json').write_text('[1]'), 'config.json describes no student'),
    'bytes': (lambda f: (f/'config.json').write_bytes(b'\xff\xfe\x00'), 'config.json is damaged'),
    'a newer version': (lambda f: changed(f/'config.json', experts=8), 'another version .* does not know experts'),
    'another backbone': (lambda f: changed(f/'config.json', backbone='vit_small_patch16_224'),
                         'do not fit Student: .*of another shape: backbone'),
    'an unknown backbone': (lambda f: changed(f/'config.json', backbone='vit_tinyy'), 'did you mean vit_tiny_patch16'),
    'text for a number': (lambda f: changed(f/'config.json', depth='three'), 'config.json describes no student'),
    'a number for teachers': (lambda f: changed(f/'config.json', teachers=3), 'config.json describes no student'),
}


@pytest.mark.parametrize('how', SPOILED)
def test_a_damaged_student_is_refused_in_one_line(how, tmp_path):
    "Row 22: files cut short, missing, foreign or of another version."
    spoil, message = SPOILED[how]
    small().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as refused: Student.from_pretrained(tmp_path)
    assert '\n' not in str(refused.value) and (str(tmp_path) in str(refused.value) or 'unknown' in how)


def test_a_student_that_is_not_finite_is_named_when_it_is_loaded(tmp_path):
    "Row 6: it was evaluated."
    student = small()
    student.spatial_heads[1][0].bias.data[3] = torch.nan
    student.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match='student.safetensors has NaN in spatial_heads.1.0.bias'):
        Student.from_pretrained(tmp_path)


def test_a_student_of_an_earlier_version_is_loaded(tmp_path):
    "Its weights have no fingerprint beside them."
    from safetensors.torch import save_file
    student = small().eval()
    student.save_pretrained(tmp_path)
    save_file(student.state_dict(), tmp_path/'student.safetensors')
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(Student.from_pretrained(tmp_path)(images)['sam'].spatial, student(images)['sam'].spatial)


def test_a_full_disk_is_refused_in_one_line_when_a_student_is_saved(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(BadInput, match='the student could not be written to .*file'):
        small().save_pretrained(tmp_path/'file')


def test_only_the_heads_that_are_wanted_are_computed_and_give_the_same():
    student, images, used = small().eval(), torch.rand(2, 3, 64, 96), []
    for i, head in enumerate([*student.summary_heads, *student.spatial_heads]):
        head.register_forward_hook(lambda *_, i=i: used.append(i))
    with torch.inference_mode():
        everything = student(images)
        used.clear()
        assert list(student(images, adaptors=['sam'])) == ['sam'] and used == [2]
        for name in TEACHERS:   # one name is a list of one
            assert_close(tuple(student(images, name)[name]), tuple(everything[name]), rtol=0, atol=0)
        assert list(student(images, ['sam', 'clip'])) == ['clip', 'sam'] and student(images, []) == {}
    with pytest.raises(BadInput, match="unknown adaptor 'clap': did you mean clip"): student(images, ['clap'])


def test_grids_come_as_tokens_and_as_maps():
    student, images = small().eval(), torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        plain, tokens, maps = (student(images, layout=layout)['sam'].spatial for layout in ('NHWC', 'NLC', 'NCHW'))
    assert plain.shape == (2, 4, 6, 16) and tokens.shape == (2, 24, 16) and maps.shape == (2, 16, 4, 6)
    assert torch.equal(tokens[1, 1*6 + 5], plain[1, 1, 5]) and torch.equal(maps[1, :, 1, 5], plain[1, 1, 5])
    with pytest.raises(BadInput, match="unknown layout 'NHW': did you mean NHWC"): student(images, layout='NHW')


@pytest.mark.parametrize('name, patch', [('vit_tiny_patch16_224', 16), ('resnet10t', 32)])
@pytest.mark.parametrize('height, width', [(1, 1), (47, 49), (640, 33), (100, 5000)])
def test_the_nearest_size_is_one_that_the_student_can_see(name, patch, height, width):
    for side, near in zip((height, width), small(name).nearest_size(height, width)):
        assert near % patch == 0 and near >= patch and (abs(near - side) <= patch/2 or near == patch)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA', 'P', 'CMYK', '1', 'LA'])
def test_a_picture_of_any_mode_is_preprocessed(mode):
    student = small().eval()
    pixels = student.preprocess(Image.new('RGB', (50, 33), 'white').convert(mode))
    assert pixels.shape == (3, 32, 48) and pixels.dtype == torch.float32 and pixels.min() == pixels.max() == 1
    assert student.preprocess(Image.new('RGB', (9, 9)).convert(mode), (64, 90)).shape == (3, 64, 96)
    with torch.inference_mode(): assert student(pixels[None])['sam'].spatial.isfinite().all()


@pytest.mark.parametrize('picture', [Image.new('I;16', (9, 9), 40000), Image.new('F', (9, 9)),
                                     Image.new('RGBA', (9, 9), (0, 0, 0, 0)), Image.new('LA', (9, 9), (9, 254))])
def test_a_picture_that_would_become_another_is_refused(picture):
    "Training sees it by `to_rgb`; `convert` clips sixteen bits and shows what lies under what is transparent."
    with pytest.raises(BadInput, match='has more than 8 bits or is transparent: radio_nb.data.images.to_rgb makes'):
        small().preprocess(picture)
    assert small().preprocess(to_rgb(picture)).isfinite().all()


@pytest.mark.parametrize('name, registers', [('vit_tiny_patch16_224', 0), ('vit_small_patch14_reg4_dinov2', 4),
                                             ('test_vit', 0)])
def test_a_trained_transformer_gives_its_tokens_as_its_first_block_sees_them(name, registers):
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, depth=1)
    for p in vit.parameters(): nn.init.normal_(p)
    first = vit._pos_embed(vit.patch_embed(torch.zeros(1, 3, *vit.patch_embed.img_size))).detach()
    prefix = Transformer(TimmNetwork(vit, (.5,)*3, (.5,)*3, name, trained=True), n_class=2).prefix.detach()
    assert vit.num_prefix_tokens == 1 + registers
    assert_close(prefix[:, :2], first[:, :1].expand(-1, 2, -1))
    assert_close(prefix[:, 2:2 + registers], first[:, 1:1 + registers])


def test_what_a_student_would_leave_out_is_refused():
    with pytest.raises(BadInput, match='aimv2_large_patch14_224 normalizes its patches'), torch.device('meta'):
        Student('aimv2_large_patch14_224', {'a': (0, 8)}, depth=1)
    for name in ('timm:test_vit/-2@random', 'timm:test_vit@random#96'):
        with pytest.raises(BadInput, match='of a student name the network alone, without layers'):
            Student(name, {'a': (0, 8)})
    with pytest.raises(BadInput, match='starts from a timm network, not from hf:facebook/dinov2-small'):
        Student('hf:facebook/dinov2-small', {'a': (0, 8)})


def test_a_picture_that_lies_on_its_side_is_turned():
    image = Image.new('RGB', (64, 32))
    image.getexif()[0x0112] = 6
    assert small().preprocess(image).shape == (3, 64, 32)


class Hub:
    "A folder that does what is needed of the hub."
    def __init__(self, folder): self.folder, self.asked = folder, []
    def __call__(self): return self
    def create_repo(self, repo, private, exist_ok):
        self.asked.append((repo, private))
        (self.folder/repo).mkdir(parents=True, exist_ok=exist_ok)
    def upload_folder(self, repo_id, folder_path):
        import shutil
        shutil.copytree(folder_path, self.folder/repo_id, dirs_exist_ok=True)
        return f'https://hub/{repo_id}'
    def download(self, repo, name):
        if not (self.folder/repo/name).exists(): raise OSError(f'404: {name}')
        return str(self.folder/repo/name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path/'hub')
    monkeypatch.setattr('huggingface_hub.HfApi', hub)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', hub.download)
    return hub


def test_a_student_comes_back_from_the_hub(hub):
    student, images = small().eval(), torch.rand(1, 3, 64, 64)
    assert student.push_to_hub('me/mine', card='# Mine', private=True) == 'https://hub/me/mine'
    assert hub.asked == [('me/mine', True)] and (hub.folder/'me/mine/README.md').read_text() == '# Mine'
    there = {path.name for path in (hub.folder/'me/mine').iterdir()}
    assert there == {'README.md', 'config.json', 'student.safetensors'}
    with torch.inference_mode():
        assert torch.equal(radio_nb.create('me/mine')(images)['sam'].spatial, student(images)['sam'].spatial)


def test_a_folder_comes_before_the_hub_and_what_is_neither_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save_pretrained('runs/mine')
    assert radio_nb.create('runs/mine').config['teachers'].keys() == TEACHERS.keys() and not hub.asked
    with pytest.raises(BadInput, match='runs/other holds no student'): radio_nb.create('runs/other')
    with pytest.raises(BadInput, match='me/none is not a folder here, and the hub gave no student .*404') as refused:
        radio_nb.create('me/none')
    assert '\n' not in str(refused.value)


def test_an_upload_that_fails_says_so_in_one_line(hub, monkeypatch):
    def refuse(*args, **kwargs): raise OSError('401 Unauthorized\nlong story')
    monkeypatch.setattr(hub, 'create_repo', refuse)
    with pytest.raises(BadInput, match='could not be uploaded to me/mine .401 Unauthorized.: log in') as refused:
        small().push_to_hub('me/mine')
    assert '\n' not in str(refused.value)


def test_create_imports_no_trainer(tmp_path):
    small().save_pretrained(tmp_path)
    script = ('import sys, radio_nb; print(radio_nb.create(sys.argv[1]).config["teachers"]); '
              'print({"accelerate", "datasets", "open_clip", "plotly"} & sys.modules.keys(), '
              '[name for name in sys.modules if name.startswith(("radio_nb.training", "radio_nb.front"))])')
    done = subprocess.run([sys.executable, '-c', script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == 'set() []'


def test_it_compiles_in_place():
    torch._dynamo.reset()
    student, images = small().eval(), torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        plain = student(images, ['sam'], 'NCHW')['sam'].spatial
        student.compile(backend='aot_eager', fullgraph=True)
        assert_close(student(images, ['sam'], 'NCHW')['sam'].spatial, plain)
