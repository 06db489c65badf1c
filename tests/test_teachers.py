"Teachers: random weights that are always the same, files that hold no weights, and a hub that is not there."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import vision_transformer
from torch import nn
from torch.testing import assert_close

from radio_nb.models.backbones import find_network
from radio_nb.models.feature_extraction import hf_grid
from radio_nb.models.specs import parse_spec
from radio_nb.models.teachers import Teacher, _clip_normalization, _resizing, classifier_of, load_teacher, own_seed
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features

PIXELS = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def state(): return timm.create_model('test_resnet', num_classes=0).state_dict()


@pytest.mark.parametrize('spec', ['timm:test_vit@random#64', 'timm:cifar_resnet20@random', 'open_clip:ViT-S-32@random'])
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
    one, other = (load_teacher(f'timm:cifar_resnet{depth}@random') for depth in (20, 32))
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
    with pytest.raises(BadInput, match='U2NetP does not give its inner layers'): load_teacher('zoo:u2netp/-2')


def test_a_layer_that_is_named_twice_in_two_ways_is_refused():
    "Its channels counted twice."
    for name, last in (('timm:test_vit', 5), ('open_clip:ViT-S-32-alt', 11)):
        with pytest.raises(BadInput, match=f'-1,{last} names a layer twice'):
            load_teacher(f'{name}/-1,{last}@random#64').widths()


def test_half_precision_inside_is_single_precision_outside():
    "It was refused by the first convolution; half precision images were, too."
    teacher, wide = load_teacher('timm:test_vit@random#64'), torch.rand(2, 3, 96, 96)
    expected = teacher(wide)
    assert_close(teacher(wide.half()), expected, rtol=0, atol=.02)
    for dtype in (torch.bfloat16, torch.float16):
        for own, other in zip(load_teacher('timm:test_vit@random#64').to(dtype)(wide), expected):
            assert own.dtype == torch.float32 and (own - other).abs().max() < .1


def test_images_of_bytes_are_refused():
    "They were taken for numbers between 0 and 1."
    with pytest.raises(BadInput, match='divide torch.uint8 by 255'):
        load_teacher('timm:test_vit@random#64')((255*PIXELS).byte())


@pytest.mark.parametrize('features', [lambda x: (x.mean((2, 3)), x[:, 0]), lambda x: (x.mean((1, 2, 3)), x),
                                      lambda x: (x.mean(2)[0], x)])
def test_a_function_that_gives_no_summary_and_grid_is_named(features):
    teacher = load_teacher(nn.Identity(), lambda x: Features(*features(x)), 8, 'mine')
    with pytest.raises(BadInput, match='teacher mine gives a summary .* for one image, not'): teacher.widths()


@pytest.mark.parametrize('spec', ['timm:nonsense@FILE', 'timm:test_resnet.nonsense@FILE',
                                  'timm:test_resnet.nonsense@random', 'timm:test_resnet.nonsense'])
def test_unknown_names_and_tags_of_timm_are_one_line(state, tmp_path, spec):
    "They ended in a traceback."
    save_file(state, tmp_path/'a.safetensors')
    with pytest.raises(BadInput, match='unknown timm model'):
        load_teacher(spec.replace('FILE', f'{tmp_path}/a.safetensors'))


def test_a_name_from_before_timm_renamed_it_takes_a_size():
    assert load_teacher('timm:vit_tiny_patch16_224_in21k@random#64').widths() == (192, 192)


@pytest.mark.parametrize('name, stated, mean', [
    ('ViT-B-16-SigLIP', {}, .5), ('ViT-B-32', {}, .48145466), ('MobileCLIP-S1', {}, 0.),
    ('ViT-S-32-alt', {}, .48145466), ('ViT-L-14/laion2b_s32b_b82k', {}, .5), ('ViT-L-14/openai', {}, .48145466),
    ('ViT-B-16-SigLIP', {'mean': '.25,.5,.5', 'std': '1,1,1'}, .25)])
def test_weights_of_a_clip_from_a_file_know_their_normalization(state, tmp_path, name, stated, mean):
    "A SigLIP from a file saw images normalized as for the first CLIP."
    import open_clip
    save_file(state, path := tmp_path/'clip.safetensors', stated)
    own = {'mean': open_clip.OPENAI_DATASET_MEAN, 'std': open_clip.OPENAI_DATASET_STD}
    assert _clip_normalization(parse_spec(f'open_clip:{name}@{path}'), own)[0][0] == mean


def test_weights_of_a_clip_whose_normalization_depends_on_its_tag():
    import open_clip
    own = {'mean': open_clip.OPENAI_DATASET_MEAN, 'std': open_clip.OPENAI_DATASET_STD}
    with pytest.raises(BadInput, match='say which ones the file holds, open_clip:ViT-L-14/TAG@my.pt; tags: openai'):
        _clip_normalization(parse_spec('open_clip:ViT-L-14@my.pt'), own)
    with pytest.raises(BadInput, match="unknown tag of ViT-L-14 'opnai': did you mean openai"):
        load_teacher('open_clip:ViT-L-14/opnai@my.pt')


def test_weights_of_timm_whose_normalization_depends_on_its_tag(tmp_path):
    "Those of DINO and those of AugReg have the same names, and were trained on other numbers."
    weights = timm.create_model('vit_small_patch16_224', num_classes=0).state_dict()
    save_file(weights, path := tmp_path/'vit.safetensors')
    with pytest.raises(BadInput, match='which ones the file holds, timm:vit_small_patch16_224.TAG@.*; tags: .*dino'):
        load_teacher(f'timm:vit_small_patch16_224@{path}')
    assert abs(load_teacher(f'timm:vit_small_patch16_224.dino@{path}').mean[0] - .485).max() < 1e-6
    save_file(weights, path, {'mean': '.1,.2,.3', 'std': '1,1,1'})
    assert abs(load_teacher(f'timm:vit_small_patch16_224@{path}').mean[0] - .1).max() < 1e-6
    assert find_network(f'timm:vit_small_patch16_224@{path}').mean == (.1, .2, .3)


@pytest.mark.parametrize('name, activation', [
    ('ViT-B-32/openai', 'QuickGELU'), ('ViT-B-32/laion2b_s34b_b79k', 'GELU'), ('ViT-B-32', 'GELU'),
    ('ViT-B-32-quickgelu/openai', 'QuickGELU')])
def test_a_clip_has_the_activation_that_its_weights_were_trained_with(name, activation):
    clip = load_teacher(f'open_clip:{name}@random#32').model
    assert {type(block.mlp.gelu).__name__ for block in clip.transformer.resblocks} == {activation}


def test_weights_of_a_clip_whose_activation_depends_on_its_tag():
    with pytest.raises(BadInput, match='differ in their activation, GELU or QuickGELU: say which ones the file holds'):
        load_teacher('open_clip:ViT-B-32@my.pt')


def test_a_clip_from_a_file_sees_another_size_as_open_clip_has_it(tmp_path):
    import open_clip
    with own_seed('clip'): made = open_clip.create_model('ViT-S-32-alt')
    save_file(made.state_dict(), path := tmp_path/'clip.safetensors', {'mean': '.5,.5,.5', 'std': '.5,.5,.5'})
    expected = open_clip.create_model('ViT-S-32-alt', pretrained=str(path), force_image_size=160).visual
    found = load_teacher(f'open_clip:ViT-S-32-alt@{path}#160').model
    assert_close(found.positional_embedding, expected.positional_embedding)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in made.state_dict().items()}
    save_file(half, path, {'mean': '.5,.5,.5', 'std': '.5,.5,.5'})
    found = load_teacher(f'open_clip:ViT-S-32-alt@{path}#160').model
    assert_close(found.positional_embedding, expected.positional_embedding, rtol=2e-3, atol=2e-3)
    save_file(made.state_dict() | {'visual.positional_embedding': torch.zeros(52, 384)}, path)
    with pytest.raises(BadInput, match=r'do not fit CLIP: 1 of another shape: visual.positional_embedding \(52, 384\)'):
        load_teacher(f'open_clip:ViT-S-32-alt@{path}#160')


def test_maps_of_several_sizes_are_joined_in_bfloat16_too():
    "A CPU does not resample bfloat16."
    teacher, images = load_teacher('timm:test_resnet/2,3@random'), torch.rand(2, 3, 64, 64)
    whole, half = teacher(images).spatial, teacher.lowered()(images).spatial
    assert whole.shape == half.shape and (whole - half.float()).norm() < .03*whole.norm()


def test_a_teacher_may_have_weights_of_five_dimensions():
    network = torch.nn.Conv3d(3, 4, (1, 16, 16), stride=(1, 16, 16))
    def features(x):
        grid = network(x[:, :, None])[:, :, 0]
        return Features(grid.mean((2, 3)), grid.movedim(1, -1))
    assert Teacher('video', network, features, 32)(torch.rand(2, 3, 32, 32)).spatial.shape == (2, 2, 2, 4)


def test_weights_that_timm_stumbles_over_are_refused(tmp_path):
    save_file({'layers.2.blocks.6.attn.relative_position_index': torch.zeros(1)}, path := tmp_path/'swin.safetensors')
    with pytest.raises(BadInput, match='do not fit SwinTransformer'):
        load_teacher(f'timm:swin_tiny_patch4_window7_224.ms_in1k@{path}')


def test_a_model_that_hides_most_of_an_image_is_refused(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTMAEConfig(image_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=16)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={'height': 64, 'width': 64}).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match='hides three quarters of every image at random'): load_teacher(f'hf:{tmp_path}')


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


@pytest.mark.parametrize('shape, size, patch, grid', [
    ((64, 5), (240, 240), 4, (8, 8)), ((72, 5), (240, 272), 4, (8, 9)),   # Swin pads odd rows: 15, then 8
    ((16, 5), (224, 224), 16, (4, 4)),                                     # LeViT, too: 7, then 4
    ((57, 5), (240, 272), None, (7, 8)), ((50, 5), (224, 224), None, (7, 7)),   # a ConvNeXt with a token, cut off
    ((265, 5), (224, 224), 14, (16, 16)), ((28, 5), (64, 112), 16, (4, 7)),
    ((7, 7, 768), (224, 224), None, (7, 7)), ((7, 14, 768), (224, 448), None, (7, 14)),   # SAM 2
    ((768, 7, 14), (224, 448), None, (7, 14)), ((768, 15, 17), (240, 272), 4, (15, 17)),
    ((8, 9, 24), (240, 272), 4, (8, 9))])
def test_states_of_transformers_have_the_grid_of_the_network(shape, size, patch, grid):
    "Those of Swin, LeViT, Hiera and SAM 2 had another, and nobody was told."
    states = torch.rand(2, *shape)
    found = hf_grid(states, size, patch)
    assert found.shape == (2, *grid, {768, 24} & {*shape} and max(shape) or 5)
    if len(shape) == 2: assert torch.equal(found.flatten(1, 2), states[:, shape[0] - grid[0]*grid[1]:])


@pytest.mark.parametrize('n, size, patch', [(8, (224, 224), 16), (300, (224, 224), None), (63, (240, 240), 4)])
def test_tokens_that_are_no_grid_are_refused(n, size, patch):
    "Groups of GroupViT, queries of a detector."
    with pytest.raises(BadInput, match=f'{n} tokens for .* pixels form no grid'):
        hf_grid(torch.rand(1, n, 5), size, patch)


@pytest.mark.parametrize('config, options, grid', [
    ('HieraConfig', dict(embed_dim=16, depths=[1, 1, 1, 1]), (2, 2)),
    ('Sam2HieraDetConfig', dict(image_size=[64]*2, hidden_size=16, embed_dim_per_stage=[16, 32, 48, 64]), (2, 2))])
def test_pyramids_of_transformers(hf_folder, config, options, grid):
    model, folder = hf_folder(config, **({'image_size': [64]*2} | options))
    teacher, images = load_teacher(f'hf:mine@{folder}'), torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([.4, .5, .6])[:, None, None], torch.tensor([.2, .3, .4])[:, None, None]
    with torch.inference_mode(): own = model((images - mean)/std).last_hidden_state
    assert_close(teacher(images).spatial, own.reshape(1, *grid, -1))


def test_a_processor_that_does_more_than_normalize(hf_folder):
    "What it makes of a pixel is what the teacher makes of it, or it is refused."
    import numpy as np
    import transformers
    _, folder = hf_folder('ViTConfig', **transformers_models()['ViTConfig'])
    white = np.full((3, 64, 64), 255, dtype='uint8')
    for options in ({'rescale_factor': 1/127.5}, {'do_rescale': False, 'do_normalize': False}, {'do_normalize': False}):
        processor = transformers.ViTImageProcessor(image_mean=[.4, .5, .6], image_std=[.2, .3, .4], do_resize=False,
                                                   **options)
        processor.save_pretrained(folder)
        teacher = load_teacher(f'hf:vit@{folder}')
        own = processor(white, return_tensors='pt', input_data_format='channels_first')['pixel_values'][0].float()
        assert_close(((1 - teacher.mean)/teacher.std).expand(3, 64, 64), own)
    transformers.MobileViTImageProcessor().save_pretrained(folder)
    with pytest.raises(BadInput, match='in a way of its own .do_flip_channel_order.'): load_teacher(f'hf:vit@{folder}')


@pytest.mark.parametrize('spec, message', [
    ('hf:siglip2_vision_model@random', 'cannot see 224 × 224 pixels .*missing 2 required'),
    ('hf:groupvit@random', '8 tokens .* form no grid')])
def test_models_of_transformers_that_want_more_than_images_say_so(spec, message):
    "The first ended in a traceback."
    pytest.importorskip('transformers')
    with pytest.raises(BadInput, match=message) as refused: load_teacher(spec).widths()
    assert '\n' not in str(refused.value)


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


def test_weights_of_timm_that_want_quickgelu_are_refused_under_the_other_name(state, tmp_path):
    save_file(state, tmp_path/'file.safetensors')
    for weights in ('', f'@{tmp_path}/file.safetensors'):
        with pytest.raises(BadInput, match='name it vit_huge_patch14_clip_quickgelu_378.dfn5b'):
            load_teacher(f'timm:vit_huge_patch14_clip_378.dfn5b{weights}')


def test_positions_of_a_flexivit_from_a_file_are_resized_as_timm_does(tmp_path):
    model = timm.create_model('flexivit_small', num_classes=0)
    save_file(model.state_dict(), tmp_path/'flexi.safetensors')
    own = load_teacher(f'timm:flexivit_small@{tmp_path}/flexi.safetensors#144').model.pos_embed
    side = round(model.pos_embed.shape[1]**.5)
    grid = model.pos_embed.detach().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    want = F.interpolate(grid, (9, 9), mode='bilinear', antialias=False).permute(0, 2, 3, 1)
    assert_close(own, want.reshape(own.shape))


def test_a_network_of_features_is_frozen_and_in_evaluation_mode():
    wrapper = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    Teacher('a', nn.Identity(), wrapper, 32)
    assert not any(part.training for part in wrapper.modules())
    assert not any(parameter.requires_grad for parameter in wrapper.parameters())


def test_what_no_file_of_a_trunk_holds_is_made(tmp_path):
    trunk = timm.create_model('efficientvit_m0', features_only=True)
    save_file(trunk.state_dict(), tmp_path/'trunk.safetensors')
    spec = f'timm:efficientvit_m0@{tmp_path}/trunk.safetensors#224'
    own, images = load_teacher(spec), torch.rand(1, 3, 224, 224)
    with torch.no_grad(): want = trunk.eval()((images - own.mean)/own.std)[-1].movedim(1, -1)
    assert_close(own(images).spatial, want)


def test_half_of_the_logits_is_no_classifier():
    with pytest.raises(BadInput, match='names no classes by a linear layer'):
        classifier_of('timm:volo_d1_224@random')


def test_positions_of_c_radio_are_aligned_where_timm_aligns_them():
    aligned = vision_transformer._RADIO_ALIGN_CORNERS
    for name, corners in ((name, name in aligned) for name in (*aligned, 'huge_patch16_radio_v4')):
        model = SimpleNamespace(pretrained_cfg={'architecture': f'vit_{name}'})
        assert _resizing(model) == {'interpolation': 'bilinear', 'antialias': False, 'align_corners': corners}
