"""Every scheme of distillation for the same student, beside the same training without a teacher; seeds are paired.

python -m experiments.schemes                          # the page below, about 25 minutes of one thread
python -m experiments.schemes --only mutual route      # some of it; finished runs are kept in runs/schemes/runs.jsonl
KDNAS_CIFAR10=PATH python -m experiments.schemes --full     # full size: CIFAR-10; not run here

A student folder of one drawn network is trained by the jobs behind `kdnas retrain` and `kdnas quantize`, under each
scheme in turn and on labels alone, from the same initial weights, images, augmentation and number of steps. A seed
fixes all four, so that each scheme is compared with its control seed by seed; the interval is Student's, over seeds.
The teacher is what `--teacher fit` trains, from all training images; the small student sees 400 of them. Accuracy is
on the test part, which chose nothing.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.every_loss import _gain as gain_of
from experiments.every_loss import few
from kdnas import Experiment, FitTeacher, Recipe, load_space, spec
from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.data import Data, cifar10, digits, strong
from kdnas.evaluation import teacher_accuracy
from kdnas.jobs._anchors import retrain_along
from kdnas.jobs._arguments import terms_of, with_losses
from kdnas.jobs._assist import between, retrain_assisted
from kdnas.jobs._run import build_teacher
from kdnas.jobs.quantize import quantize_student
from kdnas.jobs.retrain import retrain
from kdnas.jobs.train import train
from kdnas.losses.feature.route_constrained import equal_intervals
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.settings import Retrain, Train
from kdnas.space import SearchSpace
from kdnas.specs import Spec, parse_spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.teachers import several_teachers, streamed_teacher

SEEDS = 5
NUM_TEACHERS = 3
# Of the first teacher's training: more than a route takes, so that anchors can be chosen among them.
NUM_SNAPSHOTS = 16
NUM_ANCHORS = 4
CONTROL, REFERENCE = "labels alone", "soft targets"
MEAN, AUTO = "several: mean of probabilities", "assistant: auto"
INT8_TRAINED, INT8_AFTER = "int8: trained so", "int8: soft targets, quantised after"
MIDDLE = "middle"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One row.

    Attributes:
        name: of the row.
        distiller: as `kdnas retrain --distiller` takes it; empty for its default, soft targets.
        losses: as `--loss` takes them.
        teacher: a key of `teachers`, or `none`.
        assistants: as `--assistants` takes them; `middle` stands for one code.
        anchors: as `--greedy-anchors` takes it; 0 for none.
        longer: how many times the steps of the others.
        strong: whether the data is `strong:`.
        control: the row that this one is paired with.
        form: what is judged: the network, the int8 graph that its training leaves, or that of `kdnas quantize`.
    """

    name: str
    distiller: str = ""
    losses: tuple[str, ...] = ()
    teacher: str = "one"
    assistants: str = ""
    anchors: float = 0.0
    longer: int = 1
    strong: bool = False
    control: str = CONTROL
    form: str = "float"

    def settings(self, recipe: Recipe) -> Retrain:
        """What `kdnas retrain` makes of these options."""
        if self.distiller:
            distiller = with_losses(parse_spec("kdnas.distillers", self.distiller), self.losses)
            assert distiller is not None
            return Retrain(recipe=recipe, distiller=distiller)
        return Retrain(recipe=recipe, distiller=terms_of(self.losses)) if self.losses else Retrain(recipe=recipe)

    def options(self) -> str:
        """The same as a person types it."""
        words = ["--distiller", self.distiller] if self.distiller else []
        words += [word for loss in self.losses for word in ("--loss", loss)]
        words += [] if self.teacher == "one" else ["--teacher", TEACHERS.get(self.teacher, self.teacher)]
        words += ["--assistants", self.assistants.replace(MIDDLE, "CODE")] if self.assistants else []
        words += ["--greedy-anchors", f"{self.anchors:g}"] if self.anchors else []
        words += [f"--steps {self.longer}N"] if self.longer > 1 else []
        words += ["--data", "strong:DATA"] if self.strong else []
        return f"`{' '.join(words)}`" if words else "nothing else"


# How the page writes the teachers: A, B, C are three of different seeds, A1 to A4 snapshots of the first's training.
TEACHERS = {
    "mean": "ensemble:A,B,C",
    "logits": "ensemble+logits:A,B,C",
    "random": "ensemble+random:A,B,C",
    "weighted": "ensemble:A=…,B=…,C=…",
    "reliable": "ensemble+reliable:A,B,C",
    "streamed": "streamed:ensemble:A,B,C",
    "route": "route:A1,A2,A3,A4",
    "snapshots": "route: all 16",
}

STRONG_CONTROL = "strong augmentation, labels alone"
SCHEMES = (
    Scheme(name=CONTROL, distiller="from_labels", teacher="none"),
    Scheme(name=REFERENCE),
    Scheme(name="hint, two stages", losses=("hint",)),
    Scheme(name="flow, two stages", losses=("flow",)),
    Scheme(name="adversarial: conditional", losses=("conditional_adversarial",)),
    Scheme(name="adversarial: MEAL", losses=("meal",), teacher="random"),
    Scheme(name="self-attention", losses=("self_attention",), teacher="none"),
    Scheme(name="mutual", distiller="mutual", teacher="none"),
    Scheme(name="self-distillation", distiller="self_distillation", teacher="none"),
    Scheme(name="born again, 3 generations", distiller="born_again,generations=3", teacher="none"),
    Scheme(name="born again, each as long", distiller="born_again,generations=3", teacher="none", longer=3),
    Scheme(name=MEAN, teacher="mean"),
    Scheme(name="several: mean of logits", teacher="logits"),
    Scheme(name="several: one at random", teacher="random"),
    Scheme(name="several: weighted by accuracy", teacher="weighted"),
    Scheme(name="several: reliable per sample", teacher="reliable"),
    Scheme(name="several: oracle", distiller="from_teacher", losses=("oracle",), teacher="mean"),
    Scheme(name="several: streamed", teacher="streamed"),
    Scheme(name="assistant: one code", assistants=MIDDLE),
    Scheme(name=AUTO, assistants="auto"),
    Scheme(name="route, soft targets", teacher="route"),
    Scheme(
        name="route, route-constrained",
        distiller="from_teacher",
        losses=("cross_entropy=0.1", "route_constrained=0.9"),
        teacher="route",
    ),
    Scheme(name="route, greedy anchors", teacher="snapshots", anchors=1.5),
    Scheme(name=STRONG_CONTROL, distiller="from_labels", teacher="none", strong=True),
    Scheme(name="strong augmentation, top-k", losses=("top_k_distillation",), strong=True, control=STRONG_CONTROL),
    Scheme(name=INT8_TRAINED, distiller="quantization_aware", form="int8 trained"),
    Scheme(name=INT8_AFTER, form="int8 after"),
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one size of the experiment is made of."""

    data: Spec
    teacher_data: Spec
    space: SearchSpace
    architecture: Architecture
    teacher: FitTeacher
    recipe: Recipe


def small() -> Size:
    """400 of scikit-learn's digits, a network of some 220,000 MACs."""
    space = load_space("digits").fitted(classes=10, image_channels=1)
    rng = python_rng(0, "schemes")
    samples = [space.sample(rng) for _ in range(100)]
    return Size(
        data=spec("experiments.schemes:few_digits"),
        teacher_data=spec(digits),
        space=space,
        architecture=min(samples, key=lambda a: abs(cost(space.blueprint(a)).macs - 220_000)),
        teacher=FitTeacher(recipe=Recipe(steps=160, batch_size=128, learning_rate=0.1)),
        recipe=Recipe(steps=250, batch_size=64, learning_rate=0.1),
    )


def full() -> Size:
    """CIFAR-10, the smallest bottleneck network, the usual recipe of 220 epochs."""
    data = spec(cifar10, path=os.environ.get("KDNAS_CIFAR10", "cifar10"))
    space = load_space("elastic_resnet").fitted(classes=10, image_channels=3)
    return Size(
        data=data,
        teacher_data=data,
        space=space,
        architecture=space.smallest,
        teacher=FitTeacher(recipe=Recipe(steps=35_000, batch_size=128, learning_rate=0.1)),
        recipe=Recipe(steps=80_000, batch_size=128, learning_rate=0.1),
    )


def few_digits() -> Data:
    """The first 400 training digits, shifted as all of them are."""
    whole = digits()
    return dataclasses.replace(few(whole), augmentation=whole.augmentation)


def teachers(size: Size, folder: Path) -> tuple[dict[str, Spec], dict[str, Any]]:
    """Teachers by the names that SCHEMES use, trained as `kdnas train` trains them, and what the page says of them."""
    common = {"space": size.space, "data": size.teacher_data, "distiller": None}
    following = dataclasses.replace(size.teacher.recipe, seed=size.teacher.recipe.seed + 1)
    first = Train(**common, teacher=dataclasses.replace(size.teacher, snapshots=NUM_SNAPSHOTS))
    others = Train(**common, teacher=FitTeacher(recipe=following, members=NUM_TEACHERS - 1))
    route: tuple[Spec, ...] = train(Experiment(train=first), folder / "first").teacher_spec["members"]
    members = (route[-1], *train(Experiment(train=others), folder / "others").teacher_spec["members"])
    data: Data = size.data.build(Data)
    built = [build_teacher(member, data) for member in members]
    weights = tuple(round(teacher_accuracy(teacher, data.search, data), 4) for teacher in built)
    mean = spec(several_teachers, kind="ensemble", members=members)
    anchors = tuple(route[k] for k in equal_intervals(NUM_SNAPSHOTS, NUM_ANCHORS))
    specs = {
        "one": members[0],
        "mean": mean,
        "logits": mean.replace(kind="ensemble+logits"),
        "random": mean.replace(kind="ensemble+random"),
        "reliable": mean.replace(kind="ensemble+reliable"),
        "weighted": mean.replace(weights=weights),
        "streamed": spec(streamed_teacher, member=mean),
        "route": spec(several_teachers, kind="route", members=anchors),
        "snapshots": spec(several_teachers, kind="route", members=route),
    }
    facts = {
        "one by one": [teacher_accuracy(teacher, data.test, data) for teacher in built],
        "mean": teacher_accuracy(build_teacher(mean, data), data.test, data),
        "anchors": [teacher_accuracy(build_teacher(teacher, data), data.test, data) for teacher in anchors],
        "weights": weights,
    }
    return specs, facts


def write_fresh(size: Size, folder: Path) -> None:
    """The student folder that every run begins with."""
    data: Data = size.data.build(Data)
    network = initialised(lambda: Network(size.space.blueprint(size.architecture)), 0)
    card = Card.of(network, data, {"role": "student of the schemes"}, size.architecture, size.space)
    write_student(folder, network, card, deploy=False)


def one_run(scheme: Scheme, seed: int, size: Size, teacher: Spec | None, folder: Path) -> dict[str, Any]:
    """Train one student under one scheme; what became of it."""
    began = time.process_time()
    record: dict[str, Any] = {"scheme": scheme.name, "seed": seed, "steps": size.recipe.steps}
    data = spec(strong, data=size.data) if scheme.strong else size.data
    settings = scheme.settings(dataclasses.replace(size.recipe, seed=seed, steps=scheme.longer * size.recipe.steps))
    student, out = folder / "fresh", place_of(folder, scheme.name, seed)
    try:
        if scheme.assistants:
            code = middle(size) if scheme.assistants == MIDDLE else scheme.assistants
            result = retrain_assisted(student, settings, out, code, data=data, teacher=teacher)
            record["assistants"] = result["assistants"]
        elif scheme.anchors:
            options = {"data": data, "teacher": teacher, "deploy": False}
            result = retrain_along(student, settings, out, threshold=scheme.anchors, **options)
            record["anchors"] = result["anchors"]
        else:
            deploy = scheme.form != "float"
            result = retrain(student, settings, out, data=data, teacher=teacher, deploy=deploy)
        record["accuracy"] = result["accuracy"]
        if scheme.form == "int8 trained":
            record |= {"accuracy": result["checks"]["int8 accuracy"], "float": result["checks"]["float accuracy"]}
        elif scheme.form == "int8 after":
            checks = quantize_student(out, folder / f"{out.name}.onnx", data=data, most=1.0)
            record |= {"accuracy": checks["accuracy"], "float": checks["float accuracy"]}
        if scheme.teacher == "streamed":
            compare(out, place_of(folder, MEAN, seed))
    except (FloatingPointError, ValueError) as error:
        record["failed"] = str(error)
    return record | {"seconds": round(time.process_time() - began, 2)}


def place_of(folder: Path, name: str, seed: int) -> Path:
    """Where a run leaves its student."""
    return folder / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-{seed}"


def middle(size: Size) -> str:
    """The code of an assistant halfway, in the logarithm of the MACs, between the student and the space's largest."""
    middles = between(size.space, cost(size.space.blueprint(size.architecture)).macs, 0)
    return size.space.code(middles[len(middles) // 2])


def compare(ours: Path, theirs: Path) -> None:
    """Raise an AssertionError unless two students have the very same weights."""
    states = [read_student(folder)[0].state_dict() for folder in (ours, theirs)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1]), f"{ours} differs from {theirs}"


def wanted(only: list[str], seeds: int) -> Iterator[tuple[Scheme, int]]:
    """Scheme and seed of every run, seed by seed; with the ones that those named are compared with."""
    names = {s.name for s in SCHEMES if not only or any(part in s.name for part in only)}
    names |= {s.control for s in SCHEMES if s.name in names} | {CONTROL, REFERENCE}
    if any(s.name in names and s.teacher == "streamed" for s in SCHEMES):
        names.add(MEAN)
    for seed in range(seeds):
        yield from ((s, seed) for s in SCHEMES if s.name in names)


def page(size: Size, records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The Markdown page."""
    by_name = {s.name: {r["seed"]: r for r in records if r["scheme"] == s.name} for s in SCHEMES}
    of = {name: {s: r["accuracy"] for s, r in rows.items() if "accuracy" in r} for name, rows in by_name.items()}
    data: Data = size.data.build(Data)
    teacher_images = len(size.teacher_data.build(Data).train)
    c, recipe = cost(size.space.blueprint(size.architecture)), size.recipe
    lines = [
        "# Every scheme against no teacher",
        "",
        "Made by `python -m experiments.schemes`; read there what was done and why.",
        "",
        f"- Student: {c.params:,} parameters, {c.macs:,} MACs, code `{size.space.code(size.architecture)}` of the "
        f"space `{size.space.name}`. The space's largest has "
        f"{cost(size.space.blueprint(size.space.largest)).macs:,} MACs.",
        f"- Data: {len(data.train)} training images under the augmentation `{data.augmentation}`; accuracy on "
        f"{len(data.test)} test images.",
        f"- Recipe: {recipe.steps} steps of {recipe.batch_size} images, SGD, learning rate {recipe.learning_rate}, "
        f"weight decay {recipe.weight_decay}, cosine; seeds 0 to {max(r['seed'] for r in records)}.",
        f"- Teachers A, B, C, trained on {teacher_images} images for "
        f"{size.teacher.recipe.steps} steps of {size.teacher.recipe.batch_size}: {_percents(facts['one by one'])}; "
        f"their mean {_percents([facts['mean']])}. Weights by accuracy on the search part: "
        f"{', '.join(f'{w:.4f}' for w in facts['weights'])}. A1 to A{NUM_ANCHORS}, snapshots of A's training at equal "
        f"intervals: {_percents(facts['anchors'])}.",
        f"- Time: {sum(r['seconds'] for r in records) / 60:.0f} minutes of one processor for {len(records)} runs, "
        "teachers apart. Seconds are of a processor and of the whole command: loading, training, writing.",
        "",
        "Gain: mean of test accuracy less the control's of the same seed, in points, with its 95 % interval over "
        "seeds; **bold** where that leaves out 0. It does not hold the chance of other test images. The control is "
        f"`{CONTROL}`, under strong augmentation `{STRONG_CONTROL}`. The column after it compares with soft targets "
        "in the same way: is the scheme better than the plain one? With this many rows one interval of a column "
        "leaves out 0 by chance.",
        "",
        f"The teachers have seen {teacher_images} training images and the students {len(data.train)}."
        + (
            " What a teacher brings includes the images that only it has seen; schemes without one (mutual, "
            "self-distillation, born again) and self-attention have no such help."
            if teacher_images > len(data.train)
            else ""
        ),
        "",
        "| Scheme | `kdnas retrain STUDENT --teacher A`, and | Accuracy | Gain | Less soft targets | Seconds per run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for scheme in SCHEMES:
        rows = list(by_name[scheme.name].values())
        if not rows:
            continue
        mean = f"{100 * statistics.mean(of[scheme.name].values()):.2f}" if of[scheme.name] else "none"
        cells = ["" if scheme.name == other else gain_of(rows, of[other])[1] for other in (scheme.control, REFERENCE)]
        if scheme.name == CONTROL:
            cells[0] = ""
        spent = statistics.median(r["seconds"] for r in rows)
        lines.append(f"| {scheme.name} | {scheme.options()} | {mean} | {' | '.join(cells)} | {spent:.1f} |")
    return "\n".join([*lines, "", *_read(by_name, of), "", *_unequal(size, by_name)]) + "\n"


def _percents(accuracies: list[float]) -> str:
    return ", ".join(f"{100 * a:.2f} %" for a in accuracies)


def _read(by_name: dict[str, dict[int, dict[str, Any]]], of: dict[str, dict[int, float]]) -> list[str]:
    """Which intervals leave out 0."""
    lines = []
    for what, others in (("its control", None), ("soft targets", REFERENCE)):
        names: dict[str, list[str]] = {"above": [], "below": [], "neither": []}
        for scheme in SCHEMES:
            other = others or scheme.control
            rows = list(by_name[scheme.name].values())
            if scheme.name in (other, CONTROL) or not rows:
                continue
            mean, text = gain_of(rows, of[other])
            names["neither" if not text.startswith("**") else "above" if mean > 0 else "below"].append(scheme.name)
        lines.append(
            f"- Against {what}, the interval is above 0 for {_listed(names['above'])}; below 0 for "
            f"{_listed(names['below'])}; it holds 0 for the other {len(names['neither'])}."
        )
    return lines


def _listed(names: list[str]) -> str:
    return "; ".join(names) if names else "none"


def _unequal(size: Size, by_name: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """What the rows do not have in common, and what else was seen."""
    chosen = [r["assistants"] for r in by_name[AUTO].values() if "assistants" in r]
    macs = [cost(size.space.blueprint(size.space.parse(code))).macs for code in chosen]
    ints = [
        f"{scheme.name}: " + ", ".join(f"{100 * r['accuracy']:.2f} (float {100 * r['float']:.2f})" for r in rows)
        for scheme in SCHEMES
        if (rows := [r for r in by_name[scheme.name].values() if "float" in r])
    ]
    after = {seed: r["accuracy"] for seed, r in by_name[INT8_AFTER].items() if "accuracy" in r}
    between_ints = gain_of(list(by_name[INT8_TRAINED].values()), after)[1]
    steps = size.recipe.steps
    largest = f"{cost(size.space.blueprint(size.space.parse(middle(size)))).macs:,}"
    return [
        "Not equal in cost, though every student has the same steps:",
        "",
        f"- born again: three generations share the {steps} steps, so that the student itself has a third of them; "
        f"each as long: {3 * steps} steps in all.",
        "- mutual: a second network of the same size learns beside the student.",
        f"- assistant: one network of {largest} MACs (`{middle(size)}`) is trained for {steps} steps first; auto: "
        "three assistants and three students for a quarter of the steps each, then as before"
        + (f" (chosen, seed by seed: {', '.join(f'{m:,}' for m in macs)} MACs)." if macs else "."),
        f"- several: {NUM_TEACHERS} teachers look at every batch, one at a time where one is drawn; streamed builds "
        "them anew for every batch, and gives the very weights of the mean (asserted run by run).",
        "- int8 and assistant rows also write and check every form of the student, which takes a part of their time.",
        "- route, greedy anchors (chosen among 16 snapshots, seed by seed: "
        + "; ".join(str(r["anchors"]) for r in by_name["route, greedy anchors"].values() if "anchors" in r)
        + "): as long as the others.",
        "",
        f"In integers, accuracy of the int8 graph and of the same weights in float, seed by seed: {'; '.join(ints)}. "
        f"Trained so less quantised after: {between_ints}.",
    ]


def main() -> None:
    """Every run that is not finished yet, then the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of schemes' names")
    parser.add_argument("--seeds", type=int, choices=range(1, SEEDS + 1), default=SEEDS, help="how many")
    parser.add_argument("--full", action="store_true", help="CIFAR-10, from the path in KDNAS_CIFAR10")
    parser.add_argument("--steps", type=int, help="other than the recipe's, for a quick look; give --page too")
    parser.add_argument("--out", type=Path, default=Path("runs/schemes"), help="teachers, students, finished runs")
    parser.add_argument("--page", type=Path, help="what to write")
    options = parser.parse_args()
    size, name = (full(), "full") if options.full else (small(), "small")
    if not options.full:
        torch.set_num_threads(1)
    if options.steps:
        size = dataclasses.replace(size, recipe=dataclasses.replace(size.recipe, steps=options.steps))
    written = options.page or Path(__file__).with_name("schemes_full.md" if options.full else "schemes.md")
    folder = options.out / f"{name}-{size.recipe.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    runs_file = folder / "runs.jsonl"
    records = [json.loads(line) for line in runs_file.read_text().splitlines()] if runs_file.exists() else []
    finished = {(r["scheme"], r["seed"]) for r in records}
    specs, facts = teachers(size, options.out / f"{name}-teachers")
    write_fresh(size, folder / "fresh")
    for scheme, seed in wanted(options.only, options.seeds):
        if (scheme.name, seed) in finished:
            continue
        record = one_run(scheme, seed, size, specs.get(scheme.teacher), folder)
        records.append(record)
        with runs_file.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    written.write_text(page(size, records, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
