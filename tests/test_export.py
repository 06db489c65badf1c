"A student that leaves: every file gives what the student gives, without this library, or is not written."
import json  # noqa: I001
import subprocess
import sys
from dataclasses import replace
from math import inf

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.testing import assert_close

from radio_nb.evaluation.scores import Score, save_scores
from radio_nb.front import export
from radio_nb.front.cli import main
from radio_nb.front.export import FORMATS, difference, export_student, timm_arguments
from radio_nb.front.model_card import MARK, beginnings, is_non_commercial, licence_of, model_card, write_card
from radio_nb.models.eradio import ERadio
from radio_nb.models.program import as_program, fixed_padding, named_outputs, replaced
from radio_nb.models.student import Student
from radio_nb.models.tensor_files import fingerprint
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.recipe import Recipe, recipe_toml

TEACHERS = {'clip': (24, 40), 'dino': (16, 16), 'sam': (0, 16)}
STUDENTS = {'vit': ('vit_tiny_patch16_224', {'depth': 2}),
            'vit with a stem': ('vit_tiny_patch16_224', {'depth': 2, 'stem': 'resnet10t', 'head_attention': 1,
                                                         'ladder': True}),
            'pyramid': ('resnet10t', {'head_attention': 1})}
SIZES = ((64, 64), (96, 160), (224, 128))


PROGRAMS = {}


def program_of(student, half=False):
    "A program takes seconds to make, and the same student leaves in several formats."
    key = json.dumps(student.config), fingerprint(student.state_dict()), half
    if key not in PROGRAMS: PROGRAMS[key] = as_program(student, half)
    return PROGRAMS[key]


@pytest.fixture(autouse=True)
def each_program_once(monkeypatch): monkeypatch.setattr(export, 'as_program', program_of)


def saved(folder, name='vit_tiny_patch16_224', **options):
    torch.manual_seed(0)
    student = Student(name, TEACHERS, head_width=32, **options)
    for module in student.modules():   # statistics as of training
        if isinstance(module, nn.BatchNorm2d): module.running_var.uniform_(.5, 2)
    student.eval().save_pretrained(folder)
    return student


def outputs(student, images):
    with torch.inference_mode(): return named_outputs(student, images)


@pytest.fixture(scope='module', params=STUDENTS)
def made(request, tmp_path_factory):
    name, options = STUDENTS[request.param]
    folder = tmp_path_factory.mktemp('student')
    return folder, saved(folder, name, **options)


def batches(student):
    for n, (height, width) in zip((1, 3, 2), SIZES): yield torch.rand(n, 3, height, width)


WITHOUT = """
import sys, {module}, numpy as np
cases = np.load({cases!r})
{load}
for i in range(3):
    outputs = run(cases[f'images {{i}}'])
    for name in {names}:
        ours, theirs = cases[f'{{name}} {{i}}'], np.asarray(outputs[name])
        assert ours.shape == theirs.shape and abs(ours - theirs).max() < 1e-4, (name, abs(ours - theirs).max())
print('radio_nb' in sys.modules, 'torch' in sys.modules, 'timm' in sys.modules)
"""
LOAD = {'onnx': ("session = onnxruntime.InferenceSession({path!r})\n"
                 "names = [output.name for output in session.get_outputs()]\n"
                 "def run(images): return dict(zip(names, session.run(names, {{'images': images}})))"),
        'torch-export': ("program = torch.export.load({path!r}).module()\n"
                         "def run(images):\n"
                         "    with torch.no_grad(): return program(torch.from_numpy(images))")}


@pytest.mark.parametrize('format, module', [('onnx', 'onnxruntime'), ('torch-export', 'torch')])
def test_a_file_gives_what_the_student_gives_where_this_library_is_not(format, module, made, tmp_path):
    "At three sizes, one of them not square, for one image and for several."
    if format == 'onnx': [pytest.importorskip(name) for name in ('onnx', 'onnxruntime', 'onnxscript')]
    folder, student = made
    exported = export_student(folder, format, out=tmp_path/f'student{".onnx" if format == "onnx" else ".pt2"}')
    assert exported.difference <= 1e-4 and [exported.path] == list(tmp_path.iterdir())
    cases, names = {}, []
    for i, images in enumerate(batches(student)):
        found = outputs(student, images)
        names = list(found)
        cases |= {f'images {i}': images.numpy()} | {f'{name} {i}': value.numpy() for name, value in found.items()}
    np.savez(tmp_path/'cases.npz', **cases)
    code = WITHOUT.format(module=module, cases=str(tmp_path/'cases.npz'), names=names,
                          load=LOAD[format].format(path=str(exported.path)))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['False', str(format == 'torch-export'), 'False']


def into_timm(student, path, size):
    "As `timm.create_model` makes it of the file, strictly."
    return timm.create_model(student.backbone.architecture, checkpoint_path=path,
                             **timm_arguments(student.backbone, size)).eval()


@pytest.mark.parametrize('name, options', [
    ('vit_tiny_patch16_224', {'depth': 3}),
    ('test_vit', {}), ('test_vit2', {}), ('test_vit3', {}), ('test_vit4', {}),   # registers, pools, norms
])
def test_timm_gets_a_transformer_with_all_its_class_tokens_and_positions(name, options, tmp_path):
    student = saved(tmp_path, name, **options)
    for images in batches(student):
        size = images.shape[-2:]
        path = export_student(tmp_path, 'timm', size=tuple(size)).path
        with torch.inference_mode():
            own = student.backbone(images)
            tokens = into_timm(student, path, tuple(size)).forward_features(student.backbone.normalize(images))
        assert_close(tokens[:, :2], own.summary, rtol=0, atol=1e-4)
        assert_close(tokens[:, 8:], own.spatial.flatten(1, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['resnet10t', 'convnext_atto', 'tf_mobilenetv3_small_minimal_100', 'regnetx_002',
                                  'swin_tiny_patch4_window7_224'])
def test_timm_gets_the_network_of_a_pyramid(name, tmp_path):
    student = saved(tmp_path, name)
    model = into_timm(student, export_student(tmp_path, 'timm').path, (64, 64))
    if name.startswith('swin'): model = lambda images, network=model: [x.movedim(-1, 1) for x in network(images)]
    for images in batches(student):
        with torch.inference_mode():
            images = student.backbone.normalize(images)
            for theirs, ours in zip(model(images), student.backbone.stages(images), strict=True):
                assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_timm_is_refused_what_it_does_not_know(tmp_path):
    saved(tmp_path, depth=1, stem='resnet10t')
    with pytest.raises(BadInput, match='timm has no vit_tiny_patch16_224 with a stem of resnet10t: choose another'):
        export_student(tmp_path, 'timm')
    saved(tmp_path, depth=1)
    with pytest.raises(BadInput, match='--size 60x64: both sides must be a multiple of 16'):
        export_student(tmp_path, 'timm', size=(60, 64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'student.safetensors']


default_cfgs = generate_default_cfgs({'small_eradio': {'mean': (.5,)*3, 'std': (.5,)*3}})


@register_model
def small_eradio(pretrained=False, **options):
    return build_model_with_cfg(ERadio, 'small_eradio', pretrained, width=16, depths=(1, 1, 2, 1), **options)


def test_an_e_radio_leaves_for_images_of_any_size(tmp_path):
    "Its windows are padded at some sizes, and tile the maps at 224."
    [pytest.importorskip(name) for name in FORMATS['onnx'].needs]
    student = saved(tmp_path, 'small_eradio')
    run = program_of(student).module()
    for images in (*batches(student), torch.rand(2, 3, 224, 224)):
        with torch.no_grad(): found = run(images)
        for name, own in outputs(student, images).items(): assert_close(found[name], own, rtol=1e-4, atol=1e-4)
    assert export_student(tmp_path, 'onnx').difference <= 1e-4


def test_a_network_that_timm_has_from_elsewhere_leaves_in_the_formats_that_need_no_timm(tmp_path):
    student = saved(tmp_path, 'cifar_resnet8')
    for format in ('timm', 'transformers'):
        with pytest.raises(BadInput, match='cifar_resnet8 is not part of timm but of radio_nb: choose --format onnx'):
            export_student(tmp_path, format)
    program = torch.export.load(export_student(tmp_path, 'torch-export').path).module()
    images = torch.rand(3, 3, 32, 48)
    with torch.no_grad(): found = program(images)
    for name, own in outputs(student, images).items(): assert_close(found[name], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('format', FORMATS)
def test_half_precision_halves_the_file(format, tmp_path):
    [pytest.importorskip(name) for name in FORMATS[format].needs]
    saved(tmp_path, depth=1)
    whole, half = (export_student(tmp_path, format, half, tmp_path/f'{half}{FORMATS[format].file[7:]}')
                   for half in (False, True))
    assert half.megabytes < .6*whole.megabytes
    assert whole.difference <= 1e-4 < half.difference < 1e-2


BEFORE = """
import sys, numpy as np, radio_nb, torch
radio_nb.__path__ = []   # all but its cure for torchvision is gone
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != '_AfterTimm']
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained({path!r}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({path!r})
cases = np.load({cases!r})
with torch.no_grad():
    for i in range(3):
        found = model(torch.from_numpy(cases[f'images {{i}}']))
        assert abs(found.last_hidden_state.numpy() - cases[f'grid {{i}}']).max() < 1e-4
        assert abs(found.pooler_output.numpy() - cases[f'summary {{i}}']).max() < 1e-4
print(*processor(Image.new('L', (99, 77)), return_tensors='pt').pixel_values.shape, model.training)
assert not [name for name in sys.modules if name.startswith('radio_nb.')]
"""


def test_transformers_loads_the_folder_where_this_library_is_not(tmp_path):
    "Its image processor resizes any picture, a grey one too, to the size that was asked for."
    pytest.importorskip('transformers')
    student, cases = saved(tmp_path, depth=2), {}
    folder = export_student(tmp_path, 'transformers', size=(64, 96)).path
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors', 'modeling_student.py',
                                                              'preprocessor_config.json']
    for i, images in enumerate(batches(student)):
        with torch.inference_mode(): summary, grid = student.backbone(images)
        cases |= {f'images {i}': student.backbone.normalize(images), f'summary {i}': summary.flatten(1),
                  f'grid {i}': grid.flatten(1, 2)}
    np.savez(tmp_path/'cases.npz', **cases)
    code = BEFORE.format(path=str(folder), cases=str(tmp_path/'cases.npz'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['1', '3', '64', '96', 'False']


@pytest.mark.parametrize('name, teachers, options', [
    ('vit_tiny_patch16_224', TEACHERS, {'depth': 2, 'stem': 'resnet10t'}),
    ('vit_tiny_patch16_224', TEACHERS, {'depth': 1, 'stem': 'tf_mobilenetv3_small_minimal_100'}),  # pads by size
    ('vit_tiny_patch16_224', TEACHERS, {'depth': 1, 'stride': 8}),
    ('test_vit2', {'sam': (0, 16)}, {}), ('test_vit3', TEACHERS, {}),
    ('resnet10t', TEACHERS, {}), ('resnet10t', {'sam': (0, 16)}, {'stride': 32}),
    ('convnext_atto', TEACHERS, {}), ('regnetx_002', TEACHERS, {}),
    ('swinv2_tiny_window8_256', TEACHERS, {}),   # tables that are in no file
])
def test_transformers_gets_the_whole_backbone(name, teachers, options, tmp_path):
    "At three sizes, which the export compares; and its weights can be trained."
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    Student(name, teachers, head_width=16, **options).eval().save_pretrained(tmp_path)
    exported = export_student(tmp_path, 'transformers')
    assert exported.difference <= 1e-4
    model = transformers.AutoModel.from_pretrained(exported.path, trust_remote_code=True)
    found = model(torch.rand(2, 3, 64, 64))
    assert (found.pooler_output is None) == (teachers != TEACHERS)
    found.last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match='images of 60 × 64 pixels: make both sides a multiple of'):
        model(torch.rand(1, 3, 60, 64))


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    pytest.importorskip('transformers')
    saved(tmp_path, depth=1)
    folder = export_student(tmp_path, 'transformers').path
    before = (folder/'config.json').stat().st_ino
    export_student(tmp_path, 'transformers')   # made again
    assert (folder/'config.json').stat().st_ino != before
    (folder/'mine.txt').write_text('mine')
    with pytest.raises(BadInput, match='student_transformers holds mine.txt, which is not of an export: choose'):
        export_student(tmp_path, 'transformers')
    assert (folder/'mine.txt').read_text() == 'mine' and not list(tmp_path.glob('*.part'))


def test_another_model_in_the_folder_is_left_alone(tmp_path):
    "Its files have the names that transformers gives them all."
    pytest.importorskip('transformers')
    saved(tmp_path, depth=1)
    other = tmp_path/'other'
    other.mkdir()
    for name in ('config.json', 'model.safetensors', 'preprocessor_config.json'): (other/name).write_text('mine')
    with pytest.raises(BadInput, match='other holds config.json, which is not of an export'):
        export_student(tmp_path, 'transformers', out=other)
    assert {path.read_text() for path in other.iterdir()} == {'mine'}


def test_a_file_that_is_there_is_left_alone(tmp_path):
    "Of all files this could be the student itself."
    saved(tmp_path, depth=1)
    before = (tmp_path/'student.safetensors').read_bytes()
    with pytest.raises(BadInput, match='student.safetensors is there already: choose another name'):
        export_student(tmp_path, 'timm', out=tmp_path/'student.safetensors')
    assert (tmp_path/'student.safetensors').read_bytes() == before


@pytest.mark.parametrize('format', FORMATS)
def test_a_student_without_summaries_leaves_in_every_format(format, tmp_path):
    [pytest.importorskip(name) for name in FORMATS[format].needs]
    torch.manual_seed(0)
    Student('test_vit', {'u': (0, 16)}, head_width=8).save_pretrained(tmp_path)
    assert export_student(tmp_path, format, size=(64, 64) if FORMATS[format].sized else None).difference <= 1e-4


def test_small_features_are_compared_by_their_own_size():
    ours = {'x': torch.full((1, 2, 2, 3), .02), 'none': torch.zeros(1, 0, 3)}
    assert difference({**ours, 'x': torch.zeros(1, 2, 2, 3)}, ours) == pytest.approx(1) and difference(ours, ours) == 0
    assert difference({**ours, 'none': torch.zeros(1, 1, 3)}, ours) == inf


def test_what_differs_from_the_student_is_not_written_and_what_was_there_stays(tmp_path, monkeypatch):
    student = saved(tmp_path, depth=1)
    before = export_student(tmp_path, 'timm').path.read_bytes()
    spoilt = export.timm_weights
    def wrong(*args):
        weights = spoilt(*args)
        return weights | {'cls_token': 2*weights['cls_token']}
    monkeypatch.setattr(export, 'timm_weights', wrong)
    with pytest.raises(BadInput, match='the export differs from the student by .*: nothing was written$'):
        export_student(tmp_path, 'timm')
    assert (tmp_path/'student.timm.safetensors').read_bytes() == before
    student.spatial_heads[0][0].weight.data *= 1e6   # too large for half precision
    student.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match='nothing was written, leave out --half'):
        export_student(tmp_path, 'torch-export', half=True)
    assert not list(tmp_path.glob('*.part*')) and not list(tmp_path.glob('*.pt2'))


@pytest.mark.parametrize('exporter, message', [
    (lambda *_: 1/0, 'vit_tiny_patch16_224 cannot be exported as torch-export .division by zero.'),
    (lambda *_: open('/nowhere/file', 'w'), 'could not be written .No such file'),
    (lambda form, path: path.write_text('no program'), 'vit_tiny_patch16_224 cannot be exported as torch-export .'),
])
def test_an_exporter_that_fails_says_so_in_one_line(exporter, message, tmp_path, monkeypatch):
    saved(tmp_path, depth=1)
    monkeypatch.setattr(export.TorchExport, 'write', exporter)
    with pytest.raises(BadInput, match=message) as refused: export_student(tmp_path, 'torch-export')
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize('kernel', [1, 3, 5])
@pytest.mark.parametrize('stride', [1, 2, 4])
def test_padding_by_size_is_fixed_where_the_stride_divides_the_sides(kernel, stride):
    conv, images = Conv2dSame(3, 4, kernel, stride, dilation=1), torch.randn(2, 3, 16, 24)
    assert_close(fixed_padding(conv)(images), conv(images))
    with pytest.raises(BadInput, match='MaxPool2dSame pads by the size of the image and cannot be exported'):
        replaced(nn.Sequential(MaxPool2dSame(3)))


def test_a_program_of_a_network_that_pads_by_size_takes_any_size():
    torch.manual_seed(0)
    student = Student('vit_tiny_patch16_224', {'sam': (0, 16)}, depth=1, stem='tf_mobilenetv3_small_minimal_100').eval()
    program = as_program(student).module()
    for images in batches(student):
        with torch.inference_mode(): theirs = program(images)
        assert_close(theirs, outputs(student, images), rtol=1e-4, atol=1e-4)


def test_what_is_asked_wrongly_is_refused_by_the_command(run, refused, tmp_path, monkeypatch):
    out, _ = run
    assert refused('export', tmp_path, '--format', 'onnx').endswith('there is no student.safetensors in it')
    assert refused('export', out, '--format', 'timm', '--size', '1x2x3').endswith('such as 160x288')
    assert refused('export', out, '--format', 'torch-export', '--size', '64').endswith('takes images of any size')
    assert refused('export', out, '--format', 'transformers', '--size', '60').endswith('must be a multiple of 16')
    assert refused('export', out, '--format', 'transformers', '--out', tmp_path/'a.onnx').endswith('ends in no dot')
    assert 'for timm ends in .safetensors' in refused('export', out, '--format', 'timm', '--out', tmp_path/'a.onnx')
    assert 'make the folder' in refused('export', out, '--format', 'timm', '--out', tmp_path/'no'/'a.safetensors')
    monkeypatch.setattr(export, 'find_spec', lambda name: None)
    assert refused('export', out, '--format', 'onnx').endswith('needs onnx and onnxscript and onnxruntime: '
                                                               'pip install "radio_nb[export]"')


@pytest.mark.parametrize('format', FORMATS)
def test_the_last_lines_of_the_command_are_a_program_that_runs(format, tmp_path, capsys, monkeypatch):
    [pytest.importorskip(name) for name in FORMATS[format].needs]
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, depth=1)
    main(['export', '.', '--format', format])
    first, program = capsys.readouterr().out.split('To use it where radio_nb is not installed:\n\n')
    assert program.startswith('# pip install ') and 'gives what the student does, but for' in first
    Image.new('L', (99, 77)).save('photo.jpg')
    found = {}
    exec(program, found)
    shape = tuple(found['grid'].shape)
    assert shape == ((1, 14, 14, 192) if format in ('onnx', 'torch-export') else (1, 196, 192))


def test_the_command_says_how_to_use_the_file_and_what_may_be_done_with_it(run, tmp_path, capsys):
    out, _ = run
    main(['export', str(out), '--format', 'timm', '--half', '--out', str(tmp_path/'a.safetensors')])
    lines = capsys.readouterr().out.splitlines()
    assert 'a.safetensors' in lines[0] and 'float16) gives what the student does, but for' in lines[0]
    code = next(line for line in lines if 'create_model' in line)
    found = {}
    exec(f'import timm\n{code}', found)
    assert found['model'].patch_embed.img_size == (64, 64) and found['model'].reg_token.shape[1] == 7
    card = (out/'README.md').read_text()
    assert '| u2netp | zoo:u2netp#64 | 64 | 64 | Apache-2.0 |' in card and 'hold_out = 4' in card
    assert 'license:' not in card and 'Not evaluated yet.' in card


@pytest.mark.parametrize('spec, licence', [
    ('zoo:u2netp#64', 'Apache-2.0'), ('timm:vit_base_patch16_224.mae', 'CC-BY-NC-4.0, not for commercial use'),
    ('timm:vit_base_patch16_224.mae@mine.pt', 'unknown'), ('timm:resnet18', 'unknown'),
    ('zoo:u2netp@random', 'none, its weights are random'), ('python:mine', 'unknown')])
def test_licences_are_those_of_the_list_of_teachers(spec, licence): assert licence_of(spec) == licence


def test_a_student_of_a_teacher_that_is_not_for_commerce_says_so(tmp_path):
    Student('test_vit', {'vit_base_patch16_224.mae': (64, 64)}, head_width=8).save_pretrained(tmp_path)
    recipe = Recipe(images='zoo:photos', teachers=('timm:vit_base_patch16_224.mae',), out=str(tmp_path))
    (tmp_path/'recipe.toml').write_text(recipe_toml(recipe))
    save_scores(tmp_path, [Score('student', 'knn top-1', .5, 9, 9, 'knn', 'a|b')])
    card = model_card(tmp_path)
    assert '**Not for commercial use**' in card and 'license_name: non-commercial' in card
    assert '| knn top-1 | 0.500 | a\\|b |' in card
    assert is_non_commercial('CC BY-NC 4.0') and not is_non_commercial('DINOv3-License')


def test_the_weights_that_a_student_began_with_have_licences_too(tmp_path):
    Student('test_vit', {'u2netp': (64, 64)}, head_width=8).save_pretrained(tmp_path)
    recipe = Recipe(images='zoo:photos', teachers=('zoo:u2netp',), out=str(tmp_path),
                    student='timm:vit_base_patch16_224.mae')
    (tmp_path/'recipe.toml').write_text(recipe_toml(recipe))
    card = model_card(tmp_path)
    assert '**Not for commercial use**' in card and '| its network | timm:vit_base_patch16_224.mae |' in card
    recipe = replace(recipe, student='test_vit', init='runs/a')
    assert beginnings(recipe) == {'an earlier student': ('runs/a', 'unknown')}


def test_the_folder_for_transformers_has_a_card_of_its_own(tmp_path):
    "Whoever uploads it takes the licences along."
    pytest.importorskip('transformers')
    saved(tmp_path, depth=1)
    for _ in range(2): main(['export', str(tmp_path), '--format', 'transformers'])   # the second time over the card
    card = (tmp_path/'student_transformers'/'README.md').read_text()
    assert 'library_name: transformers' in card and "AutoModel.from_pretrained('FOLDER', trust_remote_code" in card
    assert 'At least one licence is unknown' in card and 'radio_nb.create' not in card


def test_a_card_is_made_again_until_somebody_takes_it_over(tmp_path):
    Student('test_vit', {'mine': (0, 64)}, head_width=8).save_pretrained(tmp_path)
    card = write_card(tmp_path).read_text()
    assert 'At least one licence is unknown' in card and MARK in card
    (tmp_path/'README.md').write_text('old\n' + MARK)
    assert write_card(tmp_path).read_text() == card
    (tmp_path/'README.md').write_text(card.replace(MARK, ''))
    assert write_card(tmp_path) is None and MARK not in (tmp_path/'README.md').read_text()
