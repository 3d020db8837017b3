"""Students of one elastic space, each trained under a teacher and on labels: the table behind three questions.

    python benchmarks/own_students.py --data cifar10_jpeg.npz --out runs/own_students --rows benchmarks/own_students.csv

How far do the two rankings differ beyond noise, which rule needs how many trainings to come near the best network, and
how much does distillation help at each cost? This script trains and writes rows; it answers nothing.

CIFAR-10 is averaged down to 16x16. The space is `own_students.toml`, up to a budget on MACs. Networks are drawn evenly
over the logarithm of the MACs: as many from each of equally wide strata, options tilted towards small or large by an
amount that is drawn for each network, or no random draw would reach the ends. They are trained in an order that
visits the strata in turn, so that a stop at any time leaves a balanced table. Every network is trained both ways with
seed 0, every sixth (one in each stratum) with seeds 0, 1 and 2. A seed fixes fresh weights, the order of the images and
their augmentation, both ways alike; only the loss differs. So the teacher's logits are computed once per seed, and
trainings under the teacher take as long as those on labels.

A row holds the accuracy on the search part, to choose by, and on the test part, to measure with; what all rows share
(space, data, recipe, teacher, the networks) is in a JSON file beside them. A finished training is a row at once, and is
not repeated when the script is started again. `--check` trains nothing: it draws the networks again, decodes their
codes, and counts parameters and MACs of each as a module, and those of the rows that are there.

About four hours of one idle thread, the teacher included; 20 to 90 s for one training.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import Memory, Row, about, agree, append, cifar, fingerprint, open_rows, rows_in, trained
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.data.base import Data, Images
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.settings import Recipe
from kdnas.space import SearchSpace
from kdnas.specs import spec
from kdnas.tables import load_space, table_of
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

SPACE = Path(__file__).with_suffix(".toml")
IMAGE_SIZE = 16
MOST_MACS = 4_000_000
STRATA = 16
PER_STRATUM = 6  # also the distance, in the order of training, between networks with every seed
TILT = 4.0  # largest log odds of a choice's last option against its first
SELECTION_SEED = 0
SEEDS = (0, 1, 2)
RECIPE = Recipe(steps=640, batch_size=128, learning_rate=0.2)
WAYS = {
    "teacher": ((0.5, spec(CrossEntropy)), (0.5, spec(SoftTargets, temperature=4.0))),
    "labels": ((1.0, spec(CrossEntropy)),),
}
TEACHER_BLOCKS = 2
TEACHER_RECIPE = Recipe(steps=2400, batch_size=128, learning_rate=0.1)
LAST_STEPS = 50  # over which the final training loss is a mean
COLUMNS = (
    *("position", "stratum", "code", "params", "macs", "way", "seed"),
    *("steps", "batch_size", "optimizer", "learning_rate", "weight_decay", "warmup", "floor", "clip", "loss"),
    *("search_accuracy", "test_accuracy", "search_cross_entropy", "test_cross_entropy", "train_loss"),
    *("seconds", "cpu_seconds", "threads", "torch"),
)


class Candidate(NamedTuple):
    """A network to train, and its place in the order."""

    position: int
    stratum: int
    code: str
    size: Cost

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those it is trained with."""
        return SEEDS if self.position % PER_STRATUM == 0 else SEEDS[:1]


def candidates(space: SearchSpace) -> list[Candidate]:
    """The networks in the order of training: STRATA times PER_STRATUM, a function of the seed alone."""
    rng = python_rng("own students", SELECTION_SEED)
    least = cost(space.blueprint(space.smallest)).macs
    width = math.log(MOST_MACS / least) / STRATA
    strata: list[dict[str, Cost]] = [{} for _ in range(STRATA)]
    while any(len(stratum) < PER_STRATUM for stratum in strata):
        tilt = rng.uniform(-TILT, TILT)
        architecture = space.decide(lambda choice, t=tilt: _tilted(choice.options, t, rng))
        size = cost(space.blueprint(architecture))
        place = int(math.log(size.macs / least) / width)
        if place < STRATA and len(strata[place]) < PER_STRATUM:
            strata[place][space.code(architecture)] = size
    order = []
    several = rng.sample(range(STRATA), STRATA)  # the stratum of each network that is trained with every seed
    for start in range(0, STRATA * PER_STRATUM, STRATA):
        fixed = {p: several[p // PER_STRATUM] for p in range(start, start + STRATA) if p % PER_STRATUM == 0}
        others = [stratum for stratum in range(STRATA) if stratum not in fixed.values()]
        rng.shuffle(others)
        order += [fixed[p] if p in fixed else others.pop() for p in range(start, start + STRATA)]
    waiting = [iter(stratum.items()) for stratum in strata]
    return [Candidate(position, place, *next(waiting[place])) for position, place in enumerate(order)]


def _tilted(options: tuple[Any, ...], tilt: float, rng: random.Random) -> Any:
    weights = [math.exp(tilt * place / max(1, len(options) - 1)) for place in range(len(options))]
    return rng.choices(options, weights)[0]


def tasks(order: list[Candidate]) -> Iterator[tuple[Candidate, int, str]]:
    """Every training in its order: network, seed, way."""
    for candidate in order:
        for seed in candidate.seeds:
            for way in WAYS:
                yield candidate, seed, way


def teacher_of(data: Data, folder: Path) -> tuple[Frozen, Row]:
    """The teacher, trained once on labels, and what the JSON file says of it."""
    blueprint = fitted_teacher((data.channels, IMAGE_SIZE, IMAGE_SIZE), data.classes, TEACHER_BLOCKS)
    network = initialised(lambda: Network(blueprint), TEACHER_RECIPE.seed)
    training = Training(network, FromLabels(), data, None, TEACHER_RECIPE)
    seconds = trained(training, "teacher", folder / "teacher.safetensors")
    accuracies = {f"{part}_accuracy": evaluate(network, getattr(data, part), data)[0] for part in ("search", "test")}
    words = {"what": f"fitted_teacher, {TEACHER_BLOCKS} blocks a stage", **cost(blueprint)._asdict(), **accuracies}
    words |= {"seconds": seconds, "sha256_of_weights": fingerprint(network), "recipe": asdict(TEACHER_RECIPE)}
    return Frozen(network, preprocessing=data.preprocessing), words


def evaluate(network: nn.Module, part: Images, data: Data) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of a network, in evaluation mode, on a part."""
    network.eval()
    hits, losses = 0, 0.0
    with torch.no_grad():
        for chunk in torch.arange(len(part)).split(500):
            labels = part.labels[chunk]
            images = data.normalise(part.take(chunk)).contiguous(memory_format=torch.channels_last)
            logits = network(images).logits
            hits += int((logits.argmax(1) == labels).sum())
            losses += float(F.cross_entropy(logits, labels, reduction="sum"))
    return hits / len(part), losses / len(part)


def train(space: SearchSpace, candidate: Candidate, way: str, seed: int, data: Data, teacher: Teacher | None) -> Row:
    """One training from fresh weights, and the row it makes."""
    recipe = replace(RECIPE, seed=seed)
    blueprint = space.blueprint(space.parse(candidate.code))
    network = initialised(lambda: Network(blueprint), seed)
    wall, cpu = time.perf_counter(), time.process_time()
    training = Training(network, FromTeacher(terms=WAYS[way]), data, teacher, recipe)
    losses = []
    while not training.done:
        losses.append(sum(training.step().values()))
    search, test = (evaluate(network, part, data) for part in (data.search, data.test))
    last = losses[-LAST_STEPS:]
    row = candidate._asdict() | candidate.size._asdict() | asdict(recipe)
    row |= {"way": way, "loss": loss_of(way), "threads": torch.get_num_threads(), "torch": torch.__version__}
    row |= {"search_accuracy": f"{search[0]:.4f}", "test_accuracy": f"{test[0]:.4f}"}
    row |= {"search_cross_entropy": f"{search[1]:.5f}", "test_cross_entropy": f"{test[1]:.5f}"}
    row |= {"train_loss": f"{sum(last) / len(last):.5f}"}
    row |= {"seconds": f"{time.perf_counter() - wall:.1f}", "cpu_seconds": f"{time.process_time() - cpu:.1f}"}
    return {column: row[column] for column in COLUMNS}


def loss_of(way: str) -> str:
    """The terms of a way's loss, in words."""
    return " + ".join(f"{weight:g} {make}" for weight, make in WAYS[way])


def key_of(row: Row) -> tuple[str, str, int]:
    """What makes a training: code, way, seed."""
    return row["code"], row["way"], int(row["seed"])


def shared_facts(space: SearchSpace, data: Data, teacher: Row, order: list[Candidate]) -> Row:
    """What all rows have in common."""
    recipe = {name: value for name, value in asdict(RECIPE).items() if name != "seed"}
    return {
        "space": table_of(space),
        "data": about(data),
        "recipe": recipe,
        "loss": {way: loss_of(way) for way in WAYS},
        "teacher": teacher,
        "selection": {"seed": SELECTION_SEED, "strata": STRATA, "most_macs": MOST_MACS, "tilt": TILT},
        "seeds": {"every network": list(SEEDS[:1]), f"every {PER_STRATUM}th": list(SEEDS)},
        "macs_of_networks": {candidate.code: candidate.size.macs for candidate in order},
    }


def check(space: SearchSpace, order: list[Candidate], rows: Path) -> None:
    """Decode every code and count every network's parameters and MACs as a module, rows and JSON file included.

    Raises:
        SystemExit: something does not agree.
    """
    expected = {}
    for candidate in order:
        architecture = space.parse(candidate.code)
        network = Network(space.blueprint(architecture)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, space.image_channels, IMAGE_SIZE, IMAGE_SIZE))
        size = Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
        if space.code(architecture) != candidate.code or size != candidate.size:
            raise SystemExit(f"{candidate.code} decodes to {space.code(architecture)} with {size}, not {candidate}")
        expected[candidate.code] = size
    facts = rows.with_suffix(".json")
    if facts.exists() and json.loads(facts.read_text())["macs_of_networks"] != {c: s.macs for c, s in expected.items()}:
        raise SystemExit(f"{facts} lists other networks")
    listed = rows_in(rows)
    for row in listed:
        if expected.get(row["code"]) != (int(row["params"]), int(row["macs"])):
            raise SystemExit(f"{rows} has a row of another network: {row}")
    if len({key_of(row) for row in listed}) != len(listed):
        raise SystemExit(f"{rows} has a training twice")
    sizes = sorted(size.macs for size in expected.values())
    print(
        f"{len(expected)} networks of {space.count():,}, {sizes[0]:,} to {sizes[-1]:,} MACs, a factor of "
        f"{sizes[-1] / sizes[0]:.1f}, the median {sizes[len(sizes) // 2]:,}; {len(list(tasks(order)))} trainings, "
        f"{len(listed)} of them in {rows.name}: codes and costs agree"
    )


def main() -> None:
    """Train what is not in the rows yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10: the folder of binary files, or an .npz of JPEG bytes")
    parser.add_argument("--out", type=Path, help="a folder for images, teacher and its logits")
    parser.add_argument("--rows", type=Path, default=SPACE.with_suffix(".csv"), help="the CSV file to go on with")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many trainings; 0 for all")
    parser.add_argument("--check", action="store_true", help="train nothing, compare codes and costs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    space = load_space(SPACE)
    order = candidates(space)
    if options.check:
        check(space, order, options.rows)
        return
    if options.data is None or options.out is None:
        parser.error("--data and --out are needed to train")
    options.out.mkdir(parents=True, exist_ok=True)
    with open_rows(options.rows, COLUMNS) as handle:
        finished = {key_of(row) for row in rows_in(options.rows)}
        data = cifar(options.data, IMAGE_SIZE, options.out / f"cifar10-{IMAGE_SIZE}.safetensors")
        teacher, words = teacher_of(data, options.out)
        print(f"teacher: {words['search_accuracy']:.2%} of the search part, {words['test_accuracy']:.2%} of test")
        agree(shared_facts(space, data, words, order), options.rows.with_suffix(".json"))
        listed = list(tasks(order))
        left = [task for task in listed if (task[0].code, task[2], task[1]) not in finished]
        left = left[: options.limit or None]
        memories: dict[int, Memory] = {}
        began = time.perf_counter()
        for count, (candidate, seed, way) in enumerate(left, 1):
            if way == "teacher" and seed not in memories:
                digest = words["sha256_of_weights"]
                place = options.out / f"teacher-{digest}-{RECIPE.steps}x{RECIPE.batch_size}-{seed}.safetensors"
                memories[seed] = Memory.of(teacher, data, replace(RECIPE, seed=seed), place)
            row = train(space, candidate, way, seed, data, memories[seed] if way == "teacher" else None)
            append(handle, COLUMNS, row)
            hours = (time.perf_counter() - began) / count * (len(left) - count) / 3600
            print(
                f"{len(finished) + count} of {len(listed)}: {candidate.code}, {candidate.size.macs:,} MACs, "
                f"{way}, seed {seed}: search {row['search_accuracy']}, test {row['test_accuracy']}, "
                f"{row['seconds']} s ({row['cpu_seconds']} s of CPU); about {hours:.1f} h left",
                flush=True,
            )


if __name__ == "__main__":
    main()
