"""What one step does, counted in the dispatcher: what a GPU would have to wait for, in which numbers it computes, how
often images are resized and programs compiled. None of it needs a GPU."""
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from radio_nb.data.crops import Crops
from radio_nb.data.images import open_images
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.models.backbones import StochasticDepth
from radio_nb.models.student import Student, checkpoint_student
from radio_nb.models.teachers import load_teacher
from radio_nb.targets.normalizers import Normalizer
from radio_nb.training.counting import Meter
from radio_nb.training.monitor import read_logs
from radio_nb.training.recipe import Partition, Recipe, Stage
from radio_nb.training.stages import plan_stages
from radio_nb.training.statistics import Source, training_teachers
from radio_nb.training.trainer import DistillStep, Trainer

CPU = torch.device('cpu')
SPECS = {'lite0': 'zoo:efficientnet-lite0#96', 'u2netp': 'zoo:u2netp#64', 'small': 'timm:test_vit@random#64'}
SMALL = Recipe('zoo:photos', tuple(SPECS.values()), '', size=64, steps=100, batch_size=4, method='mse',
               teacher_precision=('bfloat16',), precision='bfloat16')


@pytest.fixture(scope='module')
def teachers(): return {name: load_teacher(spec, name=name) for name, spec in SPECS.items()}


def new_trainer(teachers, **fields):
    "A trainer at its first step, and its batches."
    recipe, names = replace(SMALL, **fields), list(teachers)
    torch.manual_seed(0)
    widths = {name: teacher.widths() for name, teacher in teachers.items()}
    student = Student('vit_tiny_patch16_224', widths, depth=2, windows=recipe.windows)
    loss = MultiTeacherLoss(recipe.method, dict.fromkeys(names, 1.), dict.fromkeys(names, 1.), recipe.balance)
    trainer = Trainer(DistillStep(student, loss, bfloat16=recipe.precision == 'bfloat16'), recipe, CPU)
    plan, asked = plan_stages(recipe, names)[0], training_teachers(recipe, teachers)
    images = open_images('zoo:photos')
    sources = [Source(part, Crops(images, 128), {name: asked[name] for name in part.weights}) for part in plan.parts]
    identity = {name: Normalizer(torch.zeros(()), torch.ones(()), torch.ones(())) for name in names}
    trainer.start_stage(plan, sources, identity)
    return trainer, list(zip(*(source.batches(recipe, trainer.accelerator, 0, 6) for source in sources)))


def test_blocks_that_are_left_out_are_left_out_again_on_the_way_back(teachers):
    "With checkpoints of activations, for the same images of a microbatch."
    weights = []
    for checkpoints in (False, True):
        trainer, batches = new_trainer(teachers, accumulate=2)
        for block in trainer.student.backbone.blocks: block.drop_path1 = StochasticDepth(.5)
        if checkpoints: checkpoint_student(trainer.student)
        trainer(*batches[0])
        weights.append({name: p.grad for name, p in trainer.student.named_parameters() if p.grad is not None})
    for name, gradient in weights[0].items(): torch.testing.assert_close(weights[1][name], gradient)


READS = {'item', 'tolist', '__bool__', '__float__', '__int__', '__index__', '__len__', 'numpy', 'cpu', '__array__',
         'nonzero', 'equal', 'allclose'} - {'__len__'}   # a length is known to the host

class Reads(TorchFunctionMode):
    "Counts reads of tensors' values."
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in READS: self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))

class Operators(TorchDispatchMode):
    "Counts operators, and the sizes to which images are resized."
    def __init__(self):
        super().__init__()
        self.seen, self.resized = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        if '_upsample_bilinear2d_aa' in str(func) and args[0].shape[1] == 3: self.resized.append(tuple(args[1]))
        return func(*args, **(kwargs or {}))


HARD = dict(balance='ada', teacher_dropout=.5, ema=.9, accumulate=2)

LAMB = {'balance': 'uncertainty', 'optimizer': 'lamb', 'windows': (2,)}
ON_THE_HOST = {'item': 9, '__index__': 3}   # in three steps: timm's LAMB counts the steps of its three groups on the
# host, and there the side of the windows is drawn

@pytest.mark.parametrize('fields, host', [({}, {}), (HARD, {}), (LAMB, ON_THE_HOST)], ids=['plain', 'hard', 'lamb'])
def test_a_step_reads_nothing(teachers, fields, host):
    trainer, batches = new_trainer(teachers, **fields)
    trainer(*batches[0])
    with Reads() as reads, Operators() as operators: logs = [trainer(*batch) for batch in batches[1:4]]
    assert reads.seen == host
    assert {'_local_scalar_dense', 'is_nonzero', 'nonzero', 'equal'} & operators.seen.keys() <= {'_local_scalar_dense'}
    assert operators.seen['_local_scalar_dense'] == host.get('item', 0) + host.get('__index__', 0)
    with Reads() as reads: lines = list(read_logs(logs))
    assert reads.seen == {'tolist': 1} and [line['step'] for line in lines] == [2, 3, 4]


def test_the_counter_of_reads_sees_each_of_them():
    x = torch.ones(())
    with Reads() as reads: x.item(), x.tolist(), bool(x), float(x), int(x), x.numpy(), x.cpu(), torch.equal(x, x)
    assert sum(reads.seen.values()) >= 8


def test_teachers_and_student_compute_in_half_precision(teachers):
    trainer, batches = new_trainer(teachers)
    trainer(*batches[0])
    with Meter() as meter: trainer(*batches[1])
    flops, _ = meter.lap()
    assert flops['bfloat16'] >= .99*sum(flops.values()), flops
    trainer, batches = new_trainer(teachers, teacher_precision=('bfloat16', 'float32', 'bfloat16'))
    with Meter() as meter: trainer(*batches[0])
    assert 0 < meter.lap()[0]['float32'] < sum(flops.values())/2


def test_images_are_resized_once_for_each_size(teachers):
    "The student's 64 pixels are those of two teachers."
    trainer, batches = new_trainer(teachers)
    trainer(*batches[0])
    with Operators() as operators: trainer(*batches[1])
    assert sorted(operators.resized) == [(64, 64), (96, 96)]


def test_nothing_is_compiled_after_the_first_step(teachers):
    parts = Partition(.5, 64, ('lite0', 'u2netp')), Partition(.5, 96, ('small',))
    fields = dict(compile='eager', stages=(Stage(6, partitions=parts),), **HARD)
    torch._dynamo.reset()
    trainer, batches = new_trainer(teachers, batch_size=8, **fields)
    for batch in batches[:2]: trainer(*batch)   # the second has losses of the first, for the dropout of teachers
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches[2:]: trainer(*batch)


def test_every_microbatch_is_compiled(teachers):
    "By default torch leaves what is behind the eighth program as it is."
    counts = []
    for accumulate in (1, 12):
        torch._dynamo.reset()
        counter = CompileCounter()
        register_backend(counter, name=f'counter-{accumulate}')
        trainer, batches = new_trainer(teachers, batch_size=12, accumulate=accumulate, compile=f'counter-{accumulate}')
        trainer(*batches[0])
        counts.append(counter.frame_count)
    assert counts[1] - counts[0] >= 11


@pytest.mark.parametrize('optimizer, most', [('adamw', 0.), ('lamb', .01)])   # LAMB's momentum goes on
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(teachers, optimizer, most):
    fields = dict(precision='float32', teacher_precision=('float32',), optimizer=optimizer)
    trainer, batches = new_trainer(teachers, **fields)
    trainer(*batches[0])
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    forward = trainer.distill_step.loss.forward
    def broken(*args):
        loss, losses = forward(*args)
        return loss*float('inf'), losses
    trainer.distill_step.loss.forward = broken
    log = trainer(*batches[1])
    after = dict(trainer.student.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert max((after[name] - before[name]).abs().max() for name in before) <= most
    with pytest.raises(ValueError, match='step 2: the norm of the gradient is nan; try a lower lr'): log['loss']
