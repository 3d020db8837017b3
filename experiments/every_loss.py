"""Every loss against the same student without a teacher: five seeds, paired, gains and losses alike.

python -m experiments.every_loss                    # the table below, about 20 minutes of one thread
python -m experiments.every_loss --only hint dist   # some of it; finished runs are kept in runs/every_loss.jsonl

A student of 3,498 parameters learns 400 of scikit-learn's digits, without augmentation, for the same number of steps
under `1 * cross_entropy + weight * loss` for each loss in turn, and under cross-entropy alone. The teacher, the
network that `--teacher fit` trains, has seen all 880 training images. A seed fixes initial weights and order of
batches, so that each loss is compared with the control seed by seed; the interval is Student's, over seeds. Accuracy
is on the 697 test images, which chose nothing. Two weights per loss: the default one (published, mostly for
CIFAR-100), and the one at which a fresh student's first value equals the cross-entropy's.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdnas import Recipe, spec
from kdnas.costs.count import cost
from kdnas.data import Data, TensorImages, digits
from kdnas.distillers import Distiller, FromLabels, FromTeacher
from kdnas.evaluation import accuracy
from kdnas.losses import Loss, Objective
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.randomness import initialised
from kdnas.space import Blueprint, layer
from kdnas.specs import algorithms, resolve
from kdnas.teachers import Ensemble, Frozen, Route, Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

SEEDS = 5
RECIPE = Recipe(steps=120, batch_size=64, learning_rate=0.1)
TEACHER_RECIPE = Recipe(steps=160, batch_size=128, learning_rate=0.1)
NUM_SNAPSHOTS = 4
# Half the width of a 95 % interval in standard errors: Student's, four degrees of freedom.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
SKIPPED = {
    "cross_entropy": "is the control",
    "scale_factors": "a regulariser of gates; the search for channels uses it",
    "pixel_wise": "for dense prediction; these networks classify",
    "holistic": "for dense prediction; these networks classify",
    "attention_map": "for transformers; these networks are convolutional",
}


class Remembered(Teacher):
    """A teacher whose outputs on the training images were computed once; there is no augmentation."""

    def __init__(self, teacher: Teacher, images: Tensor) -> None:
        super().__init__()
        self.places = {image.numpy().tobytes(): place for place, image in enumerate(images)}
        self.outputs = teacher(images)

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The remembered outputs of these very pixels."""
        rows = torch.tensor([self.places[image.numpy().tobytes()] for image in pixels])
        return self.outputs.map(lambda tensor: tensor[rows])


def student() -> Blueprint:
    """Four convolutions and a classifier."""
    conv = "kdnas.blocks.basic:ConvNormAct"
    stages = (
        (layer(conv, inputs=8, outputs=8, kernel=3, stride=1),),
        (layer(conv, inputs=8, outputs=12, kernel=3, stride=2),),
        (layer(conv, inputs=12, outputs=16, kernel=3, stride=2),),
    )
    stem = layer(conv, inputs=1, outputs=8, kernel=3, stride=1)
    return Blueprint(stem, stages, layer("kdnas.blocks.basic:PoolLinear", inputs=16, classes=10), (1, 8, 8))


def few(data: Data, count: int = 400) -> Data:
    """The first `count` training images, without augmentation."""
    chosen = torch.arange(count)
    part = TensorImages(data.train.take(chosen), data.train.labels[chosen])
    return dataclasses.replace(data, train=part, augmentation="none")


def teachers(data: Data, images: Tensor) -> dict[str, Any]:
    """The teacher, the route of its snapshots, an ensemble with a second one; and the accuracy of each on its own."""
    networks, accuracies, route = [], [], []
    for seed in range(2):
        recipe = dataclasses.replace(TEACHER_RECIPE, seed=seed)
        network = initialised(lambda: Network(fitted_teacher((1, 8, 8), 10)), 100 + seed)
        training = Training(network, FromLabels(label_smoothing=0.1), data, None, recipe)
        while not training.done:
            training.step()
            if seed == 0 and training.index % (recipe.steps // NUM_SNAPSHOTS) == 0:
                state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
                copy = Network(network.blueprint)
                copy.load_state_dict(state)
                route.append(Remembered(Frozen(copy, preprocessing=data.preprocessing), images))
        networks.append(Remembered(Frozen(network, preprocessing=data.preprocessing), images))
        accuracies.append(accuracy(network, data.test, data))
    return {"one": networks[0], "several": Ensemble(networks), "route": Route(route), "accuracy": accuracies}


def distiller_of(name: str, rule: str, teacher: Teacher, data: Data) -> tuple[Distiller, float]:
    """Cross-entropy plus the loss at the rule's weight, and that weight."""
    if name == "control":
        return FromLabels(), 0.0
    loss_spec = spec(algorithms("kdnas.losses")[name])
    weight = resolve(loss_spec.make).weight  # type: ignore[attr-defined]
    if rule == "equal":
        weight = equal_weight(name, teacher, data)
    return FromTeacher(terms=((1.0, spec(algorithms("kdnas.losses")["cross_entropy"])), (weight, loss_spec))), weight


def equal_weight(name: str, teacher: Teacher, data: Data) -> float:
    """Cross-entropy over the loss's size, both of a fresh student of seed 0 on the first 64 images."""
    network = initialised(lambda: Network(student()), 0).train()
    ids = torch.arange(64)
    pixels, labels = data.train.take(ids), data.train.labels[ids]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = Objective(tuple((1.0, spec(algorithms("kdnas.losses")[n])) for n in ("cross_entropy", name)))
        outputs, teacher_outputs = network(data.normalise(pixels)), teacher(pixels)
        objective.prepare(outputs, teacher_outputs)
        for loss in objective.losses.values():
            assert isinstance(loss, Loss)
            loss.mark_trained()  # its first value, with parts as they are
        values = [
            float(loss(outputs, teacher_outputs, labels)) if isinstance(loss, Loss) else 0.0
            for loss in objective.losses.values()
        ]
    size = abs(values[1])
    return float(f"{values[0] / size:.3g}") if size > 1e-12 and math.isfinite(size) else math.nan


def one_run(name: str, rule: str, seed: int, teacher: Teacher, data: Data) -> dict[str, Any]:
    """Train one student; what became of it."""
    began = time.process_time()
    network = initialised(lambda: Network(student()), seed)
    distiller, weight = distiller_of(name, rule, teacher, data)
    record: dict[str, Any] = {"loss": name, "rule": rule, "seed": seed, "weight": weight}
    try:
        training = Training(network, distiller, data, teacher, dataclasses.replace(RECIPE, seed=seed))
        while not training.done:
            training.step()
        record["accuracy"] = accuracy(network, data.test, data)
    except (FloatingPointError, ValueError) as error:
        record["failed"] = str(error)
    return record | {"seconds": round(time.process_time() - began, 2)}


def wanted(only: list[str]) -> Iterator[tuple[str, str, int]]:
    """Loss, rule and seed of every run: the control first, then seed by seed at default weights, then at equal ones."""
    names = [n for n in sorted(algorithms("kdnas.losses")) if n not in SKIPPED and (not only or n in only)]
    yield from (("control", "default", seed) for seed in range(SEEDS))
    for rule, seed, name in itertools.product(("default", "equal"), range(SEEDS), names):
        yield name, rule, seed


def table(records: list[dict[str, Any]], accuracies: list[float], seconds: float) -> str:
    """The Markdown page."""
    control = {r["seed"]: r["accuracy"] for r in records if r["loss"] == "control"}
    mean = statistics.mean(control.values())
    teacher = ", ".join(f"{100 * a:.2f} %" for a in accuracies)
    size = cost(student())
    lines = [
        "# Every loss against no teacher",
        "",
        "Made by `python -m experiments.every_loss`; read there what was done and why.",
        "",
        f"- Student: {size.params:,} parameters, {size.macs:,} MACs, {RECIPE.steps} steps of {RECIPE.batch_size} "
        f"images out of 400; seeds 0 to {len(control) - 1}; SGD, learning rate {RECIPE.learning_rate}.",
        f"- Control, cross-entropy alone: {100 * mean:.2f} % of 697 test images "
        f"(seeds: {', '.join(f'{100 * control[s]:.2f}' for s in sorted(control))}).",
        f"- Teachers: {teacher} (the second is only in the ensemble that `teacher_graph` and `meal` see).",
        f"- Time: {seconds / 60:.0f} minutes of one processor for {len(records)} runs, teachers apart.",
        "",
        "Gain: mean of test accuracy less the control's of the same seed, in points, with its 95 % interval; "
        "**bold** where that leaves out 0. Equal weight: loss and cross-entropy start out alike. "
        "With this many rows one or two intervals of a column leave out 0 by chance.",
        "",
        "| Loss | Default weight | Gain | Equal weight | Gain | Seconds per run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for name in sorted({r["loss"] for r in records} - {"control"}):
        cells, order = [], -math.inf
        for rule in ("default", "equal"):
            mine = [r for r in records if r["loss"] == name and r["rule"] == rule]
            gain, text = _gain(mine, control)
            order = gain if rule == "default" else order
            weight = f"{mine[0]['weight']:g}" if mine and math.isfinite(mine[0]["weight"]) else "none"
            cells += [weight, text]
        spent = statistics.median(r["seconds"] for r in records if r["loss"] == name)
        rows.append((order, f"| `{name}` | {' | '.join(cells)} | {spent:.1f} |"))
    lines += [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    lines += ["", "Not run:", "", *(f"- `{name}`: {why}." for name, why in SKIPPED.items())]
    return "\n".join(lines) + "\n"


def _gain(records: list[dict[str, Any]], control: dict[int, float]) -> tuple[float, str]:
    """The mean gain and its cell."""
    failed = [r for r in records if "failed" in r]
    if failed:
        return -math.inf, f"{len(failed)} of {len(records)} seeds failed: {failed[0]['failed'].partition('.')[0]}"
    gains = [100 * (r["accuracy"] - control[r["seed"]]) for r in records if r["seed"] in control]
    if len(gains) < 2:
        return -math.inf, "not run"
    mean = statistics.mean(gains)
    half = STUDENT_T[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    text = f"**{text}**" if abs(mean) > half else text
    return mean, text if len(gains) == SEEDS else f"{text}, {len(gains)} seeds"


def main() -> None:
    """Every run that is not finished yet, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of losses")
    parser.add_argument("--runs", type=Path, default=Path("runs/every_loss.jsonl"), help="finished runs")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"), help="what to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    lines = options.runs.read_text().splitlines() if options.runs.exists() else []
    records = [json.loads(line) for line in lines]
    finished = {(r["loss"], r["rule"], r["seed"]) for r in records}
    data = digits()
    small = few(data)
    known_teachers = teachers(data, small.train.take(torch.arange(len(small.train))))
    which = {"route_constrained": "route", "teacher_graph": "several", "meal": "several"}
    for name, rule, seed in wanted(options.only):
        if (name, rule, seed) in finished:
            continue
        record = one_run(name, rule, seed, known_teachers[which.get(name, "one")], small)
        records.append(record)
        with options.runs.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        if name == "control" and seed < SEEDS - 1:
            continue
        options.table.write_text(
            table(records, known_teachers["accuracy"], sum(r["seconds"] for r in records)), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
