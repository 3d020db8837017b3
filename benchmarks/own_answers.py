"""What the rows of `own_students.py` answer so far.

    python benchmarks/own_answers.py [--rows FILE]

1. How far do the rankings under the teacher and on labels differ beyond noise? Kendall's tau of test accuracies between
   the two ways with different seeds, less that within a way between different seeds, over networks with every seed.
2. How much does distillation help at each cost? The difference of test accuracy, paired by network and seed, in thirds
   of the networks by MACs.
3. How many trainings does a rule need to come within 0.5 points of the best? Networks are taken in the order of a rule,
   chosen by search accuracy under the teacher with seed 0, and judged by test accuracy with the other seeds.

Intervals are 95 % percentile bootstraps over networks. An answer that needs more networks says so.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from common import Row, rows_in

from kdnas.statistics import interval, kendall, resampled_mean

LEAST = 8  # networks with every seed below which nothing is said of rankings
WITHIN = 0.5


def tables(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows by way and seed, then by code."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["way"], row["seed"]), {})[row["code"]] = row
    return found


def gains(rows: Sequence[Row]) -> Iterator[str]:
    """What distillation adds, in points, by thirds of the MACs."""
    own = tables(rows)
    macs = {row["code"]: int(row["macs"]) for row in rows}
    points: dict[str, list[float]] = {}
    for (way, seed), taught in own.items():
        for code, row in taught.items() if way == "teacher" else ():
            if code in own.get(("labels", seed), {}):
                other = own["labels", seed][code]
                gain = 100 * (float(row["test_accuracy"]) - float(other["test_accuracy"]))
                points.setdefault(code, []).append(gain)
    codes = sorted(points, key=macs.__getitem__)
    yield from ("| MACs | networks | points gained by the teacher |", "| --- | --- | --- |")
    for part in [codes, *(list(p) for p in np.array_split(np.array(codes), 3))]:
        values = np.array([np.mean(points[code]) for code in part])
        low, high = interval(resampled_mean, values)
        title = "all" if part is codes else f"{macs[part[0]]:,} to {macs[part[-1]]:,}"
        yield f"| {title} | {len(part)} | {values.mean():+.2f} [{low:+.2f}, {high:+.2f}] |"


def disagreement(rows: Sequence[Row]) -> str:
    """How far the two rankings differ beyond what two seeds of one way differ."""
    own = tables(rows)
    ways, seeds = sorted({way for way, _ in own}), sorted({seed for _, seed in own})
    codes = sorted(set.intersection(*(set(table) for table in own.values()))) if len(own) == 6 else []
    if len(codes) < LEAST:
        return f"Rankings: {len(codes)} networks have every seed both ways; {LEAST} are needed to say how they differ."
    accuracy = {key: np.array([float(table[code]["test_accuracy"]) for code in codes]) for key, table in own.items()}
    pairs = list(itertools.permutations(seeds, 2))

    def difference(places: np.ndarray) -> float:
        across = [kendall(accuracy[ways[0], a][places], accuracy[ways[1], b][places]) for a, b in pairs]
        within = [kendall(accuracy[w, a][places], accuracy[w, b][places]) for w in ways for a, b in pairs]
        return float(np.mean(across) - np.mean(within))

    rng = np.random.default_rng(0)
    draws = [difference(rng.integers(len(codes), size=len(codes))) for _ in range(500)]
    low, high = np.percentile(draws, (2.5, 97.5))
    value = difference(np.arange(len(codes)))
    verdict = "beyond noise" if high < 0 else "no more than noise"
    return (
        f"Rankings: tau between the ways less that within a way is {value:+.2f} [{low:+.2f}, {high:+.2f}] over "
        f"{len(codes)} networks: they differ by {verdict}."
    )


def needed(rows: Sequence[Row]) -> Iterator[str]:
    """Trainings that a rule needs to come near the best network."""
    own = tables(rows)
    seeds = [seed for way, seed in own if way == "teacher" and seed != "0"]
    first = own.get(("teacher", "0"), {})
    codes = [code for code in first if all(code in own["teacher", seed] for seed in seeds)] if seeds else []
    if len(codes) < LEAST:
        yield f"Rules: {len(codes)} networks under the teacher have every seed; {LEAST} are needed."
        return
    truth = {c: 100 * np.mean([float(own["teacher", s][c]["test_accuracy"]) for s in seeds]) for c in codes}
    labels = own.get(("labels", "0"), {})
    orders = {
        "the largest first": sorted(codes, key=lambda c: -int(first[c]["macs"])),
        "accuracy on labels first": sorted(codes, key=lambda c: -float(labels[c]["search_accuracy"])),
    }
    orders |= {f"random {k}": list(np.random.default_rng(k).permutation(codes)) for k in range(200)}
    counts = {name: _trainings(order, first, truth) for name, order in orders.items()}
    for name in list(counts)[:2]:
        yield f"Rules: {name} needs {counts[name]} trainings of {len(codes)} to come within {WITHIN} points."
    drawn = np.mean([count for name, count in counts.items() if name.startswith("random")])
    yield f"Rules: random orders need {drawn:.1f} in the mean."


def _trainings(order: Sequence[str], first: dict[str, Row], truth: dict[str, float]) -> int:
    for count in range(1, len(order) + 1):
        chosen = max(order[:count], key=lambda code: float(first[code]["search_accuracy"]))
        if max(truth.values()) - truth[chosen] <= WITHIN:
            return count
    return len(order)


def main() -> None:
    """Print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("own_students.csv"))
    rows = rows_in(parser.parse_args().rows)
    print("\n".join([f"{len(rows)} trainings", "", *gains(rows), "", disagreement(rows), *needed(rows)]))


if __name__ == "__main__":
    main()
