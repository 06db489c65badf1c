"Teacher specs: what can be said about them before anything is loaded."
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radio_nb.models.specs import Spec, architectures, check_spec, is_random, parse_spec
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
    assert is_random('zoo:cifar-resnet20@random#32') and not is_random('timm:random') and not is_random('python:random')


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
