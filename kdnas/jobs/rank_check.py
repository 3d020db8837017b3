"""Rank correlation of a run's scores with a table of true accuracies."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdnas.jobs._run import Run
from kdnas.ranking.quality import CONTROLS, TRAINED, quality, read_table
from kdnas.scorers.base import LayerCount, score_by_all
from kdnas.specs import Spec


def rank_check(
    run: Run,
    table: Path,
    *,
    scorers: Mapping[str, Spec] | None = None,
    column: str = "mean_acc",
    num_images: int | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every row of a table with the run's supernet and measure the ranking.

    Every distinct network is scored once; networks and output scorers share prefixes.

    Args:
        run: a run with a trained supernet.
        table: a CSV file with codes of the run's space and true accuracies.
        scorers: specs by name; by default the scorer of the run's search.
        column: the column of true accuracies.
        num_images: search images; by default as many as the run's search uses.
        resamples: resamples of the bootstrap.
        seed: of the images and the bootstrap.

    Returns:
        The values of `quality`, and `table`, `column`, `rows`, `canonical`, `images`, `scorers`, `seconds` and the
        layer evaluations `saved`, all JSON-able.

    Raises:
        ValueError: as in `read_table`; a scorer has a control's name; the supernet is not trained; a score is not
            finite.
    """
    rows = read_table(table, run.space, column)
    settings = run.experiment.search
    if scorers is None:
        scorers = {settings.scorer.name: settings.scorer}
    for name in scorers:
        if name in CONTROLS:
            raise ValueError(f"scorer {name!r} is a control, which is always measured. Remove it from the scorers.")
    built = {name: run.scorer(scorer_spec) for name, scorer_spec in scorers.items()}
    evidence = run.evidence(settings.num_images if num_images is None else num_images, seed)
    networks = list(dict.fromkeys(row.architecture for row in rows))
    began, layer_count = time.perf_counter(), LayerCount()
    scores: dict[str, list[float]] = {}
    columns = score_by_all(run.supernet, networks, list(built.values()), evidence, layer_count)
    for name, scored in zip(built, columns, strict=True):
        by_network = dict(zip(networks, scored, strict=True))
        scores[name] = [by_network[row.architecture].value for row in rows]
    return {
        "table": str(table),
        "column": column,
        "rows": len(rows),
        "canonical": len(networks),
        "images": len(evidence.labels),
        "scorers": list(built),
        "seconds": round(time.perf_counter() - began, 3),
        "saved": str(layer_count),
        **quality(scores, rows, resamples=resamples, seed=seed),
    }


def rank_check_table(checked: Mapping[str, Any]) -> str:
    """What `rank_check` returns as tables: points lost by the best, correlations, precision and regret."""
    names = [*checked["scorers"], *CONTROLS]
    lines = [
        f"{checked['table']}, {checked['column']}: {checked['rows']:,} rows, {checked['canonical']:,} networks, "
        f"{checked['images']:,} images",
        f"{checked['seconds']:.1f} s, {checked['saved']}",
    ]
    canonical = checked["groups"].get("canonical", checked["groups"]["all"])["scores"]
    lines += [
        "",
        f"points lost where the {TRAINED} best-scored within a MACs budget are trained and the best is kept",
        _header("distinct networks", names),
        *(
            _line(f"MACs <= {bound:,.0f}", [canonical[n][f"lost {quantile}"] for n in names])
            for quantile, bound in checked["budgets"].items()
        ),
    ]
    for statistic, title in (("tau", "Kendall's tau-b"), ("rho", "Spearman's rho")):
        lines += ["", f"{title} [95 % bootstrap interval]", _header("rows", names)]
        for group, measured in checked["groups"].items():
            lines.append(_line(f"{group} ({measured['rows']:,})", [measured["scores"][n][statistic] for n in names]))
        if statistic == "tau":
            titles = {
                "layers": "within equal depth",
                "non_minimal": "within equal non_minimal",
                "macs": "within MACs quintiles",
            }
            for kind, measured in checked["within"].items():
                lines.append(_line(titles[kind], [measured[n] for n in names]))
    for group in ("all", "canonical"):
        measured = checked["groups"].get(group)
        if measured is not None:
            lines += ["", f"on {group} rows: precision at the top, and regret of the best-scored within a MACs budget"]
            lines.append(_header("", names))
            statistics = [s for s in measured["scores"][names[0]] if s.startswith(("top", "regret"))]
            for s in statistics:
                bound = f" <= {checked['budgets'][s.removeprefix('regret ')]:,.0f}" if s.startswith("regret") else ""
                lines.append(_line(s + bound, [measured["scores"][n][s] for n in names]))
    lines += ["", *_verdicts(checked)]
    return "\n".join(lines)


def _header(first: str, names: Sequence[str]) -> str:
    return f"{first:<28}" + "".join(f"  {name:>20}" for name in names)


def _line(title: str, values: Sequence[Sequence[float | None]]) -> str:
    return f"{title:<28}" + "".join(f"  {_cell(v):>20}" for v in values)


def _cell(value: Sequence[float | None]) -> str:
    middle, low, high = value
    if middle is None:
        return "none"
    return f"{middle:.3f}" if low is None or high is None else f"{middle:.3f} [{low:.2f}, {high:.2f}]"


def _verdicts(checked: Mapping[str, Any]) -> list[str]:
    """A sentence per score: which size controls it outranks on distinct networks."""
    lines = []
    measured = checked["groups"].get("canonical", checked["groups"]["all"])
    for name in checked["scorers"]:
        gaps = {control: measured["scores"][name][f"tau - {control}"] for control in CONTROLS}
        beaten = [control for control, gap in gaps.items() if gap[1] is not None and gap[1] > 0]
        not_beaten = [control for control in CONTROLS if control not in beaten]
        sentence = f"{name} ranks better than {', '.join(beaten) or 'no control'}"
        lines.append(sentence + (f", not demonstrably better than {', '.join(not_beaten)}." if not_beaten else "."))
    return lines
