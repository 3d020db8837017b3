"""Every loss goes into every distiller by its name, with its stages, parts and discriminators."""

import pytest
import torch

from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.jobs._arguments import losses_of, terms_of
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.specs import algorithms, find_spec, resolve
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.teachers.combined import Route
from kdnas.training.loop import Training
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()
# The first step of a run and its last are in the first stage and the last one.
RECIPE = Recipe(steps=3, batch_size=16, learning_rate=0.01)
DENSE_OR_ATTENTION = ("pixel_wise", "holistic", "attention_map")
NAMES = sorted(set(algorithms("kdnas.losses")) - {"scale_factors", *DENSE_OR_ATTENTION})


def frozen(seed):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), seed)
    return Frozen(network, preprocessing=DATA.preprocessing)


def training(distiller, recipe=RECIPE):
    if isinstance(distiller, FromTeacher):
        model = initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0)
    else:
        model = initialised(lambda: Supernet(SPACE), 0)
    return Training(model, distiller, DATA, frozen(5), recipe)


def distiller_of(kind, name):
    return terms_of([name]).build() if kind is FromTeacher else kind(terms=losses_of([name]))


@pytest.mark.parametrize("kind", [FromTeacher, Sandwich, SinglePath])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_trains_in_every_distiller(kind, name):
    made = training(distiller_of(kind, name))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    while not made.done:
        values = made.step()
    assert all(torch.isfinite(torch.tensor(v)) for v in values.values())
    assert all(torch.isfinite(p).all() for p in made.model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in made.model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_every_learnable_part_is_optimised_and_checkpointed_and_none_is_in_the_student(name):
    made = training(terms_of([name]).build())
    parts = dict(made.distiller.named_parameters())
    before = {n: p.detach().clone() for n, p in parts.items()}
    held = {id(p) for g in made.optimizer.param_groups for p in g["params"]}
    while not made.done:
        made.step()
    for part, parameter in parts.items():
        assert (id(parameter) in held) == parameter.requires_grad, part
    movable = [n for n, p in parts.items() if p.requires_grad]
    moved = [n for n in movable if not torch.equal(parts[n], before[n])]
    assert not movable or moved
    assert set(made.state()["distiller"]) >= set(parts)
    assert set(made.state()["model"]) == set(Network(SPACE.blueprint(SPACE.smallest)).state_dict())


@pytest.mark.parametrize("name", ["conditional_adversarial", "meal"])
def test_discriminators_learn_under_a_supernet_too(name):
    for kind in (Sandwich, SinglePath):
        made = training(distiller_of(kind, name))
        values = made.step()
        assert f"{name}_discriminator" in values


def test_a_loss_that_is_clipped_reports_its_value_apart():
    made = training(distiller_of(FromTeacher, "singular_value"))
    assert set(made.step()) == {"student", "singular_value"}


def test_aggregation_looks_through_the_student_while_it_searches_and_not_after(monkeypatch):
    seen = []
    remaining_layers = Network.remaining_layers

    def watched(self, stage, feature, outputs):
        seen.append(stage)
        return remaining_layers(self, stage, feature, outputs)

    monkeypatch.setattr(Network, "remaining_layers", watched)
    made = training(distiller_of(FromTeacher, "aggregation"), Recipe(steps=3, batch_size=16, learning_rate=0.01))
    made.step()
    assert seen == [0, 1]
    made.step()
    made.step()
    assert seen == [0, 1]


def test_what_runs_through_the_student_leaves_its_running_statistics_alone():
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0).train()
    images = DATA.normalise(DATA.train.take(torch.arange(8)))
    features = network(images).features
    before = {n: b.clone() for n, b in network.named_buffers()}
    logits = network.remaining_layers(0, features[0])
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers())
    torch.testing.assert_close(logits, network(images).logits)
    assert all(m.track_running_stats for m in network.modules() if hasattr(m, "track_running_stats"))


def test_a_subnet_and_its_network_go_on_from_a_map_alike():
    supernet = initialised(lambda: Supernet(SPACE), 0)
    network = supernet.extract(SPACE.smallest)
    images = DATA.normalise(DATA.train.take(torch.arange(8)))
    feature = network(images).features[0].detach()
    assert torch.equal(supernet.remaining_layers(0, feature, SPACE.smallest), network.remaining_layers(0, feature))


def test_the_snapshots_of_a_route_teach_one_after_the_other(monkeypatch):
    snapshots = [frozen(seed) for seed in (1, 2, 3)]
    route, pixels = Route(snapshots), DATA.train.take(torch.arange(4))
    assert torch.equal(route(pixels).logits, snapshots[-1](pixels).logits)
    distiller = FromTeacher(terms=((1.0, find_spec("kdnas.losses", "route_constrained", num_anchors=3)),))
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0)
    made = Training(network, distiller, DATA, route, Recipe(steps=6, batch_size=16, learning_rate=0.01))
    assert distiller.schedule(6).restarts == frozenset({2, 4})
    who, teach = [], Frozen.teach

    def watched(self, *arguments):
        who.append(snapshots.index(self))
        return teach(self, *arguments)

    monkeypatch.setattr(Frozen, "teach", watched)
    while not made.done:
        made.step()
    assert who == [0, 0, 1, 1, 2, 2]
    assert torch.equal(route(pixels).logits, snapshots[-1](pixels).logits)


def test_the_dense_ones_refuse_a_classifier_by_name():
    for name in DENSE_OR_ATTENTION:
        assert resolve(algorithms("kdnas.losses")[name]) is not None
    with pytest.raises(ValueError, match="attentions"):
        training(distiller_of(FromTeacher, "attention_map"))
    for name in ("pixel_wise", "holistic"):
        with pytest.raises(ValueError, match=r"height|dense|map"):
            made = training(distiller_of(FromTeacher, name))
            made.step()


@pytest.mark.parametrize(("name", "largest"), [("conditional_adversarial", 1e-3), ("meal", 1e-3)])
def test_a_discriminator_follows_the_schedule_at_its_own_small_rate(name, largest):
    recipe = Recipe(steps=4, batch_size=16, learning_rate=0.05, warmup=0.5)
    made = training(distiller_of(FromTeacher, name), recipe)
    theirs = {id(p) for n, p in made.distiller.named_parameters() if "discriminator" in n}
    assert theirs
    rates = []
    while not made.done:
        made.step()
        by = {id(p): group["lr"] for group in made.optimizer.param_groups for p in group["params"]}
        assert {rate for p, rate in by.items() if p not in theirs} == {recipe.rate(made.index - 1)}
        (rate,) = {rate for p, rate in by.items() if p in theirs}
        rates.append(rate)
    assert rates[1] == pytest.approx(largest)
    assert rates[0] == pytest.approx(largest / 2)
    assert max(rates) <= largest * (1 + 1e-9)
