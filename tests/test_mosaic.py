"Teachers that see several images on one canvas: where everything lies, and what a run makes of it."
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from children import same_after_a_break, small_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from radio_nb.agglomeration.mosaic import Canvas, canvas_of, cut, dealt, mosaic, mosaics_at
from radio_nb.data.crops import Batch
from radio_nb.data.images import open_images
from radio_nb.evaluation.scores import EvalData
from radio_nb.front.evaluate import evaluate
from radio_nb.models.teachers import Teacher, load_teacher
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.plan import network_rows, plan_recipe
from radio_nb.training.preparation import new_student
from radio_nb.training.recipe import Partition, Recipe, Stage
from radio_nb.training.stages import check_recipe
from radio_nb.training.statistics import load_statistics, open_sources
from radio_nb.training.train import run_recipe

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    "One teacher sees mosaics of 2 × 2 and of 4 × 4, the other each image alone."
    home = tmp_path_factory.mktemp('mosaics')
    return Recipe(small_images(home/'images', 12), ('zoo:u2netp#128', 'zoo:efficientnet-lite0/-2#64'), str(home/'run'),
                  sizes=(32, 64), mosaic=('u2netp',), depth=1, head_width=16, steps=4, batch_size=5,
                  statistics_steps=3, checkpoint_every=2, device='cpu', watch_every=2)


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def sources_of(recipe):
    teachers = dict(zip(('u2netp', 'efficientnet-lite0/-2'), map(load_teacher, recipe.teachers)))
    plan, = check_recipe(recipe)
    return open_sources(recipe, plan, open_images(recipe.images), teachers, new_accelerator(CPU), CPU)


def local_teacher(patch, size):
    "It says of each patch what is in it, and knows nothing else: a convolution in whole numbers, exact in any order."
    torch.manual_seed(0)
    network = nn.Conv2d(3, 8, patch, patch, bias=False)
    with torch.no_grad(): network.weight.copy_(torch.randint(-3, 4, network.weight.shape))
    def features(x): return Features(network(x).mean((2, 3)), network(x).movedim(1, -1))
    return Teacher('local', network, features, size, (0.,)*3, (1.,)*3)


@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.sampled_from((1, 3, 8)), st.integers(1, 9),
       st.one_of(st.none(), st.integers(0, 2**50)))
@settings(deadline=None, max_examples=60)
def test_a_teacher_that_only_knows_patches_says_the_same_of_mosaics(data, high, wide, patch, images, seed):
    image = high*patch, wide*patch
    size = tuple(side*data.draw(st.integers(1, 3)) + patch*data.draw(st.integers(0, 4)) for side in image)
    canvas = Canvas(size, image, (patch, patch))
    rows, columns = canvas.cells
    assert all(n == side//own for n, side, own in zip(canvas.cells, size, image))
    assert all(cell % patch == 0 and own <= cell and n*cell <= side
               for cell, own, n, side in zip(canvas.cell, image, canvas.cells, size))
    teacher, x = local_teacher(patch, size), torch.randint(9, (images, 3, *image)).float()
    assert canvas_of(teacher, image) == canvas
    found = dealt(mosaics_at(image, {'local': teacher}, ('local',)), 0 if seed is None else seed)['local'](x)
    assert torch.equal(found.spatial, teacher(x, image).spatial) and found.summary.shape == (images, 0)
    order = canvas.order(images, seed)
    canvases = mosaic(x, canvas, order, fill=-1.)
    assert canvases.shape == (-(-images//(rows*columns)), 3, *size)
    assert sorted(order.tolist()) == list(range(len(order)))
    pixels = canvases.movedim(1, -1)[:, ::patch, ::patch]   # a position's first pixel
    assert torch.equal(cut(pixels, canvas, order, images), x.movedim(1, -1)[:, ::patch, ::patch])
    for i, canvas_ in enumerate(canvases):   # each cell holds one whole image
        for slot in range(rows*columns):
            top, left = slot//columns*canvas.cell[0], slot % columns*canvas.cell[1]
            held = canvas_[:, top:top + image[0], left:left + image[1]]
            assert torch.equal(held, x[order[i*rows*columns + slot] % images])


@pytest.mark.parametrize('wrong', [lambda c: c._replace(patch=(16, 16)), lambda c: c._replace(image=(64, 64)),
                                   lambda c: c._replace(size=(160, 96))])
def test_a_wrong_cut_is_seen(wrong):
    canvas, teacher = Canvas((112, 112), (32, 32), (8, 8)), local_teacher(8, 112)
    x = torch.randint(9, (9, 3, 32, 32)).float()
    order = canvas.order(9, 0)
    grids = teacher(mosaic(x, canvas, order)).spatial
    assert torch.equal(cut(grids, canvas, order, 9), teacher(x, (32, 32)).spatial)
    try: other = cut(grids, wrong(canvas), order, 9)
    except (RuntimeError, IndexError): return
    assert other.shape != (9, 4, 4, 8) or not torch.equal(other, teacher(x, (32, 32)).spatial)


def test_images_meet_others_in_other_cells_and_the_same_for_a_seed(recipe):
    source, = sources_of(recipe)
    batch = next(source.batches(recipe, new_accelerator(CPU), 0, 1))
    assert batch.images.shape[-2:] == (64, 64)   # as large as the student's and the other teacher's, not the canvas
    for drawn in (source, *source.others):
        high = drawn.part.size[0]//32
        names, grids = ('u2netp', 'efficientnet-lite0/-2'), []
        for seed in (1, 1, 2):
            dealt_out = drawn._replace(teachers=dealt(drawn.teachers, seed))
            found = dealt_out.teacher_features(batch, CPU)
            assert found['u2netp'].spatial.shape == (5, high, high, 64) and found['u2netp'].summary.shape == (5, 0)
            grids.append([found[name].spatial for name in names])
        assert torch.equal(grids[0][0], grids[1][0]) and not torch.equal(grids[0][0], grids[2][0])
        assert all(torch.equal(grids[0][1], other[1]) for other in grids)   # who sees each image alone
    drawn = [source.drawn(seed).teachers['u2netp'].features for seed in range(20)]
    assert len({tuple(one.canvas.order(5, one.seed).tolist()) for one in drawn}) > 15
    assert [one.seed for one in drawn] == list(range(20))
    assert source.teachers['u2netp'].features.seed is None   # the source's own are not changed


def test_each_cell_comes_as_often(recipe):
    canvas, counts = Canvas((64, 64), (32, 32), (8, 8)), np.zeros((5, 8), int)
    for seed in range(2000):
        slots = canvas.order(5, seed).argsort()[:5].numpy()
        counts[np.arange(5), slots] += 1
    assert (abs(counts - 250) < 75).all()   # five standard deviations


def test_a_broken_run_goes_on_to_the_same_student(recipe, out, tmp_path):
    assert same_after_a_break(recipe, out, tmp_path/'run')


def test_statistics_are_taken_on_mosaics(recipe, tmp_path):
    def taken(teacher, mosaic):
        one = replace(recipe, sizes=(64,), teachers=(teacher, recipe.teachers[1]), mosaic=mosaic, steps=1)
        return load_statistics(run_recipe(replace(one, out=str(tmp_path/teacher[-3:]))))
    own, alone = taken('zoo:u2netp#128', ('u2netp',)), taken('zoo:u2netp#064', ())
    assert (own['u2netp.mean'] - alone['u2netp.mean']).norm() > .05*alone['u2netp.mean'].norm()
    assert torch.equal(own['efficientnet-lite0/-2.mean'], alone['efficientnet-lite0/-2.mean'])
    source, = sources_of(replace(recipe, sizes=(64,)))
    teachers = [dealt(source.teachers, i) for i in range(3)]   # other neighbours in each batch
    by_hand = [source._replace(teachers=teachers[i]).teacher_features(batch, CPU)['u2netp'].spatial
               for i, batch in enumerate(source.batches(recipe, new_accelerator(CPU), 0, 3))]
    assert_close(own['u2netp.mean'], torch.cat(by_hand).double().mean((0, 1, 2)))


def test_a_student_of_mosaics_has_no_summary_of_that_teacher_and_is_evaluated_as_ever(recipe, out):
    student = new_student(recipe, {'u2netp': (64, 64), 'efficientnet-lite0/-2': (112, 112)})
    assert student.config['teachers']['u2netp'][0] == 0 < student.config['teachers']['efficientnet-lite0/-2'][0]
    found = evaluate(out, EvalData(images=recipe.images), sizes=((64, 64),))
    measures = {score.measure for score in found.scores if score.model == 'student'}
    assert 'explained, u2netp' in measures and 'summary_cosine, u2netp' not in measures


def test_a_plan_counts_canvases(recipe):
    def flops(plan): return sum(plan.stages[0][1][0].teachers['u2netp'].values())   # for one image, the mean over sizes
    alone, both = plan_recipe(replace(recipe, sizes=(64,), mosaic=())), plan_recipe(recipe)
    assert 5*flops(both) == pytest.approx((2 + 1)/2*flops(alone))   # canvases of 2 × 2 and of 4 × 4, five images each
    assert {row[0]: row[2] for row in network_rows(both)}['u2netp'] == '≤ 64 × 64'


def test_masks_and_windows_go_along(recipe, tmp_path):
    "A crop's mask counts on its own grid; windows of a shift are cut before they are put side by side."
    source, = sources_of(replace(recipe, sizes=(64,), shift=0))
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    masks = torch.ones(3, 64, 64, dtype=torch.bool)
    found = source.teacher_features(Batch(images, {}, torch.arange(3), masks), CPU)
    assert found['u2netp'].spatial.shape[1:3] == (2, 2)
    shifted = replace(recipe, sizes=(96,), teachers=('zoo:efficientnet-lite0/-2#192',), shift=1,
                      mosaic=('efficientnet-lite0/-2',), out=str(tmp_path/'run'), steps=1)
    assert run_recipe(shifted)


def test_a_network_in_the_teacher_s_place_of_features_stays_its_own():
    class Net(nn.Module):
        def forward(self, x): return Features(x.mean((2, 3)), F.avg_pool2d(x, 8).movedim(1, -1))
    net = Net()
    teacher = Teacher('net', net, net, 64)
    other = mosaics_at((32, 32), {'net': teacher}, ('net',))['net']
    assert teacher.features is net and other.size == (32, 32) and teacher.size == 64
    x = torch.rand(5, 3, 32, 32)
    assert_close(other.lowered()(x).spatial.float(), teacher(x, (32, 32)).spatial, rtol=.01, atol=.01)


def test_what_would_not_be_exact_is_refused(recipe, tmp_path):
    def refused(match, run=check_recipe, **fields):
        with pytest.raises(BadInput, match=match) as error: run(replace(recipe, out=str(tmp_path/'refused'), **fields))
        assert '\n' not in str(error.value)
    refused("unknown teacher in mosaic 'u2net': did you mean u2netp", mosaic=('u2net',))
    refused('mosaic: teacher u2netp is flexible', flexible=('u2netp',))
    refused('mosaic: a cache knows each crop alone', cache='x', views=2)
    refused('mosaic: microbatches would have other mosaics', accumulate=5)
    refused('summary_weights: teacher u2netp sees mosaics', summary_weights=(1., 1.))
    assert check_recipe(replace(recipe, summary_weights=(0., 1.)))
    refused('at 128 × 128 pixels, has no room for an image of 160 × 160: choose a smaller size', run_recipe,
            sizes=(64, 160))
    refused('cannot be cut at images of 48 × 48: make both sides a multiple of 32 × 32', plan_recipe, sizes=(48,))
    refused('has 4 × 4 positions, each of no whole number of pixels', run_recipe,
            teachers=('zoo:u2netp#126', recipe.teachers[1]))
    parts = Partition(.6, 64), Partition(.4, 160)
    refused('no room for an image of 160 × 160', run_recipe, stages=(Stage(2, partitions=parts),))
    with pytest.raises(BadInput, match='mosaic: 2 processes would have other mosaics than one'):
        plan_recipe(replace(recipe, batch_size=4), processes=2)
