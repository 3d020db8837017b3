"""A training that several processes share computes what one process does."""

import dataclasses
from contextlib import closing

import pytest
import torch

from kdnas.data.feeding import decoding
from kdnas.distillers.aggregation import Aggregation
from kdnas.distillers.base import Batch, Distiller, Step
from kdnas.distillers.block_wise import BlockWise
from kdnas.distillers.fair_paths import FairPaths
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.prioritized import Prioritized
from kdnas.distillers.single_path import SinglePath
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.ranks import team
from kdnas.settings import Recipe
from kdnas.specs import algorithms, parse_spec, resolve
from kdnas.supernet import Supernet
from kdnas.teachers.base import Frozen
from kdnas.training import loop
from kdnas.training import shared as shared_training
from kdnas.training.loop import Training
from kdnas.training.shared import check as check_shared
from tests import processes
from tests.distillers.spaces import ELASTIC, OPERATIONS, TOY
from tests.processes import together
from tests.toy import data

RECIPE = Recipe(steps=3, batch_size=12, learning_rate=0.05, clip=0.0)
DATA = dataclasses.replace(data(), augmentation="strong_crop_flip")
OPTIONS = {
    "attentive": {"num_sampled": 20},
    "prioritized": {"size": 2, "slice_size": 3, "every": 2, "warmup": 0.1},
    "progressive": {"stages": (("full", 1, 1.0, 1), ("kernel", 0, 1.0, 1), ("width", 0, 1.0, 2))},
    "born_again": {"generations": 2, "taught": True},
}
FIRST = {"sandwich", "single_path", "block_wise", "prioritized", "progressive"}


def parallel():
    """Classes of the distillers that several processes may share, by name."""
    classes = {name: resolve(path) for name, path in algorithms("kdnas.distillers").items()}
    return {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, Distiller) and c.parallel != "no"}


def training(distiller, recipe=RECIPE):
    space = OPERATIONS if isinstance(distiller, FairPaths) else ELASTIC
    network = lambda: Network(TOY.blueprint(TOY.largest))  # noqa: E731
    model = initialised(network if distiller.model_type is Network else lambda: Supernet(space), 0)
    teacher = Frozen(initialised(network, 9), preprocessing=DATA.preprocessing)
    return Training(model, distiller, DATA, teacher, recipe)


def in_float64():
    loop.Batch = lambda pixels, *rest: Batch(pixels.double(), *rest)
    torch.set_default_dtype(torch.float64)


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Networks of 64 bits: a rounding of 32 bits can turn a rectifier on that is off in one process."""
    monkeypatch.setattr(loop, "Batch", loop.Batch)  # is as before after the test
    monkeypatch.setattr(processes, "prepare", in_float64)
    in_float64()
    yield
    torch.set_default_dtype(torch.float32)


def steps(shared, count):
    """Losses, the gradients' conflict, and the state after each step."""
    states = []
    for _ in range(count):
        losses, state = shared.step(watch=True), shared.state()
        tensors = {f"{part}.{name}": t.clone() for part in ("model", "distiller") for name, t in state[part].items()}
        states.append((losses, shared.conflict, tensors))
    return states


@pytest.mark.parametrize("names", [FIRST, pytest.param(parallel().keys() - FIRST, marks=pytest.mark.slow)])
def test_two_processes_equal_one(names):
    make = {name: lambda name=name: training(parallel()[name](**OPTIONS.get(name, {}))) for name in sorted(names)}
    check(make)


def check(make):
    """Compare trainings, made by name, of two processes with those of one."""
    counts = {name: 3 if name in ("prioritized", "progressive", "born_again", "stages") else 2 for name in make}
    pairs = together(lambda: {name: steps(build(), counts[name]) for name, build in make.items()})
    for name, build in make.items():
        for step, (one, two) in enumerate(zip(steps(build(), counts[name]), pairs[name], strict=True)):
            assert one[0] == pytest.approx(two[0], abs=1e-6), (name, step)
            assert one[1] == pytest.approx(two[1], abs=1e-6), (name, step)
            assert one[2].keys() == two[2].keys()
            for key, tensor in one[2].items():
                torch.testing.assert_close(two[2][key], tensor, rtol=0, atol=1e-6, msg=f"{name}, {step}: {key}")


def test_losses_that_compare_samples_see_those_of_both_processes():
    terms = ("dist", "contrastive", "singular_value", "cross_layer", "conditional_adversarial", "soft_targets")
    objective = tuple((0.5, parse_spec("kdnas.losses", name)) for name in ("cross_entropy", *terms))
    staged = tuple((1.0, parse_spec("kdnas.losses", name)) for name in ("cross_entropy", "multi_head_graph"))
    make = {"terms": objective, "stages": staged}
    check({name: lambda terms=terms: training(FromTeacher(terms=terms)) for name, terms in make.items()})


def test_processes_with_statistics_of_their_own_take_the_mean_of_their_steps():
    recipe = dataclasses.replace(RECIPE, per_process="statistics")
    ((_, _, pair),) = together(lambda: steps(training(SinglePath(), recipe), 1))
    halves = []
    for part in (slice(6), slice(6, 12)):
        own = training(SinglePath(), recipe)
        own._feed = own._feed.taking(part)
        own._feed.taking = lambda _, feed=own._feed: feed
        ((_, _, state),) = steps(own, 1)
        halves.append(state)
    for name, tensor in pair.items():
        if tensor.is_floating_point():  # the gradient is not clipped: a step is linear in it
            torch.testing.assert_close(tensor, (halves[0][name] + halves[1][name]) / 2, rtol=0, atol=1e-6)
    (one,) = steps(training(SinglePath(), RECIPE), 1)
    assert any(not torch.allclose(one[2][name], tensor) for name, tensor in pair.items())


def test_each_process_has_images_of_its_own_made_ready_and_they_are_the_same():
    def weights(decoders):
        with decoding(decoders), closing(training(SinglePath())) as own:
            for _ in range(3):
                own.step()
            return {name: tensor.clone() for name, tensor in own.state()["model"].items()}

    none, two = (together(lambda n=n: weights(n)) for n in (0, 2))
    assert all(torch.equal(none[name], two[name]) for name in none)


def test_processes_with_architectures_of_their_own_train_both():
    recipe = dataclasses.replace(RECIPE, per_process="architectures")
    shared = together(lambda: steps(training(SinglePath(), recipe), 2))
    paths = [Step(0, 3, 0, process=process).rng("architectures") for process in range(2)]
    first, second = (ELASTIC.sample(rng) for rng in paths)
    assert first != second
    fresh = training(SinglePath()).state()["model"]
    for path in (first, second):
        blueprint = ELASTIC.blueprint(path)
        supernet = training(SinglePath()).model
        for name, layer in blueprint.named_layers():
            own = {id(p) for p in supernet.bank_module(name, layer).parameters()}
            names = [f"model.{key}" for key, p in supernet.named_parameters() if id(p) in own]
            assert any(not torch.equal(shared[0][2][key], fresh[key.removeprefix("model.")]) for key in names), name


def test_blocks_spread_over_processes_equal_those_of_one(monkeypatch):
    recipes = [dataclasses.replace(RECIPE, optimizer=name, clip=0.1, batch_size=11) for name in ("sgd", "adamw")]

    def states(recipe):
        own, records = training(BlockWise(), recipe), []
        for step in range(3):
            losses = own.step(watch=True)
            if step != 1:  # in between the parts are where they were trained
                state = own.state()
                tensors = {f"{part}.{n}": t.clone() for part in ("model", "distiller") for n, t in state[part].items()}
                moments = {k: v for k, v in state["optimizer"]["state"].items() if v}
                records.append((tensors, moments, dict(state["uses"])))
            records.append((losses, float(own.gradient_norm), own.conflict))
        return records

    def spread():
        monkeypatch.setattr(shared_training, "average", lambda *_: pytest.fail("gradients are exchanged"))
        return [states(dataclasses.replace(recipe, per_process="blocks")) for recipe in recipes]

    torch.testing.assert_close(together(spread), [states(recipe) for recipe in recipes], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("distiller", "changes", "message"),
    [
        (SinglePath(), {"batch_size": 9}, "`batch_size` must be a multiple of the number of processes, 2, got 9"),
        (SinglePath(), {"activations": "recomputed"}, "`activations` must be kept with several processes"),
        (SinglePath(), {"execution": "compiled"}, "`execution` must be eager with several processes"),
        (Aggregation(), {}, "Aggregation trains in one process"),
        (Prioritized(), {"per_process": "architectures"}, "must be nothing or statistics with Prioritized"),
        (
            FromTeacher(terms=((1.0, parse_spec("kdnas.losses", "contrastive")),)),
            {"per_process": "statistics"},
            "`per_process` must be nothing with Contrastive, which remembers",
        ),
        (SinglePath(), {"per_process": "blocks"}, "`per_process` must not be blocks with SinglePath"),
        (BlockWise(schedule="one_by_one"), {"per_process": "blocks"}, "must not be blocks with BlockWise"),
    ],
)
def test_what_processes_cannot_share_is_refused(monkeypatch, distiller, changes, message):
    monkeypatch.setattr(team, "number", lambda: 2)
    with pytest.raises(ValueError, match=message):
        check_shared(distiller, dataclasses.replace(RECIPE, **changes))
