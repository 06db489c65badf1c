"Weights whose size is a number of its own, in runs."
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import same_after_a_break, small_images
from torch.testing import assert_close

from radio_nb.agglomeration.spectral import OWN, SpectralScale, plain_weights, reparametrize
from radio_nb.models.student import Student
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.plan import plan_recipe
from radio_nb.training.recipe import Recipe
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.stages import check_recipe
from radio_nb.training.train import run_recipe


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('spectral')
    return Recipe(small_images(home/'images', 8), ('zoo:efficientnet-lite0/-2#64',), str(home/'run'), size=64, depth=1,
                  head_width=16, steps=4, batch_size=4, statistics_steps=2, checkpoint_every=2, device='cpu', ema=.5,
                  method='global', watch_every=0, lr=1e-4, spectral=True)


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def test_a_broken_run_goes_on_to_the_same_student(recipe, out, tmp_path):
    assert same_after_a_break(recipe, out, tmp_path/'run')


def test_rows_that_cancel_each_other_and_a_matrix_of_zeros():
    for rows in ([[1.], [-1.]], [[1., 2.], [-1., -2.], [.5, 0.]]):
        weight = torch.tensor(rows)
        assert_close(SpectralScale(weight).gamma, torch.linalg.matrix_norm(weight, 2))
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.nn.init.zeros_(network[0].weight)
    with pytest.raises(BadInput, match='the weights of 0 are all 0'): reparametrize(network)


def test_every_matrix_of_the_backbone_has_the_size_that_was_learned(recipe, out):
    weights = load_checkpoint(Path(out)/'checkpoints')['trainer']['weights']
    plain = plain_weights(weights)
    sizes = {key.removesuffix(f'{OWN}0.gamma'): gamma for key, gamma in weights.items() if key.endswith('gamma')}
    sizes = {name: gamma for name, gamma in sizes.items() if name.startswith('student.backbone.blocks')}
    assert len(sizes) == 4   # queries, keys and values; what joins them; and two of the MLP
    for name, gamma in sizes.items():
        assert_close(torch.linalg.matrix_norm(plain[f'{name}.weight'], 2), gamma, rtol=.05, atol=0)


def test_the_saved_student_is_plain_and_says_the_same(recipe, out):
    student = Student.from_pretrained(out)
    assert not any('parametrizations' in name for name, _ in student.named_parameters())
    state = load_checkpoint(Path(out)/'checkpoints')['trainer']
    own = plain_weights(state['ema'])
    assert all(torch.equal(own[f'backbone.{key}'], value) for key, value in student.backbone.state_dict().items())


def test_the_first_step_is_that_of_a_plain_student(recipe, tmp_path):
    losses = [[line for line in (run_recipe(replace(recipe, out=str(tmp_path/f'{on}'), spectral=on, log_every=1))
                                 /'metrics.jsonl').read_text().splitlines()][0].split('"gradient"')[0]
              for on in (True, False)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize('n, m', [(1, 5), (5, 1), (8, 8), (30, 4)])
def test_the_largest_singular_value_is_found(n, m):
    torch.manual_seed(n)
    weight = torch.randn(n, m, dtype=torch.float64)
    assert_close(SpectralScale(weight, rounds=500).gamma.detach(), torch.linalg.matrix_norm(weight, 2))


def test_it_is_planned(recipe):
    own, plain = plan_recipe(recipe), plan_recipe(replace(recipe, spectral=False))
    numbers = sum(n + m + 1 for n, m in ((576, 192), (192, 192), (768, 192), (192, 768)))   # two vectors and a size
    assert own.memory.student - plain.memory.student == 2*4*numbers   # of the student and its average


def test_what_cannot_be_is_refused(recipe):
    for field, value in {'damp': .1, 'shard': True}.items():
        with pytest.raises(BadInput, match=f'spectral: .* leave out --{field}'):
            check_recipe(replace(recipe, ema=0., **{field: value}))


def test_half_precision_does_not_reach_the_largest_singular_value():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    scale = SpectralScale(weight)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(scale.sigma(weight), scale.gamma)
