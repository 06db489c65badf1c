"""Every family of timm and every image tower of open_clip as a teacher, with random weights.

A few by default; all with `pytest tests/test_sweep.py --sweep`, and with `-s` it prints the table of the chapter
`feature_extraction`. `families.json` holds the smallest architecture of every module of timm; `python
tests/test_sweep.py` writes it again for another timm.
"""
import radio_nb  # noqa: F401, I001  before open_clip, so that torchvision can be imported
import json
import logging
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch.testing import assert_close

from radio_nb.models.feature_extraction import clip_features
from radio_nb.models.teachers import Teacher, load_teacher, set_tower_size
from radio_nb.targets.bad_input import BadInput

FILE = Path(__file__).with_name('families.json')
FAMILIES = json.loads(FILE.read_text())
# modules of timm whose networks have no grid of their own, only those of layers, and what the message says
CANNOT = {'coat': 'CoaT ends in 3 tensors, not in one grid', 'crossvit': 'CrossVit ends in 2 tensors, not in one grid',
          'efficientvim': 'EfficientViM ends in 4 tensors, not in one grid',
          'pit': 'PoolingVisionTransformer gives 0 tokens for 224 × 224 pixels and does not say'}
GRIDS = {'mobilenetv5_base': (16, 16)}   # whatever the image is
FEW = ['efficientnet', 'eva', 'levit', 'resnet', 'swin_transformer', 'xcit', 'cait', 'hiera']


def architectures_by_module():
    "Those of timm itself; `zoo` adds some."
    found = {}
    for name in timm.list_models():
        if not timm.model_entrypoint(name).__module__.startswith('timm.'): continue
        found.setdefault(timm.models._registry._model_to_module[name], []).append(name)
    return found


def write_families():
    "Find the smallest architecture of every module, by its parameters. Takes minutes."
    def parameters(name):
        with torch.device('meta'): return sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
    smallest = {module: min(names, key=parameters) for module, names in sorted(architectures_by_module().items())}
    FILE.write_text(json.dumps(smallest, indent=1) + '\n')


def check_features(teacher, size, widths, patch):
    "The teacher's features of an image: finite numbers, of the declared widths, on the right grid."
    images = torch.rand(1, 3, *size)
    summary, spatial = teacher(images, size)
    got = summary.shape[1], spatial.shape[3], *spatial.shape[1:3]
    wanted = patch if isinstance(patch, tuple) else tuple(side/patch for side in size)   # unpadded: 1.7 less
    assert got[:2] == widths and all(abs(n - m) < 2 for n, m in zip(got[2:], wanted)), (got, widths, wanted)
    assert summary.isfinite().all() and spatial.isfinite().all()
    return images, summary, spatial


def second_size(load, side):
    "A teacher and another size that it sees: not a square where it can, else a square it is built for, else none."
    teacher = load('')
    for size in ((side, 2*side), (side, 3*side//2), (side//2, side)):
        try: teacher.widths(size)
        except BadInput as e: assert len(str(e).splitlines()) == 1
        else: return teacher, size
    for other in (side//2, 2*side, 3*side//2):
        try:
            teacher = load(f'#{other}')
            teacher.widths()
        except BadInput as e: assert len(str(e).splitlines()) == 1
        else: return teacher, (other, other)
    return None, ()


def check_against_timm(architecture, teacher, images, summary, spatial):
    "The teacher's features are `forward_head` and `forward_features` of the network as timm itself builds it."
    plain = timm.create_model(architecture, num_classes=0).eval().to(memory_format=torch.channels_last)
    plain.load_state_dict(teacher.model.state_dict())
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        final = plain.forward_features((images - teacher.mean)/teacher.std)
        assert_close(summary, plain.forward_head(final, pre_logits=True), rtol=1e-3, atol=1e-4)
    if final.ndim == 3: final, spatial = final[:, -spatial[..., 0].numel():], spatial.flatten(1, 2)
    elif getattr(plain, 'output_fmt', 'NCHW') == 'NCHW': final = final.movedim(1, -1)
    assert_close(spatial, final, rtol=1e-3, atol=1e-4)


def sweep_timm(architecture):
    "Make a teacher of an architecture; returns a line of the table."
    def load(size): return load_teacher(f'timm:{architecture}@random{size}')
    teacher = load('')
    model, side = teacher.model, teacher.size
    patch = GRIDS.get(architecture, model.feature_info[-1]['reduction'])
    widths = (model.head_hidden_size, model.num_features)
    images, summary, spatial = check_features(teacher, (side, side), widths, patch)
    check_against_timm(architecture, teacher, images, summary, spatial)
    other, size = second_size(load, side)
    second = 'none'
    if other is not None:
        *_, wide = check_features(other, size, widths, patch)
        second = f'{"x".join(map(str, size))} {"x".join(map(str, wide.shape[1:3]))}'
    try:
        inner = load_teacher(f'timm:{architecture}/-2@random')(images)
        assert_close(inner.summary, summary, rtol=1e-3, atol=1e-4)
        layer = 'x'.join(map(str, inner.spatial.shape[1:]))
    except BadInput as e:
        assert len(str(e).splitlines()) == 1
        layer = '-'
    first = 'x'.join(map(str, spatial.shape[1:3]))
    return f'{architecture:36}{widths[0]:6}{widths[1]:6}{side:5} {first:8}{second:16}{layer}'


@pytest.mark.parametrize('module', FAMILIES)
def test_every_family_of_timm_is_a_teacher(module, request):
    if module not in FEW and not request.config.getoption('sweep'): pytest.skip('--sweep takes all families')
    if module in CANNOT:
        with pytest.raises(BadInput, match=CANNOT[module]) as refusal:
            load_teacher(f'timm:{FAMILIES[module]}@random').widths()
        assert len(str(refusal.value).splitlines()) == 1
        assert load_teacher(f'timm:{FAMILIES[module]}/-1@random').widths()
    else: print(sweep_timm(FAMILIES[module]))


def test_the_list_of_families_is_that_of_timm():
    "A timm with new modules needs a new list, see above; one that has lost some fails in the sweep."
    assert set(architectures_by_module()) == set(FAMILIES)


def towers():
    "An architecture for every image tower of open_clip, in the words of its configuration."
    found = {}
    for name in open_clip.list_models():
        found.setdefault(json.dumps(open_clip.get_model_config(name)['vision_cfg'], sort_keys=True), name)
    return sorted(found.values())


def sweep_tower(architecture):
    "Shapes of an image tower at two sizes, without memory for its weights; returns a line of the table."
    cfg = open_clip.get_model_config(architecture)
    side, embedding = cfg['vision_cfg']['image_size'], cfg['embed_dim']
    build = open_clip.model._build_vision_tower   # without the text tower, which may need a hub
    def teacher(size):
        with torch.device('meta'):
            tower = build(embedding, {**cfg['vision_cfg'], 'image_size': size}, cfg.get('quick_gelu', False))
            if size != side: set_tower_size(tower, size, architecture)
            made = Teacher(architecture, tower, clip_features(tower), size)
        return made.to('meta')
    grids = []
    for size in (side, side + 64):
        made = teacher(size)
        summary, spatial = made(torch.empty(1, 3, size, size, device='meta'))
        assert summary.shape == (1, embedding)
        grids.append(tuple(spatial.shape[1:]))
    patch = cfg['vision_cfg'].get('patch_size') or round(side/grids[0][0])
    assert all(grid[0] == grid[1] and abs(grid[0] - size/patch) < 1 for grid, size in zip(grids, (side, side + 64)))
    first, second = ('x'.join(map(str, grid[:2])) for grid in grids)
    return f'{architecture:28}{embedding:6}{grids[0][2]:6}{side:5}{first:>8}{side + 64:5}{second:>8}'


@pytest.mark.parametrize('architecture', towers())
def test_every_image_tower_of_open_clip_is_a_teacher(architecture, request):
    few = ('RN50', 'ViT-B-32', 'coca_ViT-B-32', 'ViT-B-16-SigLIP', 'convnext_tiny', 'ViTamin-S', 'PE-Core-T-16-384')
    if architecture not in few and not request.config.getoption('sweep'): pytest.skip('--sweep takes all towers')
    print(sweep_tower(architecture))


if __name__ == '__main__':
    logging.disable(logging.WARNING)
    write_families()
