"""What controlled information flow adds to a step of plain distillation.

    python benchmarks/cifd.py [--batch 128] [--threads 2] [--device cpu]

Both steps train the same student on the same batch, towards cached embeddings and logits of a teacher. The CIFD step
also runs three frozen rate–distortion modules on those embeddings, learns from them, and has a bottleneck. (The paper's
own figure is 1.08.) The steps are taken in turns.
"""
from functools import partial

import torch
from timing import arguments, ratio, report
from torch import nn

from radio_nb.cifd.controlled_flow import Bottleneck, ControlledFlowLoss, ModelOutput
from radio_nb.cifd.rate_distortion import RateDistortion
from radio_nb.models.zoo import CifarResNet

args = arguments(__doc__, batch=128)


class Embedder(nn.Module):
    "A backbone, its embedding through a projector, and logits."
    def __init__(self, backbone, width, bottleneck):
        super().__init__()
        self.backbone, self.norm = backbone, nn.LayerNorm(width)
        self.bottleneck = Bottleneck(width) if bottleneck else nn.Identity()
        self.projector, self.classifier = nn.Linear(width, 64), nn.Linear(width, 10)

    def forward(self, images):
        w = self.bottleneck(self.norm(self.backbone(images)))
        return ModelOutput(self.projector(w), self.classifier(w))


class Pooled(nn.Module):
    "A CIFAR ResNet up to its average."
    def __init__(self, depth):
        super().__init__()
        self.net = CifarResNet(depth)

    def forward(self, images): return self.net.forward_features(images).mean((2, 3))


def plain():
    "Three convolutions, the student of the tutorial on information."
    sizes = zip((3, 32, 64), (32, 64, 64))
    layers = [layer for a, b in sizes for layer in (nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def random(*shape):
    "A batch of noise of that shape."
    return torch.randn(args.batch, *shape, device=args.device)


def stepper(backbone, modules):
    "A function that trains a student by one step; with modules it is CIFD, without them plain distillation."
    torch.manual_seed(0)
    student = Embedder(backbone, 64, modules is not None).to(args.device)
    images, labels = random(3, 32, 32), torch.randint(10, (args.batch,), device=args.device)
    teacher = ModelOutput(random(64), random(10))
    names = ['teacher'] if modules is None else ['teacher', *(f'R={rate:g}' for rate in modules.rates.tolist())]
    loss = ControlledFlowLoss(dict.fromkeys(names, 1.), temperature=4., dropout=0.)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)

    def step():
        output, sources = student(images), {'teacher': teacher}
        if modules is not None:
            with torch.no_grad(): reconstructions = modules.decode(modules.encode(teacher.embedding))
            logits = modules.classifier(reconstructions).detach()
            sources |= {name: ModelOutput(reconstructions[i], logits[i]) for i, name in enumerate(names[1:])}
        bits = None if modules is None else student.bottleneck.bits
        total, _ = loss(output, sources, bits, labels)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return step


backbones = {'ResNet-20': partial(Pooled, 20), 'ResNet-8': partial(Pooled, 8), 'three convolutions': plain}
for name, backbone in backbones.items():
    modules = RateDistortion(64, 1., 10., 100., classes=10).eval().requires_grad_(False).to(args.device)
    slower = ratio(stepper(backbone(), modules), stepper(backbone(), None), 15)
    report(f'CIFD step against KD step, student {name}', slower, 1.1)
