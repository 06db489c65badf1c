"""How much of a GPU a step uses: images/s, and the share of what a matrix product in bfloat16 reaches there.

    python benchmarks/gpu.py [--only abc] [--batch 64] [--steps 10] [--device cuda] [--scale full]

(a) a ViT-L/14 as DINOv2 has it and one as CLIP has it teach a ViT-B/16 at 224 pixels; (b) the same on three quarters
of a batch, and on the rest a ViT-B/16 as SAM has it at 1024 pixels; (c) as (a), from a cache. Each is run as PyTorch
does it line by line, and compiled. Beside (a) stands a loop written out by hand with the same networks. Weights are
random, the images are the packaged photographs. Arithmetic is counted, not measured. At the end come the ten kernels
that take most of the time of the last setting. Most of the script's own time goes into compiling: `--only a` asks for
one setting. `--scale small --device cpu` tries the script where there is no GPU, and says nothing about one.
"""
import gc  # noqa: I001
from collections import Counter
from dataclasses import replace

import radio_nb  # noqa: F401  before timm, so that torchvision can be imported
import timm.optim
import torch
from timing import arguments, fastest, seconds
from torch.profiler import ProfilerActivity, profile

from radio_nb.losses.losses import spatial_loss, summary_loss
from radio_nb.training.plan import measured_trainer, plan_recipe
from radio_nb.training.recipe import Partition, Recipe, Stage, teacher_names

FULL = dict(teachers=('timm:vit_large_patch14_reg4_dinov2@random#224', 'open_clip:ViT-L-14@random'),
            student='vit_base_patch16_224', size=224)
SMALL = dict(teachers=('timm:vit_tiny_patch16_224@random#64', 'timm:vit_small_patch16_224@random#64'),
             student='vit_tiny_patch16_224', size=64)
SAM = {'full': ('timm:samvit_base_patch16@random#1024', 1024), 'small': ('timm:samvit_base_patch16@random#128', 128)}


def recipes():
    "The three settings, by what they are called."
    both = Recipe('zoo:photos', out='', batch_size=args.batch, device=args.device, precision='bfloat16', watch_every=0,
                  steps=10_000, **(FULL if args.scale == 'full' else SMALL))
    sam, large = SAM[args.scale]
    *names, third = teacher_names((*both.teachers, sam))
    parts = Partition(.75, both.size, tuple(names)), Partition(.25, large, (third,))
    stage = Stage(10_000, partitions=parts)
    return {'(a) two teachers': both,
            '(b) and a third at 1024 px': replace(both, teachers=(*both.teachers, sam), stages=(stage,)),
            '(c) from a cache': replace(both, views=4, cache='cache')}


def matmul_peak():
    "TFLOPS of a square product in bfloat16."
    n = 8192 if args.device.startswith('cuda') else 1024
    x, y = (torch.randn(n, n, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    return 2*n**3/fastest(torch.mm, x, y, repeats=20)/1e12


def bare_step(trainer, batch):
    "The same networks in a loop written out: what a step must do, and no more."
    student, teachers = trainer.student.train(), trainer.sources[0].teachers
    optimizer = timm.optim.create_optimizer_v2(student, 'adamw', 1e-3, .02, fused=True)
    pixels, device = batch.images.to(trainer.device), trainer.device.type

    def loss_of(images, said):
        with torch.autocast(device, torch.bfloat16): seen = student(images)
        return sum(summary_loss(seen[name].summary, summary) + spatial_loss(seen[name].spatial, spatial)
                   for name, (summary, spatial) in said.items())
    if trainer.recipe.compile: loss_of = torch.compile(loss_of, backend=trainer.recipe.compile, dynamic=False)

    def step():
        images = pixels/255
        loss = loss_of(images, {name: teacher(images) for name, teacher in teachers.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.)
        optimizer.step()
    return step


def rate(step):
    "Seconds of one step, of many that nobody waits for, after some to warm up."
    def many():
        for _ in range(args.steps): step()
    for _ in range(3): step()
    return min(seconds(many) for _ in range(2))/args.steps


def line(what, took, flops):
    "One row of the table."
    memory = torch.cuda.max_memory_allocated()/1e9 if args.device.startswith('cuda') else 0
    print(f'{what:46}{args.batch/took:10,.1f}{flops/took/1e12/peak:9.0%}{memory:9.1f}', flush=True)


def kernels(step):
    "The ten that take most of the time."
    on_gpu = args.device.startswith('cuda')
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for _ in range(3): step()
    spent = Counter()
    for event in seen.key_averages():
        spent[event.key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(spent.values())
    for name, time in spent.most_common(10): print(f'{time/whole:6.1%}  {name[:110]}')


args = arguments(__doc__, only='abc', batch=64, steps=10, scale='full', device='cuda')
if args.device.startswith('cuda'):
    torch.set_float32_matmul_precision('high')
    print(torch.cuda.get_device_name())
peak = matmul_peak()
print(f'a product in bfloat16: {peak:.1f} TFLOPS\n\n{"":46}{"images/s":>10}{"of peak":>9}{"GB":>9}')
chosen = {what: recipe for what, recipe in recipes().items() if what[1] in args.only}
for what, recipe in chosen.items():
    flops = sum(plan_recipe(recipe, half=args.device.startswith('cuda')).step().values())
    for backend in '', 'inductor':
        trainer = None   # its memory is the next one's
        gc.collect()
        if args.device.startswith('cuda'): torch.cuda.reset_peak_memory_stats()
        trainer, batches = measured_trainer(replace(recipe, compile=backend), 1)
        batch, how = next(batches), 'compiled' if backend else 'line by line'
        ours = rate(lambda: trainer(*batch))   # noqa: B023  called at once
        line(f'{what}, {how}', ours, flops)
        if what.startswith('(a)'):
            bare = rate(bare_step(trainer, batch[0]))
            line(f'    the loop by hand, {how}: {bare/ours:.2f} of its rate', bare, flops)
print(f'\nWhere the time of {what}, compiled, goes:')
kernels(lambda: trainer(*batch))
