"The pictures to touch: widgets moved as a hand would, and the vectors that a page carries."
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from radio_nb.front.explore import cloud_between, clouds, packed, similarity, similarity_html, unpacked

pytest.importorskip('ipywidgets')
pytest.importorskip('anywidget')
from radio_nb.front.explore import NormalizerExplorer, SimilarityExplorer, similarity_figure  # noqa: E402


@pytest.fixture
def explorer():
    torch.manual_seed(0)
    images, teacher = torch.rand(2, 3, 32, 48), torch.randn(2, 4, 6, 10)
    students = {f'step {i}': {'clip': torch.randn(2, 8, 12, 10), 'backbone': torch.randn(2, 8, 12, 7)} for i in (1, 2)}
    return SimilarityExplorer(images, {'clip': teacher, 'an inner layer': teacher[..., :5]}, students,
                              {'clip': {'double': lambda grid: 2*grid - 1}})


@pytest.mark.parametrize('name, value', [('image', 1), ('teacher', 'an inner layer'), ('normalizer', 'double'),
                                         ('student', 'backbone'), ('trained for', 'step 1'), ('row', 0),
                                         ('column', 11)])
def test_every_control_changes_the_picture(explorer, name, value):
    before = [trace.to_plotly_json() for trace in explorer.figure.data]
    explorer.controls[name].value = value
    after = [trace.to_plotly_json() for trace in explorer.figure.data]
    assert str(before) != str(after)
    still = explorer.still()
    for live, other in zip(explorer.figure.data[1:3], still.data[1:3]): assert (live.z == other.z).all()
    assert explorer.figure.layout.annotations[1].text == explorer['teacher']


def test_a_click_moves_row_and_column_also_at_the_edge(explorer):
    for x, y, row, column in ((.5, .5, 4, 6), (0, 0, 0, 0), (1, 1, 7, 11)):
        explorer.click(None, SimpleNamespace(xs=[x], ys=[y]), None)
        assert (explorer['row'], explorer['column']) == (row, column)
    explorer.click(None, SimpleNamespace(xs=[], ys=[]), None)   # beside everything


def test_a_teacher_without_a_head_is_compared_with_the_backbone(explorer):
    explorer.controls['teacher'].value = 'an inner layer'
    assert list(explorer.maps()) == ['an inner layer', 'student, backbone']


def test_the_cloud_passes_through_every_normalizer():
    torch.manual_seed(0)
    turning = NormalizerExplorer(torch.randn(50, 2) @ torch.tensor([[2., 1.], [0., .3]]))
    for i, points in enumerate(turning.clouds.values()):
        turning.slider.value = i
        torch.testing.assert_close(torch.tensor(turning.figure.data[0].x), points[:, 0])
    turning.slider.value = .5
    assert turning.figure.layout.annotations[0].text.startswith('from none to global: ')


def test_features_that_carry_a_gradient_can_be_looked_at():
    "A student's own do; the slider ended in numpy's complaint."
    turning = NormalizerExplorer(torch.randn(50, 2).requires_grad_())
    turning.slider.value = 1.5
    assert len(turning.still().data) == len(turning.clouds)


def test_half_way_lies_half_way():
    after = clouds(torch.randn(20, 2))
    torch.testing.assert_close(cloud_between(after, .5), (after['none'] + after['global'])/2)
    torch.testing.assert_close(cloud_between(after, len(after) - 1), after['phi-s'])


@pytest.mark.parametrize('shape', [(1, 1, 3), (5, 7, 200), (16, 16, 1280), (40, 20, 64)])
def test_packed_vectors_keep_their_cosines(shape):
    torch.manual_seed(0)
    grid = torch.randn(shape) @ torch.diag(.9**torch.arange(shape[-1])) + .1
    size, at = tuple(min(16, n) for n in shape[:2]), (.3, .8)
    small = torch.nn.functional.adaptive_avg_pool2d(grid.movedim(-1, 0), size).movedim(0, -1)
    torch.testing.assert_close(similarity(unpacked(packed(grid)), at), similarity(small, at), atol=.04, rtol=0)


def test_names_and_broken_features_do_no_harm_in_a_page():
    evil, grids = '</script><img src=x onerror=alert(1)>', torch.full((1, 2, 2, 3), float('nan'))
    part = similarity_html([Image.new('RGB', (20, 20))], {evil: grids}, {evil: grids})
    assert evil not in part and '<img src=x' not in part
    assert json.loads(part.partition('application/json">')[2].partition('</script>')[0])['teachers'] == [evil]


def test_no_trace_that_is_clicked_on_is_deaf():
    "A browser sends no click from a trace whose `hoverinfo` is 'skip'; the mark of the place lets it through."
    figure = similarity_figure(torch.rand(3, 16, 16), {'a': torch.rand(4, 4)}, (.5, .5))
    deaf = [trace.type for trace in figure.data if trace.hoverinfo == 'skip']
    assert 'image' not in deaf and 'heatmap' not in deaf
