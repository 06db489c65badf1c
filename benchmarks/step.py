"""What the trainer costs beside a loop written out by hand, with the same teachers, student, batch and optimizer.

    python benchmarks/step.py [--batch 8] [--steps 40] [--threads 2] [--device cpu]

The two take their steps in turns, in one run; a ratio is that of their fastest steps. The second figure is for teachers
whose answers are read from a cache; the loop beside it finds its targets in memory, normalized.
"""
import tempfile  # noqa: I001

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import timm.optim
import torch
import torch.nn.functional as F
from timing import arguments, ratio, report

from radio_nb.training.teacher_cache import teacher_features, fill_cache
from radio_nb.data.crops import Crops, image_batches
from radio_nb.data.images import open_images
from radio_nb.losses.losses import spatial_loss, summary_loss
from radio_nb.losses.multi_teacher import MultiTeacherLoss
from radio_nb.targets.phi_s import fit_normalizer
from radio_nb.training.distributed import new_accelerator
from radio_nb.training.recipe import Recipe
from radio_nb.training.stages import plan_stages
from radio_nb.training.statistics import Source, measure
from radio_nb.models.student import Student
from radio_nb.models.teachers import load_teacher
from radio_nb.training.trainer import DistillStep, Trainer, normalize_targets

SIZE, SPECS = 160, {'efficientnet-lite0': 'zoo:efficientnet-lite0#160', 'u2netp': 'zoo:u2netp#128'}


def new_student():
    "A vision transformer of six blocks, the same every time."
    torch.manual_seed(0)
    widths = {name: teacher.widths() for name, teacher in teachers.items()}
    return Student('vit_tiny_patch16_224', widths, head_width=512, depth=6).to(device)


def new_trainer(crops, cached):
    "The trainer as a run would make it, at its first step."
    recipe = Recipe('', tuple(SPECS.values()), '', size=SIZE, steps=10_000, batch_size=args.batch, device=args.device)
    loss = MultiTeacherLoss('phi-s', dict.fromkeys(SPECS, 1.), dict.fromkeys(SPECS, 1.))
    stage_plan = plan_stages(recipe, list(SPECS))[0]
    trainer = Trainer(DistillStep(new_student(), loss), recipe, device)
    trainer.start_stage(stage_plan, [Source(stage_plan.parts[0], crops, teachers, cached)], normalizers)
    return trainer


def bare_step(images, targets=None):
    "The least that a step must do; with `targets`, without any teacher."
    student = new_student().train()
    optimizer = timm.optim.create_optimizer_v2(student, 'adamw', 1e-3, .02, fused=True)

    def step():
        small = pixels = images.to(device)/255
        if pixels.shape[-1] != SIZE: small = F.interpolate(pixels, (SIZE, SIZE), mode='bilinear', antialias=True)
        said, loss = student(small), 0
        for name, teacher in teachers.items():
            if targets: summary, spatial = targets[name]
            else:
                summary, spatial = teacher(pixels)
                spatial = normalizers[name](spatial)
            loss = loss + summary_loss(said[name].summary, summary) + spatial_loss(said[name].spatial, spatial)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
        optimizer.step()
        return loss.item()
    return step


def compare(what, crops, cached, target):
    "One line: the trainer's step over the bare one, on one batch of `crops`."
    batch = next(image_batches(crops, args.batch, 1))
    targets = normalize_targets(teacher_features(teachers, batch, device, cached), normalizers, 0) if cached else None
    trainer, bare = new_trainer(crops, cached), bare_step(batch.images, targets)
    report(what, ratio(lambda: trainer(batch), bare, args.steps), target)


args = arguments(__doc__, batch=8, steps=40)
device = torch.device(args.device)
teachers = {name: load_teacher(spec, name=name).to(device) for name, spec in SPECS.items()}
images = open_images('zoo:photos')
said = (teacher_features(teachers, batch, device) for batch in image_batches(Crops(images, 224), args.batch, 2))
normalizers = {name: fit_normalizer('phi-s', s.spatial).to(device) for name, s in measure(said).items()}

compare('trainer step against a bare loop', Crops(images, 224), {}, 1.03)
with tempfile.TemporaryDirectory() as folder:
    cached = fill_cache(teachers, Crops(images, SIZE, views=1), folder, args.batch, new_accelerator(device))
    compare('cached step against a bare loop of the student alone', Crops(images, SIZE, views=1), cached, 1.10)
