"""How long runs take beside what `radio-nb plan --calibrate` says.

    python benchmarks/plan.py [--steps 150] [--threads 2]

Each recipe is planned, calibrated by twenty real steps of each stage, and then run on the packaged photographs. A ratio
is that of the time from its first step to its last over the time planned; they should differ by less than a quarter.
"""
import tempfile
import time
from dataclasses import replace

from timing import arguments, report

from radio_nb.data.files import Progress
from radio_nb.training.plan import calibrated, plan_recipe
from radio_nb.training.recipe import Partition, Recipe, Stage
from radio_nb.training.train import Callbacks, run_recipe

args = arguments(__doc__, steps=150)
Progress.hidden = True
BASE = Recipe('zoo:photos', ('zoo:u2netp#128',), '', size=128, depth=4, head_width=128, batch_size=8, steps=args.steps,
              statistics_steps=48, checkpoint_every=10**6, watch_every=0, device='cpu')
two = ('zoo:u2netp#64', 'zoo:efficientnet-lite0#128')
parts = (Partition(.75, 64, ('u2netp',)), Partition(.25, 128, ('efficientnet-lite0',)))
RECIPES = {
    'a transformer': BASE,
    'a pyramid, two teachers': replace(BASE, student='convnext_atto', depth=0, teachers=two, accumulate=2),
    'partitions': replace(BASE, teachers=two, stages=(Stage(args.steps, partitions=parts),)),
    'two stages': replace(BASE, size=64, stages=(Stage(args.steps//2), Stage(args.steps//2, size=128))),
}


def seconds_of_steps(recipe):
    "From the first step of a run to its last, and one more."
    times = []
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(replace(recipe, out=f'{folder}/run'), callbacks=Callbacks(lambda run: times.append(time.time())))
    return (times[-1] - times[0])*len(times)/(len(times) - 1)


for what, recipe in RECIPES.items():
    plan = plan_recipe(recipe)
    first = plan._replace(stages=plan.stages[:1])   # whose statistics come before the first step
    planned = calibrated(plan).seconds(plan.total() - first.before())
    took = seconds_of_steps(recipe)
    report(f'{what}: {took:.1f} s, planned {planned:.1f} s', took/planned, '.75 to 1.25', 'from')
