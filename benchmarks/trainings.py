"""What a few results of trainings tell about the other networks of a table: the predictor on published accuracies.

    python benchmarks/trainings.py --data FOLDER [--draws 50] [--spaces NAME ...] [--table]

FOLDER holds the public rows of the benchmarks (`nas_bench_macro_public.csv` and the like). N rows are drawn, the
predictor of `kdnas search --trainings` is fitted to their accuracies, and the other networks (at most 1,000) are
predicted. A line per draw is appended to `benchmarks/trainings.csv`, and the same command goes on where it was stopped;
`--table` prints the means over the draws with their 95 % bootstrap intervals.

Choices and size need no supernet; `ranking_proof.py` adds similarities to the largest subnet of one.
"""

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdnas import load_space
from kdnas.ranking.quality import BenchmarkRow, canonical_rows, read_table
from kdnas.scorers import _features as features
from kdnas.scorers._features import Features
from kdnas.scorers._predictor import fit
from kdnas.statistics import interval, kendall, points_lost, precision_at_top, resampled_mean

TABLES = {
    "nas_bench_macro": "mean_acc",
    "nas_bench_201": "cifar10_test",
    "channel_bench_macro_mobilenet": "mean_acc",
    "channel_bench_macro_resnet": "mean_acc",
}
ROWS = Path(__file__).with_name("trainings.csv")
NUMBERS = (10, 20, 50, 100)
DRAWS = 50
_COLOURS = ("#1b5e9b", "#b5541c", "#2b7a3d", "#7b3f94")
BUDGETS = (0.25, 0.5, 0.75, 1.0)
MEASURES = ("tau", "score_tau", "covered", "top_tenth", "lost_of_five", "falls_back")
NAMES = ("space", "features", "score", "trainings", "draw", *MEASURES, "seconds")


class Table(NamedTuple):
    """A benchmark's networks.

    Attributes:
        rows: one per distinct network.
        accuracy: in [0, 1], `[networks]`.
        features: by name.
        scores: prior scores by the name of the features; None for none.
    """

    rows: Sequence[BenchmarkRow]
    accuracy: np.ndarray
    features: dict[str, Features]
    scores: dict[str, tuple[str, np.ndarray] | None]


def read(name: str, folder: Path) -> Table:
    """The public rows of a benchmark, with what is known of the networks before any is trained."""
    space = load_space(name)
    listed = read_table(folder / f"{name}_public.csv", space, TABLES[name])
    rows = [listed[i] for i in canonical_rows(listed)]
    networks = [row.architecture for row in rows]
    chosen = features.choices(space, networks)
    size = np.array([[np.log(row.macs), np.log(row.params), row.non_minimal] for row in rows])
    known = {"choices + size": Features.of(chosen, size)}
    scores: dict[str, tuple[str, np.ndarray] | None] = {"choices + size": None}
    known["choices + size, on the count"] = known["choices + size"]
    scores["choices + size, on the count"] = ("choices above their smallest option", size[:, 2])
    return Table(rows, np.array([row.truth for row in rows]) / 100, known, scores)


def measured(table: Table, name: str, trainings: int, draw: int) -> dict[str, Any]:
    """What the predictor says of the other networks after so many drawn results."""
    order = np.random.default_rng((trainings, draw)).permutation(len(table.rows))
    drawn, others = order[:trainings], order[trainings:][:1000]
    known, prior = table.features[name], table.scores[name]
    score = None if prior is None else prior[1]
    began = time.perf_counter()
    predictor = fit(
        known.values[drawn],
        table.accuracy[drawn],
        "gaussian_process",
        groups=known.groups,
        score=None if score is None else score[drawn],
        unit="accuracy",
    )
    beliefs = predictor.believe(known.values[others], None if score is None else score[others])
    truth = table.accuracy[others]
    macs = np.array([table.rows[i].macs for i in others], float)
    lost = [100 * float(points_lost(beliefs.mean, truth, macs, q, 5)) for q in np.quantile(macs, BUDGETS)]
    return {
        "tau": kendall(beliefs.mean, truth),
        "score_tau": "" if score is None else kendall(score[others], truth),
        "covered": np.mean((beliefs.low <= truth) & (truth <= beliefs.high)),
        "top_tenth": float(precision_at_top(beliefs.mean, truth, 0.1)),
        "lost_of_five": lost[-1],
        **{f"lost_q{round(100 * share)}": value for share, value in zip(BUDGETS, lost, strict=True)},
        "falls_back": int(predictor.falls_back),
        "seconds": round(time.perf_counter() - began, 3),
    }


def run_missing(options: argparse.Namespace) -> None:
    """Append what is not measured yet."""
    done = {tuple(row[name] for name in NAMES[:5]) for row in read_rows(options.rows)}
    for space in options.spaces:
        table = read(space, options.data)
        for name in table.features:
            score = (table.scores[name] or ("",))[0]
            for trainings in NUMBERS:
                for draw in range(options.draws):
                    key = (space, name, score, str(trainings), str(draw))
                    if key not in done:
                        append(
                            options.rows, dict(zip(NAMES, key, strict=False)) | measured(table, name, trainings, draw)
                        )
            print(f"{space}, {name}", flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, NAMES, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({name: f"{v:.4f}" if isinstance(v := row[name], float) else v for name in NAMES})


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def table_lines(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Means over the draws, with their 95 % intervals, as a Markdown table."""
    names = (
        "tau",
        "tau of the score alone",
        "in the 90 % interval",
        "of the best tenth",
        "points lost by the best five",
    )
    yield "| " + " | ".join(("space", "known of each network", "N", *names)) + " |"
    yield "| --- " * 8 + "|"
    cells: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["space"], row["features"], row["trainings"]), []).append(row)
    for (space, name, trainings), own in cells.items():
        columns = [np.array([float(row[m]) for row in own]) if own[0][m] else None for m in MEASURES[:5]]
        texts = ["" if column is None else f"{column.mean():.3f}" for column in columns]
        low, high = interval(resampled_mean, columns[0])
        texts[0] += f" [{low:.3f}, {high:.3f}]"
        yield "| " + " | ".join((space, name, trainings, *texts)) + " |"


def summary(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Mean tau and the share of the predicted best tenth that is truly there, a row per space: the README's table."""
    yield "| space | " + " | ".join(f"{n} trainings" for n in NUMBERS) + " | of the best tenth, with 50 |"
    yield "| --- " * (2 + len(NUMBERS)) + "|"
    for space, means in _means(rows, "tau").items():
        cells = (f"{means[n]:.2f}" for n in NUMBERS)
        yield f"| {space} | " + " | ".join(cells) + f" | {_means(rows, 'top_tenth')[space][50]:.2f} |"


def _means(rows: Sequence[dict[str, str]], measure: str) -> dict[str, dict[int, float]]:
    """Means over the draws by space and number of trainings, of choices and size without a prior score."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["features"] == "choices + size":
            values.setdefault(row["space"], {}).setdefault(int(row["trainings"]), []).append(float(row[measure]))
    return {space: {n: float(np.mean(v)) for n, v in own.items()} for space, own in values.items()}


def picture(rows: Sequence[dict[str, str]]) -> str:
    """The taus of `summary` over the number of trainings, a line per space, as SVG."""
    width, height, left, bottom = 640, 300, 50, 260
    place = lambda n, tau: (left + 150 * np.log(n / 10), bottom - 240 * tau)  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="{height - 6}">trainings, a logarithmic scale; upwards: tau with the truth</text>',
    ]
    for n in NUMBERS:
        parts.append(f'<text x="{place(n, 0)[0]:.0f}" y="{bottom + 18}" text-anchor="middle">{n}</text>')
    for tau in (0.0, 0.5, 1.0):
        y = place(10, tau)[1]
        parts.append(f'<line x1="{left}" x2="{left + 360}" y1="{y}" y2="{y}" stroke="#bbb"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tau:g}</text>')
    above = 0.0  # the label before: two are at least 15 pixels apart
    lines = sorted(_means(rows, "tau").items(), key=lambda line: -line[1][NUMBERS[-1]])
    for colour, (space, means) in zip(_COLOURS, lines, strict=True):
        points = [place(n, means[n]) for n in NUMBERS]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        above = max(points[-1][1] + 4, above + 15)
        parts.append(f'<text x="{points[-1][0] + 8:.1f}" y="{above:.1f}" fill="{colour}">{space}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Measure what is not measured yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of the public rows")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--spaces", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--table", action="store_true", help="print the rows that there are")
    parser.add_argument("--picture", type=Path, help="with --table: write the picture, an SVG file")
    options = parser.parse_args()
    if not options.table:
        if options.data is None or not options.data.is_dir():
            raise SystemExit("--data must be the folder of the public rows")
        run_missing(options)
    rows = read_rows(options.rows)
    print("\n".join([*table_lines(rows), "", *summary(rows)]))
    if options.picture:
        options.picture.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
