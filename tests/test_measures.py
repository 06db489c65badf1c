"What `match`, `labelled` and `knn` cannot show well: random shapes and cuts, other libraries, chunks, broken sources."
import io
from math import isnan
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Value
from datasets import Features as Columns
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close

from radio_nb.data.labelled import features_of, in_order, labelled_images
from radio_nb.evaluation import knn
from radio_nb.evaluation.knn import knn_accuracy, knn_predict, nearest
from radio_nb.evaluation.match import Match, linear_cka, rankme, teacher_match
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.targets.moments import Moments
from radio_nb.targets.phi_s import fit_normalizer

quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def normal(*shape): return torch.randn(*shape, dtype=torch.float64)
def orthogonal(n): return torch.linalg.qr(normal(n, n)).Q


def hsic(x, y):
    "The estimate of HSIC from Gram matrices centred by H (Gretton et al. 2005), up to a factor."
    H = torch.eye(len(x), dtype=torch.float64) - 1/len(x)
    return (x @ x.T @ H @ y @ y.T @ H).trace()


@quick
@given(seeds, st.integers(3, 40), st.integers(1, 12), st.integers(1, 12), st.floats(-1e3, 1e3))
def test_cka_is_that_of_gram_matrices(seed, n, C, D, shift):
    torch.manual_seed(seed)
    x, y = normal(n, C), normal(n, D)
    wanted = hsic(x, y)/(hsic(x, x)*hsic(y, y)).sqrt()
    assert_close(linear_cka(x + shift, y - shift), wanted.item(), rtol=1e-7, atol=1e-9)
    assert_close(linear_cka(y, x), wanted.item(), rtol=1e-7, atol=1e-9)


@quick
@given(seeds, st.integers(3, 40), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_cka_is_blind_to_rotation_and_scale(seed, n, C, factor):
    torch.manual_seed(seed)
    x, y = normal(n, C), normal(n, 5)
    assert_close(linear_cka(x, -factor*x @ orthogonal(C) + 7), 1., rtol=1e-9, atol=0)
    assert_close(linear_cka(factor*x @ orthogonal(C), y), linear_cka(x, y), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('still', [torch.zeros(9, 2), torch.full((9, 2), 1e6/3)])
def test_what_is_constant_aligns_with_nothing(still):
    assert linear_cka(still, torch.randn(9, 3)) == linear_cka(torch.randn(9, 3), still) == 0.
    assert linear_cka(still, still) == 0.


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rankme_is_the_entropy_of_singular_values(seed, n, C, factor, mean):
    torch.manual_seed(seed)
    x = factor*(normal(n, C) + mean)
    p = torch.linalg.svdvals(x)
    p = p/p.sum() + 1e-7   # as the paper writes it
    assert_close(rankme(x), (-(p*p.log()).sum()).exp().item(), rtol=1e-4, atol=0)


@quick
@given(seeds, st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=8))
def test_rankme_of_a_known_spectrum(seed, spectrum):
    torch.manual_seed(seed)
    k, sigma = len(spectrum), torch.tensor(spectrum, dtype=torch.float64)
    sigma[sigma < 2e-7*sigma.max()] = sigma.max()
    x = torch.linalg.qr(normal(30, k)).Q*sigma @ torch.linalg.qr(normal(12, k)).Q.T   # of rank k in 12 channels
    p = sigma/sigma.sum()
    assert_close(rankme(x), (-(p*p.log()).sum()).exp().item(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_rankme_at_its_ends(dtype):
    assert_close(rankme(torch.eye(100, dtype=dtype)), 100.)
    assert_close(rankme(torch.ones(5000, 300, dtype=dtype)/3), 1.)
    assert_close(rankme(torch.randn(5000, 1)*torch.randn(1, 300)), 1., rtol=1e-4, atol=0)   # one but for rounding
    assert rankme(torch.zeros(5, 3, dtype=dtype)) == 0.


def grids(x, side=2):
    "Rows as grids of images, with the average as summary."
    spatial = x.view(-1, side, side, x.shape[-1])
    return Features(spatial.mean((1, 2)), spatial)


@quick
@given(seeds, st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.floats(-100, 100))
def test_a_stream_gives_what_the_whole_gives(seed, C, sizes, mean):
    torch.manual_seed(seed)
    y = torch.randn(4*sum(sizes), C) + mean
    x = (y + torch.randn_like(y)*torch.rand(C)).float()
    normalizer = fit_normalizer('standardize', Moments(C).update(y))
    match = Match(normalizer, thorough=True)
    for part in zip(*(rows.split([4*n for n in sizes]) for rows in (x, y))): match.update(*map(grids, part))
    found, (x, y) = match.result(), (x.double(), y.double())
    assert_close(found['cka'], linear_cka(x, y), rtol=1e-6, atol=1e-9)
    assert_close([found['rankme'], found['rankme_teacher']], [rankme(x), rankme(y)], rtol=1e-4, atol=0)
    def width(e): return (e.var(0, correction=0).max() - e.var(0, correction=0).min()).item()
    assert_close(found['error_range'], width(x - y), rtol=1e-7, atol=1e-10)
    assert_close(found['error_range_normalized'], width((x - y)*normalizer.weight), rtol=1e-6, atol=1e-9)


@quick
@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 1e6), st.floats(-1e6, 1e6))
def test_a_match_keeps_small_variances_beside_large_means(seed, sizes, mean, offset):
    "Variances and explained variance against two passes of NumPy, where sums of squares lose every digit."
    torch.manual_seed(seed)
    grids, match = [], Match()
    for n in [2, *sizes]:
        y = mean + .01*normal(n, 2, 2, 5)
        x = (y + offset + torch.linspace(.1, 1, 5)*normal(n, 2, 2, 5)).float()
        match.update(Features(x.mean((1, 2)), x), Features(y.mean((1, 2)), y))
        grids.append((x.double().reshape(-1, 5).numpy(), y.reshape(-1, 5).numpy()))
    x, y = (np.concatenate(rows) for rows in zip(*grids))
    variances, result = (x - y).var(0), match.result()
    assert result['error_range'] == pytest.approx(variances.max() - variances.min(), rel=1e-7)
    assert result['explained'] == pytest.approx(1 - ((x - y)**2).mean()/y.var(0).mean(), rel=1e-6, abs=1e-6)


def test_other_measures_stay_and_the_expensive_ones_are_optional():
    x, y = grids(torch.randn(16, 3)), grids(torch.randn(16, 3))
    def measured(*args, **kwargs):
        return teacher_match({'s': lambda _: {'t': x}}, {'t': lambda _: y}, [None], *args, **kwargs)['s']['t']
    plain, full = measured(), measured({'t': fit_normalizer('phi-s', Moments(3).update(y.spatial))}, thorough=True)
    assert list(plain) == ['explained', 'mse', 'cosine', 'summary_cosine', 'error_range']
    assert list(full) == [*plain, 'error_range_normalized', 'cka', 'rankme', 'rankme_teacher']
    assert all(full[name] == value for name, value in plain.items())


def test_isotropic_errors_have_no_range_after_phi_s():
    "By hand: e = c·Θ r with r of unit variance and unrelated channels has, normalized, variance c² in every channel."
    torch.manual_seed(0)
    y = normal(4000, 8) @ normal(8, 8)
    phi_s = fit_normalizer('phi-s', Moments(8).update(y))
    r = normal(4000, 8)
    r = torch.linalg.qr(r - r.mean(0)).Q*4000**.5   # covariance exactly the identity
    x = y + .5*(phi_s.inverse(r.float()) - phi_s.inverse(torch.zeros(1, 8))).double()
    found = Match(phi_s).update(grids(x.float()), grids(y.float())).result()
    assert_close(found['error_range_normalized'], 0., atol=1e-5, rtol=0)
    uneven = y + phi_s.inverse((r*torch.arange(1, 9)).float()).double()   # variances 1, 4, … 64 in normalized space
    found = Match(phi_s).update(grids(uneven.float()), grids(y.float())).result()
    assert_close(found['error_range_normalized'], 63., rtol=1e-4, atol=0)


@quick
@given(seeds, st.integers(1, 12), st.integers(2, 6), st.sampled_from([.07, .5, 10.]),
       st.sampled_from(['cosine', 'euclidean']))
def test_neighbours_vote_as_in_scikit_learn(seed, k, n_classes, temperature, metric):
    torch.manual_seed(seed)
    x, y, q = torch.randn(60, 8), torch.randint(n_classes, (60,)), torch.randn(30, 8)
    def similarity(distance): return 1 - distance if metric == 'cosine' else 1 - distance**2/2   # of unit vectors
    def weights(distance): return np.exp(similarity(distance)/temperature)
    oracle = KNeighborsClassifier(k, metric=metric, algorithm='brute', weights=weights)
    oracle.fit(F.normalize(x.double()), y)
    assert knn_predict(x, y, q, k, temperature).tolist() == oracle.predict(F.normalize(q.double())).tolist()


@quick
@given(seeds, st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
def test_chunks_change_nothing(seed, k, chunk, block):
    torch.manual_seed(seed)
    x, y, q = torch.randn(37, 5), torch.randint(3, (37,)), torch.randn(23, 5)
    whole = nearest(x, q, k), knn_predict(x, y, q, k)
    with patch.multiple(knn, CHUNK=chunk, BLOCK=block): assert_close((nearest(x, q, k), knn_predict(x, y, q, k)), whole)


def test_lengths_do_not_count_and_the_lower_of_two_equals_wins():
    x = torch.tensor([[1., 0], [-1, 0], [0, 1], [0, -1]])
    y, q = torch.tensor([9, 9, 4, 4]), torch.tensor([[1e-3, 1e-3], [1e6, 1e6], [0, 0]])
    assert knn_predict(x, y, q, k=4).tolist() == [4, 4, 4]
    assert knn_predict(x*torch.tensor([[1e5], [1], [1], [1]]), y, q + torch.tensor([1e-4, 0]), k=1).tolist()[0] == 9
    assert knn_predict(x, y, q[:0], k=4).shape == (0,)
    query = torch.tensor([[2., 1]])
    assert knn_predict(x.half(), y, query.half(), k=2, temperature=1e-3).tolist() == [9]   # exp(894) is not a float32


def test_a_class_is_found_in_itself():
    x, y = torch.randn(100, 7), torch.randint(10**6, (100,))
    assert knn_accuracy(x, y, 3*x, y, k=1) == 1.
    assert knn_accuracy(x, y, x, y + 1, k=1) < .1


@pytest.mark.parametrize('wrong, message', [
    (dict(k=51), 'k is 51, but must be from 1 to 50'), (dict(k=0), 'k is 0'),
    (dict(temperature=0.), 'temperature is 0'),
    (dict(train_y=torch.zeros(49).long()), r'labels of 50 references .* shape \(50,\)'),
    (dict(train_y=torch.zeros(50)), 'float32'), (dict(test_y=torch.zeros(3).long()), r'labels of 9 queries'),
    (dict(test_x=torch.zeros(9, 3)), r'\(50, 4\) and \(9, 3\)'),
    (dict(train_x=torch.full((50, 4), torch.nan)), 'NaN or infinity in 50 of 50 references'),
    (dict(test_x=torch.full((9, 4), torch.inf)), 'NaN or infinity in 9 of 9 queries'),
    (dict(test_x=torch.zeros(0, 4), test_y=torch.zeros(0).long()), 'no queries')])
def test_what_cannot_be_compared(wrong, message):
    good = dict(train_x=torch.randn(50, 4), train_y=torch.zeros(50).long(),
                test_x=torch.randn(9, 4), test_y=torch.zeros(9).long())
    with pytest.raises(BadInput, match=message): knn_accuracy(**good | wrong)


@pytest.mark.parametrize('measure', [linear_cka, lambda x, y: rankme(y)])
def test_measures_of_nothing_and_of_nan(measure):
    for y in (torch.ones(0, 2), torch.ones(3), torch.full((3, 2), torch.nan)):
        with pytest.raises(BadInput): measure(torch.ones(3, 2), y)


def cell(grey, side=32):
    file = io.BytesIO()
    Image.new('RGB', (side, side), (grey,)*3).save(file, 'PNG')
    return {'bytes': file.getvalue(), 'path': None}


def parquet(path, labels, kind, column='label'):
    rows = {'image': [cell(i) for i in range(len(labels))], column: labels}
    Dataset.from_dict(rows, Columns({'image': ImageColumn(), column: kind})).to_parquet(path)
    return str(path)


@pytest.mark.parametrize('labels, kind, numbers, names', [
    ([2, 0, 2], ClassLabel(names=['a', 'b', 'c']), [2, 0, 2], ['a', 'b', 'c']),
    ([1, 0, 1], Value('int64'), [1, 0, 1], ['0', '1']),
    (['dog', 'cat', 'dog'], Value('string'), [1, 0, 1], ['cat', 'dog'])])
def test_labels_of_parquet(tmp_path, labels, kind, numbers, names):
    images, found, found_names = labelled_images(parquet(tmp_path/'a.parquet', labels, kind))
    assert (found.tolist(), found_names, found.dtype) == (numbers, names, torch.int64)
    stream = torch.cat(list(in_order(images, 16, batch_size=2)))
    assert_close(stream[:, 0, 0, 0]*255, torch.arange(3.))   # every image in its place, none twice
    _, reversed_numbers, _ = labelled_images(parquet(tmp_path/'b.parquet', labels, kind), names[::-1])
    assert reversed_numbers.tolist() == [len(names) - 1 - n for n in numbers]


@pytest.mark.parametrize('labels, kind, column, message', [
    ([-1, -1], ClassLabel(names=['a', 'b']), 'label', 'has no labels: of none'),
    ([.5, 1.], Value('float32'), 'label', 'holds 0.5'),
    ([None, 1], Value('int64'), 'label', '1 of 2 images have no class'),
    ([-2, 1], Value('int64'), 'label', 'holds -2'),
    ([1, 2], Value('int64'), 'n', 'no column label; its columns are image, n')])
def test_labels_that_are_none(tmp_path, labels, kind, column, message):
    with pytest.raises(BadInput, match=message): labelled_images(parquet(tmp_path/'a.parquet', labels, kind, column))


def test_numbers_of_classes_are_in_the_order_of_numbers(tmp_path):
    names = [str(i) for i in (0, 2, 10)]
    for name in names:
        (tmp_path/'folder'/name).mkdir(parents=True)
        (tmp_path/'folder'/name/'1.png').write_bytes(cell(0)['bytes'])
    assert labelled_images(str(tmp_path/'folder'))[2] == names
    assert labelled_images(parquet(tmp_path/'a.parquet', ['10', '2', '0'], Value('string')))[2] == names


def test_a_teacher_that_says_nothing_leaves_nothing_to_explain():
    match = Match()
    nothing = torch.zeros(1, 0)
    match.update(Features(nothing, torch.randn(1, 1, 1, 4)), Features(nothing, torch.ones(1, 1, 1, 4)))
    assert isnan(match.result()['explained'])
    match = Match()   # the mean of three such numbers is none of them
    match.update(*(Features(torch.zeros(3, 0), torch.full((3, 1, 1, 1), x).double()) for x in (1., .1)))
    assert isnan(match.result()['explained'])


def test_folders(tmp_path):
    for i, name in enumerate(['b/1', 'a/2', 'a/deep/3', '.hidden/4', 'top']):
        (tmp_path/f'{name}.png').parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/f'{name}.png').write_bytes(cell(i)['bytes'])
    images, labels, names = labelled_images(str(tmp_path))
    assert (labels.tolist(), names) == ([0, 0, 1], ['a', 'b'])
    assert [int(255*x) for x in torch.cat(list(in_order(images, 16)))[:, 0, 0, 0]] == [1, 2, 0]
    with pytest.raises(BadInput, match='classes that are not among the names: b'):
        labelled_images(str(tmp_path), ['a', 'c'])
    with pytest.raises(BadInput, match='has no labels'): labelled_images(str(tmp_path/'b'))
    (tmp_path/'a'/'2.png').write_bytes(b'broken')
    with pytest.raises(BadInput, match=r'2\.png .*remove it'): list(in_order(images, 16))


@pytest.mark.parametrize('source, message', [
    ('zoo:photos', 'no labels'), ('stream:hf:x', 'leave out stream'), ('/no/where', 'no such folder')])
def test_sources_without_labels(source, message):
    with pytest.raises(BadInput, match=message): labelled_images(source)


def test_features_of_many_batches(capsys):
    batches = [torch.rand(n, 3, 4, 4) for n in (3, 1, 2)]
    found = features_of(lambda images: Features(images.mean((2, 3)).half(), images), batches, steps=3, what='colours')
    assert_close(found, torch.cat(batches).mean((2, 3)).half().float())
    assert 'colours 3/3' in capsys.readouterr().err
    with pytest.raises(BadInput, match='no images'): features_of(lambda images: None, [])
