"What a chapter cannot show of zero-shot classification: invariances on random inputs, the cache, and what is refused."
import radio_nb  # noqa: F401, I001  before open_clip, so that torchvision can be imported
import os

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from radio_nb.evaluation import zero_shot
from radio_nb.evaluation.zero_shot import TEMPLATES, TextTower, cached_embeddings, class_embeddings, zero_shot_accuracy
from radio_nb.targets.bad_input import BadInput

ARCH = 'ViT-S-32-alt'


@pytest.fixture(scope='module')
def clip_file(tmp_path_factory):
    "A file with a whole CLIP of random weights."
    path = tmp_path_factory.mktemp('clip')/'clip.safetensors'
    torch.manual_seed(0)
    weights = open_clip.create_model(ARCH).state_dict()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    return path


def data(n, classes, width, seed):
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(classes, width, generator=random)
    y = torch.randint(classes, (n,), generator=random)
    return embeddings[y] + torch.randn(n, width, generator=random), y, embeddings


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(2, 9), st.integers(1, 50), st.integers(0, 999))
def test_accuracy_is_that_of_sorted_cosines_in_chunks_of_any_size(n, classes, width, chunk, seed):
    x, y, embeddings = data(n, classes, width, seed)
    order = (F.normalize(x, dim=1) @ F.normalize(embeddings, dim=1).T).argsort(1, descending=True)
    expected = {'top1': (order[:, 0] == y).double().mean().item()}
    if classes > 5: expected['top5'] = (order[:, :5] == y[:, None]).any(1).double().mean().item()
    assert zero_shot_accuracy(x, y, embeddings, chunk) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_lengths_and_rotations_do_not_count(seed):
    x, y, embeddings = data(30, 7, 5, seed)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    lengths = torch.rand(30, 1)*9 + .1
    assert zero_shot_accuracy(lengths*x @ rotation, y, 3*embeddings @ rotation) == zero_shot_accuracy(x, y, embeddings)


def test_every_sentence_has_one_vote_whatever_the_chunk():
    "By hand from the definition, with a tower of random directions of random lengths."
    table = torch.randn(300, 6)*torch.rand(300, 1)*10
    seen = []
    def tokenizer(sentences): return torch.tensor([seen.append(s) or len(seen) - 1 for s in sentences])
    names = [f'thing {i}' for i in range(30)]
    ours = class_embeddings(lambda tokens: table[tokens], tokenizer, names, chunk=7)
    votes = F.normalize(table[:30*len(TEMPLATES)], dim=1).reshape(30, len(TEMPLATES), 6)
    assert_close(ours, F.normalize(votes.mean(1), dim=1))
    assert seen[:len(TEMPLATES)] == [t.replace('{}', 'thing 0') for t in TEMPLATES] and len(seen) == 30*len(TEMPLATES)


def test_a_text_tower_from_a_file_has_no_image_half(clip_file):
    tower = TextTower(f'open_clip:{ARCH}@{clip_file}')
    weights = load_file(clip_file)
    own = tower.model.state_dict()
    assert not any(name.startswith('visual') for name in own)
    for name, tensor in own.items(): assert_close(tensor, weights[name], atol=0, rtol=0)
    assert not any(p.requires_grad for p in tower.model.parameters())


def test_embeddings_that_are_kept_need_no_tower(clip_file, tmp_path, monkeypatch):
    spec, names = f'open_clip:{ARCH}@{clip_file}', ['cat', 'dog']
    first = cached_embeddings(spec, names, ('a {}',), tmp_path)
    def no_tower(*_): raise AssertionError('loaded')
    monkeypatch.setattr(zero_shot, 'TextTower', no_tower)
    assert_close(cached_embeddings(spec, names, ('a {}',), tmp_path), first, atol=0, rtol=0)
    at_another_size = cached_embeddings(f'{spec}#256', names, ['a {}'], tmp_path)   # of images, which does not matter
    assert_close(at_another_size, first, atol=0, rtol=0)
    for other in ((spec, names[::-1], ('a {}',)), (spec, names, ('the {}',)), (spec, ['cat'], ('a {}',))):
        with pytest.raises(AssertionError, match='loaded'): cached_embeddings(*other, tmp_path)
    os.utime(clip_file, (1, 1))
    with pytest.raises(AssertionError, match='loaded'): cached_embeddings(spec, names, ('a {}',), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == ['.safetensors']


def test_a_broken_file_is_made_again_and_random_weights_are_not_kept(clip_file, tmp_path):
    spec = f'open_clip:{ARCH}@{clip_file}'
    first = cached_embeddings(spec, ['cat'], ('a {}',), tmp_path)
    kept, = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert_close(cached_embeddings(spec, ['cat'], ('a {}',), tmp_path), first, atol=1e-6, rtol=0)
    a, b = (cached_embeddings(f'open_clip:{ARCH}@random#224', ['cat'], ('a {}',), tmp_path) for _ in range(2))
    assert torch.equal(a, b)   # row 3: an untrained tower is always the same one
    assert (a - first).abs().max() > .01 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('spec, message', [
    ('zoo:u2netp', 'zoo:u2netp has no text tower'),
    ('open_clip:ViT-S-32-alt', 'name the weights, open_clip:ViT-S-32-alt/TAG'),
    ('open_clip:ViT-S-32-alt@/no/file.pt', 'no such weight file: /no/file.pt'),
    ('open_clip:ViT-S-33-alt@random', 'unknown open_clip model'),
    ('open_clip:ViT-B-16-SigLIP@random', 'its tokenizer is not part of open_clip and could not be fetched'),
])
def test_towers_that_cannot_be_had(spec, message):
    with pytest.raises(BadInput, match=message): TextTower(spec)


@pytest.mark.parametrize('change, message', [
    (lambda x, y, e: (x, y, e[:, :3]),
     'the summaries have 5 channels and the class embeddings 3: they must come from one CLIP model'),
    (lambda x, y, e: (x, y[:3], e), r'zero-shot needs summaries \(n, C\) and classes \(n,\), not \(9, 5\) and \(3,\)'),
    (lambda x, y, e: (x/0, y, e), 'the summaries are not all finite'),
    (lambda x, y, e: (x, y + 4, e), 'but there are embeddings of 4 classes'),
    (lambda x, y, e: (x[:0], y[:0], e), 'there are no images'),
])
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(BadInput, match=message): zero_shot_accuracy(*change(*data(9, 4, 5, 0)))


@pytest.mark.parametrize('names, templates, message', [
    ([], TEMPLATES, 'there are no classes'), (['cat'], (), 'class embeddings need a template'),
    (['cat'], ('a cat',), "the template 'a cat' has no {} for the name"),
])
def test_classes_without_sentences_are_refused(names, templates, message):
    with pytest.raises(BadInput, match=message): class_embeddings(None, None, names, templates)
