"""The tables, the aims and the picture of `ranking_proof.py`, from its rows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]

DEFAULT = "rank_ensemble,members=in_place,scorer=loss+nwot,num_reference=100"
SHOWN = {
    DEFAULT: "**KL to the largest + nwot (the default)**",
    "in_place,scorer=loss": "KL to the largest",
    "in_place": "RDM to the largest",
    "in_place,scorer=cka": "CKA to the largest",
    "rank_ensemble": "RDM to the largest + depth",
    "ranks: in_place + KL to the largest + nwot": "RDM + KL to the largest + nwot",
    "ranks: KL to the largest + nwot + CKA + params": "KL + CKA to the largest + nwot + params",
    "nwot": "nwot",
    "zen": "zen",
    "accuracy": "accuracy",
    "loss": "KL to the outside teacher",
    "rdm": "RDM to the outside teacher",
    "cka": "CKA to the outside teacher",
    "ranks: outside loss + in_place": "KL to the outside teacher + RDM to the largest",
    "ranks: outside loss + KL to the largest + nwot": "KL to the outside teacher + KL to the largest + nwot",
    "macs": "MACs",
    "params": "params",
    "non_minimal": "choices above the smallest",
    "random": "five random networks",
}
MEASURES = ("tau", "lost_q25", "lost_q50", "lost_q75", "lost_q100", "top_tenth")
TITLES = ("tau", "a quarter", "half", "three quarters", "all", "of the best tenth")
LOST = MEASURES[1:5]
BEST = "choices + size + similarity"


def mean_with_interval(values: Sequence[float], digits: int = 2) -> str:
    """The mean over supernets, and from two on its 95 % interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    from scipy.stats import t

    reach = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:.{digits}f} [{mean - reach:.{digits}f}, {mean + reach:.{digits}f}]"


def of(rows: Sequence[Row], **values: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in values.items())]


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Both tables per space and way, and the aims."""
    for space, way in dict.fromkeys((row["space"], row["way"]) for row in rows):
        own = of(rows, space=space, way=way)
        seeds = sorted({row["seed"] for row in own})
        seconds = np.mean([float(row["train_seconds"]) for row in own])
        yield (
            f"**{space}, {way}**: seeds {', '.join(seeds)}; {own[0]['steps']} steps of {own[0]['batch_size']} images, "
            f"{seconds:.0f} s each; {own[0]['networks']} networks"
        )
        yield from [
            "",
            *_table("score", ((words, of(own, score=name, trainings=0)) for name, words in SHOWN.items())),
            "",
        ]
        kinds = dict.fromkeys((row["score"], row["trainings"]) for row in own if row["trainings"] != "0")
        named = ((f"{number} trainings, {name}", of(own, score=name, trainings=number)) for name, number in kinds)
        yield from [*_table("results of trainings", named, "in the 90 % interval"), ""]
    yield from aims(rows)


def _table(title: str, named: Any, last: str = "") -> Iterator[str]:
    titles = (title, *TITLES, *([last] if last else []))
    yield "| " + " | ".join(titles) + " |"
    yield "| --- " * len(titles) + "|"
    for words, own in named:
        if own:
            columns = [*MEASURES, *(["covered"] if last else [])]
            cells = (mean_with_interval([float(row[name]) for row in own]) for name in columns)
            yield f"| {words} | " + " | ".join(cells) + " |"


class Aim(NamedTuple):
    """What was aimed at: a bound on a column's mean over seeds; `lost` is the budget in which most is lost."""

    words: str
    space: str
    score: str
    trainings: int
    column: str
    bound: float


AIMS = (
    Aim("points lost by five finalists, worst budget", "nas_bench_macro", DEFAULT, 0, "lost", 0.15),
    Aim("tau without trainings", "nas_bench_macro", DEFAULT, 0, "tau", 0.82),
    Aim("tau with 20 trainings", "nas_bench_macro", BEST, 20, "tau", 0.85),
    Aim("tau with 50 trainings", "nas_bench_macro", BEST, 50, "tau", 0.89),
    Aim("of the best tenth with 50", "nas_bench_macro", BEST, 50, "top_tenth", 0.75),
    Aim("tau without trainings", "nas_bench_201", DEFAULT, 0, "tau", 0.74),
    Aim("tau with 20 trainings", "nas_bench_201", BEST, 20, "tau", 0.75),
    Aim("tau with 100 trainings", "nas_bench_201", BEST, 100, "tau", 0.80),
)


def aims(rows: Sequence[Row]) -> Iterator[str]:
    """Every aim beside what was measured, by way of training."""
    yield from ("| aim | space | way | bound | measured | |", "| --- " * 6 + "|")
    for aim in AIMS:
        ways = dict.fromkeys(row["way"] for row in of(rows, space=aim.space))
        for way in ways or ["labels"]:
            own = of(rows, space=aim.space, way=way, score=aim.score, trainings=aim.trainings)
            is_loss = aim.column == "lost"
            columns = {n: [float(row[n]) for row in own] for n in (LOST if is_loss else (aim.column,))}
            if own:
                values = max(columns.values(), key=np.mean)
                good = np.mean(values) <= aim.bound if is_loss else np.mean(values) >= aim.bound
                cells = (mean_with_interval(values, 3), "met" if good else "**missed**")
            else:
                cells = ("", "not measured")
            sign = "at most" if is_loss else "at least"
            yield f"| {aim.words} | {aim.space} | {way} | {sign} {aim.bound:g} | " + " | ".join(cells) + " |"


def picture(rows: Sequence[Row]) -> str:
    """Points lost by five finalists within each budget, a dot per supernet, for the scores that matter: an SVG."""
    names = [DEFAULT, "in_place", "loss", "rdm", "accuracy", "macs", "random"]
    own = [row for row in of(rows, space="nas_bench_macro", trainings=0) if row["score"] in names]
    most = max([1.0, *(float(row[name]) for row in own for name in LOST)])
    left, top, width, height, gap = 300, 40, 110, 22, 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 4 * (width + gap)}" '
        f'height="{top + height * len(names) + 20}" font-family="sans-serif" font-size="12">'
    ]
    for column, title in enumerate(TITLES[1:5]):
        x = left + column * (width + gap)
        parts.append(f'<text x="{x}" y="20">{title} of the MACs</text>')
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top - 10}" y2="{top + height * len(names)}" stroke="#888"/>')
    for line, name in enumerate(names):
        y = top + height * line + 8
        parts.append(f'<text x="0" y="{y + 4}">{SHOWN[name].replace("*", "")}</text>')
        for row in of(own, score=name):
            for column, measure in enumerate(LOST):
                x = left + column * (width + gap) + width * float(row[measure]) / most
                words = f"{row['way']}, seed {row['seed']}: {float(row[measure]):.2f} points"
                mark = f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="#356" fill-opacity="0.5">'
                parts.append(f"{mark}<title>{words}</title></circle>")
    parts.append(
        f'<text x="{left}" y="{top + height * len(names) + 14}">0 to {most:.1f} points of accuracy lost</text></svg>'
    )
    return "\n".join(parts) + "\n"
