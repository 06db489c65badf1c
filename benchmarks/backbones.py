"""How fast E-RADIO-L is beside three teachers of AM-RADIO, and how much each of them computes.

    python benchmarks/backbones.py [--batch 1] [--repeats 2] [--precision float32] [--compile inductor] [--device cpu]

The networks have timm's architectures and random weights. They are built one after another and take the same number
of images, each network at its own size; the fastest of some calls counts, `--repeats` at least and 20 seconds of
them. On a CPU that is one image in float32, on a CUDA device 16 in bfloat16, compiled. E-RADIO-L stands here twice:
at 224 pixels, where the paper speaks of ten times the speed of its teachers, and at 512, for which it gives images/s,
with windows that grow with the image, 16 positions for 7. The published ratios are of images/s on an A100 with
TensorRT. Multiply–adds are counted, not measured. On a CPU it takes some ten minutes.
"""
import gc  # noqa: I001
from typing import NamedTuple

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import timm
import torch
from timing import arguments, seconds

from radio_nb.models.eradio import multiply_adds


class Case(NamedTuple):
    "One line of the table."
    title: str
    name: str              # timm's
    size: int              # of the images, in pixels
    options: dict = {}     # for `timm.create_model`
    published: float = 0.  # images/s


STUDENTS = [Case('E-RADIO-L', 'eradio_l', 224), Case('E-RADIO-L', 'eradio_l', 512, {'window': 16}, 468)]
TEACHERS = [Case('CLIP ViT-H/14', 'vit_huge_patch14_clip_378', 378, {}, 170),
            Case('DINOv2 ViT-g/14', 'vit_giant_patch14_reg4_dinov2', 224, {'img_size': 224}, 294),
            Case('SAM ViT-H/16', 'samvit_huge_patch16', 1024, {}, 12)]


@torch.inference_mode()
def images_per_second(case):
    "Features of a batch, again and again."
    network = timm.create_model(case.name, num_classes=0, **case.options).eval()
    network = network.to(args.device, dtype, memory_format=torch.channels_last)
    images = torch.rand(args.batch, 3, case.size, case.size, device=args.device, dtype=dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    features = network.forward_features
    if args.compile: features = torch.compile(features, backend=args.compile)
    features(images)
    times = []
    while len(times) < args.repeats or sum(times) < 20: times.append(seconds(features, images))
    return args.batch/min(times)


def measured(case):
    "Print the line of a network; gives images/s and multiply–adds of one image."
    work, speed = multiply_adds(case.name, case.size, case.size, **case.options)[''], images_per_second(case)
    gc.collect()
    torch.cuda.empty_cache()
    title = f'{case.title} at {case.size}'
    print(f'{title:24}{work/1e9:14,.0f} G{speed:12.3f}{work*speed/1e12:14.3f} T', flush=True)
    return speed, work


args = arguments(__doc__, batch=0, repeats=2, precision='', compile='')
on_cuda = args.device.startswith('cuda')
args.batch, args.compile = args.batch or (16 if on_cuda else 1), args.compile or ('inductor' if on_cuda else '')
args.precision = args.precision or ('bfloat16' if on_cuda else 'float32')
dtype = getattr(torch, args.precision)
print(f'{torch.cuda.get_device_name() if on_cuda else "CPU"}: {args.batch} images at a time, {args.precision}, '
      f'{args.compile or "not compiled"}\n\n{"":24}{"multiply–adds":>16}{"images/s":>12}{"of them in 1 s":>16}')
students, teachers = ([(case, *measured(case)) for case in cases] for cases in (STUDENTS, TEACHERS))
for student, speed, work in students:
    print(f'\n{student.title} at {student.size}: how many times a teacher\'s images/s, and how much less arithmetic')
    for teacher, its_speed, its_work in teachers:
        published = f', published {student.published/teacher.published:.1f}' if student.published else ''
        print(f'  {teacher.title} at {teacher.size}: {speed/its_speed:.1f}{published}; arithmetic {its_work/work:.1f}')
