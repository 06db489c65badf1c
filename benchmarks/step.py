"""What the trainer costs beside a loop written out by hand, with the same teachers, student, batch and optimizer.

    python benchmarks/step.py [--batch 8] [--steps 12] [--threads 2] [--device cpu]

The two take their steps in turns, in one run; a ratio is that of their fastest steps.
"""
import radio_nb  # noqa: F401, I001  before timm, so that torchvision can be imported
import timm.optim
import torch
import torch.nn.functional as F
from timing import arguments, ratio, report

from radio_nb.losses import spatial_loss, summary_loss
from radio_nb.normalizers import fit_normalizer
from radio_nb.statistics import measure
from radio_nb.student import Student
from radio_nb.teachers import load_teacher
from radio_nb.train import Recipe, Trainer

SIZE, SPECS = 160, {'efficientnet-lite0': 'zoo:efficientnet-lite0#160', 'u2netp': 'zoo:u2netp#128'}


def new_student(teachers, device):
    "A vision transformer of six blocks, the same every time."
    torch.manual_seed(0)
    widths = {name: teacher.widths() for name, teacher in teachers.items()}
    return Student('vit_tiny_patch16_224', widths, head_width=512, depth=6).to(device)


def bare_step(teachers, normalizers, images, device):
    "The least that a step must do."
    student = new_student(teachers, device).train()
    optimizer = timm.optim.create_optimizer_v2(student, 'adamw', 1e-3, .02)

    def step():
        pixels = images/255
        said, loss = student(F.interpolate(pixels, (SIZE, SIZE), mode='bilinear', antialias=True)), 0
        for name, teacher in teachers.items():
            summary, spatial = teacher(pixels)
            loss = loss + summary_loss(said[name].summary, summary) + spatial_loss(said[name].spatial, normalizers[name](spatial))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
        optimizer.step()
        return loss.item()
    return step


args = arguments(__doc__, batch=8, steps=12)
device = torch.device(args.device)

teachers = {name: load_teacher(spec, name=name).to(device) for name, spec in SPECS.items()}
images = torch.randint(256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
normalizers = {name: fit_normalizer('phi-s', s.spatial).to(device) for name, s in measure(teachers, [images/255]).items()}
recipe = Recipe('', tuple(SPECS.values()), '', size=SIZE, steps=10_000, batch_size=args.batch, device=args.device)
trainer = Trainer(new_student(teachers, device), teachers, normalizers, recipe, device)
bare = bare_step(teachers, normalizers, images, device)
report('trainer step against a bare loop', ratio(lambda: trainer(images), bare, args.steps), 1.03)
