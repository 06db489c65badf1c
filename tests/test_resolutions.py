"Sizes that are drawn for each step, and teachers that follow: what a step sees, in sources and in whole runs."
from dataclasses import replace

import pytest
import torch
from children import small_images
from hypothesis import given, settings
from hypothesis import strategies as st

from radio_nb.agglomeration.resolutions import grid_of, teachers_at
from radio_nb.data.images import open_images
from radio_nb.evaluation.scores import EvalData
from radio_nb.front.evaluate import evaluate
from radio_nb.models.teachers import load_teacher
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.plan import network_rows, plan_recipe
from radio_nb.training.recipe import Partition, Recipe, Stage, parse_recipe, recipe_toml
from radio_nb.training.stages import check_recipe
from radio_nb.training.statistics import load_statistics, open_sources
from radio_nb.training.train import run_recipe

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    "One teacher follows, the other keeps its size."
    home = tmp_path_factory.mktemp('resolutions')
    return Recipe(small_images(home/'images', 12), ('zoo:efficientnet-lite0/-2#64', 'zoo:u2netp#64'), str(home/'run'),
                  sizes=(48, 64, 96), flexible=('efficientnet-lite0/-2',), depth=1, head_width=16, steps=4,
                  batch_size=4, statistics_steps=3, checkpoint_every=2, device='cpu', watch_every=2)


def sources_of(recipe, plan=None):
    plan, teachers = plan or check_recipe(recipe)[0], {'efficientnet-lite0/-2': load_teacher(recipe.teachers[0]),
                                                       'u2netp': load_teacher(recipe.teachers[1])}
    return open_sources(recipe, plan, open_images(recipe.images), teachers, new_accelerator(CPU), CPU)


@given(st.integers(2, 5), st.integers(2, 5), st.sampled_from((8, 16, 32)), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_a_teacher_that_follows_has_the_student_s_grid(high, wide, stride, layer):
    teacher = load_teacher(f'zoo:efficientnet-lite0/-{layer}')
    found = teachers_at((high*stride, wide*stride), {'own': teacher, 'other': teacher}, ('own',), stride)
    assert grid_of(found['own']) == (high, wide) and found['other'] is teacher
    again = teachers_at((wide*stride, high*stride), found, ('own',), stride)   # from wherever it is
    assert grid_of(again['own']) == (wide, high)


def test_every_size_is_drawn_and_all_see_it(recipe):
    source, = sources_of(recipe)
    batch = next(source.batches(recipe, new_accelerator(CPU), 0, 1))
    assert batch.images.shape[-2:] == (96, 96)   # as large as the largest
    counts = {}
    for seed in range(300):
        drawn = source.drawn(seed)
        assert drawn.part.size == source.drawn(seed).part.size
        counts[drawn.part.size] = counts.get(drawn.part.size, 0) + 1
    assert len(counts) == 3 and min(counts.values()) > 70
    for drawn in (source, *source.others):
        height, _ = drawn.part.size
        found = drawn.teacher_features(batch, CPU)
        assert found['efficientnet-lite0/-2'].spatial.shape[1:3] == (height//16,)*2
        assert found['u2netp'].spatial.shape[1:3] == (2, 2)   # 64 pixels, whatever the student sees


def test_parts_draw_for_themselves(recipe):
    parts = Partition(.5, sizes=(32, 48)), Partition(.5, sizes=(64, 96))
    plan, = check_recipe(replace(recipe, stages=(Stage(3, partitions=parts),)))
    a, b = sources_of(recipe, plan)
    pairs = {(a.drawn(seed).part.size, b.drawn(seed + (1 << 40)).part.size) for seed in range(60)}
    assert len(pairs) == 4


def test_what_is_left_open_comes_from_above(recipe):
    def sizes(stage, **fields): return check_recipe(replace(recipe, stages=(stage,), **fields))[0].parts[0].sizes()
    assert sizes(Stage(3)) == ((96, 96), (64, 64), (48, 48))
    assert sizes(Stage(3, 80)) == ((80, 80),)
    assert sizes(Stage(3, sizes=(32, 64))) == ((64, 64), (32, 32))
    assert sizes(Stage(3, sizes=(32, 64), partitions=(Partition(1., (48, 80)),))) == ((48, 80),)
    text = recipe_toml(replace(recipe, stages=(Stage(3, sizes=(32, 64), partitions=(Partition(1., sizes=(16,)),)),)))
    assert parse_recipe(text, 'here')['stages'][0].partitions[0].sizes == (16,)


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def test_statistics_are_taken_at_each_size(recipe, out, tmp_path):
    name = 'efficientnet-lite0/-2'
    def mean(**fields):
        run = run_recipe(replace(recipe, out=str(tmp_path/str(fields)), steps=1, **fields))
        return load_statistics(run)[f'{name}.mean']
    each = torch.stack([mean(sizes=(size,), statistics_steps=3) for size in (48, 64, 96)])
    found = load_statistics(out)[f'{name}.mean']
    assert all((found - one).norm() > .05*one.norm() for one in each)   # those of no size alone
    assert (found - each.mean(0)).norm() < .5*(each - each.mean(0)).norm(dim=1).max()


def test_a_cache_remembers_every_size(recipe, tmp_path):
    cached = replace(recipe, views=1, cache=str(tmp_path/'cache'), out=str(tmp_path/'run'))
    source, = sources_of(cached)
    batch = next(source.batches(cached, new_accelerator(CPU), 0, 1))
    assert batch.images.shape[-2:] == (96, 96)
    for one in (source, *source.others):
        live, kept = one._replace(cached={}).teacher_features(batch, CPU), one.teacher_features(batch, CPU)
        for name in live:
            error = (live[name].spatial - kept[name].spatial).abs().max()
            assert error < .002*live[name].spatial.abs().max()   # half precision


def test_a_plan_takes_the_mean_over_sizes_and_the_most_memory(recipe):
    def planned(*sizes): return plan_recipe(replace(recipe, sizes=sizes))
    def arithmetic(plan): return sum(plan.step().values())
    each, drawn = [planned(size) for size in (48, 64, 96)], planned(48, 64, 96)
    assert arithmetic(drawn) == pytest.approx(sum(map(arithmetic, each))/3)
    assert drawn.memory == each[-1].memory and drawn.memory != each[0].memory
    shown = {row[0]: row[2] for row in network_rows(drawn)}
    assert shown == {'efficientnet-lite0/-2': '≤ 96 × 96', 'u2netp': '64 × 64', 'student': '≤ 96 × 96'}
    *each, drawn = (plan_recipe(replace(recipe, sizes=sizes, views=1, cache='x'))
                    for sizes in ((48,), (64,), (96,), (48, 64, 96)))
    fixed = plan_recipe(replace(recipe, sizes=(64,), views=1, cache='x', teachers=('zoo:u2netp#64',), flexible=()))
    assert drawn.crop_bytes() == sum(plan.crop_bytes() for plan in each) - 2*fixed.crop_bytes()   # which sees one size
    def filling(plan): return sum(plan._replace(images=10).before().values())
    assert filling(drawn) == pytest.approx(sum(map(filling, each)) - 2*filling(fixed))


def test_the_student_is_judged_by_what_its_teacher_says_of_the_same_size(recipe, out):
    "A teacher that follows gives other scores than the same teacher at its own size."
    data, name = EvalData(images=recipe.images), 'efficientnet-lite0/-2'
    found = evaluate(out, data, sizes=((48, 48), (96, 96)))
    scores = {(score.measure, score.dataset): score.value for score in found.scores if score.model == 'student'}
    own = [value for (measure, _), value in scores.items() if measure == f'explained, {name}']
    assert len(own) == 2 and own[0] != own[1]


def test_what_cannot_follow_is_refused(recipe, tmp_path):
    with pytest.raises(BadInput, match="unknown teacher in flexible 'u2net': did you mean u2netp"):
        check_recipe(replace(recipe, flexible=('u2net',)))
    fixed = replace(recipe, teachers=('timm:mixer_s16_224@random',), flexible=('mixer_s16_224@random',))
    with pytest.raises(BadInput, match='teacher mixer_s16_224@random cannot see 96 × 96 pixels'):
        run_recipe(replace(fixed, out=str(tmp_path/'a')))
    with pytest.raises(BadInput, match='a student with patches of 16 cannot see 40 × 40 pixels'):
        run_recipe(replace(recipe, sizes=(40, 96), out=str(tmp_path/'b')))
    with pytest.raises(BadInput, match='sizes: 64 is listed twice; all are drawn equally often'):
        check_recipe(replace(recipe, sizes=(64, 96, 64)))
    with pytest.raises(BadInput, match="sizes is .*, but must be a list, in which each is a whole number at least 1"):
        replace(recipe, sizes=(0, 96))
