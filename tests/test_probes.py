"What a chapter cannot show of the probes: invariances over random inputs, memory, and everything that is refused."
import radio_nb  # noqa: F401  before torchmetrics, so that torchvision can be imported

# isort: split
import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close
from torchmetrics.classification import MulticlassJaccardIndex

from radio_nb.data.files import Stopped
from radio_nb.evaluation.linear_probe import STRENGTHS, Rows, fit_classifier, linear_probe
from radio_nb.evaluation.segmentation import (
    cached_grids,
    confusion,
    iou_by_class,
    mean_iou,
    segment,
    segmentation_images,
    segmentation_probe,
)
from radio_nb.targets.bad_input import BadInput


def clouds(n=120, width=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(classes, width, generator=generator)[y] + torch.randn(n, width, generator=generator), y


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 5), st.integers(1, 12), st.sampled_from([3., .3, .03]), st.integers(0, 99))
def test_coefficients_are_those_of_scikit_learn(classes, width, l2, seed):
    x, y = clouds(100, width, classes, seed)
    x = ((x - x.mean(0))/x.std(0, correction=0)).double()
    weight, bias = fit_classifier(Rows(x, y), classes, l2)
    theirs = LogisticRegression(C=1/(len(x)*l2), tol=1e-10, max_iter=5000).fit(x, y)
    # scikit-learn has one weight vector for two classes: the difference of ours, under half of our penalty
    if classes == 2: theirs = LogisticRegression(C=2/(len(x)*l2), tol=1e-10, max_iter=5000).fit(x, y)
    expected = torch.from_numpy(theirs.predict_proba(x))
    assert_close((x @ weight.T + bias).softmax(1), expected, atol=1e-4, rtol=0)
    if classes > 2: assert_close(weight, torch.from_numpy(theirs.coef_), atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.floats(1e-3, 1e3))
def test_units_do_not_count(seed, scale):
    "Each channel scaled and shifted by something else: the same probe."
    x, y = clouds(seed=seed)
    other = x*scale*torch.linspace(.1, 10, x.shape[1]) - 3*scale
    a, b = (linear_probe(z[:80], y[:80], z[80:], y[80:], l2=.1, dtype=torch.float64)
            for z in (x.double(), other.double()))
    assert_close(a.classifier(x.double()), b.classifier(other.double()), atol=1e-3, rtol=0)
    assert a.accuracy == b.accuracy


def test_a_probe_is_the_same_twice_and_leaves_random_numbers_alone():
    x, y = clouds()
    torch.manual_seed(1)
    a = linear_probe(x[:80], y[:80], x[80:], y[80:])
    after = torch.rand(1)
    torch.manual_seed(1)
    assert_close(torch.rand(1), after, atol=0, rtol=0)
    b = linear_probe(x[:80], y[:80], x[80:], y[80:])
    assert a.accuracy == b.accuracy and a.tried == b.tried and tuple(a.tried) == STRENGTHS
    assert_close(a.classifier.weight, b.classifier.weight, atol=0, rtol=0)


def test_the_test_set_has_no_say_in_the_strength():
    x, y = clouds()
    a = linear_probe(x[:80], y[:80], x[80:], y[80:])
    b = linear_probe(x[:80], y[:80], -9*x[80:], y[80:])
    assert a.l2 == b.l2 and a.tried == b.tried


def test_features_from_inference_mode_dead_channels_and_single_precision():
    with torch.inference_mode(): x, y = clouds()
    x = torch.cat([x, torch.full((len(x), 1), 7.)], 1)
    double = linear_probe(x[:80], y[:80], x[80:], y[80:], l2=.1, dtype=torch.float64)
    single = linear_probe(x[:80], y[:80], x[80:], y[80:], l2=.1)
    assert double.classifier.weight[:, -1].abs().max() < 1e-6
    assert_close(single.classifier.weight.double(), double.classifier.weight, atol=1e-3, rtol=0)


def test_a_class_that_training_never_saw_is_never_right():
    x, y = clouds()
    assert linear_probe(x, y, x[:3], torch.tensor([3, 3, 3]), l2=.1).accuracy == 0


def test_as_accurate_as_the_best_of_scikit_learn():
    "Over the same strengths, on all of the training set: within .3 points, though the choice sees a fifth of it only."
    x, y = clouds(4500, 30, 20)
    ours = linear_probe(x[:1500], y[:1500], x[1500:], y[1500:])
    standard = (x - x[:1500].mean(0))/x[:1500].std(0, correction=0)
    def theirs(l2): return LogisticRegression(C=1/(1500*l2), max_iter=1000).fit(standard[:1500], y[:1500])
    best = max(theirs(l2).score(standard[1500:], y[1500:]) for l2 in STRENGTHS)
    assert ours.accuracy > best - .003


def test_a_probe_shows_how_far_it_is_and_can_be_stopped(capsys):
    x, y = clouds()
    linear_probe(x[:80], y[:80], x[80:], y[80:], what='probe of clip')
    assert 'probe of clip 700/700' in capsys.readouterr().err
    linear_probe(x[:80], y[:80], x[80:], y[80:])
    assert capsys.readouterr().err == ''
    asked = iter([False]*20 + [True])
    with pytest.raises(Stopped, match='the linear probe was stopped'):
        linear_probe(x[:80], y[:80], x[80:], y[80:], stopped=lambda: next(asked))
    with pytest.raises(StopIteration): next(asked)


def test_a_probe_holds_blocks_and_not_the_summaries(tmp_path):
    """40,000 × 1000 in half precision, mapped from a file, are 76 MiB; in float32 they would be 153, in float64 305.

    In a process of its own, which sees the file's own pages as part of what it holds.
    """
    code = """if True:
        import resource, sys
        import numpy as np, torch
        from radio_nb.evaluation.linear_probe import linear_probe
        torch.set_num_threads(1)
        x = np.memmap(sys.argv[1], np.float16, 'w+', shape=(40_000, 1000))
        for i in range(0, len(x), 1000): x[i:i+1000] = np.random.default_rng(i).standard_normal((1000, 1000))
        x, y = torch.from_numpy(x), torch.arange(40_000) % 50
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
        linear_probe(x[:4096], y[:4096], x[:9], y[:9], l2=100.)
        before = peak()
        linear_probe(x, y, x[:4096], y[:4096], l2=100.)
        print(peak() - before)"""
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'x'], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '131072'})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40, done.stdout


@pytest.mark.parametrize('change, message', [
    (lambda x, y: (x[:, 0], y, x, y),
     r'the training set needs summaries \(n, C\) and classes \(n,\), not \(120,\) and \(120,\)'),
    (lambda x, y: (x, y, x, y[:5]), 'the test set needs summaries'),
    (lambda x, y: (x/0, y, x, y), 'the summaries of the training set are not all finite'),
    (lambda x, y: (x, 0*y, x, y), 'a probe needs five training images or more, of two classes or more'),
    (lambda x, y: (x, y - 1, x, y), 'classes are numbered from 0'),
    (lambda x, y: (x, y, x[:, :2], y), 'the training set has summaries of 6 channels and the test set of 2'),
    (lambda x, y: (x, y, x[:0], y[:0]), 'the test set is empty'),
])
def test_sets_that_do_not_fit_are_refused(change, message):
    with pytest.raises(BadInput, match=message): linear_probe(*change(*clouds()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999), st.booleans())
def test_mean_iou_is_that_of_torchmetrics(classes, seed, inside):
    "Also where void has the number behind the last class, as in CamVid."
    random = torch.Generator().manual_seed(seed)
    ignore = classes if inside else 255
    truth, predicted = (torch.randint(classes, (3, 5, 7), generator=random) for _ in range(2))
    truth[torch.rand(truth.shape, generator=random) < .3] = ignore
    table = sum(confusion(p, t, classes, ignore) for p, t in zip(predicted, truth))
    if classes > 1:
        metric = MulticlassJaccardIndex(classes, average=None, ignore_index=ignore)
        # a class that is nowhere is 0 there and nan here
        assert_close(iou_by_class(table).nan_to_num(0).float(), metric(predicted, truth), atol=1e-6, rtol=0)
    assert table.sum() == (truth != ignore).sum()
    assert mean_iou(confusion(truth.clamp_max(classes - 1), truth, classes, ignore)) == 1


def grids(n=24, classes=3, seed=0):
    "Grids whose first channels are the class that lies there, with noise."
    random = torch.Generator().manual_seed(seed)
    where = torch.randint(classes, (n, 3, 4), generator=random)
    x = torch.eye(classes)[where] + .3*torch.randn(n, 3, 4, classes, generator=random)
    masks = where.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    return x, masks


def test_what_is_there_is_found_and_the_seed_decides_only_the_order_of_images():
    train, test = grids(), grids(seed=1)
    torch.manual_seed(5)
    probes = [segmentation_probe(train, test, 3, epochs=30, lr=3e-2, seed=seed) for seed in (0, 0, 1)]
    assert probes[0].miou > .6
    assert_close(probes[0].confusion, probes[1].confusion, atol=0, rtol=0)
    assert_close(probes[0].miou, probes[2].miou, atol=.03, rtol=0)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert_close(after, torch.rand(1), atol=0, rtol=0)


def test_void_teaches_nothing():
    "A mask of nothing but void moves no weight and does no harm to the others."
    (x, masks), test = grids(), grids(seed=1)
    masks[:, :8] = 255
    masks[0] = 255
    first = segmentation_probe((x, masks), test, 3, epochs=3)
    assert first.head[1].weight.isfinite().all() and first.head[1].weight.any()
    alone = segmentation_probe((x[:1], masks[:1]), test, 3, epochs=2, batch_size=1)
    assert_close(alone.head[1].weight, torch.zeros(3, 3, 1, 1), atol=0, rtol=0)


@pytest.mark.parametrize('unit', [1e-5, 1e-3, .1, 100.])
def test_the_unit_of_grids_does_not_count(unit):
    (x, masks), (y, test_masks) = grids(8), grids(seed=1)
    probes = [segmentation_probe((u*x + 3*u, masks), (u*y + 3*u, test_masks), 3) for u in (1., unit)]
    assert_close(probes[0].miou, probes[1].miou, atol=.01, rtol=0)


def test_what_does_not_count_is_no_answer():
    (x, masks), (y, test_masks) = grids(), grids(seed=1)
    masks[masks == 0] = 255   # the first class is void in both
    probe = segmentation_probe((x, masks.where(masks != 255, 0)), (y, test_masks), 3, ignore=0, epochs=1, lr=0)
    assert probe.confusion[:, 0].sum() == 0 and probe.confusion.sum() == (test_masks != 0).sum()
    probes = [segmentation_probe((x, masks.where(masks != 255, 0)), (y, test_masks), 3, ignore=no) for no in (-1, 255)]
    assert torch.equal(*(probe.confusion for probe in probes)) and probes[0].confusion[:, 2].sum()   # no class is -1


def test_logits_are_resized_and_not_classes():
    "Halfway between two positions the border is where the logits cross, not at the edge of a position."
    head = torch.nn.Conv2d(1, 2, 1)
    head.weight.data, head.bias.data = torch.tensor([1., -1]).reshape(2, 1, 1, 1), torch.zeros(2)
    classes = segment(head, torch.tensor([3., -1]).reshape(1, 1, 2, 1), (1, 16)).argmax(1)[0, 0]
    assert 8 < (classes == 0).sum() <= 11


def test_half_precision_where_it_is_enough():
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    def spatial(images): return images[:, :, :2, :2].movedim(1, -1)
    assert cached_grids(spatial, [(torch.ones(2, 3, 4, 4), masks)])[0].dtype == torch.float16
    mixed, _ = cached_grids(spatial, [(torch.ones(2, 3, 4, 4), masks), (torch.full((2, 3, 4, 4), 1e5), masks)])
    assert mixed.dtype == torch.float32 and mixed.max() == 1e5
    with pytest.raises(BadInput, match='there are no labelled images'): cached_grids(spatial, [])


@pytest.mark.parametrize('change, message', [
    (lambda x, m: ((x, m[:3]), (x, m)), 'the training set needs grids'),
    (lambda x, m: ((x, m), (x[0], m)), 'the test set needs grids'),
    (lambda x, m: ((x, m + 1), (x, m)),
     'the masks of the training set have class 3, but there are 3 classes and 255 is ignored'),
    (lambda x, m: ((x, m), (x[..., :2], m)), 'the training set has grids of 3 channels and the test set of 2'),
    (lambda x, m: ((x, m), (x[:0], m[:0])), 'the test set is empty'),
])
def test_grids_that_do_not_fit_are_refused(change, message):
    with pytest.raises(BadInput, match=message): segmentation_probe(*change(*grids()), 3)


def png(array, mode='L'):
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, 'PNG')
    return {'bytes': out.getvalue(), 'path': None}


def parquet(path, rows, **columns):
    columns = columns or {'image': ImageColumn(), 'mask': ImageColumn()}
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
    return path


ramp = np.arange(48*80, dtype=np.uint8).reshape(48, 80) % 5


def test_masks_keep_their_numbers_and_images_their_place(tmp_path):
    "Sides are rounded to multiples of 32; every second pixel of a mask is one of its numbers; palettes are numbers."
    left = np.zeros((48, 80), np.uint8)
    left[:, :40] = 255
    image, mask = png(left, 'RGB'), (left > 0)*np.uint8(4)
    file = parquet(tmp_path/'a.parquet', [{'image': image, 'mask': png(mask, mode)} for mode in ('L', 'P', 'L')])
    batches = list(segmentation_images(file, batch_size=2))
    assert [len(images) for images, _ in batches] == [2, 1]
    images, masks = batches[0]
    assert images.shape == (2, 3, 64, 96) and masks.shape == (2, 64, 96)   # 48 lies halfway
    assert masks.dtype == torch.uint8
    assert_close(images.max(), torch.tensor(1.))
    assert set(masks[0].unique().tolist()) == {0, 4}
    assert ((images[0, 0] > .5) == (masks[0] == 4)).float().mean() > .98
    assert next(segmentation_images(file, 32))[0].shape == (3, 3, 32, 32)


def test_columns_without_metadata_are_pictures_too(tmp_path):
    "Parquet that another program wrote has structs of bytes and path."
    picture = {'bytes': Value('binary'), 'path': Value('string')}
    file = parquet(tmp_path/'a.parquet', [{'image': png(ramp, 'RGB'), 'mask': png(ramp)}], image=picture, mask=picture)
    assert next(segmentation_images(tmp_path, 32))[1].max() == 4 and file.exists()


@pytest.mark.parametrize('row, message', [
    ({'image': png(ramp, 'RGB'), 'mask': png(ramp, 'RGB')},
     'the mask in row 0 of .* has the mode RGB: a mask is an 8-bit picture'),
    ({'image': png(ramp, 'RGB'), 'mask': None}, 'the mask in row 0 of .* is missing'),
    ({'image': png(ramp, 'RGB'), 'mask': {'bytes': b'no picture', 'path': None}},
     'the mask in row 0 of .* cannot be read'),
    ({'image': {'bytes': b'no picture', 'path': None}, 'mask': png(ramp)},
     'the image in row 0 of .* cannot be identified as an image'),
    ({'image': png(ramp, 'RGB'), 'mask': png(ramp.T.copy())},
     'the mask in row 0 of .* is 48 × 80 pixels and its image 80 × 48'),
])
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    with pytest.raises(BadInput, match=message): next(segmentation_images(parquet(tmp_path/'a.parquet', [row]), 32))


@pytest.mark.parametrize('turn, refused', [(1, False), (3, True), (6, True)])
def test_an_image_that_would_be_turned_beside_its_mask_is_refused(tmp_path, turn, refused):
    "The image was turned, and its mask was not: 180° were no error, and wrong everywhere."
    entry, file = Image.Exif(), io.BytesIO()
    entry[0x0112] = turn
    Image.fromarray(ramp).convert('RGB').save(file, 'JPEG', exif=entry)
    rows = [{'image': {'bytes': file.getvalue(), 'path': None}, 'mask': png(ramp if turn < 5 else ramp.T.copy())}]
    images = segmentation_images(parquet(tmp_path/'a.parquet', rows), 32)
    if refused:
        with pytest.raises(BadInput, match='is to be turned, says its EXIF entry'): next(images)
    else: assert next(images)[0].shape == (1, 3, 32, 32)


def test_a_probe_of_grids_of_one_position_gets_no_batch_of_one_image():
    def images(n): return torch.randn(n, 1, 1, 4), torch.randint(0, 2, (n, 4, 4), dtype=torch.uint8)
    assert 0 <= segmentation_probe(images(17), images(3), 2, epochs=1).miou <= 1
    for n in (0, 1):
        with pytest.raises(BadInput, match='needs two positions or more'): segmentation_probe(images(n), images(3), 2)


@pytest.mark.parametrize('options, message', [({'l2': -1.}, 'the penalty l2 is -1.0, but must be 0 or more'),
                                              ({'strengths': ()}, 'strengths: there is none to choose from')])
def test_a_penalty_that_is_none_is_refused(options, message):
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    with pytest.raises(BadInput, match=message): linear_probe(x, y, x, y, **options)


def test_sources_that_are_none_are_refused(tmp_path):
    with pytest.raises(BadInput, match='no Parquet file at'): next(segmentation_images(tmp_path))
    (tmp_path/'broken.parquet').write_bytes(b'PAR1 not')
    with pytest.raises(BadInput, match='could not be loaded'): next(segmentation_images(tmp_path/'broken.parquet'))
    file = parquet(tmp_path/'a.parquet', [{'image': png(ramp, 'RGB'), 'mask': png(ramp)}])
    with pytest.raises(BadInput, match='both sides of the images must be multiples of 32, not 40 × 64'):
        next(segmentation_images(file, (40, 64)))
