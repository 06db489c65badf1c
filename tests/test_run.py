"`radio_nb.distill` and `Run` as a program uses them: objects in place of names, callbacks, what is refused."
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from children import photo_parquet
from datasets import Dataset
from PIL import Image
from torch import nn

from radio_nb.data.crops import Crops, centre_crop
from radio_nb.data.files import hours_minutes_seconds
from radio_nb.front.evaluate import compare_folders, open_run
from radio_nb.front.run import as_dataset
from radio_nb.front.run_match import learned_from, load_match, match_run
from radio_nb.models.zoo import photographs
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import height_width
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.preparation import Inputs
from radio_nb.training.recipe import Recipe, Stage
from radio_nb.training.trainer import DistillStep, TrainState

TINY = dict(size=32, steps=4, statistics_steps=2, batch_size=4, head_width=16, depth=1, checkpoint_every=2)


class Blocks(nn.Module):
    "A network: the mean colours of blocks of 8 pixels, and their mean."
    def forward(self, images):
        grid = nn.functional.avg_pool2d(images, 8).movedim(1, -1)
        return grid.mean((1, 2)), grid


def pictures(n=12, side=48): return [Image.open(p).convert('RGB').resize((side, side)) for p in photographs()[:n]]


def same(a, b):
    a, b = a.student.state_dict(), b.student.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize('images', [
    pictures, lambda: [np.asarray(image) for image in pictures()],
    lambda: [torch.from_numpy(np.array(image)).movedim(-1, 0) for image in pictures()],
    lambda: [torch.from_numpy(np.array(image)).movedim(-1, 0)/255 for image in pictures()],
], ids=['pictures', 'arrays', 'bytes', 'floats'])
def test_images_of_every_kind_train_the_same_student(tmp_path, images):
    parquet = Dataset.from_dict({'image': pictures()})
    args = dict(teachers={'blocks': Blocks()}, device='cpu', **TINY)
    first = radio_nb.distill(images=parquet, out=tmp_path/'data_set', **args)
    second = radio_nb.distill(images=images(), out=tmp_path/'sequence', **args)
    assert same(first, second) and list(second.student.config['teachers']) == ['blocks']


def test_a_timm_model_a_path_and_a_parquet_file(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model('test_vit', num_classes=0)
    source = tmp_path/'photos.parquet'
    photo_parquet(source, 8)
    run = radio_nb.distill(images=source, teachers=[vit, 'zoo:u2netp#64'], out=tmp_path/'run', **TINY)
    assert list(run.match['new crops']['student']) == ['VisionTransformer', 'u2netp'] and run.report().exists()
    assert run.ready.teachers['VisionTransformer'].size == vit.default_cfg['input_size'][-1]


def test_a_function_that_is_called_like_a_spec_s_teacher_is_another(tmp_path):
    "Both get their whole names, by which the function was not found."
    def u2netp(images): return Blocks()(images)
    run = radio_nb.distill(images=pictures(), teachers=['zoo:u2netp#32', u2netp], out=tmp_path/'run', **TINY)
    assert list(run.student.config['teachers']) == ['zoo:u2netp#32', 'python:u2netp']
    with pytest.raises(BadInput, match='teacher zoo:u2netp is called u2netp, .* and not mine'):
        radio_nb.distill(images=pictures(), teachers={'mine': 'zoo:u2netp'}, **TINY)


def test_steps_beside_stages_are_refused():
    recipe = Recipe('zoo:photos', ('zoo:u2netp',), '', stages=(Stage(50),))
    with pytest.raises(BadInput, match='steps: the stages of the recipe say how many'):
        radio_nb.distill(recipe, steps=3)


def test_a_student_that_not_all_teachers_taught_can_be_evaluated():
    "Weights were asked of those alone that had taken part, one for each."
    recipe = Recipe('', ('zoo:u2netp', 'zoo:efficientnet-lite0'), '', summary_weights=(1., 0.))
    assert learned_from(recipe, ['u2netp']) == (['u2netp'], [])
    recipe = replace(recipe, spatial_weights=(0., 1.))
    assert learned_from(recipe, ['u2netp', 'efficientnet-lite0']) == (['u2netp', 'efficientnet-lite0'], ['u2netp'])


def test_own_augmentation_decides_what_is_seen(tmp_path):
    seen = []
    def grey(image, size, random):
        seen.append(image.size)
        return torch.full((3, *height_width(size)), 100 + int(random.integers(50)), dtype=torch.uint8)
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, crop=grey, out=tmp_path/'run', **TINY)
    assert len(seen) >= 16 and len(run.metrics) == 4


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path):
    "Stopped by an exception of the user's own after a checkpoint, with objects handed over again."
    args = dict(images=pictures(), teachers={'blocks': Blocks()}, device='cpu', **TINY)
    whole = radio_nb.distill(out=tmp_path/'whole', **args)
    def fail(run): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): radio_nb.distill(out=tmp_path/'broken', on_checkpoint=fail, **args)
    with pytest.raises(BadInput, match='holds an unfinished run'): radio_nb.distill(out=tmp_path/'broken', **args)
    ends = []
    broken = radio_nb.distill(out=tmp_path/'broken', resume=True, on_end=lambda run: ends.append(run.student), **args)
    assert same(whole, broken) and [line['step'] for line in broken.metrics] == [1, 2, 3, 4]
    assert torch.equal(ends[0].backbone.prefix, broken.student.backbone.prefix)


def test_a_callback_ends_a_run_with_the_student_of_that_moment(tmp_path):
    args = dict(images='zoo:photos', teachers='zoo:u2netp#64', **TINY)
    def enough(run):
        if run.metrics['step'] == 3: run.stop()
    early = radio_nb.distill(out=tmp_path/'early', on_step=enough, **args)
    assert len(early.metrics) == 3 and early.student.backbone.dim
    again = radio_nb.distill(out=tmp_path/'early', **args)   # it is finished, and is opened
    assert again.metrics == early.metrics and again.match == early.match


def test_a_run_is_opened_by_its_folder(tmp_path):
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', hold_out=2, **TINY)
    measured = run.match
    assert measured == load_match(tmp_path/'run') and 'new images' in measured
    opened = radio_nb.Run(tmp_path/'run')
    assert opened.match == measured and opened.metrics == run.metrics and 'blocks' in str(opened)
    with pytest.raises(BadInput, match='hand them over again'): opened.feature_maps()
    opened = radio_nb.Run(tmp_path/'run', Inputs(run.inputs.images, run.inputs.teachers))
    assert opened.feature_maps(2).size[0] > 200


@pytest.mark.parametrize('change, message', [
    (dict(step=3), "unknown field of a recipe 'step': did you mean steps"),
    (dict(teachers=[]), 'teachers: say which'),
    (dict(teachers=[3]), 'teacher int is a int'),
    (dict(teachers=lambda images: images), 'must give a summary'),
    (dict(images=[]), 'the sequence is empty'),
    (dict(images=[1, 2]), 'a sequence of int cannot be used'),
    (dict(images=[torch.full((3, 8, 8), 7.)]), r'must lie in \[0, 1\]'),
    (dict(student='vit_tinyy'), "unknown timm model 'vit_tinyy'"),
    (dict(size=40), 'patches of 16 cannot see 40 × 40 pixels'),
    (dict(accumulate=3), '4 images of a process cannot be divided into 3 microbatches'),
])
def test_what_cannot_work_is_known_before_a_folder_is_made(tmp_path, change, message):
    with pytest.raises(BadInput, match=message):
        radio_nb.distill(**dict(images='zoo:photos', teachers='zoo:u2netp#64', out=tmp_path/'run', **TINY) | change)
    assert not (tmp_path/'run').exists()


def test_a_finished_run_of_other_objects_is_not_taken_for_this_one(tmp_path):
    args = dict(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', **TINY)
    radio_nb.distill(**args)
    with pytest.raises(BadInput, match='whether it had the same objects is not known'): radio_nb.distill(**args)


def test_others_may_read_what_a_run_leaves(tmp_path):
    before = os.umask(0o022)
    try: run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', **TINY)
    finally: os.umask(before)
    for name in ('student.safetensors', 'statistics.safetensors', 'config.json', 'recipe.toml'):
        assert (run.out/name).stat().st_mode & 0o777 == 0o644, name


def test_a_name_that_was_changed_in_one_of_two_files_is_noticed(tmp_path):
    "Found by the fuzzer, as a KeyError and as a table without rows."
    run = radio_nb.distill(images='zoo:photos', teachers='zoo:u2netp#64', out=tmp_path/'run', **TINY)
    config = run.out/'config.json'
    config.write_text(config.read_text().replace('u2netp', 'u2netq'))
    message = 'config.json names the teachers u2netq, and recipe.toml u2netp: one of the files was changed'
    with pytest.raises(BadInput, match=message): match_run(run.recipe, run.ready, run.out)
    with pytest.raises(BadInput, match=message): open_run(run.out)


def test_a_student_is_not_shown_bytes(tmp_path):
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', **TINY)
    with pytest.raises(BadInput, match=r'images must lie in \[0, 1\]: divide torch.uint8 by 255'):
        run.student(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_run_is_not_a_second_seed_of_itself(tmp_path):
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', **TINY)
    with pytest.raises(BadInput, match='is named twice'): compare_folders([str(run.out), f'{run.out}/'])


def test_a_gradient_that_is_not_finite_moves_no_weight(tmp_path):
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'run', device='cpu',
                           **TINY)
    state = TrainState(DistillStep(run.student, nn.Identity()), run.recipe, new_accelerator(torch.device('cpu')))
    before = [p.detach().clone() for p in run.student.parameters()]
    for p in run.student.parameters(): p.grad = torch.full_like(p, float('nan'))
    assert state.optimizer_step(1e-3, 7).isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True))


def test_the_report_escapes_what_a_user_wrote(tmp_path):
    run = radio_nb.distill(images=pictures(), teachers={'blocks': Blocks()}, out=tmp_path/'<b>bold', **TINY)
    page = run.report().read_text()
    assert '<b>bold' not in page and '&lt;b&gt;bold' in page


def test_a_clock_goes_beyond_a_day():
    assert hours_minutes_seconds(55.5*3600) == '55:30:00' and hours_minutes_seconds(59.9) == '00:00:59'


@pytest.mark.parametrize('image, value', [(np.full((32, 32, 3), 200), 200), (np.full((32, 32, 3), .5), 128),
                                          (torch.full((3, 32, 32), .5, dtype=torch.bfloat16, requires_grad=True), 128)])
def test_images_are_bytes_or_from_0_to_1(image, value):
    crop = Crops(as_dataset([image]), 32, crop=centre_crop)[0].image
    assert crop.shape == (3, 32, 32) and (crop == value).all()


def test_arrays_have_rows_columns_and_channels():
    grey = Crops(as_dataset([np.full((32, 32, 1), 200)]), 32, crop=centre_crop)[0].image
    assert grey.shape == (3, 32, 32) and (grey == 200).all()
    for wrong in (np.zeros((3, 32, 40)), np.zeros((0, 32, 3))):
        with pytest.raises(BadInput, match=r'a sequence of ndarray \('): as_dataset([wrong])
    with pytest.raises(BadInput, match='true and false'): as_dataset([np.ones((32, 32, 3), bool)])


@pytest.mark.parametrize('value, wrong', [(np.nan, 'floating point'), (1.5, 'floating point'), (300, 'whole numbers')])
def test_images_of_other_numbers_are_refused(value, wrong):
    with pytest.raises(BadInput, match=f'images of {wrong}'): as_dataset([np.full((32, 32, 3), value)])
