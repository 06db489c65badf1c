"Teacher specs: what can be said about them before anything is loaded."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_nb.models.specs import TEACHERS, Spec, architectures, check_spec, is_random, parse_spec
from radio_nb.targets.bad_input import BadInput, nearest, reason, unknown


@given(st.text(max_size=40))
def test_any_text_is_a_spec_or_refused_in_one_line(text):
    try: parse_spec(text)
    except BadInput as e: assert len(str(e).splitlines()) == 1


@pytest.mark.parametrize('text, spec', [
    ('timm:a@b#c.pth#64', Spec('timm', 'a', 'b#c.pth', 64)),
    ('timm:a#²', Spec('timm', 'a#²')),   # '²' is a digit, but not a number
    ('open_clip:A/b@c@d:e', Spec('open_clip', 'A/b', 'c@d:e'))])
def test_a_spec_is_taken_apart(text, spec): assert parse_spec(text) == spec


def test_a_variable_of_the_shell_that_was_empty_does_not_become_the_weights_of_the_hub():
    with pytest.raises(BadInput, match="'timm:resnet18@#64' names no weights behind @"): parse_spec('timm:resnet18@#64')


def test_untrained_teachers_are_known_as_such():
    assert is_random('timm:cifar_resnet20@random#32')
    assert not is_random('timm:random') and not is_random('python:random')


@pytest.mark.parametrize('name, meant', [
    ('vit_tinyy', 'vit_tiny_patch16_224'), ('vit_tiny', 'vit_tiny_patch16_224'), ('resnet19', 'resnet18'),
    ('dinov2_vitb', 'vit_base_patch14_dinov2'), ('convnext-atto', 'convnext_atto'),
    ('VIT_TINY_PATCH16', 'vit_tiny_patch16_224'),
    ('siglip', 'vit_base_patch16_siglip_224')])
def test_a_misspelled_name_suggests_what_was_meant(name, meant):
    "Row 29: among the first three where the beginning is right, at least of the same kind where it is not."
    near = nearest(name, list(architectures('timm')))
    assert len(near) == 3
    if name.startswith(('dinov2', 'siglip')): assert all('vit' in one or name in one for one in near)
    else: assert meant in near


def test_no_message_lists_a_thousand_names():
    message = str(unknown('timm model', '§§§', list(architectures('timm'))))
    assert len(message) < 600 and message.endswith('in all)')
    assert str(unknown('kind', '', ['a', 'b'])) == "unknown kind '': known: a, b"


def test_a_reason_is_one_line_that_ends_between_words():
    long = 'The server answered with a page. ' + 'word '*100
    assert len(reason(OSError(long))) <= 240 and reason(OSError(long)).endswith('word …')
    assert reason(RuntimeError('  \n ')) == 'RuntimeError'


def test_weight_files_that_are_none(tmp_path):
    "Row 25."
    (tmp_path/'empty.safetensors').touch()
    messages = {'empty.safetensors': 'is empty: its download may have failed', '.': 'is a folder: name the weight',
                'gone.pth': 'no such weight file'}
    for path, message in messages.items():
        with pytest.raises(BadInput, match=message): check_spec(f'timm:resnet18@{tmp_path/path}')


@pytest.mark.parametrize('text, spec', [
    ('timm:a/blocks.8,-1@b/c.pth#64', Spec('timm', 'a', 'b/c.pth', 64, ('blocks.8', -1))),
    ('zoo:a/-2', Spec('zoo', 'a', layers=(-2,))),
    ('open_clip:A/tag', Spec('open_clip', 'A/tag')),
    ('open_clip:A/tag/-1,3', Spec('open_clip', 'A/tag', layers=(-1, 3))),
    ('hf:org/dino-2.5', Spec('hf', 'org/dino-2.5')),
    ('hf:org/dino/-2@folder/x', Spec('hf', 'org/dino', 'folder/x', layers=(-2,)))])
def test_layers_stand_behind_the_name(text, spec):
    assert parse_spec(text) == spec
    assert spec.output() == text.partition('@')[0]


@pytest.mark.parametrize('text, message', [
    ('timm:resnet18/', 'timm:resnet18/ names no layer behind /: give numbers or names, as in timm:resnet18/-2'),
    ('timm:/-2', 'names no layer behind /'), ('zoo:u2netp/1,', 'names no layer'),
    ('timm:a/1,1', 'names a layer twice')])
def test_layers_that_are_none(text, message):
    with pytest.raises(BadInput, match=message): parse_spec(text)


def test_a_folder_for_transformers(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    with pytest.raises(BadInput, match='is not a folder with a config.json'): check_spec(f'hf:dinov2@{tmp_path}')
    (tmp_path/'config.json').touch()
    assert check_spec(f'hf:dinov2@{tmp_path}').weights == str(tmp_path)
    monkeypatch.setattr('radio_nb.models.specs.find_spec', lambda name: None)
    with pytest.raises(BadInput, match='hf:dinov2@random needs transformers'): check_spec('hf:dinov2@random')


def test_what_the_list_of_teachers_says_is_what_their_libraries_say():
    "Licence, summary and patch; a licence that forbids commercial use says so."
    import open_clip
    import timm
    import torch

    from radio_nb.models.feature_extraction import summary_kind
    for spec, info in TEACHERS.items():
        source, name = spec.split(':')
        if source == 'timm':
            cfg = timm.get_pretrained_cfg(name)
            assert info.licence.lower().startswith(cfg.license) and ('nc' in cfg.license) == ('not for' in info.licence)
            with torch.device('meta'): model = timm.create_model(name, num_classes=0)
            assert (info.summary, info.patch) == (summary_kind(model), model.feature_info[-1]['reduction']), spec
        if source == 'open_clip':
            arch, tag = name.split('/')
            assert tag in open_clip.list_pretrained_tags_by_model(arch)


def test_a_network_that_a_program_registered_with_timm_is_known_once_timm_is_imported(monkeypatch):
    import sys

    import timm

    @timm.models.register_model
    def my_own_net(pretrained=False, **options): return timm.create_model('resnet10t', **options)

    assert check_spec('timm:my_own_net@random') == Spec('timm', 'my_own_net', 'random')
    with pytest.raises(BadInput, match="unknown timm model 'my_own_nett'"): check_spec('timm:my_own_nett@random')
    monkeypatch.delitem(sys.modules, 'timm')
    with pytest.raises(BadInput, match="unknown timm model 'my_own_net'"): check_spec('timm:my_own_net@random')
