"""Which ranking chooses well? Supernets of four published spaces, their scores against published accuracies.

    python benchmarks/ranking_proof.py --data cifar10.npz --tables FOLDER --out runs/ranking_proof
        [--space NAME ...] [--way NAME ...] [--seeds SEED ...] [--full STEPS] [--limit N] [--table [--picture FILE]]

FOLDER holds the public rows (`nas_bench_macro_public.csv` and the like). A supernet is trained per space, seed and way:
`labels` and `taught` train a uniform single path, on labels or under a teacher of another family; `sandwich` the
largest, the smallest and two random subnets, all but the largest under the largest, without any other teacher. All take
about the same time, 9 minutes of one idle thread for NAS-Bench-Macro, 3 to 6 for the others, on CIFAR-10 averaged
down to 16x16, spaces reduced as `SPACES` says.

Then every network of the table (1,000 of them, where there are more) gets every score on 256 images of the search
part. A row per score holds Kendall's tau, the points of accuracy lost where the best five within a budget are trained
and the best one is kept (budgets at quarters of the table's MACs), and the precision among the best tenth; rows with
`trainings` hold the same after so many published accuracies were drawn as results and the predictor of `kdnas search
--trainings` was fitted to them, a mean over 50 draws, on the networks that were not drawn. `similarity` features are
those to the supernet's largest subnet.

The teacher is the ResNet of `own_students.py`, another family than any of the spaces. A finished supernet is rows at
once, and nothing is done twice: the same command goes on where it was stopped. `--table` prints what the rows say.

`--full` is for a GPU: whole networks on whole images (32x32), batches of 128, so many steps of a single path and a
quarter of them of a sandwich. 12,000 steps take less than nine minutes there. Give it rows of its own.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from channel_widths import divided
from common import Row, append, cifar, open_rows, rows_in, trained
from own_students import teacher_of
from proof_tables import picture, report
from trainings import DRAWS, NUMBERS, TABLES, Table, measured

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.evaluation import accuracy
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import channels_last, default_device, repeatable
from kdnas.randomness import initialised, torch_rng
from kdnas.ranking.quality import BenchmarkRow, canonical_rows, read_table
from kdnas.runs.files import write_json
from kdnas.scorers import _features as features
from kdnas.scorers._features import Features
from kdnas.scorers.base import Evidence, Score, score_by_all
from kdnas.settings import Recipe
from kdnas.space import SearchSpace
from kdnas.spaces import Channels
from kdnas.specs import parse_spec, spec
from kdnas.statistics import kendall, points_lost, precision_at_top
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Teacher
from kdnas.training.loop import Training

IMAGE_SIZE, BATCH, IMAGES, NETWORKS, TRAINED = 16, 64, 256, 1000, 5
FULL_SIZE, FULL_BATCH = 32, 128
STEPS = {
    "nas_bench_macro": 3600,
    "nas_bench_201": 5000,
    "channel_bench_macro_mobilenet": 5000,
    "channel_bench_macro_resnet": 5000,
}
"""Of a single path; a sandwich has four subnets a step, and a quarter of the steps."""
KL = ((1.0, spec(SoftTargets, temperature=1.0)),)
WAYS: dict[str, Distiller] = {
    "labels": SinglePath(),
    "taught": SinglePath(terms=KL),
    "sandwich": Sandwich(terms=()),
}
BY_LARGEST = {"rdm": "in_place", "cka": "in_place,scorer=cka", "loss": "in_place,scorer=loss"}
SCORERS = (
    *BY_LARGEST.values(),
    "accuracy",
    "rank_ensemble,members=in_place,scorer=loss+nwot,num_reference=100",
    "rank_ensemble",
    "zen",
)
BY_TEACHER = ("rdm", "cka", "loss")
BUDGETS = (0.25, 0.5, 0.75, 1.0)
LOST = tuple(f"lost_q{round(100 * share)}" for share in BUDGETS)
COLUMNS = (
    *("space", "way", "seed", "teacher", "steps", "batch_size", "networks", "score", "trainings", "tau"),
    *LOST,
    *("top_tenth", "covered", "supernet_accuracy", "train_seconds", "score_seconds", "torch"),
)


class Part(NamedTuple):
    """A supernet to train."""

    space: str
    way: str
    seed: int
    full: int = 0
    """Steps of a single path at the published size; 0 for the reduced one."""

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join([self.space, self.way, str(self.seed), *["full"] * bool(self.full)])


def reduced(name: str) -> SearchSpace:
    """The space whose supernet is trained here: of the same codes, with smaller networks."""
    space = load_space(name)
    if isinstance(space, Channels):
        space = divided(space, 8)
    change = {"nas_bench_macro": {"width_multiplier": 0.5}, "nas_bench_201": {"num_cells": 2}}.get(name, {})
    return dataclasses.replace(space, resolutions=(IMAGE_SIZE,), **change)


def table_rows(name: str, folder: Path) -> list[BenchmarkRow]:
    """The distinct networks of a table, drawn where there are more than NETWORKS; of the published costs."""
    rows = read_table(folder / f"{name}_public.csv", load_space(name), TABLES[name])
    distinct = canonical_rows(rows)
    drawn = np.random.default_rng(0).permutation(len(distinct))[:NETWORKS]
    return [rows[distinct[i]] for i in sorted(drawn)]


def train_supernet(part: Part, data: Data, teacher: Teacher, place: Path) -> tuple[Supernet, Row]:
    """A supernet, trained once or read back, and what its rows say of it."""
    steps = (part.full or STEPS[part.space]) // (4 if part.way == "sandwich" else 1)
    batch, device = (FULL_BATCH, default_device()) if part.full else (BATCH, torch.device("cpu"))
    recipe = Recipe(steps=steps, batch_size=batch, learning_rate=0.1, seed=part.seed)
    space = dataclasses.replace(load_space(part.space), resolutions=(FULL_SIZE,)) if part.full else reduced(part.space)
    supernet = initialised(lambda: Supernet(space), part.seed)
    training = Training(supernet, WAYS[part.way], data, teacher if part.way == "taught" else None, recipe, device)
    seconds = trained(training, part.name, place)
    return supernet.eval(), {"steps": steps, "batch_size": batch, "train_seconds": seconds}


def evidence_of(supernet: Supernet, data: Data, teacher: Teacher) -> Evidence:
    """The same search images for every supernet, with a teacher's outputs."""
    device = next(supernet.parameters()).device
    chosen = torch.randperm(len(data.search), generator=torch_rng("evidence", 0))[:IMAGES]
    pixels, labels = data.search.take(chosen).to(device), data.search.labels[chosen].to(device)
    return Evidence(
        pixels, channels_last(data.normalise(pixels)), labels, teacher(pixels), teacher, data, supernet=supernet
    )


def scores_of(supernet: Supernet, codes: Sequence[str], evidence: Evidence, kind: str) -> dict[str, Any]:
    """Every score of every network by name, a list each; of the `family` teacher its own alone."""
    names = (*(SCORERS if kind == "outside" else ()), *BY_TEACHER)
    networks = [supernet.space.parse(code) for code in codes]
    scorers = [parse_spec("kdnas.scorers", name).build() for name in names]
    columns = dict(zip(names, score_by_all(supernet, networks, scorers, evidence), strict=True))
    table = {name: [score.value for score in column] for name, column in columns.items()}
    if kind == "outside":
        table["nwot"] = [score.parts["Nwot"] for score in columns[SCORERS[4]]]
        stages = [*_stages(columns[BY_LARGEST["rdm"]]), *_stages(columns[BY_LARGEST["cka"]])]
        table["similarities"] = np.column_stack([*stages, table[BY_LARGEST["loss"]]]).tolist()
    for name in ("rdm", "cka"):
        stages = list(_stages(columns[name]))
        for place, values in enumerate(stages):
            title = "logits" if place == len(stages) - 1 else f"stage {place + 1}"
            table[f"{name}, {title}"] = values
    return table


def _stages(scores: Sequence[Score]) -> Iterator[list[float]]:
    for name in (name for name in scores[0].parts if name.startswith("teacher_stage_")):
        yield [score.parts[name] for score in scores]


def ranks(*scores: Sequence[float]) -> np.ndarray:
    """The mean of the networks' ranks under several scores."""
    from scipy.stats import rankdata

    return np.mean([rankdata(values) for values in scores], 0)


def all_scores(table: Mapping[str, Any], rows: Sequence[BenchmarkRow], kind: str) -> dict[str, np.ndarray]:
    """What a supernet's rows are about: the scores, means of their ranks, and sizes."""
    scores = {name: np.array(values, float) for name, values in table.items() if name != "similarities"}
    if kind == "outside":
        rdm, cka, kl = (scores[name] for name in BY_LARGEST.values())
        sizes = {
            name: np.array([getattr(row, name) for row in rows], float) for name in ("macs", "params", "non_minimal")
        }
        scores |= {
            "ranks: KL to the largest + nwot": ranks(kl, scores["nwot"]),
            "ranks: in_place + nwot": ranks(rdm, scores["nwot"]),
            "ranks: in_place + KL to the largest + nwot": ranks(rdm, kl, scores["nwot"]),
            "ranks: KL to the largest + nwot + CKA + params": ranks(kl, scores["nwot"], cka, sizes["params"]),
            "ranks: outside loss + in_place": ranks(scores["loss"], rdm),
            "ranks: outside loss + KL to the largest + nwot": ranks(scores["loss"], kl, scores["nwot"]),
            **sizes,
        }
    return scores


def statistics_of(score: np.ndarray, rows: Sequence[BenchmarkRow]) -> Row:
    """Tau, points lost and precision of a score."""
    truths = np.array([row.truth for row in rows])
    macs = np.array([row.macs for row in rows], float)
    lost = [float(points_lost(score, truths, macs, bound, TRAINED)) for bound in np.quantile(macs, BUDGETS)]
    top = float(precision_at_top(score, truths, 0.1))
    return {"tau": kendall(score, truths), **dict(zip(LOST, lost, strict=True)), "top_tenth": top}


def random_five(rows: Sequence[BenchmarkRow]) -> Row:
    """The points lost by five random networks: exact means."""
    return statistics_of(np.zeros(len(rows)), rows) | {"tau": 0.0}


def predicted(
    space: SearchSpace, rows: Sequence[BenchmarkRow], table: Mapping[str, Any]
) -> Iterator[tuple[str, int, Row]]:
    """What results of trainings add: means over the draws, by features and number."""
    networks = [row.architecture for row in rows]
    size = np.array([[np.log(row.macs), np.log(row.params), row.non_minimal] for row in rows])
    chosen, alike = features.choices(space, networks), np.array(table["similarities"])
    prior = ("KL to the largest + nwot", np.array(table[SCORERS[4]]))
    known = {
        "choices + size": Features.of(chosen, size),
        "size + similarity": Features.of(size, alike),
        "choices + size + similarity": Features.of(chosen, size, alike),
    }
    scores = {name: None if "similarity" not in name else prior for name in known}
    truths = np.array([row.truth for row in rows]) / 100
    whole = Table(rows, truths, known, scores)
    for name in known:
        for number in NUMBERS:
            draws = [measured(whole, name, number, draw) for draw in range(DRAWS)]
            names = ("tau", *LOST, "top_tenth", "covered")
            yield name, number, {n: float(np.mean([draw[n] for draw in draws])) for n in names}


def rows_of(part: Part, options: argparse.Namespace, data: Data, teachers: Mapping[str, Teacher]) -> Iterator[Row]:
    """Train a supernet, score the table, and measure."""
    place = options.out / f"{part.name}.safetensors"
    supernet, facts = train_supernet(part, data, teachers["outside"], place)
    rows = table_rows(part.space, options.tables)
    facts |= {"space": part.space, "way": part.way, "seed": part.seed}
    facts |= {"networks": len(rows), "torch": torch.__version__}
    facts["supernet_accuracy"] = accuracy(supernet.extract(supernet.space.largest), data.search, data)
    for kind, teacher in teachers.items():
        stored = place.with_name(f"{place.stem}-{kind}.json")
        if not stored.exists():
            began = time.process_time()
            codes = [load_space(part.space).code(row.architecture) for row in rows]  # widths may be divided
            table = scores_of(supernet, codes, evidence_of(supernet, data, teacher), kind)
            write_json(stored, {"scores": table, "seconds": time.process_time() - began})
        content = json.loads(stored.read_text())
        table = content["scores"]
        shared = facts | {"teacher": kind, "score_seconds": content["seconds"], "trainings": 0}
        for name, values in all_scores(table, rows, kind).items():
            yield shared | {"score": name} | statistics_of(values, rows)
        if kind == "outside":
            yield shared | {"score": "random"} | random_five(rows)
            for name, number, means in predicted(load_space(part.space), rows, table):
                yield shared | {"score": name, "trainings": number} | means


def parts(options: argparse.Namespace) -> list[Part]:
    """The supernets, in the order of training: a seed of everything first."""
    ways = {name: tuple(WAYS) if name == "nas_bench_macro" else ("labels",) for name in STEPS}
    rest = {name: tuple(way for way in WAYS if way not in ways[name]) for name in STEPS}
    order = [
        Part(space, way, seed, options.full)
        for listed in (ways, rest)
        for seed in options.seeds
        for space, own in listed.items()
        for way in own
    ]
    return [part for part in order if part.space in options.space and part.way in options.way]


def text(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10: the folder of binary files, or an .npz of JPEG bytes")
    parser.add_argument("--tables", type=Path, help="the folder of the public rows")
    parser.add_argument("--out", type=Path, help="a folder for images, teachers and supernets")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--space", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which (default: 0 1 2)")
    parser.add_argument("--full", type=int, default=0, metavar="STEPS", help="at the published size, for a GPU")
    parser.add_argument("--limit", type=int, default=0, help="stop after so many supernets; 0 for all")
    parser.add_argument("--table", action="store_true", help="train nothing, print the tables and the aims")
    parser.add_argument("--picture", type=Path, help="with --table: write the picture, an SVG file")
    options = parser.parse_args()
    if options.table:
        print("\n".join(report(rows_in(options.rows))))
        if options.picture:
            options.picture.write_text(picture(rows_in(options.rows)), encoding="utf-8")
        return
    if options.data is None or options.tables is None or options.out is None:
        parser.error("--data, --tables and --out are needed to train")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    with open_rows(options.rows, COLUMNS) as handle:
        data = cifar(options.data, IMAGE_SIZE, options.out / f"cifar10-{IMAGE_SIZE}.safetensors")
        outside, words = teacher_of(data, options.out)
        if options.full:
            data = cifar(options.data, FULL_SIZE, options.out / f"cifar10-{FULL_SIZE}.safetensors")
            outside = outside.to(default_device())
        print(f"teacher: {words['test_accuracy']:.2%} of test", flush=True)
        written = {(row["space"], row["way"], int(row["seed"]), row["teacher"]) for row in rows_in(options.rows)}
        left = [part for part in parts(options) if (*part[:3], "outside") not in written][: options.limit or None]
        for part in left:
            with repeatable(default_device()):
                rows = [*rows_of(part, options, data, {"outside": outside})]
            for row in rows:
                append(handle, COLUMNS, {name: text(row.get(name, "")) for name in COLUMNS})
            print(f"{part} is in {options.rows}", flush=True)


if __name__ == "__main__":
    main()
