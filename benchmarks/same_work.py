"""The best network at 50, 25 and 12.5 % of a trained network's MACs: kdnas and what people use instead, side by side.

    python benchmarks/same_work.py --data cifar10_jpeg.npz --out runs/same_work --modelopt modelopt/bin/python
    python benchmarks/same_work.py --table       # every cell and difference
    python benchmarks/same_work.py --summary     # the tables of README.md and docs/from_your_network.md

Three teachers are trained here on CIFAR-10: kdnas's fitted ResNet and a MobileNetV2 at 16x16, a MobileNetV2 at 32x32.
"resnet-2" is the ResNet trained once more by the same recipe on another processor, whose rounding gives other weights:
its rows are more seeds of the ResNet's cells, where these decide something.
Every contestant gets the traced teacher and a budget in MACs and returns a network, with weights of the teacher or
fresh ones; peers.py says what each does. All are retrained by the same code: a seed fixes the batches and their
augmentation, whoever trains. The loss is the mixture of labels and teacher that is best on the search part after a
tenth of the short training; choosing it is part of the cost. The retraining is short (700 steps) or long (3,000).

Under a budget on latency, a contestant that knows MACs only is called with ever other MACs until the measured latency
of its network is within it.

A row holds a network's costs, what search and retraining took, and which test images it classifies correctly, so that
differences are paired; what all rows share is in a JSON file beside them. A training that is finished is a row at once
and is not repeated; networks are kept in --out, so that a search is not repeated for the long training. FastNAS needs
an environment of its own, with `pip install nvidia-modelopt==0.47.0 requests huggingface_hub torchprofile==0.0.4` and
`pip install --no-deps .` for kdnas's layers; without --modelopt it is left out.

`--table` prints the comparison as markdown: differences to the best of the peers in a cell, which is chosen on the test
part, in the peers' favour. Intervals are 95 %, over test images and seeds; the seeds' part is pooled over cells, so
that a cell of one seed has it too.
"""

import argparse
import base64
import copy
import itertools
import math
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import ours
import peers
import torch
from common import Memory, Row, about, agree, append, cifar, fingerprint, open_rows, rows_in, trained
from comparison import Task, hits_of, summary, tables
from peers import Contestant, Facts, macs_of, plain, traced
from torch import nn

from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.costs.latency import LatencyTable
from kdnas.data.base import Data
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import accuracy, graded
from kdnas.jobs._trials import matching
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network, batch_statistics
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.space import Blueprint
from kdnas.spaces.mbconv import Head, MBConvSpace, Stage, Stem
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

ROWS = Path(__file__).with_suffix(".csv")
SHORT, LONG = 700, 3000
SEEDS = (0, 1, 2)
SHARES = {"macs": (0.125, 0.25, 0.5), "latency": (0.75, 0.9)}  # widths alone reach about 0.6 of the ResNet's latency
LATENCY_SEEDS = 1  # short trainings alone
SECOND_SEEDS = (3, 4, 5)  # of the second ResNet: the smallest networks trained long, and latency
RECIPE = Recipe(steps=LONG, batch_size=64, learning_rate=0.05)
TEACHER_RECIPE = Recipe(steps=3000, batch_size=128, learning_rate=0.1)
_SOFT = spec(SoftTargets, temperature=4.0)
WAYS = {
    "labels": ((1.0, spec(CrossEntropy)),),
    "half": ((0.5, spec(CrossEntropy)), (0.5, _SOFT)),
    "teacher": ((0.1, spec(CrossEntropy)), (0.9, _SOFT)),
}
LATENCY_REPEATS = 200  # on a machine with neighbours, whose speed changes from one second to the next
COLUMNS = (
    *("teacher", "budget", "share", "contestant", "seed", "steps", "note", "params", "macs", "latency_ms", "widths"),
    *("inherited", "loss", "choice", "search_cpu_seconds", "search_images", "choice_cpu_seconds", "choice_images"),
    *("retrain_cpu_seconds", "teacher_cpu_seconds", "retrain_images"),
    *("search_accuracy_before", "search_accuracy", "test_accuracy", "test_hits", "torch"),
)


def scaled(contestant: Contestant) -> ours.UnderLatency:
    """A contestant that knows MACs only, with as many of them as the measured latency admits."""

    def under(
        network: Network, teacher: Frozen, data: Data, seconds: float, table: LatencyTable, seed: int
    ) -> tuple[Network, Facts]:
        whole = cost(network.blueprint).macs

        def at(share: float) -> tuple[float, Any]:
            try:
                result = contestant(network, teacher, data, share * whole, seed)
            except Infeasible:
                return math.inf, None
            return table.whole(result[0].blueprint), result

        return peers.largest_within(at, seconds)

    return under


# The contestants. Differences are to the best of PEERS; FastNAS joins them where --modelopt names its Python.
PEERS: dict[str, Contestant] = {
    "tp-local": peers.magnitude_local,
    "tp-global": peers.magnitude_global,
    "tp-group-norm": peers.group_norm,
    "uniform": peers.uniform,
}
CONTROLS: dict[str, Contestant] = {"random": peers.random_removal, "equal-shares": peers.equal_by_norm}
LATENCY: dict[str, ours.UnderLatency] = {
    "tp-local": scaled(peers.magnitude_local),
    "tp-global": scaled(peers.magnitude_global),
    "equal-shares": scaled(peers.equal_by_norm),
    **ours.UNDER_LATENCY,
}


def _mobilenet(size: int, stride: int, stages: tuple[tuple[int, int, int, int], ...], head: int) -> Blueprint:
    """A MobileNetV2 for small images; a stage is expansion, width, depth and stride."""
    space = MBConvSpace(
        name="mobilenet",
        source="MobileNetV2 for small images",
        classes=10,
        image_channels=3,
        resolutions=(size,),
        stem=Stem(width=(16,), stride=stride),
        stages=tuple(Stage(expansion=(e,), width=(w,), depth=(d,), stride=s) for e, w, d, s in stages),
        head=Head(kind="mobilenet_v2", width=(head,)),
    )
    return space.blueprint(space.largest)


TEACHERS = {
    "resnet": lambda: fitted_teacher((3, 16, 16), 10, blocks=1),
    "mobilenet": lambda: _mobilenet(16, 1, ((1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 3, 2), (6, 64, 2, 1)), 256),
    "mobilenet32": lambda: _mobilenet(32, 2, ((1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 3, 2), (6, 80, 3, 1)), 320),
}
TEACHERS["resnet-2"] = TEACHERS["resnet"]


def plan(contestants: list[str]) -> Iterator[Task]:
    """All trainings: short before long, seed by seed, small budgets first, all contestants of a cell together."""
    first = [name for name in TEACHERS if name != "resnet-2"]
    known = [name for name in contestants if name in LATENCY]
    for steps in (SHORT, LONG):
        for seed, share, teacher in itertools.product(SEEDS, SHARES["macs"], first):
            yield from (Task(teacher, "macs", share, name, seed, steps) for name in contestants)
        if steps == SHORT:
            for seed, share, teacher in itertools.product(range(LATENCY_SEEDS), SHARES["latency"], first):
                yield from (Task(teacher, "latency", share, name, seed, steps) for name in known)
    for seed in SECOND_SEEDS:
        yield from (Task("resnet-2", "macs", min(SHARES["macs"]), name, seed, LONG) for name in contestants)
    for seed, share in itertools.product(SECOND_SEEDS, SHARES["latency"]):
        yield from (Task("resnet-2", "latency", share, name, seed, SHORT) for name in known)


@final
@dataclass(frozen=True)
class World:
    """A teacher and its data.

    Attributes:
        network: the teacher's, traced.
        about: for the JSON file.
        out: the folder for networks and logits.
    """

    network: Network
    data: Data
    about: Row
    out: Path

    @classmethod
    def of(cls, name: str, images: Path, out: Path) -> "World":
        """The teacher, trained once on labels."""
        blueprint = TEACHERS[name]()
        size = blueprint.image[1]
        data = cifar(images, size, out / f"cifar10-{size}.safetensors")
        source = initialised(lambda: Network(blueprint), TEACHER_RECIPE.seed)
        training = Training(source, FromLabels(), data, None, TEACHER_RECIPE)
        seconds = trained(training, name, out / f"teacher-{name}.safetensors")
        parts = {"search": data.search, "test": data.test}
        words = {**cost(blueprint)._asdict(), "seconds": seconds, "sha256_of_weights": fingerprint(source)}
        words |= {f"{part}_accuracy": accuracy(source, images, data) for part, images in parts.items()}
        return cls(traced(plain(source), data.image), data, words | {"data": about(data)}, out)

    @cached_property
    def teacher(self) -> Frozen:
        """The teacher."""
        return Frozen(copy.deepcopy(self.network), preprocessing=self.data.preprocessing)

    @cached_property
    def latency(self) -> LatencyTable:
        """Measures networks on this machine, each beside the teacher."""
        return LatencyTable(torch.device("cpu"), repeats=LATENCY_REPEATS, beside=self.network.blueprint)

    @cached_property
    def forward_seconds(self) -> float:
        """CPU seconds of the teacher's forward pass for one image of a batch."""
        pixels = self.data.train.take(torch.arange(10 * RECIPE.batch_size))
        began = time.process_time()
        for batch in pixels.split(RECIPE.batch_size):
            self.teacher(batch)
        return (time.process_time() - began) / len(pixels)

    def memory(self, seed: int, steps: int) -> Memory:
        """The teacher's logits for a seed's first batches; those of the long training serve the short one too."""

        def place(count: int) -> Path:
            return self.out / f"logits-{self.about['sha256_of_weights']}-{count}x{RECIPE.batch_size}-{seed}.safetensors"

        count = SHORT if steps <= SHORT and not place(LONG).exists() else LONG
        recipe = replace(RECIPE, steps=count, seed=seed)
        return Memory.of(self.teacher, self.data, recipe, place(count)).first(steps)

    def budget(self, task: Task) -> float:
        """The task's budget: MACs or seconds."""
        if task.budget == "macs":
            return task.share * self.about["macs"]
        return task.share * self.latency.measured(self.network.blueprint)


def cpu_seconds() -> float:
    """CPU seconds of this process and the finished ones it started."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def network_of(task: Task, world: World) -> tuple[Network, Row]:
    """The contestant's network, searched once, with what the row says of search and loss.

    Raises:
        Infeasible: no network within the budget.
    """
    folder = world.out / "networks" / task.name
    if not folder.exists():
        bound, began = world.budget(task), cpu_seconds()
        arguments = (copy.deepcopy(world.network), world.teacher, world.data, bound)
        if task.budget == "latency":
            network, facts = LATENCY[task.contestant](*arguments, world.latency, task.seed)
        else:
            network, facts = contestants()[task.contestant](*arguments, task.seed)
        words: Row = {"inherited": facts.inherited, "search_images": facts.images}
        words["search_cpu_seconds"] = f"{cpu_seconds() - began:.1f}"
        words["latency_ms"] = f"{1e3 * world.latency.whole(network.blueprint):.3f}"
        size, counted = cost(network.blueprint), macs_of(plain(network), world.data.image)
        if counted != size.macs or (task.budget == "macs" and size.macs > bound):
            raise SystemExit(f"{task}: {size.macs} MACs by kdnas, {counted} by torch, the budget is {bound}")
        words |= size._asdict()
        words["widths"] = "-".join(str(m.out_channels) for m in plain(network).modules() if _mixes(m))
        words["search_accuracy_before"] = f"{_accuracy_before(network, world.data):.4f}"
        words |= choose_loss(network, facts.source, task.seed, world)
        if facts.source is not None:
            card = Card.of(facts.source, world.data, {})
            write_student(world.out / "sources" / task.name, facts.source, card, deploy=False)
        write_student(folder, network, Card.of(network, world.data, {"row": words}), deploy=False)
    network, card = read_student(folder)
    return network.requires_grad_(True), dict(card.origin["row"])


def source_of(task: Task, world: World) -> Network | None:
    """The teacher's network in the contestant's order of channels, where it has one."""
    folder = world.out / "sources" / task.name
    return read_student(folder)[0] if folder.exists() else None


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def _accuracy_before(network: Network, data: Data) -> float:
    """Accuracy on the search part, the batch norms with the statistics of their batch."""
    with batch_statistics(network), torch.no_grad():
        hits = [network(data.normalise(x)).logits.argmax(1) == y for x, y in data.search.batches()]
    return float(torch.cat(hits).float().mean())


def choose_loss(network: Network, source: Network | None, seed: int, world: World) -> Row:
    """The mixture that is best on the search part after a tenth of the short training."""
    steps = SHORT // 10
    images = steps * RECIPE.batch_size
    taught = 2 * images * world.forward_seconds if source is None else 0.0  # what remembered logits cost
    began = cpu_seconds()
    students = {way: retrain(network, way, source, steps, seed, world) for way in WAYS}
    accuracies = {way: accuracy(student, world.data.search, world.data) for way, student in students.items()}
    return {
        "loss": max(accuracies, key=lambda way: accuracies[way]),
        "choice": " ".join(f"{way} {value:.4f}" for way, value in accuracies.items()),
        "choice_cpu_seconds": f"{cpu_seconds() - began + taught:.1f}",
        "choice_images": len(WAYS) * (images + len(world.data.search)),
    }


def retrain(network: Network, way: str, source: Network | None, steps: int, seed: int, world: World) -> Network:
    """A copy of the network after training with a mixture, and with its channels matched where there is a source."""
    terms, recipe = WAYS[way], replace(RECIPE, steps=steps, seed=seed)
    teacher: Teacher | None = None if way == "labels" else world.memory(seed, steps)
    if source is not None:
        terms = (*terms, (LeadingChannels.weight, matching(steps)))
        teacher = Frozen(source, preprocessing=world.data.preprocessing)
    distiller = FromTeacher(terms=terms)
    training = Training(copy.deepcopy(network), distiller, world.data, teacher, recipe)
    while not training.done:
        training.step()
    assert isinstance(training.model, Network)
    return training.model


def row_of(task: Task, world: World) -> Row:
    """Search, retraining, and the row they make; a row of its budget alone where there is no network within it."""
    world.memory(task.seed, task.steps)  # not a part of any contestant's seconds
    row: Row = {**dict.fromkeys(COLUMNS, ""), **task._asdict(), "torch": torch.__version__}
    try:
        network, words = network_of(task, world)
    except Infeasible as error:
        return row | {"note": f"none: {error}"}
    row |= words
    source = source_of(task, world)
    began = cpu_seconds()
    student = retrain(network, row["loss"], source, task.steps, task.seed, world)
    row["retrain_cpu_seconds"] = f"{cpu_seconds() - began:.1f}"
    row["retrain_images"] = task.steps * RECIPE.batch_size
    remembered = source is None and row["loss"] != "labels"
    row["teacher_cpu_seconds"] = f"{remembered * world.forward_seconds * row['retrain_images']:.1f}"
    hits = graded(student, world.data.test, world.data)
    row["search_accuracy"] = f"{accuracy(student, world.data.search, world.data):.4f}"
    row["test_accuracy"] = f"{float(hits.float().mean()):.4f}"
    row["test_hits"] = base64.b64encode(np.packbits(hits.numpy()).tobytes()).decode()
    return row


def contestants() -> dict[str, Contestant]:
    """All of them, by name."""
    return ours.OURS | PEERS | CONTROLS


def check(rows: list[Row]) -> None:
    """Every row's accuracy is that of its images, its MACs are within the budget, and no training is there twice.

    Raises:
        SystemExit: something does not agree.
    """
    whole = {name: cost(make()).macs for name, make in TEACHERS.items()}
    for row in rows:
        task = Task.of(row)
        if row["note"]:
            continue
        if abs(float(hits_of(row).mean()) - float(row["test_accuracy"])) > 1e-4:
            raise SystemExit(f"{task} has another accuracy than its images: {row['test_accuracy']}")
        if task.budget == "macs" and int(row["macs"]) > task.share * whole[task.teacher]:
            raise SystemExit(f"{task} has {row['macs']} MACs, more than its budget")
    if len({Task.of(row) for row in rows}) != len(rows):
        raise SystemExit("a training is there twice")
    print(f"{len(rows)} rows: accuracies and budgets agree")


def shared_facts(worlds: dict[str, World]) -> Row:
    """What all rows have in common."""
    retraining = {**asdict(RECIPE), "steps": [SHORT, LONG], "seed": list(SEEDS)}
    recipes = {"retraining": retraining, "teachers": asdict(TEACHER_RECIPE)}
    losses = {way: " + ".join(f"{weight:g} {make}" for weight, make in terms) for way, terms in WAYS.items()}
    shares = {budget: list(values) for budget, values in SHARES.items()}
    teachers = {name: world.about for name, world in worlds.items()}
    return {"teachers": teachers, "recipes": recipes, "losses": losses, "shares": shares}


def main() -> None:
    """Train what is not in the rows yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10: the folder of binary files, or an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, help="a folder for images, teachers, their logits and the networks")
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS], help="CSV files; the first is gone on with")
    parser.add_argument("--modelopt", type=Path, help="the Python of an environment with nvidia-modelopt")
    parser.add_argument("--contestants", nargs="+", help="names, in order; all by default")
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=list(TEACHERS), help="whose rows")
    parser.add_argument("--steps", type=int, nargs="+", default=[SHORT, LONG], help="trainings of so many steps alone")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many trainings; 0 for all")
    parser.add_argument("--check", action="store_true", help="train nothing, compare the rows with themselves")
    parser.add_argument("--table", action="store_true", help="train nothing, print the comparison")
    parser.add_argument("--summary", action="store_true", help="train nothing, print the tables of README and docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for place in options.rows for row in rows_in(place)]
    if options.check:
        return check(rows)
    known_peers = (*PEERS, "fastnas")
    if options.summary:
        kinds = dict.fromkeys((row["budget"], int(row["steps"])) for row in rows)
        return print("\n\n".join(summary(rows, known_peers, *kind) for kind in kinds))
    if options.table:
        return print("\n".join(tables(rows, known_peers)))
    if options.data is None or options.out is None:
        parser.error("--data and --out are needed to train")
    if options.modelopt is not None:
        PEERS["fastnas"] = peers.fastnas(options.modelopt)
    names = options.contestants or list(contestants())
    if unknown := [name for name in names if name not in contestants()]:
        parser.error(f"--contestants must be among {', '.join(contestants())}, got {unknown[0]}")
    if "fastnas" not in names:
        print("fastnas is left out: --modelopt names no environment, or --contestants names others", flush=True)
    (options.out / "networks").mkdir(parents=True, exist_ok=True)
    with open_rows(options.rows[0], COLUMNS) as handle:
        worlds = {name: World.of(name, options.data, options.out) for name in options.teachers}
        agree(shared_facts(worlds), options.rows[0].with_suffix(".json"))
        finished = {Task.of(row) for row in rows}
        wanted = [t for t in plan(names) if t.teacher in options.teachers and t.steps in options.steps]
        left = [task for task in wanted if task not in finished][: options.limit or None]
        began = time.perf_counter()
        for count, task in enumerate(left, 1):
            try:
                row = row_of(task, worlds[task.teacher])
            except Exception:  # a contestant's fault stops no other; it has no row, so the next start tries again
                print(f"{count} of {len(left)}: {task.name}, {task.steps} failed\n{traceback.format_exc()}", flush=True)
                continue
            append(handle, COLUMNS, row)
            hours = (time.perf_counter() - began) / count * (len(left) - count) / 3600
            outcome = row["note"] or f"test {row['test_accuracy']}, {row['loss']}, {row['retrain_cpu_seconds']} s"
            print(f"{count} of {len(left)}: {task.name}, {task.steps}: {outcome}; {hours:.1f} h left", flush=True)


if __name__ == "__main__":
    main()
