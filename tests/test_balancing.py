"""AdaLoss and learned weights in a trainer: the same averages and gradients however a batch is divided, and weights
that arrive (rows of AdaLoss, of `uncertainty`, and of masks in a step)."""
from dataclasses import replace

import pytest
import torch
from children import Children, small_images, train
from torch.testing import assert_close

from radio_nb.data.crops import Batch
from radio_nb.losses.balancing import BETAS
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.features import Features
from radio_nb.targets.normalizers import Normalizer
from radio_nb.training.recipe import Partition, Recipe, Stage
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.stages import plan_stages
from radio_nb.training.statistics import Source
from radio_nb.training.trainer import DistillStep, Trainer

NAMES = ('large', 'small')
SCALES = {'large': 30., 'small': .1}
CPU = torch.device('cpu')


class Patches(torch.nn.Module):
    "A student or teacher of one layer, which sees each patch of 8 pixels alone."
    def __init__(self, seed, names=('own',)):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = torch.nn.Conv2d(3, 4*len(names), 8, 8).double()
        self.names, self.config, self.spatial_heads = names, {'teachers': {}}, []

    def no_weight_decay(self): return set()

    def forward(self, images):
        grid = self.backbone(images.double()).movedim(1, -1)
        return {name: Features(own.mean((1, 2)), own) for name, own in zip(self.names, grid.split(4, -1))}


def scaled_teacher(name):
    "A fixed teacher, with the scale of its name."
    net = Patches(len(name)).requires_grad_(False)
    def features(images):
        summary, grid = net(images)['own']
        return Features(summary, SCALES[name]*grid)
    return features


TEACHERS = {name: scaled_teacher(name) for name in NAMES}
IDENTITY = {name: Normalizer(torch.zeros(4), torch.eye(4), torch.eye(4)) for name in NAMES}


def new_trainer(stages=(), balance='ada', weights=(1., 1.), **fields):
    "A trainer of `Patches`, at the first stage of its recipe."
    fields = {'steps': 8, 'batch_size': 8, 'size': 32, 'clip': 1e9, 'optimizer': 'adamw'} | fields
    recipe = Recipe('zoo:photos', ('zoo:large', 'zoo:small'), '', stages=stages, balance=balance, **fields)
    summary, spatial = (dict.fromkeys(NAMES, weight) for weight in weights)
    loss = MultiTeacherLoss('mse', summary, spatial, balance)
    trainer = Trainer(DistillStep(Patches(0, NAMES), loss), recipe, CPU)
    trainer.plans = plan_stages(recipe, list(NAMES))
    enter(trainer, 0)
    return trainer


def enter(trainer, i):
    "Begin a stage."
    plan = trainer.plans[i]
    sources = [Source(part, None, {name: TEACHERS[name] for name in part.weights}) for part in plan.parts]
    trainer.start_stage(plan, sources, IDENTITY, {})


def batch(step, rows=slice(None), masks=None, n=8):
    "The images of a step, or some of them."
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return Batch(images[rows], {}, torch.full((len(images[rows]),), -1), masks)


def gradient(trainer): return torch.cat([p.grad.flatten().clone() for p in trainer.student.parameters()])


def by_definition(steps, momentum=.99):
    "Averages and gradients of AdaLoss on whole batches, written out: every term over the average of the steps before."
    student, seen, gradients = Patches(0, NAMES), {}, []
    other = new_trainer()   # moves the weights as the trainers under test do
    student.load_state_dict(other.student.state_dict())
    for step in range(steps):
        images = batch(step).images/255
        outputs, total = student(images), 0
        for name in NAMES:
            x, y = outputs[name], TEACHERS[name](images)
            cosine = (x.summary*y.summary).sum(-1)/(x.summary.norm(dim=-1)*y.summary.norm(dim=-1))
            for kind, term in ('summary', (1 - cosine).mean()), ('spatial', (x.spatial - y.spatial).square().mean()):
                past = seen.setdefault((name, kind), [])
                weights = [momentum**i for i in reversed(range(len(past)))]
                average = sum(w*v for w, v in zip(weights, past))/sum(weights) if past else term.item()
                total = total + term/average
                past.append(term.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(student.parameters()))]))
        other(batch(step))
        student.load_state_dict(other.student.state_dict())
    averages = {}
    for key, past in seen.items():
        weights = [momentum**i for i in reversed(range(len(past)))]
        averages[' '.join(key)] = sum(w*v for w, v in zip(weights, past))/sum(weights)
    return gradients, averages


def check(trainer, batches):
    "Run a trainer and compare with the definition."
    gradients, averages = by_definition(4)
    for step in range(4):
        trainer(*batches(step))
        assert_close(gradient(trainer), gradients[step], rtol=1e-6, atol=1e-6*gradients[step].abs().max().item())
    ada = trainer.loss.balance
    assert ada.steps.tolist() == [4]*4
    for name, average in zip(ada.names, ada.average.tolist()): assert average == pytest.approx(averages[name], rel=1e-6)


@pytest.mark.parametrize('accumulate', [1, 2, 4])
def test_ada_has_the_averages_and_gradients_of_the_whole_batch(accumulate):
    check(new_trainer(accumulate=accumulate), lambda step: [batch(step)])


@pytest.mark.parametrize('accumulate', [1, 2])
def test_ada_counts_a_teacher_in_two_partitions_once(accumulate):
    stage = Stage(8, partitions=(Partition(.5, 32), Partition(.5, 32)))
    halves = slice(0, 4), slice(4, 8)
    check(new_trainer((stage,), accumulate=accumulate), lambda step: [batch(step, rows) for rows in halves])


def test_ada_divides_a_teacher_that_comes_later_by_its_own_first_loss():
    trainer = new_trainer((Stage(3, teachers=('large',)), Stage(3, restart_statistics=False)))
    assert trainer(batch(0))['loss'] == pytest.approx(2, rel=1e-5)   # summary and grid, each over itself
    for step in (1, 2): trainer(batch(step))
    enter(trainer, 1)
    before = dict(zip(trainer.loss.balance.names, trainer.loss.balance.average.tolist()))
    line = trainer(batch(3))
    old = sum(line['teachers']['large'][kind]/before[f'large {kind}'] for kind in ('summary', 'spatial'))
    assert line['loss'] == pytest.approx(old + 2, rel=1e-5)
    assert dict(zip(trainer.loss.balance.names, trainer.loss.balance.steps.tolist())) == {
        'large spatial': 4, 'large summary': 4, 'small spatial': 1, 'small summary': 1}


def test_ada_takes_in_the_losses_of_a_teacher_that_dropout_left_out():
    trainer = new_trainer(teacher_dropout=.9)
    for step in range(6): trainer(batch(step))
    assert trainer.loss.balance.steps.tolist() == [6]*4


def test_dividing_changes_no_average():
    trainer = new_trainer()
    trainer(batch(0))
    before = {key: tensor.clone() for key, tensor in trainer.loss.balance.state_dict().items()}
    for _ in range(3): trainer.loss.balance({'large spatial': torch.tensor(5.)})
    assert all(torch.equal(before[key], tensor) for key, tensor in trainer.loss.balance.state_dict().items())


@pytest.mark.parametrize('balance', ['ada', 'uncertainty'])
def test_a_balance_goes_on_from_a_checkpoint_to_the_same_bits(balance):
    whole, broken, resumed = (new_trainer(balance=balance, ema=.9, teacher_dropout=.5, accumulate=2) for _ in range(3))
    for step in range(6): whole(batch(step))
    for step in range(3): broken(batch(step))
    resumed.load_state_dict(broken.state_dict())
    for step in range(3, 6): resumed(batch(step))
    one, other = whole.state.state_dict()['weights'], resumed.state.state_dict()['weights']
    assert any(key.startswith('loss.balance') for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize('optimizer', ['adamw', 'lamb'])
def test_learned_weights_arrive_at_the_optimum_of_their_losses(optimizer):
    "For losses from .001 to 140; with the student's own rate, here next to nothing, b would not move at all."
    trainer = new_trainer(balance='uncertainty', steps=1000, lr=1e-9, balance_lr=.02, optimizer=optimizer)
    for _ in range(1000): line = trainer(batch(0))
    balance = trainer.loss.balance
    for name, b in zip(balance.names, balance.b.tolist()):
        teacher, kind = name.split()
        loss = line['teachers'][teacher][kind]
        assert b == pytest.approx(torch.tensor((loss + (loss*loss + 4*loss)**.5)/2).log().item(), abs=.1), (name, loss)


def test_lamb_takes_the_moments_of_a_backbone_that_begins_later_for_young():
    "timm's counts steps by group, in which heads and backbone are together; and it would clip a second time."
    trainer = new_trainer(optimizer='lamb', heads_only=3)
    for step in range(4): trainer(batch(step))
    assert all(group['step'] == 1 and group['max_grad_norm'] is None for group in trainer.state.optimizer.param_groups)


def test_learned_weights_have_their_own_rate_and_no_decay():
    trainer = new_trainer(balance='uncertainty', balance_lr=.05, lr=1e-3, weight_decay=.5)
    trainer(batch(0))
    *others, own = trainer.state.optimizer.param_groups
    assert own['params'] == [trainer.loss.balance.b] and own['weight_decay'] == 0 and tuple(own['betas']) == BETAS
    assert all(own['lr'] == pytest.approx(50*group['lr']) for group in others)
    listed = [id(p) for group in trainer.state.optimizer.param_groups for p in group['params']]
    assert sorted(listed) == sorted(id(p) for p in trainer.distill_step.parameters())


def padded(step, colour, masks):
    "The images of a step with the padding in some colour."
    images = batch(step).images.clone()
    images.masked_fill_(~masks[:, None], colour)
    return batch(step)._replace(images=images, masks=masks)


@pytest.mark.parametrize('balance', ['fixed', 'ada', 'uncertainty'])
def test_what_the_padding_shows_is_of_no_consequence(balance):
    "Masks reach the loss, cut into microbatches: different padding, and whole or divided, the gradient is the same."
    masks = torch.ones(8, 32, 32, dtype=torch.bool)
    masks[:3, :, 20:], masks[5, 8:] = False, False   # 20 is within a patch, which then does not count
    found = []
    for colour, accumulate in (0, 1), (255, 1), (99, 2):
        trainer = new_trainer(balance=balance, weights=(0., 1.), accumulate=accumulate)   # summaries see the padding
        for step in range(2): trainer(padded(step, colour, masks))
        found.append(gradient(trainer))
    for other in found[1:]: assert_close(other, found[0], rtol=1e-6, atol=1e-7*found[0].abs().max().item())
    unmasked = new_trainer(balance=balance, weights=(0., 1.))
    for step in range(2): unmasked(padded(step, 255, masks)._replace(masks=None))
    assert (gradient(unmasked) - found[0]).abs().max() > .01*found[0].abs().max()


def train_double(recipe, resume=False):
    "A run in double precision: what is left of a difference is then no rounding that Adam has enlarged."
    torch.set_default_dtype(torch.float64)
    train(recipe, resume)


PARTS = (Partition(.5, 64), Partition(.5, 64, ('zoo:u2netp#32',)))
RUN = Recipe(images='', teachers=('zoo:u2netp#64', 'zoo:u2netp#32'), out='', depth=1, size=64, head_width=16, steps=6,
             batch_size=8, statistics_steps=4, checkpoint_every=3, device='cpu', method='mse')


@pytest.fixture(scope='module')
def images(tmp_path_factory): return small_images(tmp_path_factory.mktemp('balancing')/'images', 24)


def trained(folder): return load_checkpoint(folder/'checkpoints')['trainer']['weights']


def test_two_processes_have_the_averages_of_one(images, tmp_path):
    "With partitions, microbatches and a dropped teacher in the same run."
    stage = Stage(6, partitions=PARTS)
    recipe = replace(RUN, images=images, balance='ada', accumulate=2, teacher_dropout=.3, stages=(stage,))
    children = [Children(n, tmp_path/f'log{n}', train_double, replace(recipe, out=str(tmp_path/str(n))))
                for n in (1, 2)]
    for runs in children: runs.wait()
    one, two = trained(tmp_path/'1'), trained(tmp_path/'2')
    assert one['loss.balance.steps'].tolist() == two['loss.balance.steps'].tolist() == [6]*4
    assert_close(one['loss.balance.average'], two['loss.balance.average'], rtol=1e-6, atol=0)
    for key in one: assert_close(one[key], two[key], rtol=1e-5, atol=1e-5, msg=key)   # the log is in float32


@pytest.mark.parametrize('balance', ['ada', 'uncertainty'])
def test_sharded_weights_are_balanced_as_whole_ones(images, tmp_path, balance):
    recipe = replace(RUN, images=images, balance=balance, optimizer='lamb')
    runs = [Children(2, tmp_path/f'log{shard}', train, replace(recipe, shard=shard, out=str(tmp_path/str(shard))))
            for shard in (False, True)]
    for children in runs: children.wait()
    plain, sharded = trained(tmp_path/'False'), trained(tmp_path/'True')
    key = f'loss.balance.{"average" if balance == "ada" else "b"}'
    assert_close(plain[key], sharded[key], rtol=1e-3, atol=1e-4)
    if balance == 'uncertainty': assert sharded[key].abs().min() > .01   # a rate of its own, in its own group
