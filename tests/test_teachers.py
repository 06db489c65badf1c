"Teachers: random weights that are always the same, files that hold no weights, and a hub that is not there."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from radio_nb.models.teachers import Teacher, load_teacher
from radio_nb.targets.bad_input import BadInput

PIXELS = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def state(): return timm.create_model('test_resnet', num_classes=0).state_dict()


@pytest.mark.parametrize('spec', ['timm:test_vit@random#64', 'zoo:cifar-resnet20@random', 'open_clip:ViT-S-32@random'])
def test_an_untrained_teacher_is_the_same_one_whenever_it_is_loaded(spec):
    "Row 3: it was drawn again for the evaluation."
    before = torch.get_rng_state()
    one = load_teacher(spec, name='clip')
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(17)
    for field, own in zip(load_teacher(spec)(PIXELS), one(PIXELS)): assert torch.equal(field, own)
    other = load_teacher(spec, seed=1)
    assert (other(PIXELS).spatial - one(PIXELS).spatial).abs().max() > 1e-4


def test_two_untrained_teachers_differ():
    one, other = (load_teacher(f'zoo:cifar-resnet{depth}@random') for depth in (20, 32))
    assert not torch.equal(one.model.conv1.weight, other.model.conv1.weight)


def test_a_teacher_says_what_it_is_beside_its_weights(state, tmp_path):
    save_file(state, tmp_path/'a.safetensors')
    assert load_teacher(f'timm:test_resnet@{tmp_path/"a.safetensors"}#64').source == 'timm:test_resnet'
    assert Teacher('mine', nn.Identity(), None, 8).source == 'Identity'
    assert load_teacher(nn.Identity(), lambda x: x, source='of layer 3').source == 'of layer 3'


def test_a_size_that_a_teacher_cannot_see_is_refused_in_one_line():
    with pytest.raises(BadInput, match='cannot see 8 × 8 pixels') as refused:
        load_teacher('timm:vit_tiny_patch16_224@random#8').widths()
    assert '\n' not in str(refused.value)


def spoiled(state, how):
    "A weight file that holds no weights."
    first = next(key for key, tensor in state.items() if tensor.ndim == 4)
    if how == 'nan': return state | {first: state[first]*torch.nan}
    if how == 'zero': return {key: tensor*0 for key, tensor in state.items()}
    return {'list': [1, 2], 'tensor': torch.ones(3), 'number': state | {first: 3}}[how]


@pytest.mark.parametrize('how, message', [
    ('nan', 'has NaN in conv1'), ('zero', 'all weights in .* are zero: fetch it again'),
    ('list', 'is not a file of weights'), ('tensor', 'is not a file of weights'), ('number', 'is not a tensor but int'),
    ('', 'is empty: its download may have failed'), ('folder', 'is a folder'), ('cut', 'fetch it again')])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(state, tmp_path, how, message):
    "Row 25."
    path = tmp_path/'weights.pth'
    if how == 'folder': path.mkdir()
    elif not how: path.touch()
    else: torch.save(spoiled(state, how) if how != 'cut' else state, path)
    if how == 'cut': path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadInput, match=message) as refused: load_teacher(f'timm:test_resnet@{path}')
    assert '\n' not in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize('size', [0, 5, 2000])
def test_a_safetensors_file_that_was_cut_short(state, tmp_path, size):
    "Row 25."
    save_file(state, path := tmp_path/'weights.safetensors')
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match='is empty' if not size else 'fetch it again'):
        load_teacher(f'timm:test_resnet@{path}')


@pytest.mark.parametrize('std', ['1/0,1,1', 'a,b,c', '1,1', '', '0,0,0', '-1,1,1', 'nan,1,1', '1e999,1,1', '1,1,1,1'])
def test_metadata_that_makes_no_sense(state, tmp_path, std):
    "Row 25: the std of the input that a file states."
    save_file(state, path := tmp_path/'weights.safetensors', {'mean': '.5,.5,.5', 'std': std})
    with pytest.raises(BadInput, match=f"weights.safetensors states .* std '{std}' of its input: each must be three"):
        load_teacher(f'timm:test_resnet@{path}')


@pytest.mark.parametrize('spec', ['timm:vit_base_patch14_dinov2.lvd142m', 'open_clip:ViT-B-16/datacomp_xl_s13b_b90k'])
def test_a_hub_that_is_not_there_is_named_at_once(spec, monkeypatch):
    "Row 29: six attempts for each of three names took most of a minute, and the reason was cut within a word."
    constants, begun = huggingface_hub.constants, time.monotonic()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://no.such.host.invalid')
    message = r'could not be fetched \(http://no.such.host.invalid cannot be reached: [^)]*\w\)\. Without a'
    with pytest.raises(BadInput, match=message): load_teacher(spec)
    assert time.monotonic() - begun < 20 and constants.HF_HUB_OFFLINE is False


def test_a_hub_without_a_model_is_not_called_unreachable(monkeypatch):
    "What the hub itself answers is what the message says."
    class Session:
        def head(self, *_, **__): return None
    def refuse(*_, **__): raise OSError('404 Client Error: no such repository.\nSee the manual')
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub, 'get_session', Session)
    monkeypatch.setattr(timm, 'create_model', refuse)
    with pytest.raises(BadInput, match=r'fetched \(404 Client Error: no such repository\)'):
        load_teacher('timm:vit_base_patch14_dinov2.lvd142m')
