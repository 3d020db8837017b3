"""Self-attention distillation (SAD) for lanes: drawn roads, with it and without it. Writes `experiments/lanes.md`.

    python -m experiments.lanes
    python -m experiments.lanes --steps 20 --page page.md    # a quick look

Hou, Ma, Liu, Loy, Learning Lightweight Lane Detection CNNs by Self Attention Distillation, ICCV 2019.

One network of some 30 million MACs is trained from the same initial weights and batches (a seed fixes both) under the
task's three losses, and under SAD beside them, from two thirds of the training on. Its three stages are compared, each
with the next; the deeper map is held constant. SAD is at the paper's weight, once as a mean over positions, as the
paper has it, and once as a sum, which is as many times larger as a map has positions. The measures are on test images,
which chose nothing; intervals are over test images and seeds. Everything that is finished is kept in `--out`; the same
command goes on after a kill, in the midst of a training too.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.segmentation import gain_of, recorded, write_record
from kdnas import Recipe, spec
from kdnas.data.base import Data
from kdnas.data.roads import roads
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import student_grades
from kdnas.jobs.retrain import retrain
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import NoTeacher, Retrain
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from kdnas.specs import Spec, find_spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student

SEEDS = 3
ROADS = spec(roads, count=1000, height=48, width=120)
STUDENT = Recipe(steps=2000, batch_size=8, learning_rate=0.05)
SPACE = Segmenter(
    stem_widths=(16,),
    stages=(
        ResNetStage(widths=(16,), depths=(1,)),
        ResNetStage(widths=(32,), depths=(2,), stride=2),
        ResNetStage(widths=(48,), depths=(2,)),
    ),
    heads=("aspp",),
    head_widths=(32,),
    head_depths=(1,),
)
CONTROL = "without SAD"
METHODS: dict[str, dict[str, Any] | None] = {
    CONTROL: None,
    "SAD": {},
    "SAD, a sum over positions": {"reduction": "sum"},
}
"""By name, the arguments of SAD; None for none of it."""


def settings_of(method: str, recipe: Recipe) -> Retrain:
    """How a network is trained under a method."""
    terms: list[tuple[float, Spec]] = [(1.0, find_spec("kdnas.losses", "cross_entropy"))]  # stands for the task's loss
    arguments = METHODS[method]
    if arguments is not None:
        terms.append((0.1, find_spec("kdnas.losses", "self_attention", **arguments)))
    return Retrain(recipe=recipe, distiller=spec(FromTeacher, terms=tuple(terms)))


def write_fresh(data: Data, folder: Path) -> None:
    """The student folder that every training begins with."""
    if not folder.exists():
        space = data.fitted(SPACE)
        network = initialised(lambda: Network(space.blueprint(space.largest)), 0)
        write_student(folder, network, Card.of(network, data, {"role": "student"}, space.largest, space), deploy=False)


def one_run(method: str, seed: int, recipe: Recipe, source: Spec, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Train one network under one method; its row, and its grades on the test images."""
    began, out = time.process_time(), folder / f"{list(METHODS).index(method)}-{seed}"
    if not out.exists():
        settings = settings_of(method, dataclasses.replace(recipe, seed=seed))
        retrain(folder / "fresh", settings, out, data=source, teacher=NoTeacher(), deploy=False)
    data: Data = source.build(Data)
    grades = student_grades(out, data)
    value = float(data.task.quality(grades.astype(float).mean(0)))
    return {"method": method, "seed": seed, "F1": value, "seconds": round(time.process_time() - began, 1)}, grades


def page(data: Data, student: Path, records: list[dict[str, Any]], grades: Mapping[tuple[str, int], np.ndarray]) -> str:
    """The Markdown page."""
    own, task = read_student(student)[1].cost, data.task
    lines = [
        "# Self-attention distillation for lanes",
        "",
        "Made by `python -m experiments.lanes`; read there what was done and why.",
        "",
        f"- Data: {len(data.train)} training, {len(data.search)} search and {len(data.test)} test images of "
        f"{data.image[1]} x {data.image[2]}, drawn.",
        f"- Network: {own.params:,} parameters, {own.macs:,} MACs; SGD; seeds 0 to {max(r['seed'] for r in records)}.",
        f"- Time: {sum(r['seconds'] for r in records) / 60:.0f} minutes of one processor for {len(records)} trainings.",
        "",
        "Gain: the mean over seeds of the test F1 less that without SAD, in points, with its 95 % interval over test "
        "images and seeds; **bold** where that leaves out 0.",
        "",
        "| Training | F1 | each seed | Gain | Point accuracy | False positives | False negatives | Seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        rows = [r for r in records if r["method"] == method]
        if rows:
            mine = _stacked(grades, rows)
            own_details = task.details(mine.mean((0, 1)), data.class_names)
            more = [f"{100 * own_details[name]:.1f}" for name in _BESIDE]
            control = [r for r in records if r["method"] == CONTROL]
            value = gain_of(mine, _stacked(grades, control), task.quality) if control and method != CONTROL else ""
            mean, each = 100 * statistics.mean(r["F1"] for r in rows), ", ".join(f"{100 * r['F1']:.1f}" for r in rows)
            spent = statistics.median(r["seconds"] for r in rows)
            lines.append(f"| {method} | {mean:.2f} | {each} | {value} | {' | '.join(more)} | {spent:.0f} |")
    return "\n".join(lines) + "\n"


_BESIDE = ("point accuracy", "false positives", "false negatives")


def _stacked(grades: Mapping[tuple[str, int], np.ndarray], rows: list[dict[str, Any]]) -> np.ndarray:
    return np.stack([grades[row["method"], row["seed"]] for row in rows]).astype(float)


def main(arguments: list[str] | None = None) -> None:
    """Every training that is not finished yet, then the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=[*METHODS], help="methods")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(1, SEEDS + 1), help="how many")
    parser.add_argument("--steps", type=int, help="of every training, for a quick look; give --page too")
    parser.add_argument("--out", type=Path, default=Path("runs/lanes"), help="students and records")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder, recipe = options.out, STUDENT
    if options.steps:
        folder, recipe = options.out / f"steps-{options.steps}", dataclasses.replace(STUDENT, steps=options.steps)
    data: Data = ROADS.build(Data)
    write_fresh(data, folder / "fresh")
    records, grades = [], {}
    for seed, method in itertools.product(range(options.seeds), METHODS):
        if method in options.only:
            file = folder / "records" / f"{list(METHODS).index(method)}-{seed}.json"
            row, own = recorded(file) or one_run(method, seed, recipe, ROADS, folder)
            write_record(file, row, own)
            records.append(row)
            grades[method, seed] = own
            print(json.dumps(row), flush=True)
    options.page.write_text(page(data, folder / "fresh", records, grades), encoding="utf-8")


if __name__ == "__main__":
    main()
