"""DFA: who sees which images, what moves the shares, and what stands still afterwards."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from kdnas.costs.count import cost
from kdnas.distillers.aggregation import Aggregation
from kdnas.distillers.base import Batch, Step
from kdnas.distillers.from_labels import FromLabels
from kdnas.jobs.retrain import retrain
from kdnas.losses.feature.feature_mse import FeatureMse
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe, Retrain
from kdnas.space import Blueprint, layer
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen, every_layer
from kdnas.teachers.combined import Ensemble
from kdnas.teachers.zoo import student_teacher
from kdnas.training.loop import Training
from tests.killing import CHECKPOINT, killed
from tests.toy import Cnn, data

DATA = data()
SPACE = dataclasses.replace(load_space("toy"), classes=3)
BLUEPRINT = SPACE.blueprint(SPACE.largest)
RECIPE = Recipe(steps=6, batch_size=16, learning_rate=0.05)


def teacher():
    """Two stages of three and two layers, at 8x8 and 4x4."""
    stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=3, outputs=6)
    block = "kdnas.blocks.resnet:BasicBlock"
    first = tuple(layer(block, inputs=6, outputs=6) for _ in range(3))
    second = (layer(block, inputs=6, outputs=8, stride=2), layer(block, inputs=8, outputs=8))
    head = layer("kdnas.blocks.basic:PoolLinear", inputs=8, classes=3)
    network = initialised(lambda: Network(Blueprint(stem, (first, second), head, (3, 8, 8))), 5)
    return Frozen(network, preprocessing=DATA.preprocessing)


def training(distiller=None, recipe=RECIPE, **arguments):
    network = initialised(lambda: Network(BLUEPRINT), 0)
    made = distiller or Aggregation(**({"search_share": 0.5} | arguments))
    return Training(network, made, DATA, teacher(), recipe)


def changed(batch, odd, pixels=None):
    """The batch with other images, and labels, of odd or of even numbers."""
    which = batch.ids % 2 == int(odd)
    made = torch.where(which[:, None, None, None], torch.rand(batch.pixels.shape) if pixels is None else pixels, 0)
    mixed = torch.where(which[:, None, None, None], made, batch.pixels)
    labels = torch.where(which, (batch.labels + 1) % 3, batch.labels)
    return Batch(mixed, labels, batch.ids, DATA, batch._teacher)


def test_the_teacher_shows_every_layer_and_layers_of_one_size_are_a_group():
    made = training()
    shapes = [tuple(f.shape[1:]) for f in made._batch(0).teacher.features]
    assert shapes == [(6, 8, 8)] * 3 + [(8, 4, 4)] * 2
    sizes = {
        made.model(DATA.normalise(torch.rand(2, 3, 8, 8))).features[i].shape[2] for i, _ in made.distiller.hint.groups
    }
    assert sizes <= {8, 4}
    assert [members for _, members in made.distiller.hint.groups] == [(0, 1, 2), (3, 4)]


def test_shares_start_equal_and_sum_to_one_after_the_search():
    made = training(rate=0.1)
    assert [a.tolist() for a in made.distiller.alpha()] == [pytest.approx([1 / 3] * 3), pytest.approx([0.5] * 2)]
    for _ in range(3):
        made.step()
    alpha = made.distiller.alpha()
    assert all(a.sum().item() == pytest.approx(1) and (a > 0).all() for a in alpha)
    assert max(abs(a - 1 / 3) for a in alpha[0].tolist()) > 0.01


def first_batch():
    """In the contiguous format of `changed`, since channels-last gradients are rounded otherwise."""
    batch = training()._batch(0)
    batch.images = batch.images.contiguous()
    return batch


def gradients(made, batch):
    """Of the weights and the connectors, from the step's losses."""
    made.model.train()
    for module in (made.model, made.distiller):
        module.zero_grad()
    for _, loss in made.distiller.losses(made.model, batch, Step(0, 6, 0)):
        loss.backward()
    return {
        name: p.grad.clone()
        for module in (made.model, made.distiller)
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def test_the_weights_and_running_statistics_never_see_the_shares_images():
    made, batch = training(), first_batch()
    found = gradients(made, batch)
    statistics = copy.deepcopy(dict(made.model.named_buffers()))
    other = training()
    unseen = gradients(other, changed(batch, odd=True))
    assert found and not any(name.startswith("hint.betas") for name in found)
    assert all(torch.equal(gradient, unseen[name]) for name, gradient in found.items())
    other.distiller.after(other.model, changed(batch, odd=True), Step(0, 6, 0))
    for name, tensor in other.model.named_buffers():
        assert torch.equal(tensor, statistics[name]), name
    seen = gradients(training(), changed(batch, odd=False))
    assert not all(torch.equal(gradient, seen[name]) for name, gradient in found.items())


def moved(batch, **arguments):
    made = training(**arguments)
    made.distiller.after(made.model, batch, Step(0, 6, 0))
    return torch.cat([beta.detach() for beta in made.distiller.hint.betas])


def test_the_shares_move_by_their_own_images_only_and_by_both_paths():
    batch = first_batch()
    found = moved(batch)
    assert found.abs().max() == pytest.approx(0.01, rel=1e-3)  # Adam's first step is the rate
    assert torch.equal(moved(changed(batch, odd=False)), found)
    signs = [moved(batch, **{name: 0.0}).sign() for name in ("student_to_teacher", "teacher_to_student")]
    assert all(s.abs().sum() == 5 for s in signs)
    nothing = {"student_to_teacher": 0.0, "teacher_to_student": 0.0, "decay": 0.0}
    assert moved(batch, **nothing).abs().max() == 0


def test_the_shares_update_is_adams():
    made = training(rate=0.05)
    reference = torch.zeros(5, requires_grad=True)
    adam = torch.optim.Adam([reference], 0.05, betas=(0.5, 0.999))
    for phase in range(4):
        reference.grad = torch.sin(torch.arange(5.0) + phase)
        made.distiller._update(reference.grad)
        adam.step()
    found = torch.cat([beta.detach() for beta in made.distiller.hint.betas])
    torch.testing.assert_close(found, reference.detach())


def test_a_part_without_images_is_left_out():
    made = training()
    batch = made._batch(0)
    even = Batch(batch.pixels, batch.labels, batch.ids * 2, DATA, batch._teacher)
    odd = Batch(batch.pixels, batch.labels, batch.ids * 2 + 1, DATA, batch._teacher)
    made.distiller.after(made.model, even, Step(0, 6, 0))
    assert all((beta == 0).all() for beta in made.distiller.hint.betas)
    assert all(gradient.abs().max() == 0 for gradient in gradients(made, odd).values())


def test_afterwards_the_shares_stand_still_and_the_student_begins_anew():
    made = training(rate=0.1)
    for _ in range(3):
        made.step()
    shares = [a.clone() for a in made.distiller.alpha()]
    fresh = initialised(lambda: Network(BLUEPRINT), RECIPE.seed)
    seen = []
    forward = made.model.forward
    made.model.forward = lambda images: seen.append(copy.deepcopy(made.model.state_dict())) or forward(images)
    for _ in range(3):
        made.step()
    assert all(torch.equal(a, b) for a, b in zip(made.distiller.alpha(), shares, strict=True))
    assert all(torch.equal(tensor, seen[0][name]) for name, tensor in fresh.state_dict().items())
    assert not torch.equal(seen[1]["stem.0.weight"], seen[0]["stem.0.weight"])
    assert training().distiller.schedule(6).restarts == {3}


def test_after_the_search_the_loss_is_the_labels_and_the_hint_with_the_shares_found():
    made = training(rate=0.1, weight=2.0)
    for _ in range(4):
        made.step()
    batch, hint = made._batch(4), made.distiller.hint
    ((_, found),) = made.distiller.losses(made.model, batch, Step(4, 6, 0))
    student = made.model(batch.images)
    expected = nn.functional.cross_entropy(student.logits, batch.labels)
    for (i, members), alpha, connector in zip(hint.groups, hint.alpha(), hint.to_teacher, strict=True):
        mixed = sum(a * batch.teacher.features[j] for a, j in zip(alpha, members, strict=True))
        own = nn.functional.adaptive_avg_pool2d(student.features[i], mixed.shape[2:])
        expected = expected + 2 * (connector(own) - mixed).square().mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_regulariser_draws_the_shares_towards_equal_ones(monkeypatch):
    made = training(student_to_teacher=0.0, teacher_to_student=0.0, decay=0.1)
    gradients = []
    monkeypatch.setattr(made.distiller, "_update", gradients.append)
    for beta in made.distiller.hint.betas:
        beta.data = torch.linspace(-1, 2, len(beta))
    made.distiller.after(made.model, first_batch(), Step(0, 6, 0))
    torch.testing.assert_close(gradients[0], 0.1 * torch.tensor([-1.0, 0.5, 2.0, -1.0, 2.0]))


def test_with_one_layers_share_the_distillation_is_a_plain_hint():
    made = training(search_share=0.0, weight=2.0)
    assert made.distiller.schedule(6).restarts == frozenset()
    batch = made._batch(0)
    for beta in made.distiller.hint.betas:
        beta.data = 1e4 * torch.nn.functional.one_hot(torch.tensor(len(beta) - 1), len(beta)).float()
    ((_, found),) = made.distiller.losses(made.model, batch, Step(0, 6, 0))
    student = made.model(batch.images)
    pairs = tuple((i, members[-1]) for i, members in made.distiller.hint.groups)
    hint = FeatureMse(taps=pairs)
    hint.prepare(student, batch.teacher, elastic=True)
    for adapter, own in zip(hint.taps.adapters.values(), made.distiller.hint.to_teacher, strict=True):
        adapter.weight.data = own.weight.data
    task = torch.nn.functional.cross_entropy(student.logits, batch.labels)
    expected = task + 2 * hint(student, batch.teacher, batch.labels)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_training_resumed_in_either_stage_ends_like_an_uninterrupted_one():
    whole = training(rate=0.1)
    states = {}
    while not whole.done:
        states[whole.index] = copy.deepcopy(whole.state())
        whole.step()
    for index in (2, 3, 4):
        resumed = training(rate=0.1)
        resumed.load(states[index])
        while not resumed.done:
            resumed.step()
        for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(a, b), (index, name)


def test_without_the_path_through_the_student_shares_move_to_what_it_matches_already():
    # The teacher's first layer is its stem's map as the student has it; the second says the label, the first does not.
    def learnt(share):
        made = training(student_to_teacher=1.0, teacher_to_student=share, rate=0.3, decay=0.0)
        batch = made._batch(0)
        easy = made.model(batch.images).features[0].detach()
        hard = 5 * nn.functional.one_hot(batch.labels, easy.shape[1]).float()[:, :, None, None].expand_as(easy)
        shown = batch.teacher._replace(features=(easy, hard))
        both = Batch(batch.pixels, batch.labels, batch.ids * 2 + 1, DATA, lambda *_: shown)
        distiller = Aggregation(groups=((0, (0, 1)),), search_share=0.5, teacher_to_student=share, rate=0.3, decay=0.0)
        distiller.prepare(made.model, both)
        made.model.remaining_layers = lambda stage, feature, outputs: feature.mean((2, 3))[:, :3]
        made.model.eval()
        for _ in range(40):
            distiller.after(made.model, both, Step(0, 6, 0))
        return distiller.alpha()[0][0].item()

    assert learnt(0.0) > 0.9
    assert learnt(200.0) < 0.5


def test_layers_of_torchvisions_networks_are_their_blocks():
    large = dataclasses.replace(DATA.preprocessing, height=64, width=64)
    shown = every_layer(Frozen(resnet18(num_classes=3), preprocessing=large))
    assert shown.stages == tuple(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))
    plain = every_layer(Frozen(Cnn(), preprocessing=DATA.preprocessing))
    assert plain.stages == Frozen(Cnn(), preprocessing=DATA.preprocessing).stages


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="search_share"):
        Aggregation(search_share=1.0)
    with pytest.raises(ValueError, match="`rate` must be"):
        Aggregation(rate=-1.0)
    with pytest.raises(ValueError, match="need a teacher of one network, got a Ensemble"):
        Training(Network(BLUEPRINT), Aggregation(), DATA, Ensemble([teacher(), teacher()]), RECIPE)
    with pytest.raises(ValueError, match="needs a teacher"):
        Training(Network(BLUEPRINT), Aggregation(), DATA, None, RECIPE)
    assert not FromLabels.every_layer


RETRAIN = Retrain(distiller=spec(Aggregation, search_share=0.5, rate=0.1), recipe=RECIPE)


def retrained(folder):
    """The toy student, trained by DFA under a teacher of blocks."""
    for name, network in (("teacher", teacher().module), ("student", initialised(lambda: Network(BLUEPRINT), 0))):
        if not (folder / name).exists():
            card = Card(
                architecture=None,
                space=None,
                blueprint=network.blueprint,
                cost=cost(network.blueprint),
                preprocessing=DATA.preprocessing,
                class_names=DATA.class_names,
                origin={},
            )
            write_student(folder / name, network, card, deploy=False)
    taught = spec(student_teacher, path=str(folder / "teacher"))
    retrain(folder / "student", RETRAIN, folder / "found", data=spec("tests.toy:data"), teacher=taught, deploy=False)


def test_a_retraining_killed_in_its_midst_ends_with_the_same_student(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    retrained(whole)
    code = f"import pathlib, {__name__} as own\nown.retrained(pathlib.Path({str(folder)!r}))"
    for step in (3, 6):  # within the search for shares, and behind it
        killed(code, f"given[1]['training']['index'] == {step}", **CHECKPOINT)
    assert list(folder.glob(".found.*.draft.safetensors"))
    retrained(folder)
    found = [read_student(place / "found")[0].state_dict() for place in (whole, folder)]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
