"Ways to listen to a teacher, in whole runs, with labels, and refused."
import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from children import differences_by_division, same_after_a_break
from datasets import ClassLabel, Dataset
from test_together import labelled_parquet
from torch.testing import assert_close

import radio_nb
from radio_nb.data.labelled import labelled_images, open_labelled
from radio_nb.listening import summaries
from radio_nb.listening.hints import FewPatches
from radio_nb.listening.lesson import Lesson, Listener, Voice
from radio_nb.listening.listeners import LISTENERS, Listening
from radio_nb.listening.summaries import HiddenAxes
from radio_nb.models.backbones import Transformer
from radio_nb.models.student import FROM_LABELS, Student
from radio_nb.models.teachers import classifier_of
from radio_nb.targets.bad_input import BadInput
from radio_nb.training.preparation import Inputs, check_sizes, prepare
from radio_nb.training.recipe import Listen, Partition, Recipe, Stage, parse_recipe, recipe_toml
from radio_nb.training.run_folder import load_checkpoint
from radio_nb.training.stages import check_recipe
from radio_nb.training.train import Callbacks, run_recipe

LITE0 = 'efficientnet-lite0'
OF_LOGITS = [name for name, listener in LISTENERS.items()
             if 'logits' in listener.needs and not {'a second teacher', 'the student as it was'} & {*listener.needs}]
OF_COMMITTEES = [name for name, listener in LISTENERS.items()
                 if 'a second teacher' in listener.needs or listener.compares_images]


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    home = tmp_path_factory.mktemp('listening')
    return Recipe(labelled_parquet(home/'images'), (f'zoo:{LITE0}#64', 'zoo:u2netp#64'), str(home/'run'), size=64,
                  depth=2, head_width=16, steps=4, batch_size=4, statistics_steps=2, checkpoint_every=2, device='cpu',
                  watch_every=0, log_every=1, method='global',   # so few crops name no principal axes
                  listen=tuple(Listen(name, .1) for name in OF_LOGITS))


@pytest.fixture(scope='module')
def out(recipe): return run_recipe(recipe)


def lines(out): return [json.loads(line) for line in (Path(out)/'metrics.jsonl').read_text().splitlines()]


def test_all_are_in_the_loss_of_the_teacher_that_has_logits(recipe, out):
    for line in lines(out):
        lite0, u2netp = line['teachers'][LITE0], line['teachers']['u2netp']
        assert lite0.keys() == {'summary', 'spatial', *OF_LOGITS} and u2netp.keys() == {'summary', 'spatial'}
        losses = sum(own['summary'] + own['spatial'] for own in (lite0, u2netp))
        assert_close(line['loss'], losses + .1*sum(lite0[name] for name in OF_LOGITS), rtol=1e-4, atol=1e-4)


def test_with_weight_0_it_is_the_same_run(recipe, tmp_path):
    without = run_recipe(replace(recipe, listen=(), out=str(tmp_path/'without')))
    everyone = tuple(Listen(name, 0.) for name in LISTENERS)
    silent = run_recipe(replace(recipe, listen=everyone, out=str(tmp_path/'silent')))
    assert (without/'student.safetensors').read_bytes() == (silent/'student.safetensors').read_bytes()


def test_a_teacher_may_have_a_listener_and_nothing_else(recipe, tmp_path):
    found = run_recipe(replace(recipe, listen=(Listen('attention'),), spatial_weights=(0., 1.), teacher_dropout=.5,
                               summary_weights=(0., 1.), out=str(tmp_path/'run')))
    for line in lines(found): assert line['teachers'][LITE0].keys() == {'attention'}


def test_a_ramp_says_how_much_counts(recipe, tmp_path):
    found = lines(run_recipe(replace(recipe, listen=(Listen('kd', 3., 'rising'),), out=str(tmp_path/'run'))))
    for done, line in enumerate(found):
        terms = {f'{name} {kind}': value for name, own in line['teachers'].items() for kind, value in own.items()}
        kd = terms.pop(f'{LITE0} kd')
        assert_close(line['loss'], sum(terms.values()) + 3*done/4*kd, rtol=1e-4, atol=1e-4)


def test_the_saved_student_names_classes(out):
    student = Student.from_pretrained(out)
    images = torch.rand(2, 3, 64, 64)
    features = student(images)
    logits = student.logits(features)
    assert student.config['classes'] == {LITE0: 1000, LITE0 + FROM_LABELS: 1000}
    assert {name: own.shape for name, own in logits.items()} == dict.fromkeys(student.config['classes'], (2, 1000))
    assert_close(logits[LITE0], student.logit_heads[0](features[LITE0].summary))
    assert not torch.equal(*logits.values())


def test_a_head_for_labels_is_made_for_who_asks_for_it(recipe, tmp_path):
    out = run_recipe(replace(recipe, listen=(Listen('kd'), Listen('dho', 0.)), steps=1, out=str(tmp_path/'run')))
    assert Student.from_pretrained(out).config['classes'] == {LITE0: 1000}


def test_it_learns_the_teacher_s_logits(recipe, tmp_path):
    "With nothing but soft labels, and images that come again, the divergence falls; three steps are an epoch."
    more = dict(steps=60, listen=(Listen('kd'),), spatial_weights=(1e-6, 0.), summary_weights=(1e-6, 0.), views=1)
    run = run_recipe(replace(recipe, out=str(tmp_path/'run'), lr=1e-2, **more))
    found = [line['teachers'][LITE0]['kd'] for line in lines(run)]
    assert np.mean(found[-6:]) < .7*np.mean(found[:6])


def test_what_a_listener_learns_is_learned_whatever_the_balance(recipe, tmp_path):
    own = replace(recipe, teachers=('zoo:u2netp#64',), listen=(Listen('mgd'),), balance='uncertainty')
    first, last = (run_recipe(replace(own, steps=steps, out=str(tmp_path/f'{steps}'))) for steps in (1, 3))
    one, three = (load_checkpoint(run/'checkpoints')['trainer']['weights'] for run in (first, last))
    moved = [key for key in one if key.startswith('listening.') and not torch.equal(one[key], three[key])]
    assert moved and len(moved) == sum(key.startswith('listening.') for key in one)


def test_a_listener_whose_own_gradient_is_not_finite_ends_the_run(recipe, monkeypatch, tmp_path):
    class Rooted(Listener):
        "Its loss is 0, and the gradient of its own weight is not a number."
        def __init__(self, widths, classes):
            super().__init__(widths, classes)
            self.root = torch.nn.Parameter(torch.zeros(()))
        def losses(self, student, teacher, lesson): return 0*student.summary.sum(1) + 0*self.root.sqrt()
    monkeypatch.setitem(LISTENERS, 'rooted', Rooted)
    own = replace(recipe, listen=(Listen('rooted'),), out=str(tmp_path/'run'))
    with pytest.raises(BadInput, match='step 1: the norm of the gradient is nan'): run_recipe(own)


def test_a_listener_s_gradient_is_clipped(recipe, monkeypatch, tmp_path):
    "With a gradient of a million beside a clip of 1, AdamW's second moment stays below 1."
    class Steep(Listener):
        def __init__(self, widths, classes):
            super().__init__(widths, classes)
            self.height = torch.nn.Parameter(torch.zeros(()))
        def losses(self, student, teacher, lesson): return 0*student.summary.sum(1) + 1e6*self.height
    monkeypatch.setitem(LISTENERS, 'steep', Steep)
    out = run_recipe(replace(recipe, listen=(Listen('steep'),), steps=1, out=str(tmp_path/'run')))
    moments = load_checkpoint(out/'checkpoints')['trainer']['optimizer']['state']
    height, = (state['exp_avg_sq'] for state in moments.values() if state['exp_avg_sq'].ndim == 0)
    assert 0 < height < 1e-2


def test_losses_of_listeners_are_those_of_float32_also_under_autocast():
    torch.manual_seed(0)
    x, y = (Voice(torch.randn(2, 8), torch.randn(2, 4, 4, 64), name='a') for _ in range(2))
    listening = Listening((Listen('relations'), Listen('attention')), {'a': (8, 64)})
    def loss(): return listening(Lesson({'a': x}, {'a': y}), {'a': 1.})[0]
    with torch.autocast('cpu', torch.bfloat16): half = loss()
    assert torch.equal(half, loss())


def test_labels_travel_with_their_images(recipe):
    images, names = open_labelled(recipe.images)
    assert len(names) == 1000 and images['label'][:] == [i % 2 for i in range(12)]
    ready = prepare(replace(recipe, hold_out=4))
    assert len(ready.train) == 8 and ready.train.column_names == ['image', 'label']
    whole = {bytes(row['image']['bytes']): row['label'] for row in images}
    assert all(whole[row['image']['bytes']] == row['label'] for row in ready.train)
    assert 'label' not in prepare(replace(recipe, listen=(Listen('kd'),))).train.column_names


def test_images_without_a_class_are_learned_from_by_who_needs_none(recipe, tmp_path):
    rows = Dataset.from_parquet(recipe.images)
    def with_labels(labels, name):
        rows.remove_columns('label').add_column('label', labels).to_parquet(tmp_path/name)
        return str(tmp_path/name)
    few = with_labels(['0', None]*6, 'few.parquet')
    assert open_labelled(few)[0]['label'][:] == [0, -1]*6
    assert open_labelled(with_labels([0, -1]*6, 'numbers.parquet'))[0]['label'][:] == [0, -1]*6
    with pytest.raises(BadInput, match='6 of 12 images have no class'): labelled_images(few)
    with pytest.raises(BadInput, match='has no labels: of none'): open_labelled(with_labels([-1]*12, 'none.parquet'))
    alike = open_labelled(recipe.images)[0]
    few = alike.map(lambda row, i: {'label': row['label'] if i < 2 else -1}, with_indices=True)
    ready = prepare(replace(recipe, listen=(Listen('dho'),)), inputs=Inputs(images=few))
    assert sorted(ready.train['label'][:])[:10] == [-1]*10
    run = radio_nb.distill(replace(recipe, listen=(Listen('dho'), Listen('labels')), steps=2, out=str(tmp_path/'run')),
                           images=few, live=False)
    own = run.metrics[-1]['teachers'][LITE0]
    assert 0 <= own['labels'] < 4 < own['dho']   # two labels at most, against soft labels of all four images


def test_parts_of_classes_are_found_in_a_run_and_after_a_break(recipe, tmp_path):
    own = replace(recipe, teachers=('timm:cifar_resnet20@random#32',), size=32, steps=6, batch_size=12,
                  listen=(Listen('lelp', options={'measured': .3}),), out=str(tmp_path/'run'))
    out = run_recipe(own)
    assert same_after_a_break(own, out, tmp_path/'again')
    one, two = (load_checkpoint(folder/'checkpoints')['trainer']['weights'] for folder in (Path(out), tmp_path/'again'))
    heard = [name for name in one if name.startswith('listening.')]
    assert heard and all(torch.equal(one[name], two[name]) for name in heard)
    assert one['listening.listeners.0.hidden.0.axes'].any()


def test_a_listener_hears_the_teachers_it_is_told_to(recipe, tmp_path):
    lines_ = Listen('attention', teachers=('u2netp',)), Listen('relations', teachers=(LITE0,)), Listen('mgd', .1)
    twice = (*lines_, Listen('attention', .5, teachers=(LITE0,)))
    out = run_recipe(replace(recipe, listen=twice, out=str(tmp_path/'run')))
    line = lines(out)[0]
    heard = {name: own.keys() - {'summary', 'spatial'} for name, own in line['teachers'].items()}
    assert heard == {LITE0: {'attention', 'relations', 'mgd'}, 'u2netp': {'attention', 'mgd'}}
    lite0, u2netp = line['teachers'][LITE0], line['teachers']['u2netp']
    own = sum(name[kind] for name in (lite0, u2netp) for kind in ('summary', 'spatial'))
    own += u2netp['attention'] + .5*lite0['attention'] + lite0['relations'] + .1*(lite0['mgd'] + u2netp['mgd'])
    assert_close(line['loss'], own, rtol=1e-4, atol=1e-4)
    assert same_after_a_break(replace(recipe, listen=twice, out=str(tmp_path/'again')), out, tmp_path/'again')


def test_a_student_has_heads_for_those_alone_who_teach_it_logits(recipe, tmp_path):
    "A head that nobody teaches would be random in the end, and DDP would wait for its gradient."
    two = replace(recipe, teachers=(f'zoo:{LITE0}#64', 'zoo:efficientnet-lite2#64'), steps=1, listen=(
        Listen('kd', teachers=(LITE0,)), Listen('dho', teachers=('efficientnet-lite2',))), out=str(tmp_path/'run'))
    names = radio_nb.create(run_recipe(two)).config['classes']
    assert names == {LITE0: 1000, 'efficientnet-lite2': 1000, f'efficientnet-lite2{FROM_LABELS}': 1000}
    one = replace(two, listen=(Listen('kd', teachers=(LITE0,)),), steps=4)
    assert max(differences_by_division(one, tmp_path)) < 1e-5
    unheard = replace(recipe, listen=(Listen('nd'),), steps=1, out=str(tmp_path/'nd'))
    assert radio_nb.create(run_recipe(unheard)).config['classes'] == {}


def test_what_does_not_suit_is_refused_before_anything_is_measured(recipe, tmp_path):
    wrong = replace(recipe, listen=(Listen('mgd', options={'holes': 2.}),), out=str(tmp_path/'run'))
    with pytest.raises(BadInput, match='option holes of listener mgd is 2.0, but must be from 0'): run_recipe(wrong)
    assert not [*Path(wrong.out).glob('statistics*')]


def test_labels_need_number_the_classes_of_those_who_are_heard_with_them(recipe):
    two = open_labelled(recipe.images)[0].cast_column('label', ClassLabel(names=['odd', 'even']))
    other = replace(recipe, teachers=(*recipe.teachers, 'timm:cifar_resnet20@random#32'), listen=(
        Listen('kd'), Listen('labels', teachers=('cifar_resnet20@random',))))
    with pytest.raises(BadInput, match='teacher cifar_resnet20@random: it names 10, and the images have 2'):
        prepare(other, inputs=Inputs(images=two))
    ten = two.cast_column('label', ClassLabel(names=[str(i) for i in range(10)]))
    assert prepare(other, inputs=Inputs(images=ten)).classes() == {LITE0: 1000, 'cifar_resnet20@random': 10}


def test_labels_of_a_data_set_that_is_handed_over_are_kept(recipe, tmp_path):
    images = open_labelled(recipe.images)[0]
    one = replace(recipe, steps=1, out=str(tmp_path/'run'))
    run = radio_nb.distill(one, images=images.select(range(6)), live=False)
    assert 'pld' in run.metrics[0]['teachers'][LITE0]


@pytest.mark.parametrize('name', LISTENERS)
def test_a_listener_is_short(name): assert len(inspect.getsource(LISTENERS[name]).splitlines()) <= 40


def test_a_recipe_with_listeners_is_written_and_read(recipe):
    assert Recipe(**parse_recipe(recipe_toml(recipe), 'text')) == recipe


def test_what_cannot_be_listened_to_is_refused(recipe):
    def refused(message, **fields):
        with pytest.raises(BadInput, match=message): check_recipe(replace(recipe, **fields))
    refused('listener pld needs labels, and zoo:photos is read without', images='zoo:photos', listen=(Listen('pld'),))
    refused('needs labels, and stream:.* is read without', images=f'stream:{recipe.images}')
    refused('listener kd needs logits, and no teacher names classes', listen=(Listen('kd'),), teachers=('zoo:u2netp',))
    refused("unknown listener 'kad': did you mean kd", listen=(Listen('kad'),))
    refused('listener kd is listed twice', listen=(Listen('kd'), Listen('kd', 2.)))
    refused('listener kd is listed twice', listen=(Listen('kd', teachers=(LITE0,)), Listen('kd', 2.)))
    refused("unknown teacher of listener kd 'owl'", listen=(Listen('kd', teachers=('owl',)),))
    refused('listener surest needs a second teacher', listen=(Listen('surest', teachers=(LITE0,)),))
    refused("unknown ramp of listener kd 'up'", listen=(Listen('kd', ramp='up'),))
    refused("unknown option of listener kd 'tau'", listen=(Listen('kd', options={'tau': 2.}),))
    check_recipe(replace(recipe, images='zoo:photos', listen=(Listen('pld', 0.), Listen('kd'))))
    with pytest.raises(BadInput, match='needs logits, and the teachers have none: classes must be named by a'):
        prepare(replace(recipe, summary_weights=(0., 1.)))
    with pytest.raises(BadInput, match='listener kd needs logits, and teacher u2netp has none'):
        prepare(replace(recipe, listen=(Listen('kd', teachers=('u2netp',)),)))
    images = open_labelled(recipe.images)[0]
    two = images.cast_column('label', ClassLabel(names=['odd', 'even']))
    with pytest.raises(BadInput, match=f'number the classes of teacher {LITE0}: it names 1000, and the images have 2'):
        prepare(recipe, inputs=Inputs(images=two))
    with pytest.raises(BadInput, match='needs labels, and the images that were handed over have no column'):
        prepare(recipe, inputs=Inputs(images=images.remove_columns('label')))


@pytest.fixture(scope='module')
def of_two(recipe):
    "A committee of the two classifiers, and a third teacher that names nothing."
    return replace(recipe, teachers=(*recipe.teachers, 'zoo:efficientnet-lite2#64'), out=f'{recipe.out}-of-two',
                   listen=tuple(Listen(name, .1) for name in OF_COMMITTEES))


def test_a_committee_is_heard_by_each_of_its_heads_and_goes_on_after_a_break(of_two, tmp_path):
    out = run_recipe(of_two)
    for line in lines(out):
        heard = {name: own.keys() - {'summary', 'spatial'} for name, own in line['teachers'].items()}
        of_logits = dict.fromkeys((LITE0, 'efficientnet-lite2'), set(OF_COMMITTEES))
        assert heard == of_logits | {'u2netp': {'infonce'}}   # it names no classes
    assert same_after_a_break(of_two, out, tmp_path/'run')


def test_a_committee_that_does_not_compare_images_can_be_divided(of_two, tmp_path):
    own = tuple(line for line in of_two.listen if not LISTENERS[line.name].compares_images)
    assert len(own) == 5 and max(differences_by_division(replace(of_two, listen=own), tmp_path)) < 1e-5


def test_a_committee_of_one_is_refused(recipe, tmp_path):
    with pytest.raises(BadInput, match=f'needs two teachers that name the same classes, and here is: {LITE0} 1000'):
        run_recipe(replace(recipe, listen=(Listen('committee'),), out=str(tmp_path/'run')))
    with pytest.raises(BadInput, match='listener mst needs a second teacher'):
        check_recipe(replace(recipe, teachers=recipe.teachers[:1], listen=(Listen('mst'),)))
    with pytest.raises(BadInput, match="unknown teacher that names classes 'owl'"):
        run_recipe(replace(recipe, teachers=(f'zoo:{LITE0}#64', 'zoo:efficientnet-lite2#64'), out=str(tmp_path/'two'),
                           listen=(Listen('weighted', options={'weights': {'owl': 1.}}),)))


def test_a_weight_that_changes_compiles_nothing_anew(recipe, tmp_path):
    def from_now_on(run):
        if run.step == 2: torch._dynamo.config.error_on_recompile = True
    torch._dynamo.reset()
    compiled = replace(recipe, compile='eager', listen=(Listen('kd', 1., 'rising'), Listen('taid', 1., 'warm-up')),
                       out=str(tmp_path/'run'))
    with torch._dynamo.config.patch(error_on_recompile=False):
        run_recipe(compiled, callbacks=Callbacks(from_now_on))


def test_a_single_image_is_refused_by_who_tells_images_apart(recipe, tmp_path):
    for fields in ({'batch_size': 1}, {'batch_size': 4, 'stages': (Stage(2, partitions=(
            Partition(.25, teachers=(LITE0,)), Partition(.75))),)}):
        alone = replace(recipe, listen=(Listen('infonce'),), out=str(tmp_path/'run'), **fields)
        with pytest.raises(BadInput, match='infonce cannot tell one image from others'): run_recipe(alone)
        assert not [*Path(alone.out).glob('statistics*')]


@pytest.mark.parametrize('name, option, value', [
    ('attention', 'power', 0.), ('ofa', 'gamma', 0.), ('bd-kd', 'more', -1.), ('taid', 'start', 1.5),
    ('dho', 'label_weight', -1.), ('acam', 'diversity', -.5), ('lelp', 'beta', 0.), ('infonce', 'alpha', 2.)])
def test_options_that_would_make_something_else_of_a_listener(name, option, value):
    with pytest.raises(BadInput, match=f'option {option} of listener {name} is {value}, but must be'):
        LISTENERS[name]({'a': (8, 8)}, {'a': 3}, **{option: value})


def test_axes_are_looked_for_again_only_with_twice_as_many_images(monkeypatch):
    "A teacher whose images of a class are all alike shows none."
    looked, find = [], summaries.eigenbasis
    monkeypatch.setattr(summaries, 'eigenbasis', lambda cov: looked.append(1) or find(cov))
    hidden = HiddenAxes(torch.nn.Linear(8, 2), 2)
    for _ in range(64):
        hidden.update(torch.eye(2, 8), torch.tensor([0, 1]))
        hidden.fit()
    assert len(looked) == 4 and not hidden.found()   # with 8, 16, 32 and 64 images or so


@pytest.fixture(scope='module')
def learned(recipe):
    "A run whose student names classes."
    return run_recipe(replace(recipe, listen=(Listen('kd'),), out=f'{recipe.out}-learned'))


def going_on(recipe, learned, *names, **fields):
    return replace(recipe, init=str(learned), listen=tuple(Listen(name, .1) for name in names), **fields)


def test_the_student_as_it_was_is_asked_and_kept_over_a_break(recipe, learned, tmp_path):
    again = going_on(recipe, learned, 'klpdp', 'klpdp-labels', out=str(tmp_path/'run'), ema=.5, lr=1e-2)
    out = run_recipe(again)
    assert all({'klpdp', 'klpdp-labels'} <= line['teachers'][LITE0].keys() for line in lines(out))
    assert same_after_a_break(again, out, tmp_path/'again')
    weights, first = load_checkpoint(Path(out)/'checkpoints')['trainer']['weights'], Student.from_pretrained(learned)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(weights[f'before.network.backbone.{name}'], value)
    for name, value in first.backbone.named_parameters():
        assert not torch.equal(weights[f'student.backbone.{name}'], value)
    assert not [name for name in radio_nb.create(out).state_dict() if name.startswith('before')]


def test_who_was_always_surer_learns_nothing_new(recipe, learned, tmp_path, monkeypatch):
    "The teacher says nothing at all, so that the student is asked to stay as it was."
    monkeypatch.setattr('radio_nb.training.preparation.classifier_of', silent_classifier)
    # without the positions that a student in training has to do without
    monkeypatch.setattr(Transformer, 'train', lambda self, mode=True: torch.nn.Module.train(self, False))
    out = run_recipe(going_on(recipe, learned, 'klpdp', out=str(tmp_path/'run')))
    assert lines(out)[0]['teachers'][LITE0]['klpdp'] < 1e-3 < lines(out)[-1]['teachers'][LITE0]['klpdp']


def silent_classifier(spec, seed=0):
    layer = classifier_of(spec, seed)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def test_the_student_as_it_was_can_be_divided(recipe, learned, tmp_path):
    both = going_on(recipe, learned, 'klpdp', 'klpdp-labels')
    assert max(differences_by_division(both, tmp_path)) < 1e-5


def test_a_student_that_was_not_is_refused(recipe, learned, tmp_path):
    with pytest.raises(BadInput, match='listener klpdp needs the student as it was: name the run .* --init'):
        check_recipe(replace(recipe, listen=(Listen('klpdp'),)))
    with pytest.raises(BadInput, match='shard: the student as it was, whom klpdp asks, is not sharded'):
        check_recipe(going_on(recipe, learned, 'klpdp', shard=True))
    silent = run_recipe(replace(recipe, listen=(), out=str(tmp_path/'silent'), steps=1))
    with pytest.raises(BadInput, match='init: the student of .* has classes {}, and this one'):
        run_recipe(going_on(recipe, silent, 'klpdp', out=str(tmp_path/'run')))


def test_few_patches_stay_as_few_when_a_run_goes_on(recipe, tmp_path):
    few = replace(recipe, listen=(), out=str(tmp_path/'run'))
    inputs = Inputs(crop=FewPatches(.5, 4))
    def fail(run):
        if run.step == 3: raise RuntimeError('the power')
    whole = run_recipe(replace(few, out=str(tmp_path/'whole')), inputs=inputs)
    with pytest.raises(RuntimeError, match='the power'): run_recipe(few, inputs=inputs, callbacks=Callbacks(fail))
    with pytest.raises(BadInput, match='the crop changed since the run in .* began'):
        run_recipe(few, resume=True, inputs=Inputs(crop=FewPatches(.25, 4)))
    out = run_recipe(few, resume=True, inputs=inputs)
    assert (Path(out)/'student.safetensors').read_bytes() == (Path(whole)/'student.safetensors').read_bytes()


def test_inner_layers_are_those_of_a_transformer_of_two_blocks_or_more(recipe, tmp_path):
    own = replace(recipe, listen=(Listen('ofa-branches'),), out=str(tmp_path/'run'))
    for other in dict(depth=1), dict(depth=0, student='resnet10t'):
        with pytest.raises(BadInput, match='listener ofa-branches needs inner layers: take a vision transformer'):
            run_recipe(replace(own, **other))
    first, last = (run_recipe(replace(own, steps=n, out=str(tmp_path/f'{n}'))) for n in (1, 2))
    one, two = (load_checkpoint(run/'checkpoints')['trainer']['weights'] for run in (first, last))
    branches = [key for key in one if '.branches.' in key]
    assert len(branches) == 6 and not any(torch.equal(one[key], two[key]) for key in branches)
    plain = run_recipe(replace(own, steps=2, listen=(Listen('ofa'),), out=str(tmp_path/'plain')))
    students = [Student.from_pretrained(run).state_dict() for run in (last, plain)]
    assert students[0].keys() == students[1].keys()   # branches are not a part of the student
    inner = next(key for key in students[0] if key.endswith('blocks.0.mlp.fc1.weight'))
    assert not torch.equal(*(student[inner] for student in students))


def test_who_compares_images_wants_the_batch_whole(recipe, monkeypatch):
    class Comparing(Listener): compares_images = True
    monkeypatch.setitem(LISTENERS, 'comparing', Comparing)
    own = replace(recipe, listen=(Listen('comparing'),))
    assert check_recipe(own)
    with pytest.raises(BadInput, match='listener comparing compares the images of a batch, .* leave out --accumulate'):
        check_recipe(replace(own, accumulate=2))
    student = SimpleNamespace(backbone=SimpleNamespace(patch=16, stride=16))
    check_sizes(own, (), student, 1)
    for name in [name for name, listener in LISTENERS.items() if listener.compares_images]:
        with pytest.raises(BadInput, match=f'listener {name} compares .* which 2 processes would divide: start one'):
            check_sizes(replace(own, listen=(Listen(name),)), (), student, 2)


def test_a_classifier_is_the_teacher_s_own():
    layer = classifier_of(f'zoo:{LITE0}')
    assert layer.weight.shape == (1000, 1280) and not layer.weight.requires_grad
    one, again, other = (classifier_of('timm:resnet10t@random', seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, other.weight)
