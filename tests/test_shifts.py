"Student and teachers that look from different places: what they are compared on, in a trainer and in whole runs."
from dataclasses import replace

import pytest
import torch
from children import small_images
from hypothesis import given, settings
from hypothesis import strategies as st
from test_balancing import IDENTITY, NAMES, Patches
from torch.testing import assert_close

import radio_nb
from radio_nb.agglomeration.shifts import Shift, Windows, fixed_pattern, moved, shared_positions, shift_of
from radio_nb.data.crops import Batch, padded_crop
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.models.backbones import new_backbone
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import check_recipe, plan_stages
from radio_nb.training.statistics import Source, load_statistics
from radio_nb.training.train import run_recipe
from radio_nb.training.trainer import DistillStep, Trainer

CPU = torch.device('cpu')


def test_where_the_student_looks_says_nothing_about_its_windows():
    shift, backbone = Shift(1, (6, 6), (6, 6)), new_backbone('vit_tiny_patch16_224', 1, depth=1, windows=(2, 3, 0))
    def drawn(seed):
        torch.manual_seed(seed)
        return shift.draw([''], seed)[''][0], backbone.draw_window(6, 6)
    assert len({drawn(seed) for seed in range(200)}) == 3*3


@given(st.integers(3, 6), st.integers(3, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_what_is_shared_is_the_same_place_of_the_crop(high, wide, finer, coarser, seed):
    "Grids that hold nothing but the place that each position has in the crop."
    student, teacher = (high*coarser, wide*coarser), (high*finer, wide*finer)
    shift = shift_of(1, {'student': student, 'teacher': teacher})
    places = shift.draw(['', 'teacher'], seed)
    def grid(shape, who):   # the step of the crop in which each position lies
        rows, columns = (torch.arange(side)//(side//n) + at for side, n, at in zip(shape, shift.units, places[who]))
        return torch.stack(torch.broadcast_tensors(rows[:, None], columns), -1)[None].float()
    target = Features(torch.zeros(1, 0), grid(teacher, 'teacher'))
    masks, moves = shared_positions(shift, places, {'teacher': target})
    there, factor = moved(grid(student, ''), moves['teacher']), [s//n for s, n in zip(student, shift.units)]
    there = there[:, ::factor[0], ::factor[1]]   # one position for each step
    own = [t//n for t, n in zip(teacher, shift.units)]
    both, target = masks['teacher'][:, ::own[0], ::own[1]], target.spatial[:, ::own[0], ::own[1]]
    assert_close(there[both], target[both])
    lost = [abs(a - b) for a, b in zip(places[''], places['teacher'])]
    assert both.sum() == (shift.units[0] - lost[0])*(shift.units[1] - lost[1])


def trainer_of(shift, weights=0):
    "A student of the same weights as its two teachers, where `weights` is 0."
    recipe = Recipe('zoo:photos', ('zoo:large', 'zoo:small'), '', steps=30, batch_size=4, size=32, shift=1, stride=8,
                    lr=1e-12)   # Adam would enlarge even rounding to a step
    loss = MultiTeacherLoss('mse', dict.fromkeys(NAMES, 0.), dict.fromkeys(NAMES, 1.))
    student = Patches(weights, NAMES)
    nets = {name: Patches(0, NAMES).requires_grad_(False) for name in NAMES}
    teachers = {name: lambda images, net=net, name=name: net(images)[name] for name, net in nets.items()}
    trainer, plan = Trainer(DistillStep(student, loss), recipe, CPU), plan_stages(recipe, list(NAMES))[0]
    trainer.start_stage(plan, [Source(plan.parts[0], None, teachers, shift=shift)], IDENTITY)
    return trainer


def batch(seed, side):
    images = torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Batch(images, {}, torch.full((4,), -1))


class Sized:
    "A teacher that says at which size it sees."
    def __init__(self, teacher): self.teacher, self.size = teacher, 32

    def __call__(self, images): return self.teacher(images)


def test_a_student_that_sees_what_its_teachers_see_has_no_loss_wherever_they_look():
    trainer = trainer_of(Shift(1, (4, 4), (4, 4)))
    source = trainer.sources[0]
    trainer.sources = [source._replace(teachers={name: Sized(t) for name, t in source.teachers.items()})]
    places = set()
    for step in range(20):
        places.add(str(source.places(trainer.recipe.seed*1_000_003 + step)))
        assert trainer(batch(step, 48))['loss'] < 1e-9
    assert len(places) > 15   # and they did look from different ones


def test_a_grid_that_is_moved_the_wrong_way_is_noticed(monkeypatch):
    "So that the test above can fail."
    monkeypatch.setattr('radio_nb.training.trainer.moved', lambda x, by: moved(x, -by))
    trainer = trainer_of(Shift(1, (4, 4), (4, 4)))
    trainer.sources = [trainer.sources[0]._replace(teachers={
        name: Sized(t) for name, t in trainer.sources[0].teachers.items()})]
    assert max(trainer(batch(step, 48))['loss'] for step in range(5)) > .01


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('shifts')
    teachers = tuple(f'zoo:efficientnet-lite0/-2#{size}' for size in (64, 128))
    return Recipe(small_images(home/'images', 12), teachers, str(home/'run'), size=64, depth=1,
                  stride=8, head_width=16, steps=4, batch_size=4, statistics_steps=3, checkpoint_every=2,
                  device='cpu', shift=1, watch_every=2)


def test_statistics_are_of_the_windows_in_the_middle(recipe, tmp_path):
    a, b = (load_statistics(run_recipe(replace(recipe, out=str(tmp_path/str(shift)), shift=shift, steps=1)))
            for shift in (0, 1))
    assert a.keys() == b.keys() and not all(torch.equal(a[key], b[key]) for key in a)   # of parts of other crops
    images = batch(0, 96).images
    seen = Windows(images, CPU, Shift(1, (4, 4), (4, 4)), {}).at(64)
    assert_close(seen, images[..., 16:80, 16:80]/255)


def test_what_cannot_be_looked_at_from_several_places_is_refused(recipe, tmp_path):
    with pytest.raises(BadInput, match='shift: a cache knows each crop as seen from one place only'):
        check_recipe(replace(recipe, cache='x', views=2))
    with pytest.raises(BadInput, match='shift: the grids .the student 4 × 4, .* steps in common, too few'):
        run_recipe(replace(recipe, out=str(tmp_path/'a'), teachers=('zoo:efficientnet-lite0#32',), stride=16))
    args = dict(teachers='zoo:efficientnet-lite0/-2#64', size=64, shift=1, steps=2, depth=1, crop=padded_crop)
    with pytest.raises(BadInput, match='crops with masks cannot be looked at from several places'):
        radio_nb.distill(images='zoo:photos', out=tmp_path/'b', **args)


def test_a_pattern_is_found_in_whatever_units_and_place():
    torch.manual_seed(0)
    grids, marks = torch.randn(400, 4, 6, 16), torch.zeros(4, 6, 16)
    marks[0] = 1.
    found = fixed_pattern(7 + 3*(grids + marks))
    assert_close(found, fixed_pattern(grids + marks))
    assert (found[0] > 2*found[1:].max()).all() and abs(fixed_pattern(grids).mean()) < 3e-3


def test_the_energy_of_a_pattern_is_right_on_average_for_few_images_in_pairs():
    torch.manual_seed(0)
    marks, found = torch.randn(2, 3, 5), []
    for _ in range(2000):   # six images that differ as wholes and in their places, each seen twice with some noise
        images = 2*torch.randn(6, 1, 1, 5) + torch.randn(6, 2, 3, 5) + marks
        views = images + .3*torch.randn(2, *images.shape)
        found.append(fixed_pattern(*views).mean()*views.flatten(0, 3).var(0, correction=0).sum())
    found, true = torch.stack(found), (marks - marks.mean((0, 1))).square().sum(-1).mean()
    assert abs(found.mean() - true) < 4*found.std()/2000**.5 < .02*true


def test_images_that_differ_as_wholes_have_no_pattern_and_one_image_tells_nothing():
    maps = torch.tensor([1., -1.])[:, None, None, None].expand(2, 3, 4, 2)
    assert_close(fixed_pattern(maps), torch.zeros(3, 4).double())
    assert fixed_pattern(maps[:1]).isnan().all()


def test_a_student_of_another_stride_must_say_so(tmp_path):
    recipe = Recipe('zoo:photos', ('zoo:u2netp#64',), str(tmp_path/'run'), student='vit_small_patch8_224', depth=1,
                    size=64, steps=2, device='cpu', shift=1)
    with pytest.raises(BadInput, match='shift: a position of this student stands for 8 pixels, .* add --stride 8'):
        run_recipe(recipe)
