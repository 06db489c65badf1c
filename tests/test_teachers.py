"Teachers: random weights that are always the same, files that hold no weights, and a hub that is not there."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from radio_nb.models.teachers import Teacher, load_teacher, own_seed
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


def test_both_towers_of_open_clip_give_what_open_clip_gives():
    "Embeddings of images and of texts, within 1e-5."
    import open_clip

    from radio_nb.evaluation.zero_shot import TextTower
    spec = 'open_clip:ViT-S-32-alt@random'
    teacher, texts = load_teacher(spec), TextTower(spec)
    with own_seed('0 open_clip:ViT-S-32-alt'): whole = open_clip.create_model('ViT-S-32-alt').eval()
    images, tokens = torch.rand(2, 3, 224, 224), open_clip.get_tokenizer('ViT-S-32-alt')(['a cat', 'two dogs'])
    with torch.inference_mode():
        own = whole.encode_image((images - teacher.mean)/teacher.std), whole.encode_text(tokens)
    assert_close(teacher(images).summary, own[0], rtol=0, atol=1e-5)
    assert_close(texts(tokens), own[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('spec, layers', [('timm:test_vit@random#64', '/-2'), ('timm:test_resnet@random', '/layer2,-1'),
                                          ('open_clip:ViT-S-32-alt@random', '/-1,0')])
def test_inner_layers_change_the_grid_and_the_key_of_a_cache_alone(spec, layers):
    name, rest = spec.split('@')
    whole, inner = load_teacher(spec), load_teacher(f'{name}{layers}@{rest}')
    f, g = whole(PIXELS), inner(PIXELS)
    assert torch.equal(f.summary, g.summary) and inner.source == name + layers and whole.source == name
    assert not torch.equal(f.spatial[..., :8], g.spatial[..., :8]) or f.spatial.shape != g.spatial.shape
    with pytest.raises(BadInput, match='has no layer 99'): load_teacher(f'{name}/99@{rest}').widths()


def test_inner_layers_are_those_of_timm_in_the_order_of_the_spec():
    teacher = load_teacher('timm:vit_tiny_patch16_224/blocks.8,2@random')
    normalized = (torch.rand(1, 3, 224, 224) - teacher.mean)/teacher.std
    with torch.inference_mode():
        two, eight = teacher.model.forward_intermediates(normalized, indices=[2, 8], norm=True, intermediates_only=True)
        assert torch.equal(teacher.features(normalized).spatial, torch.cat([eight, two], 1).movedim(1, -1))


def test_networks_without_inner_layers_say_so():
    for spec in ('zoo:u2netp/-2', 'zoo:cifar-resnet20/-2@random'):
        with pytest.raises(BadInput, match='does not give its inner layers'): load_teacher(spec)


def test_wide_images_have_wide_grids():
    "A count of 32 positions says neither 4 × 8 nor 8 × 4."
    teacher = load_teacher('timm:vit_tiny_patch16_224@random')
    images = torch.rand(1, 3, 64, 128)
    grid = teacher(images, (64, 128)).spatial
    assert grid.shape[1:3] == (4, 8)
    assert teacher(images, (128, 64)).spatial.shape[1:3] == (8, 4)
    assert teacher(images).spatial.shape[1:3] == (14, 14)


def transformers_models():
    "A small model of each family: its configuration and the name of its image processor."
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16)
    sam = dict(output_channels=24, window_size=2, global_attn_indexes=[1], mlp_dim=64)
    return {'CLIPVisionConfig': small, 'SiglipVisionConfig': small, 'Dinov2Config': small,
            'DINOv3ViTConfig': dict(small, num_register_tokens=4), 'SamVisionConfig': small | sam, 'ViTConfig': small}


@pytest.fixture
def hf_folder(tmp_path):
    "From a configuration to a model of transformers and the folder in which it is."
    transformers = pytest.importorskip('transformers')
    def write(config, **options):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(getattr(transformers, config)(**options)).eval()
        model.save_pretrained(tmp_path)
        transformers.ViTImageProcessor(image_mean=[.4, .5, .6], image_std=[.2, .3, .4]).save_pretrained(tmp_path)
        return model, tmp_path
    return write


@pytest.mark.parametrize('config', transformers_models())
def test_teachers_of_transformers_give_what_their_models_give(config, hf_folder):
    model, folder = hf_folder(config, **transformers_models()[config])
    teacher, inner = (load_teacher(f'hf:mine{layer}@{folder}') for layer in ('', '/0'))
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([.4, .5, .6])[:, None, None], torch.tensor([.2, .3, .4])[:, None, None]
    with torch.inference_mode(): own = model((images - mean)/std, output_hidden_states=True)
    last, state = own.last_hidden_state, own.hidden_states[1]
    if config == 'SamVisionConfig': pooled, last, state = last.mean((2, 3)), last.movedim(1, -1), state
    else: pooled, last, state = own.pooler_output, *(s[:, -16:].unflatten(1, (4, 4)) for s in (last, state))
    summary, spatial = teacher(images)
    assert_close((summary, spatial), (pooled, last), rtol=1e-5, atol=1e-5)
    assert_close(inner(images).spatial, state, rtol=1e-5, atol=1e-5)
    assert inner.source == 'hf:mine/0' and teacher.widths() == (summary.shape[1], last.shape[-1])


def test_a_clip_of_transformers_gives_its_embedding(hf_folder):
    part = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model, folder = hf_folder('CLIPConfig', projection_dim=24, vision_config=dict(part, image_size=64, patch_size=16),
                              text_config=dict(part, vocab_size=99, bos_token_id=0, eos_token_id=1))
    teacher, images = load_teacher(f'hf:clip@{folder}'), torch.rand(1, 3, 64, 128)
    with torch.inference_mode():
        own = model.get_image_features((images - teacher.mean)/teacher.std, interpolate_pos_encoding=True)
    assert_close(teacher(images, (64, 128)).summary, own.pooler_output)
    assert teacher(images, (64, 128)).spatial.shape == (1, 4, 8, 32) and teacher.summary_kind == 'CLIP embedding'


def test_a_pooling_layer_that_was_never_trained_is_not_used(hf_folder):
    model, folder = hf_folder('ViTConfig', **transformers_models()['ViTConfig'])
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith('pooler')}
    save_file(state, folder/'model.safetensors', {'format': 'pt'})
    teacher, images = load_teacher(f'hf:vit@{folder}'), torch.rand(1, 3, 64, 64)
    with torch.inference_mode(): own = model((images - teacher.mean)/teacher.std).last_hidden_state
    assert_close(teacher(images).summary, own[:, 0])
    assert teacher.summary_kind == 'class token'
    save_file(dict(list(state.items())[3:]), folder/'model.safetensors', {'format': 'pt'})
    with pytest.raises(BadInput, match='lacks 3 weights of ViTModel'): load_teacher(f'hf:vit@{folder}')


@pytest.mark.parametrize('spec, message', [
    ('hf:bert@random', 'sees no images'), ('hf:samm@random', 'Without a network give a local file: hf:samm@PATH'),
    ('hf:org/none', 'weights could not be fetched'), ('hf:a@/nowhere', 'is not a folder with a config.json')])
def test_models_of_transformers_that_cannot_be_had(spec, message):
    pytest.importorskip('transformers')
    with pytest.raises(BadInput, match=message) as refused: load_teacher(spec)
    assert '\n' not in str(refused.value)


def test_a_folder_of_transformers_that_is_damaged(hf_folder):
    _, folder = hf_folder('ViTConfig', **transformers_models()['ViTConfig'])
    (folder/'preprocessor_config.json').unlink()
    with pytest.raises(BadInput, match='does not say how its images are normalized'): load_teacher(f'hf:vit@{folder}')
    (folder/'model.safetensors').write_bytes(b'no weights')
    with pytest.raises(BadInput, match='cannot be loaded') as refused: load_teacher(f'hf:vit@{folder}')
    assert '\n' not in str(refused.value)
