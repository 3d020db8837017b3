"""How good are the widths that scale factors find? Ranked among trained networks of equal MACs.

    KDNAS_CIFAR10=PATH KDNAS_DATA=FOLDER python benchmarks/channel_widths.py --out FOLDER [--space resnet] [--seeds 2]

PATH is CIFAR-10 (see `kdnas.data.cifar.cifar10`), FOLDER holds the public rows of Channel-Bench-Macro: widths of seven
layers, each a quarter, a half, three quarters or all of its full width, trained with three seeds.

A copy of the benchmark's largest network, all widths divided, is trained on labels; it is teacher and source. For each
budget (a share of its MACs) factors are trained under it from its weights as published, groups not normalised, without
removing blocks, which the benchmark does not. What is kept of each width is a share; of the benchmark's rows within 3 %
of the same share of the full network's MACs the one of the nearest shares (Euclidean) is looked up.

Reported is its percentile: the share of the rows in that band whose accuracy is lower (ties count half). Random widths
are the band itself: 50 on average. Controls, looked up alike: equal shares everywhere, factors whose penalty does not
know the costs, and the row of the band with most parameters. A finished training is kept in --out.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdnas import Budget, Recipe, load_space
from kdnas.conversion.convert import convert
from kdnas.conversion.scale_factors import Factors
from kdnas.costs.count import cost
from kdnas.data import Data, cifar10
from kdnas.distillers import FromLabels
from kdnas.evaluation import accuracy
from kdnas.jobs.convert import Plain
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.ranking.quality import BenchmarkRow, read_table
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import write_json
from kdnas.runs.progress import progress
from kdnas.space import SearchSpace
from kdnas.spaces import Channels
from kdnas.teachers import Frozen
from kdnas.training.loop import Training

BAND = 0.03


def divided(space: Channels, by: int) -> Channels:
    """The same space with all full widths divided."""
    stages = tuple(
        dataclasses.replace(stage, hidden=tuple(h // by for h in stage.hidden), width=stage.width // by)
        for stage in space.stages
    )
    return dataclasses.replace(
        space, stem_width=space.stem_width // by, stages=stages, head_width=space.head_width // by
    )


def run_all_steps(training: Training, name: str) -> None:
    """Every step."""
    with progress(name, training.recipe.steps) as bar:
        while not training.done:
            losses = training.step()
            bar.update(training.index, ", ".join(f"{n} {v:.3f}" for n, v in losses.items()))


def teacher_of(space: SearchSpace, data: Data, recipe: Recipe, place: Path) -> Network:
    """The largest network, trained on labels; read back where it was trained before."""
    network = initialised(lambda: Network(space.blueprint(space.largest)), recipe.seed)
    if place.exists():
        network.load_state_dict(load_state(place))
    else:
        run_all_steps(Training(network, FromLabels(), data, None, recipe), place.stem)
        save_state(place, dict(network.state_dict()))
    return network.eval()


def shares_of(
    network: Network, data: Data, recipe: Recipe, budget: float, by_cost: bool
) -> tuple[list[float], dict[str, float]]:
    """What is kept of each width, in the order of execution, and what became of the network."""
    conversion = convert(Plain(network), image=data.image)
    student = conversion.supernet.extract(conversion.space.largest)
    whole = cost(student.blueprint).macs
    bound = Budget(macs=budget * whole)
    factors = Factors(conversion.space, budget=bound, by_cost=by_cost, blocks=False, normalised=False)
    training = Training(student, factors, data, Frozen(network, preprocessing=data.preprocessing), recipe)
    run_all_steps(training, f"factors {budget:g}")
    channels = factors.within(bound)
    small = factors.removed(student.eval(), channels).eval()
    facts = {"accuracy": accuracy(small, data.search, data), "share": cost(small.blueprint).macs / whole}
    facts |= {"met": float(factors.met)}
    return [float(channels[unit.key].float().mean()) for unit in factors.units], facts


def nearest(rows: list[BenchmarkRow], shares: list[float]) -> BenchmarkRow:
    """The row whose widths' shares are nearest."""
    return min(rows, key=lambda row: sum((int(d) / 4 - s) ** 2 for d, s in zip(row.code, shares, strict=True)))


def percentile(rows: list[BenchmarkRow], row: BenchmarkRow) -> float:
    """Per cent of the rows that are worse; ties count half."""
    truths = np.array([r.truth for r in rows])
    return float(100 * ((truths < row.truth).mean() + (truths == row.truth).mean() / 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="finished trainings")
    parser.add_argument("--space", choices=("resnet", "mobilenet"), default="resnet")
    parser.add_argument("--divide", type=int, default=8, help="all widths")
    parser.add_argument("--size", type=int, default=16, help="of the images")
    parser.add_argument("--teacher-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=800, help="with factors")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="with factors")
    parser.add_argument("--budget", type=float, action="append", help="share of the MACs; repeatable")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    for name in ("KDNAS_CIFAR10", "KDNAS_DATA"):
        if name not in os.environ:
            raise SystemExit(f"set {name}, see --help")
    full = load_space(f"channel_bench_macro_{options.space}")
    assert isinstance(full, Channels)
    table = read_table(Path(os.environ["KDNAS_DATA"], f"{full.name}_public.csv"), full, "mean_acc")
    most = cost(full.blueprint(full.largest)).macs
    data = cifar10(os.environ["KDNAS_CIFAR10"], size=options.size)
    space = dataclasses.replace(divided(full, options.divide), resolutions=(options.size,))
    options.out.mkdir(parents=True, exist_ok=True)
    settings = f"{options.space}-{options.divide}-{options.size}-{options.teacher_steps}"
    records: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        recipe = Recipe(steps=options.teacher_steps, batch_size=128, learning_rate=0.1, seed=seed)
        teacher = teacher_of(space, data, recipe, options.out / f"teacher-{settings}-{seed}.safetensors")
        print(f"seed {seed}: the teacher has {accuracy(teacher, data.search, data):.2%} of the search part", flush=True)
        for budget in options.budget or [0.25, 0.5]:
            rows = [row for row in table if abs(row.macs / (budget * most) - 1) <= BAND]
            for by_cost in (True, False):
                place = (
                    options.out
                    / f"{settings}-{options.steps}-{options.learning_rate:g}-{budget:g}-{by_cost}-{seed}.json"
                )
                if not place.exists():
                    began = time.perf_counter()
                    short = Recipe(steps=options.steps, batch_size=128, learning_rate=options.learning_rate, seed=seed)
                    shares, facts = shares_of(teacher, data, short, budget, by_cost)
                    write_json(place, {"shares": shares, **facts, "seconds": time.perf_counter() - began})
                record = json.loads(place.read_text())
                row = nearest(rows, record["shares"])
                records.append({"budget": budget, "name": "factors" if by_cost else "factors, costs unknown"})
                records[-1] |= {"percentile": percentile(rows, row), "code": row.code, "truth": row.truth, **record}
    report(records, table, most)


def report(records: list[dict[str, Any]], table: list[BenchmarkRow], most: int) -> None:
    """A Markdown table: per budget the factors of every seed, and the controls."""
    print("| MACs | widths | rows | percentile | nearest rows | their accuracy | shares kept, seed 0 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for budget in sorted({r["budget"] for r in records}):
        rows = [row for row in table if abs(row.macs / (budget * most) - 1) <= BAND]
        truths = [row.truth for row in rows]
        for name in ("factors", "factors, costs unknown"):
            mine = [r for r in records if r["budget"] == budget and r["name"] == name]
            places = ", ".join(f"{r['percentile']:.0f}" for r in mine)
            shares = " ".join(f"{s:.2f}" for s in mine[0]["shares"])
            mean = statistics.mean(r["percentile"] for r in mine)
            line = f"| {budget:g} | {name} | {len(rows)} | {mean:.0f} ({places}) "
            line += (
                f"| {', '.join(r['code'] for r in mine)} | {statistics.mean(r['truth'] for r in mine):.2f} | {shares} |"
            )
            print(line)
        equal = nearest(rows, [_equal(budget)] * len(rows[0].code))
        heavy = max(rows, key=lambda row: row.params)
        for name, row in (("equal shares", equal), ("most parameters", heavy)):
            print(
                f"| {budget:g} | {name} | {len(rows)} | {percentile(rows, row):.0f} | {row.code} | {row.truth:.2f} | |"
            )
        low, high = np.percentile(truths, [2.5, 97.5])
        print(
            f"| {budget:g} | random | {len(rows)} | 50 | | {statistics.mean(truths):.2f} [{low:.2f}, {high:.2f}], best "
            f"{max(truths):.2f} | |"
        )


def _equal(budget: float) -> float:
    """The share of every width that leaves this share of the MACs, which go with its square."""
    return float(np.sqrt(budget))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
