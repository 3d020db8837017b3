"""Searchers on the public rows of NAS-Bench-Macro, the true accuracy as the score.

    KDNAS_DATA=FOLDER python benchmarks/searchers.py [--evaluations 100] [--seeds 20] [--macs 60e6] [--searcher NAME]

FOLDER holds nas_bench_macro_public.csv. A searcher may ask for the networks of the table and for no others. Printed
per searcher: the median, over the seeds, of the rank of the best network found (1 is the best of the table), its
quartiles, the share of seeds that find a network of the best ten, and the median, over the seeds, of the area under the
best accuracy within a MACs budget, over all budgets, as a share of the whole table's: 100 % is the whole front.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from kdnas import load_space
from kdnas.architecture import Architecture
from kdnas.ranking.quality import BenchmarkRow, canonical_rows, read_table
from kdnas.runs.entry import Entry
from kdnas.searchers import Searcher
from kdnas.space import SearchSpace
from kdnas.specs import Spec, find_spec

SEARCHERS = {
    "random_search": find_spec("kdnas.searchers", "random_search"),
    "evolution": find_spec("kdnas.searchers", "evolution"),
    "nsga2": find_spec("kdnas.searchers", "nsga2"),
    "optuna tpe": find_spec("kdnas.searchers", "optuna_sampler"),
    "optuna nsgaii": find_spec("kdnas.searchers", "optuna_sampler", sampler="nsgaii"),
}


def evaluated(
    searcher_spec: Spec, space: SearchSpace, rows: dict[Architecture, BenchmarkRow], seed: int, evaluations: int
) -> list[BenchmarkRow]:
    searcher = searcher_spec.build(Searcher, space=space, admits=rows.__contains__, rng=random.Random(seed))
    networks: dict[Architecture, BenchmarkRow] = {}
    while len(networks) < evaluations:
        batch = searcher.ask(evaluations - len(networks))
        if not batch:
            break
        networks |= {a: rows[a] for a in batch}
        searcher.tell([_entry(rows[a]) for a in batch])
    return list(networks.values())


def area(rows: Iterable[BenchmarkRow], largest: int, worst: float) -> float:
    """Area under the best accuracy within a MACs budget, above the worst accuracy and up to the largest budget."""
    steps = sorted((row.macs, row.truth) for row in rows)
    best = itertools.accumulate((truth - worst for _, truth in steps), max)
    edges = [*(macs for macs, _ in steps), largest]
    return sum(b * (right - left) for b, (left, right) in zip(best, itertools.pairwise(edges), strict=True))


def _entry(row: BenchmarkRow) -> Entry:
    return Entry(row.architecture, row.code, row.truth, {}, row.params, row.macs, row.layers, 0.0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--evaluations", type=int, default=100)
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--macs", type=float, default=float("inf"), help="a budget")
    arguments.add_argument("--searcher", action="append", choices=SEARCHERS, help="repeatable; all of them by default")
    options = arguments.parse_args()
    if "KDNAS_DATA" not in os.environ:
        raise SystemExit("set KDNAS_DATA to the folder that holds nas_bench_macro_public.csv")
    space = load_space("nas_bench_macro")
    table = read_table(Path(os.environ["KDNAS_DATA"]) / "nas_bench_macro_public.csv", space, "mean_acc")
    rows = {row.architecture: row for row in (table[i] for i in canonical_rows(table)) if row.macs <= options.macs}
    truths = [row.truth for row in rows.values()]
    ends = max(row.macs for row in rows.values()), min(truths)
    print(f"{len(rows):,} networks, {options.evaluations} unique evaluations, {options.seeds} seeds")
    print(f"{'searcher':<16}{'median rank':>12}{'quartiles':>14}{'in best 10':>12}{'front':>9}{'s per search':>14}")
    for name, searcher_spec in ((name, SEARCHERS[name]) for name in options.searcher or SEARCHERS):
        began = time.perf_counter()
        searches = [evaluated(searcher_spec, space, rows, seed, options.evaluations) for seed in range(options.seeds)]
        each = (time.perf_counter() - began) / options.seeds
        ranks = [1 + sum(truth > max(row.truth for row in search) for truth in truths) for search in searches]
        low, middle, high = statistics.quantiles(ranks, n=4, method="inclusive")
        top = sum(r <= 10 for r in ranks) / len(ranks)
        front = statistics.median(area(search, *ends) for search in searches) / area(rows.values(), *ends)
        print(
            f"{name:<16}{middle:>12.1f}{f'{low:.0f} to {high:.0f}':>14}{top:>12.0%}{front:>9.1%}{each:>14.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
