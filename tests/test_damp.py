"Noise on the weights: what it changes in a trainer, and that a run with it can be broken off and shared out."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from children import Children, apart, same_after_a_break, small_images, train
from test_balancing import IDENTITY, NAMES, Patches, batch, scaled_teacher
from torch import nn
from torch.testing import assert_close

from radio_nb.agglomeration.damp import noisy_weights
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.recipe import Recipe
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.stages import check_recipe, plan_stages
from radio_nb.training.statistics import Source
from radio_nb.training.train import run_recipe
from radio_nb.training.trainer import DistillStep, Trainer, microbatches


class Linears(Patches):
    "The same student, its one layer a linear one."
    def __init__(self):
        super().__init__(0, NAMES)
        self.mix = nn.Linear(3, 3).double()

    def forward(self, images): return super().forward(self.mix(images.double().movedim(1, -1)).movedim(-1, 1))


def trainer_of(**fields):
    recipe = Recipe('zoo:photos', ('zoo:large', 'zoo:small'), '', steps=8, batch_size=8, size=32, clip=1e9, **fields)
    loss = MultiTeacherLoss('mse', dict.fromkeys(NAMES, 0.), dict.fromkeys(NAMES, 1.))
    trainer = Trainer(DistillStep(Linears(), loss), recipe, torch.device('cpu'))
    plan = plan_stages(recipe, list(NAMES))[0]
    teachers = {name: scaled_teacher(name) for name in NAMES}
    trainer.start_stage(plan, [Source(plan.parts[0], None, teachers)], IDENTITY)
    return trainer


def gradient_of(trainer):
    trainer(batch(0))
    return torch.cat([p.grad.flatten() for p in trainer.student.parameters()])


def parts_of_a_step(partitions, processes, seed=0):
    "In two microbatches for each of the processes."
    sources = [Source(plan_stages(trainer_of().recipe, list(NAMES))[0].parts[0], None, {})]*partitions
    return [micro for rank in range(processes) for micro in microbatches(
        sources, (batch(0),)*partitions, 2, seed, SimpleNamespace(process_index=rank, num_processes=processes))]


def test_every_part_of_a_step_has_noise_of_its_own():
    "Of whatever microbatch, partition, process and step it is; a CPU looks at the lower 32 bits of a seed."
    student, found = Linears(), set()
    for seed in range(3):
        for micro in parts_of_a_step(2, 2, seed):
            with micro.noise(student, .3): found.add(tuple(student.mix.weight.flatten().tolist()))
    assert len(found) == 3*2*2*2


def test_a_step_takes_the_mean_of_gradients_at_noisy_weights():
    "Each of two parts of the batch has its own noise; the weights move from where they were."
    found, micros, parts = gradient_of(trainer_of(damp=.3, accumulate=2)), parts_of_a_step(1, 1), []
    for k in range(2):
        trainer = trainer_of()
        with micros[k].noise(trainer.student, .3):
            own = {name: t.clone() for name, t in trainer.student.state_dict().items()}
        other = trainer_of()
        other.student.load_state_dict(own)
        other(batch(0, slice(k, None, 2)))
        parts.append(torch.cat([p.grad.flatten() for p in other.student.parameters()]))
    assert_close(found, (parts[0] + parts[1])/2, rtol=1e-6, atol=1e-9)
    assert (found - gradient_of(trainer_of(accumulate=2))).norm() > .05*found.norm()


def test_weights_are_put_back_when_a_step_fails():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match='the power'), noisy_weights(layer, .5, 0): raise RuntimeError('the power')
    assert torch.equal(layer.weight, before)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('damp')
    return Recipe(small_images(home/'images', 12), ('zoo:u2netp#64',), str(home/'run'), size=64, depth=1, head_width=16,
                  steps=4, batch_size=4, statistics_steps=3, checkpoint_every=2, device='cpu', damp=.2, accumulate=2)


def test_a_broken_run_goes_on_to_the_same_student(recipe, tmp_path):
    assert same_after_a_break(recipe, run_recipe(recipe), tmp_path/'run')


def double(recipe):
    torch.set_default_dtype(torch.float64)
    train(recipe)


def test_as_many_processes_as_pieces_train_the_same_student(recipe, tmp_path):
    ways = {'pieces': (1, 2), 'processes': (2, 1)}
    children = [Children(n, tmp_path/f'{name}-log', double, replace(recipe, out=str(tmp_path/name), accumulate=pieces))
                for name, (n, pieces) in ways.items()]
    for child in children: child.wait()
    assert apart(*(load_checkpoint(tmp_path/name/'checkpoints')['trainer']['weights'] for name in ways)) < 1e-5


def test_shards_are_refused(recipe):
    with pytest.raises(BadInput, match='weights in shards are not made noisy'):
        check_recipe(replace(recipe, shard=True))
