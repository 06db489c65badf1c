"Rate, distortion and bottleneck: properties over random inputs, and a run that uses them."
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import kill, same_weights, start, wait_for
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from radio_nb.cifd import rate_distortion
from radio_nb.cifd.cifd import CIFDLoss, compressed, fit_rd_modules, load_rd_modules
from radio_nb.cifd.controlled_flow import Bottleneck, ControlledFlowLoss, ModelOutput, TokenBottleneck
from radio_nb.cifd.rate_distortion import (
    EntropyModel,
    RateDistortion,
    fit_modules,
    gaussian_bits,
    measure_modules,
    rate_distortion_loss,
    water_filling,
)
from radio_nb.front.cli import main
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.bad_input import BadInput
from radio_nb.targets.features import Features
from radio_nb.training.preparation import new_student
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import check_recipe
from radio_nb.training.trainer import DistillStep, Trainer

CIFD_ARGS = [*SMALL, '--information', '10', '1', '--information-steps', '5']


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(.1, 3))
def test_any_density_rises_and_adds_up_to_one(seed, spread):
    torch.manual_seed(seed)
    density = EntropyModel(3)
    with torch.no_grad():
        for parameter in density.parameters(): parameter.normal_(0, spread)
    k = torch.arange(-3000., 3001)[:, None].expand(-1, 3)
    with torch.no_grad():
        assert (density.logits(k)[1:] >= density.logits(k)[:-1]).all()
        top, bottom = (torch.sigmoid(density.logits(torch.full((1, 3), end))) for end in (3000.5, -3000.5))
        mass = torch.exp2(-density.bits(k).double()).sum(0)
    assert_close(mass, (top - bottom)[0].double(), atol=6001*1e-9 + 1e-3, rtol=0)   # each term is at least 1e-9


def test_bits_do_not_depend_on_shape_or_autocast():
    torch.manual_seed(0)
    density, y = EntropyModel(4), torch.randn(2, 3, 5, 4)*4
    bits = density.bits(y)
    assert bits.shape == y.shape and bits.dtype == torch.float32 and (bits > 0).all()
    assert_close(bits.view(-1, 4), density.bits(y.view(-1, 4)), rtol=0, atol=0)
    with torch.autocast('cpu', torch.bfloat16): assert_close(density.bits(y), bits, rtol=0, atol=0)


def test_the_most_absurd_value_has_finite_bits_and_gradients():
    density, y = EntropyModel(2), torch.tensor([[1e8, -1e30], [3e4, 0.]], requires_grad=True)
    bits = density.bits(y)
    bits.sum().backward()
    assert bits.isfinite().all() and (bits <= rate_distortion.MOST_BITS + 1e-4).all() and y.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in density.parameters())


def test_bits_are_differentiable_in_code_and_density():
    torch.manual_seed(0)
    density = EntropyModel(3).double()
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def nats(y, *parameters):
        named = dict(zip([name for name, _ in density.named_parameters()], parameters))
        state = {f'density.{name}': parameter for name, parameter in named.items()}
        upper, lower = (torch.func.functional_call(Logits(density), state, (y + half,)) for half in (.5, -.5))
        return rate_distortion._log_mass(upper, lower)

    class Logits(torch.nn.Module):
        def __init__(self, density):
            super().__init__()
            self.density = density

        def forward(self, y): return self.density.logits(y)

    assert torch.autograd.gradcheck(nats, (y, *(p.detach().clone().requires_grad_() for p in density.parameters())))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(1e-3, .999))
def test_water_filling_and_its_inverse_agree(eigenvalues, share):
    eigenvalues = torch.tensor(eigenvalues, dtype=torch.float64)
    distortion, bits = water_filling(eigenvalues, share*eigenvalues.max().item())
    assert gaussian_bits(eigenvalues, distortion.item()) == pytest.approx(bits.item(), abs=1e-6)
    # one level for all directions costs no less than that of the mean variance
    least = distortion.item()/len(eigenvalues)
    assert bits <= .5*len(eigenvalues)*torch.log2(eigenvalues.mean()/least).item() + 1e-9


def test_equal_variances_have_a_closed_form():
    assert gaussian_bits(torch.full((8,), 3.), 6.) == pytest.approx(8*.5*torch.tensor(4.).log2().item())


def test_a_batch_of_modules_is_as_many_single_ones(monkeypatch):
    # without noise, which would be drawn in another order
    monkeypatch.setattr(rate_distortion, 'noise_or_round', lambda code, training: code)
    torch.manual_seed(0)
    x, rates = torch.randn(32, 6), (1., 10., 100.)
    together = RateDistortion(6, *rates, hidden=8)
    with torch.no_grad():
        for maps in (together.encoder, together.decoder): maps.out.weight.normal_()
    losses = rate_distortion_loss(together, x, together(x))
    losses.sum().backward()
    for i, rate in enumerate(rates):
        alone = RateDistortion(6, rate, hidden=8)
        own, theirs = dict(alone.named_parameters()), dict(together.named_parameters())
        for name, parameter in own.items():
            part = slice(6*i, 6*i + 6) if name.startswith('density') else slice(i, i + 1)
            parameter.data.copy_(theirs[name].data[part])
        loss = rate_distortion_loss(alone, x, alone(x))
        loss.sum().backward()
        assert_close(loss[0], losses[i], rtol=1e-5, atol=1e-5)
        for name, parameter in own.items():
            part = slice(6*i, 6*i + 6) if name.startswith('density') else slice(i, i + 1)
            assert_close(parameter.grad, theirs[name].grad[part], rtol=1e-3, atol=1e-4)


def test_fitting_is_repeatable_and_leaves_the_generator_alone():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    def fitted():
        torch.manual_seed(1)
        modules = fit_modules(RateDistortion(4, 1., 10., hidden=4), x, steps=5)
        return modules, torch.rand(1)
    (a, after_a), (b, after_b) = fitted(), fitted()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert torch.equal(after_a, after_b) and not a.training


def test_evaluation_rounds():
    torch.manual_seed(0)
    modules, x = RateDistortion(4, 10.).eval(), torch.randn(3, 5, 4)
    code = modules.encode(x)
    assert torch.equal(code, code.round())
    output = modules(x)
    assert output.reconstruction.shape == (1, 3, 5, 4) and output.bits.shape == (1, 3, 5) and output.logits is None
    assert_close(output.reconstruction, modules(x).reconstruction, rtol=0, atol=0)


def test_measuring_in_batches_changes_nothing():
    torch.manual_seed(0)
    modules, x = RateDistortion(4, 1., 10.), torch.randn(50, 4)
    whole, batches = measure_modules(modules, x), measure_modules(modules, x, batch_size=7)
    assert modules.training
    for a, b in zip(whole, batches): assert a == pytest.approx(b)


def test_a_bottleneck_can_be_left_out_in_evaluation():
    w = torch.randn(2, 7, 16)
    bottleneck = Bottleneck(16)
    assert not torch.equal(bottleneck(w), w) and bottleneck.bits.shape == (2, 7)
    assert bottleneck.eval()(w) is w


def test_a_token_bottleneck_adds_the_noise_of_one_call():
    torch.manual_seed(0)
    features, bottleneck = Features(torch.randn(2, 3, 8), torch.randn(2, 4, 5, 8)), TokenBottleneck(8)
    together = torch.cat([features.summary, features.spatial.flatten(1, 2)], 1)
    torch.manual_seed(1)
    noisy = Bottleneck.forward(bottleneck, together)
    torch.manual_seed(1)
    tokens, spatial = bottleneck(features)
    assert torch.equal(tokens, noisy[:, :3]) and torch.equal(spatial, noisy[:, 3:].view(2, 4, 5, 8))
    assert bottleneck.bits.shape == (2, 23)
    assert bottleneck.eval()(features) is features and bottleneck.bits is None


def test_every_source_may_be_left_out():
    loss = ControlledFlowLoss({'teacher': 1., 'R=1': 1.})
    x, y = ModelOutput(torch.ones(2, 3).requires_grad_()), ModelOutput(torch.zeros(2, 3))
    total, terms = loss(x, {'teacher': y, 'R=1': y}, kept={'teacher': False, 'R=1': False})
    total.backward()   # a step like any other
    assert total == 0 and not x.embedding.grad.any() and terms['teacher'] == terms['R=1'] == 1


def test_dropout_is_the_same_program_whatever_is_left_out():
    "Each other set of truths was a program of its own, and behind the eighth nothing was compiled any more."
    torch._dynamo.reset()
    counter, loss = CompileCounter(), ControlledFlowLoss({'teacher': 1., 'R=1': 1.}, dropout=.5)
    y = ModelOutput(torch.zeros(2, 3))
    def step(x): return loss(ModelOutput(x), {'teacher': y, 'R=1': y})[0]
    torch.manual_seed(0)
    expected = [step(torch.ones(2, 3)).item() for _ in range(20)]
    compiled = torch.compile(step, backend=counter)
    torch.manual_seed(0)
    assert [compiled(torch.ones(2, 3)).item() for _ in range(20)] == expected and {*expected} == {0., 1., 2.}
    assert counter.frame_count == 1


def test_the_density_of_a_bottleneck_keeps_up_in_a_run():
    "It learns as fast as that of modules does, and is not shrunk; everything else is as it was."
    recipe = Recipe('', ('zoo:u2netp#64',), '', size=64, depth=1, information=(1.,), lr=1e-3)
    widths = {'u2netp': (64, 64)}
    student = new_student(recipe, widths)
    loss = MultiTeacherLoss('phi-s', {'u2netp': 1.}, {'u2netp': 1.})
    trainer = Trainer(DistillStep(student, loss), recipe, torch.device('cpu'))
    density = {id(p) for p in student.neck.density.parameters()}
    groups = trainer.state.optimizer.param_groups
    [own] = [group for group in groups if any(id(p) in density for p in group['params'])]
    assert {id(p) for p in own['params']} == density and own['weight_decay'] == 0 and own['lr_scale'] == 10
    rest = [p for group in groups if group is not own for p in group['params']]
    assert len(rest) == len({*map(id, rest)}) and {*map(id, rest)} == {id(p) for p in student.parameters()} - density
    assert all('lr_scale' not in group for group in groups if group is not own)


def test_rates_need_targets_of_one_scale():
    recipe = Recipe('zoo:photos', ('zoo:u2netp',), 'runs/a', information=(10., 1.))
    check_recipe(recipe)
    with pytest.raises(BadInput, match='information: method mse leaves features as they are'):
        check_recipe(replace(recipe, method='mse'))


def test_modules_round_from_the_beginning_and_have_rates_in_common():
    torch.manual_seed(0)
    x, make = torch.randn(5, 4), partial(RateDistortion, 4, hidden=4)
    loss = CIFDLoss({'a': make(1.)}, {'a': 1.})
    assert torch.equal(compressed(loss.coders[0], x), compressed(loss.coders[0], x))
    with pytest.raises(BadInput, match='must have the same rates'):
        CIFDLoss({'a': make(1., 10.), 'b': make(5.)}, {'a': 1.})


def test_a_module_counts_with_its_weight_in_its_divergence_too():
    "CIFD's equation in float64: with two KL of 1 and a weight of .25 they are 1.25 together, not 2."
    torch.manual_seed(0)
    student, teacher, module = (ModelOutput(*torch.randn(2, 4, 3, dtype=torch.float64)) for _ in range(3))
    loss = ControlledFlowLoss({'teacher': 1., 'R=1': .25}, soft_labels=.7, temperature=2.).eval()
    labels = torch.tensor([0, 2, 1, 1])
    total, _ = loss(student, {'teacher': teacher, 'R=1': module}, labels=labels)
    expected = -student.logits.float().log_softmax(-1)[range(4), labels].mean().double()
    q = (student.logits.float()/2).softmax(-1).double()
    for source, weight in (teacher, 1.), (module, .25):
        p = (source.logits.float()/2).softmax(-1).double()
        distance = ((student.embedding - source.embedding)**2).mean()
        expected = expected + weight*(distance + .7*4*(p*(p/q).log()).sum(-1).mean())
    assert_close(total, expected, rtol=1e-6, atol=0)


def test_the_padding_is_of_no_consequence_to_modules():
    "A mask holds for the reconstructions as it does for the teacher."
    torch.manual_seed(0)
    modules, mask = {'a': RateDistortion(3, 1., 10.).eval()}, torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, :, 2:] = False
    teacher, found = torch.randn(2, 4, 4, 3), []
    for padding in 0., 50.:
        student = torch.ones(2, 4, 4, 3).requires_grad_()
        target = {'a': Features(torch.zeros(2, 1), teacher.masked_fill(~mask[..., None], padding))}
        loss = CIFDLoss(modules, {'a': 1.}, dropout=0.)
        total, _ = loss({'a': Features(torch.zeros(2, 1), student)}, target, masks={'a': mask})
        found.append(torch.autograd.grad(total, student)[0])
    assert torch.equal(*found) and not found[0][~mask].any() and found[0][mask].all()


def test_a_teacher_without_weight_gets_no_modules():
    torch.manual_seed(0)
    modules = {name: RateDistortion(3, 1.).eval() for name in 'ab'}
    features = {name: Features(torch.zeros(1, 2), torch.randn(1, 2, 2, 3)) for name in 'ab'}
    total, terms = CIFDLoss(modules, {'a': 0., 'b': 2.}, dropout=0.)(features, features)
    assert terms['a'] == {} and set(terms['b']) == {'R=1'}
    assert_close(total, 2*terms['b']['R=1'])


def test_modules_come_back_from_their_tensors():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    x = x*torch.tensor([3., 2., 1., 1., .01, .01, .01, .01])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    modules, curve = fit_rd_modules(x, (1., 10.), steps=3)
    assert torch.equal(torch.rand(1), expected)   # whoever draws next gets what it would have got
    assert curve['code'] == 4 and curve['width'] == 8 and curve['vectors'] == 200
    assert_close(load_rd_modules(modules.state_dict())(x).reconstruction, modules(x).reconstruction, rtol=0, atol=0)


@pytest.fixture(scope='module')
def cifd_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('cifd')/'run'
    main(['distill', *CIFD_ARGS, '--out', str(out)])
    return out


def test_a_run_reports_its_modules(cifd_run):
    lines = [json.loads(line) for line in (cifd_run/'metrics.jsonl').open()]
    assert all(set(line['teachers']['u2netp']) == {'summary', 'spatial', 'R=10', 'R=1'} for line in lines)
    assert all(line['bits'] > 0 for line in lines)
    report = (cifd_run/'report.html').read_text()
    assert all(text in report for text in ('Rate and distortion', 'modules with R = 10', 'Bits of the student'))
    assert 'bottleneck' not in ' '.join(same_keys(cifd_run))


def same_keys(folder):
    from safetensors import safe_open
    with safe_open(folder/'student.safetensors', 'pt') as file: return list(file.keys())


def test_a_run_with_modules_and_no_bottleneck(tmp_path):
    main(['distill', *CIFD_ARGS, '--bottleneck', '0', '--balance', 'ada', '--out', str(tmp_path/'run')])
    lines = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').open()]
    assert len(lines) == 6 and not any('bits' in line for line in lines)


@pytest.mark.parametrize('moment', ['statistics.safetensors', 'checkpoints/00000002.pt'])
def test_a_killed_run_with_modules_goes_on_to_the_same_student(cifd_run, tmp_path, moment):
    out = tmp_path/'run'
    child = start(tmp_path/'log', 'distill', *CIFD_ARGS, '--out', out)
    wait_for(out/moment)
    kill(child)
    main(['distill', *CIFD_ARGS, '--out', str(out), '--resume'])
    assert same_weights(out, cifd_run)


@pytest.mark.parametrize('rates, wanted', [(['10', '10'], 'must be different'), (['0'], 'greater than 0'),
                                           (['1', '-3'], 'greater than 0')])
def test_rates_must_be_positive_and_different(rates, wanted, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(['distill', *SMALL, '--information', *rates, '--out', str(tmp_path/'run')])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and wanted in error and error.count('\n') == 1
    assert not (tmp_path/'run').exists()


def test_too_few_vectors_are_refused():
    with pytest.raises(BadInput, match='3 vectors are too few'): fit_rd_modules(torch.randn(3, 4), (1.,))
