"Teachers' own decoders, fed by somebody else."
import pytest
import torch
from torch.testing import assert_close

from radio_nb.agglomeration.resolutions import teachers_at
from radio_nb.data.crops import centre_crop
from radio_nb.data.images import decode, open_images
from radio_nb.evaluation.decoders import agreement, decoder_of, decoder_reads
from radio_nb.models.teachers import load_teacher
from radio_nb.models.zoo import ZOO
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features


@pytest.fixture(scope='module')
def images():
    rows = open_images('zoo:photos').select((4, 6, 20))
    return torch.stack([centre_crop(decode(row['image']), 64) for row in rows])/255


def test_who_has_a_decoder():
    assert decoder_reads(load_teacher('zoo:u2netp#64')) == 'spatial'
    assert decoder_reads(load_teacher('zoo:efficientnet-lite0')) == 'summary'
    assert decoder_reads(load_teacher('timm:resnet18@random#64')) == ''


def test_a_classifier_names_what_the_whole_network_names(images):
    teacher = load_teacher('zoo:efficientnet-lite0#64')
    with torch.no_grad(): whole = ZOO['efficientnet-lite0'].load().eval()((images - teacher.mean)/teacher.std)
    decoder, classes, own = decoder_of(teacher), whole.argmax(1), teacher(images)
    assert torch.equal(decoder(images), classes) and torch.equal(decoder(images, own), classes)
    other = decoder(images, Features(own.summary.roll(1, 0), torch.zeros(3, 1, 1, 1)))
    assert torch.equal(other, classes.roll(1))   # the summary alone decides


def test_a_mask_is_that_of_the_whole_network_and_takes_in_the_deepest_map(images):
    teacher = load_teacher('zoo:u2netp#64')
    with torch.no_grad(): whole = teacher.model((images - teacher.mean)/teacher.std)[:, 0] > .5
    decoder, own = decoder_of(teacher), teacher(images)
    assert torch.equal(decoder(images), whole) and torch.equal(decoder(images, own), whole)
    assert not torch.equal(decoder(images, own._replace(spatial=own.spatial + 9)), whole)
    finer = torch.nn.functional.interpolate(own.spatial.movedim(-1, 1), scale_factor=2, mode='nearest').movedim(1, -1)
    assert decoder(images, own._replace(spatial=finer)).shape == whole.shape   # a grid of another size is resampled


def test_a_teacher_may_see_other_sizes_or_have_no_decoder(images):
    wide, = teachers_at((64, 96), {'': load_teacher('zoo:u2netp#64')}, ('',), 32).values()
    assert decoder_of(wide)(images).shape == (3, 64, 96)
    with pytest.raises(BadInput, match='has no decoder'): decoder_of(load_teacher('timm:resnet18@random#64'))


def test_agreement():
    assert_close(agreement(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])), torch.tensor([1., 0, 1]))
    a, b = torch.zeros(3, 2, 2, dtype=torch.bool), torch.zeros(3, 2, 2, dtype=torch.bool)
    a[0, 0], b[0, :, 0], a[1] = True, True, True
    assert_close(agreement(a, b), torch.tensor([1/3, 0, 1]))   # both mark nothing: they agree
