"""Distillation for segmentation on CamVid: one student under each loss, then a search among elastic segmenters.

python -m experiments.segmentation camvid_small.npz     # experiments/segmentation.md, about three hours of one thread
python -m experiments.segmentation camvid_small.npz --only labels pixel-wise     # some of it
python -m experiments.segmentation camvid_small.npz --only --page chain.md       # the chain alone
python -m experiments.segmentation camvid_small.npz --steps 20 --page page.md    # a quick look

Brostow, Fauqueur, Cipolla, Semantic Object Classes in Video, Pattern Recognition Letters 2009 (images and labels).
Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019 (arXiv 1903.04197).

A teacher of the kind that `--teacher fit` trains learns the training images. One student, a network of the space
`elastic_segmenter` (LR-ASPP without its branch of an earlier map) of some 150 million MACs, is trained from the same
initial weights and batches (a seed fixes both) under the labels alone, and under the labels and each loss at its
default weight; "+" adds a level to those before it. The critic of the holistic loss has a quarter of its default
width: on maps of the images' size it would cost five times the student.
Then the chain of `kdnas run`: supernet, ranking by the default score, finalists, beside as many random
networks and the largest within the budget, each trained for as many steps. mIoU is on the test images, which chose
nothing; intervals are over test images and seeds. Everything that is finished is kept in `--out`; the same command
goes on after a kill, in the midst of a training too.

The .npz holds JPEG images and PNG label maps end to end: `train_jpeg`, `train_jpeg_offsets`, `train_mask_png`, ...
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

from kdnas import Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.data.masks import masks
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import student_grades
from kdnas.jobs._run import Run, insisting
from kdnas.jobs.chain import chain
from kdnas.jobs.fit import fit
from kdnas.jobs.retrain import retrain
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.runs.files import write_atomically
from kdnas.settings import Finals, Fit, Retrain, Search, Train
from kdnas.space import SearchSpace
from kdnas.specs import Spec, find_spec
from kdnas.statistics import difference_interval
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.teachers.zoo import student_teacher

SEEDS = 3
PARTS = ("train", "val", "test")
TEACHER = Recipe(steps=1200, batch_size=8, learning_rate=0.05)
STUDENT = Recipe(steps=800, batch_size=8, learning_rate=0.05)
SUPERNET = Recipe(steps=450, batch_size=8, learning_rate=0.05)
MACS = 150e6
EVALUATIONS = 60
CONTROL = "labels"
METHODS: dict[str, tuple[tuple[str, dict[str, Any], float | None], ...]] = {
    CONTROL: (),
    "pixel-wise": (("pixel_wise", {}, None),),
    "+ pair-wise": (("pixel_wise", {}, None), ("region_similarity", {}, None)),
    "+ holistic": (("pixel_wise", {}, None), ("region_similarity", {}, None), ("holistic", {"width": 16}, None)),
    "CWD": (("channel_wise", {"maps": "logits", "temperature": 4.0}, 3.0),),
    "SAD": (("self_attention", {}, None),),
    "attention transfer": (("attention_transfer", {}, None),),
}
"""By name, the losses beside that of the labels: name, arguments, weight (None for the default one)."""


def unpack(npz: Path, folder: Path) -> None:
    """Write images, masks and `classes.txt` as the data source `masks` reads them, unless they are there."""
    if (folder / "classes.txt").exists():
        return
    with np.load(npz, allow_pickle=False) as content:
        for part in PARTS:
            for kind, suffix in (("images", "jpg"), ("masks", "png")):
                place = folder / part / kind
                place.mkdir(parents=True, exist_ok=True)
                array = f"{part}_{'jpeg' if kind == 'images' else 'mask_png'}"
                files, ends = content[array], content[f"{array}_offsets"].tolist()
                for number, (begin, end) in enumerate(itertools.pairwise(ends)):
                    (place / f"{number:04}.{suffix}").write_bytes(files[begin:end].tobytes())
        text = "".join(f"{name}\n" for name in [*map(str, content["classes"]), "void"])
    write_atomically(folder / "classes.txt", lambda draft: draft.write_text(text, encoding="utf-8"))


def teacher_of(data: Spec, recipe: Recipe, width: int, folder: Path) -> tuple[Spec, dict[str, Any]]:
    """The teacher, trained as `kdnas fit` trains it, and its row."""
    settings = Fit(data=data, teacher=FitTeacher(recipe=recipe, blocks=1, width=width))
    with insisting(True):
        row = fit(settings, folder)
    return spec(student_teacher, path=str((folder / "teacher").resolve())), row


def networks() -> SearchSpace:
    """The space; LR-ASPP reads the last map alone."""
    return dataclasses.replace(load_space("elastic_segmenter"), low_level=False)


def write_fresh(data: Data, folder: Path) -> None:
    """The student folder that every training of the first part begins with: of many networks the one next to MACS."""
    if folder.exists():
        return
    space = data.fitted(networks())
    rng = python_rng(0, "segmentation")
    samples = [space.sample(rng) for _ in range(100)]
    architecture = min(samples, key=lambda a: abs(cost(space.blueprint(a)).macs - MACS))
    network = initialised(lambda: Network(space.blueprint(architecture)), 0)
    write_student(folder, network, Card.of(network, data, {"role": "student"}, architecture, space), deploy=False)


def settings_of(method: str, recipe: Recipe) -> Retrain:
    """How a student is trained under a method."""
    losses = METHODS[method]
    if not losses:
        return Retrain(recipe=recipe, distiller=spec(FromLabels))
    terms = [(1.0, find_spec("kdnas.losses", "cross_entropy"))]
    for name, arguments, weight in losses:
        loss = find_spec("kdnas.losses", name)
        terms.append((_weight(loss) if weight is None else weight, loss.replace(**arguments)))
    return Retrain(recipe=recipe, distiller=spec(FromTeacher, terms=tuple(terms)))


def _weight(loss: Spec) -> float:
    kind: Any = type(loss.build())
    return float(kind.weight)


def one_run(
    method: str, seed: int, recipe: Recipe, data: Spec, teacher: Spec, folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """Train one student under one method; its row, and its grades on the test images."""
    began, out = time.process_time(), folder / f"{method.replace('+ ', 'and-').replace(' ', '-')}-{seed}"
    settings = settings_of(method, dataclasses.replace(recipe, seed=seed))
    if not out.exists():
        retrain(folder / "fresh", settings, out, data=data, teacher=teacher, deploy=False)
    loaded: Data = data.build(Data)
    grades = student_grades(out, loaded)
    value = float(loaded.task.quality(grades.astype(float).mean(0)))
    return {"method": method, "seed": seed, "mIoU": value, "seconds": round(time.process_time() - began, 1)}, grades


def searched(data: Spec, teacher: Spec, recipes: Mapping[str, Recipe], seeds: int, folder: Path) -> Run:
    """The chain: elastic segmenters ranked by their similarity to the teacher, finalists, and their controls.

    The student that is chosen with the first seed, and the network of each control, are trained with all seeds.
    """
    loaded: Data = data.build(Data)
    experiment = Experiment(
        train=Train(space=networks(), data=data, teacher=teacher, recipe=recipes["supernet"]),
        search=Search(
            budget=Budget(macs=MACS),
            num_evaluations=EVALUATIONS,
            num_images=min(64, len(loaded.search)),
        ),
        retrain=Retrain(recipe=recipes["student"]),
        finals=Finals(finalists=3, controls=("labels", "random", "largest"), seeds=seeds),
    )
    with insisting(True):
        return chain(experiment, folder, deploy=False)


def page(
    data: Data,
    student: Path,
    teacher: Mapping[str, Any],
    records: list[dict[str, Any]],
    grades: Mapping[tuple[str, int], np.ndarray],
    run: Run | None,
) -> str:
    """The Markdown page."""
    own = read_student(student)[1].cost
    task: Any = data.task
    lines = [
        "# Distillation for segmentation",
        "",
        "Made by `python -m experiments.segmentation camvid_small.npz`; read there what was done and why.",
        "",
        f"- Data: {len(data.train)} training, {len(data.search)} search and {len(data.test)} test images of "
        f"{data.image[1]} x {data.image[2]}, {data.classes} classes.",
        f"- Teacher: {teacher['params']:,} parameters, {teacher['macs']:,} MACs, {100 * teacher['accuracy']:.2f} mIoU.",
        f"- Student: {own.params:,} parameters, {own.macs:,} MACs; SGD; seeds 0 to {max(r['seed'] for r in records)}.",
        f"- Time: {sum(r['seconds'] for r in records) / 60:.0f} minutes of one processor for {len(records)} trainings.",
        "",
        "Gain: the mean over seeds of the test mIoU less that of the labels alone, in points, with its 95 % interval "
        "over test images and seeds; **bold** where that leaves out 0. With six rows an interval leaves out 0 by "
        "chance in one page of four.",
        "",
        "| Losses beside that of the labels | mIoU | each seed | Gain | Best and worst gain of a class | Seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    by_method = {
        method: np.stack([grades[method, r["seed"]] for r in records if r["method"] == method]).astype(float)
        for method in METHODS
        if any(r["method"] == method for r in records)
    }
    for method, mine in by_method.items():
        rows = [r for r in records if r["method"] == method]
        mean = 100 * statistics.mean(r["mIoU"] for r in rows)
        each = ", ".join(f"{100 * r['mIoU']:.2f}" for r in rows)
        gain = "" if method == CONTROL or CONTROL not in by_method else gain_of(mine, by_method[CONTROL], task.quality)
        classes = "" if not gain else _classes(mine, by_method[CONTROL], data)
        spent = statistics.median(r["seconds"] for r in rows)
        lines.append(f"| {method} | {mean:.2f} | {each} | {gain} | {classes} | {spent:.0f} |")
    return "\n".join([*lines, *([] if run is None else _chain(run))]) + "\n"


def gain_of(mine: np.ndarray, others: np.ndarray, quality: Any) -> str:
    value, low, high = (100 * bound for bound in difference_interval(mine, others, quality=quality))
    words = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{words}**" if low > 0 or high < 0 else words


def _classes(mine: np.ndarray, others: np.ndarray, data: Data) -> str:
    """The classes whose IoU gains and loses most."""
    ours, theirs = (data.task.details(side.mean((0, 1)), data.class_names) for side in (mine, others))
    gains = {
        name.removeprefix("IoU "): 100 * (ours[name] - theirs[name])
        for name in ours
        if name.startswith("IoU ") and name in theirs
    }
    best, worst = max(gains, key=gains.__getitem__), min(gains, key=gains.__getitem__)
    return f"{best} {gains[best]:+.1f}, {worst} {gains[worst]:+.1f}"


def _chain(run: Run) -> list[str]:
    """The closing table of the chain, and what its test images say."""
    results = run.storage.results()
    lines = [
        "",
        "## The chain",
        "",
        f"`elastic_segmenter`, at most {MACS / 1e6:.0f} million MACs, {len(run.ranking())} candidates ranked by the "
        "default score; every network trained for as many steps.",
        "",
        "| Network | mIoU | each seed | 95 % interval | Params | MACs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        low, high = (100 * bound for bound in row["interval"])
        macs = f"{row['macs']:,}" if row.get("macs") else "–"
        each = ", ".join(f"{100 * seed:.2f}" for seed in row.get("seeds", []))
        lines.append(
            f"| {row['name']} | {100 * row['accuracy']:.2f} | {each} | {low:.2f} to {high:.2f} | {row['params']:,} | "
            f"{macs} |"
        )
    sentences = [control["sentence"] for control in results["controls"].values()]
    return [*lines, "", *(f"- {sentence}" for sentence in sentences)]


def main(arguments: list[str] | None = None) -> None:
    """Every training that is not finished yet, then the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("npz", type=Path, help="CamVid")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=[*METHODS], help="methods")
    parser.add_argument("--seeds", type=int, default=SEEDS, choices=range(1, SEEDS + 1), help="how many")
    parser.add_argument("--no-chain", action="store_true", help="the first part only")
    parser.add_argument("--width", type=int, default=32, help="channels of the teacher's first stage")
    parser.add_argument("--steps", type=int, help="of every training, for a quick look; give --page too")
    parser.add_argument("--out", type=Path, default=Path("runs/segmentation"), help="data, teacher, students, run")
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"), help="what to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.out / f"steps-{options.steps}" if options.steps else options.out
    recipes = {"teacher": TEACHER, "student": STUDENT, "supernet": SUPERNET}
    if options.steps:
        recipes = {name: dataclasses.replace(recipe, steps=options.steps) for name, recipe in recipes.items()}
    unpack(options.npz, options.out / "data")
    data = spec(masks, path=str((options.out / "data").resolve()), weighted=True)
    loaded: Data = data.build(Data)
    teacher, row = teacher_of(data, recipes["teacher"], options.width, folder / "teacher")
    write_fresh(loaded, folder / "fresh")
    records, grades = [], {}
    for seed, method in itertools.product(range(options.seeds), METHODS):
        if method in options.only:
            file = folder / "records" / f"{list(METHODS).index(method)}-{seed}.json"
            record, own = recorded(file) or one_run(method, seed, recipes["student"], data, teacher, folder)
            write_record(file, record, own)
            records.append(record)
            grades[method, seed] = own
            print(json.dumps(record), flush=True)
    run = None if options.no_chain else searched(data, teacher, recipes, options.seeds, folder / "chain")
    if not records:  # the chain alone
        options.page.write_text("\n".join([] if run is None else _chain(run)).lstrip() + "\n", encoding="utf-8")
        return
    text = page(loaded, folder / "fresh", row, records, grades, run)
    options.page.write_text(text, encoding="utf-8")


def recorded(file: Path) -> tuple[dict[str, Any], np.ndarray] | None:
    """A finished training's record and grades."""
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["record"], np.array(content["grades"])


def write_record(file: Path, record: dict[str, Any], grades: np.ndarray) -> None:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"record": record, "grades": grades.tolist()})
        write_atomically(file, lambda draft: draft.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
