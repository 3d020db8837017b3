"""Searchers on the public rows of NAS-Bench-Macro, the true accuracy as the score.

    KDNAS_DATA=FOLDER python benchmarks/searchers.py [--evaluations 100] [--seeds 20] [--macs 60e6] [--searcher NAME]

FOLDER holds nas_bench_macro_public.csv. A searcher may ask for the networks of the table and for no others. Printed
per searcher: the median, over the seeds, of the rank of the best network found (1 is the best of the table), its
quartiles, and the share of seeds that find a network of the best ten.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path

from kdnas.architecture import Architecture
from kdnas.ranking.quality import Row, canonical_rows, read_table
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.specs import Spec, named
from kdnas.tables import load_space

SEARCHERS = {
    "random_search": named("kdnas.searchers", "random_search"),
    "evolution": named("kdnas.searchers", "evolution"),
    "nsga2": named("kdnas.searchers", "nsga2"),
    "optuna tpe": named("kdnas.searchers", "optuna_sampler"),
    "optuna nsgaii": named("kdnas.searchers", "optuna_sampler", sampler="nsgaii"),
}


def best_rank(made: Spec, space: SearchSpace, rows: dict[Architecture, Row], seed: int, evaluations: int) -> int:
    searcher = made.build(Searcher, space=space, admits=rows.__contains__, rng=random.Random(seed))
    found: set[Architecture] = set()
    while len(found) < evaluations:
        asked = searcher.ask(evaluations - len(found))
        if not asked:
            break
        found.update(asked)
        searcher.tell([_entry(rows[a]) for a in asked])
    best = max(rows[a].truth for a in found)
    return 1 + sum(row.truth > best for row in rows.values())


def _entry(row: Row) -> Entry:
    return Entry(row.architecture, row.code, row.truth, {}, row.params, row.macs, row.layers, 0.0)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--evaluations", type=int, default=100)
    asked.add_argument("--seeds", type=int, default=20)
    asked.add_argument("--macs", type=float, default=float("inf"), help="a budget")
    asked.add_argument("--searcher", action="append", choices=SEARCHERS, help="repeatable; all of them by default")
    given = asked.parse_args()
    if "KDNAS_DATA" not in os.environ:
        raise SystemExit("set KDNAS_DATA to the folder that holds nas_bench_macro_public.csv")
    space = load_space("nas_bench_macro")
    table = read_table(Path(os.environ["KDNAS_DATA"]) / "nas_bench_macro_public.csv", space, "mean_acc")
    held = (table[i] for i in canonical_rows(table))
    rows = {row.architecture: row for row in held if row.macs <= given.macs}
    print(f"{len(rows):,} networks, {given.evaluations} unique evaluations, {given.seeds} seeds")
    print(f"{'searcher':<16}{'median rank':>12}{'quartiles':>14}{'in best 10':>12}{'s per search':>14}")
    for name, made in ((name, SEARCHERS[name]) for name in given.searcher or SEARCHERS):
        began = time.perf_counter()
        ranks = [best_rank(made, space, rows, seed, given.evaluations) for seed in range(given.seeds)]
        low, middle, high = statistics.quantiles(ranks, n=4, method="inclusive")
        top, each = sum(r <= 10 for r in ranks) / len(ranks), (time.perf_counter() - began) / given.seeds
        print(f"{name:<16}{middle:>12.1f}{f'{low:.0f} to {high:.0f}':>14}{top:>12.0%}{each:>14.2f}", flush=True)


if __name__ == "__main__":
    main()
