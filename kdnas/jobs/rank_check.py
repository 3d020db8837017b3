"""A run's scores against a table of true accuracies."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdnas.jobs._run import Run
from kdnas.ranking.quality import CONTROLS, quality, read_table
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
    """Score every row of a table with the run's supernet and measure the ranking; JSON-able.

    Every distinct network is scored once, prefixes shared among networks and scorers where a scorer allows it.

    Args:
        run: a run with a trained supernet.
        table: a CSV file with codes of the run's space and true accuracies.
        scorers: by the names the result gives them; by default the scorer of the run's search.
        column: of the true accuracies.
        num_images: of the search part; by default as many as the run's search uses.
        resamples: of the bootstrap.
        seed: of the images and the bootstrap.

    Returns:
        What `quality` returns, and `table`, `column`, `rows`, `canonical`, `images`, `scorers`, the
        `seconds` of all of them together and the evaluations `saved`.

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
            raise ValueError(f"{name} is a control and is measured in any case. Leave it out of the scorers.")
    built = {name: run.scorer(made) for name, made in scorers.items()}
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


def rank_check_table(found: Mapping[str, Any]) -> str:
    """The result as tables: rank correlation per group of rows, then precision and regret, controls beside scores."""
    names = [*found["scorers"], *CONTROLS]
    lines = [
        f"{found['table']}, {found['column']}: {found['rows']:,} rows, {found['canonical']:,} networks, "
        f"{found['images']:,} images",
        f"{found['seconds']:.1f} s, {found['saved']}",
    ]
    for statistic, title in (("tau", "Kendall's tau-b"), ("rho", "Spearman's rho")):
        lines += ["", f"{title} [95 % bootstrap interval]", _header("rows", names)]
        for group, held in found["groups"].items():
            lines.append(_line(f"{group} ({held['rows']:,})", [held["scores"][n][statistic] for n in names]))
        if statistic == "tau":
            titles = {
                "layers": "within equal depth",
                "non_minimal": "within equal non_minimal",
                "macs": "within MACs quintiles",
            }
            for kind, held in found["within"].items():
                lines.append(_line(titles[kind], [held[n] for n in names]))
    for group in ("all", "canonical"):
        held = found["groups"].get(group)
        if held is not None:
            lines += ["", f"on {group} rows: precision at the top, and regret of the best-scored within a MACs budget"]
            lines.append(_header("", names))
            statistics = [s for s in held["scores"][names[0]] if s.startswith(("top", "regret"))]
            for s in statistics:
                bound = f" <= {found['budgets'][s.removeprefix('regret ')]:,.0f}" if s.startswith("regret") else ""
                lines.append(_line(s + bound, [held["scores"][n][s] for n in names]))
    lines += ["", *_verdicts(found)]
    return "\n".join(lines)


def _header(first: str, names: Sequence[str]) -> str:
    return f"{first:<28}" + "".join(f"  {name:>20}" for name in names)


def _line(title: str, values: Sequence[Sequence[float | None]]) -> str:
    return f"{title:<28}" + "".join(f"  {_said(v):>20}" for v in values)


def _said(value: Sequence[float | None]) -> str:
    middle, low, high = value
    if middle is None:
        return "none"
    return f"{middle:.3f}" if low is None or high is None else f"{middle:.3f} [{low:.2f}, {high:.2f}]"


def _verdicts(found: Mapping[str, Any]) -> list[str]:
    """Per score a sentence on whether it ranks better than each size control does, on distinct networks."""
    lines = []
    held = found["groups"].get("canonical", found["groups"]["all"])
    for name in found["scorers"]:
        gaps = {control: held["scores"][name][f"tau - {control}"] for control in CONTROLS}
        beaten = [control for control, gap in gaps.items() if gap[1] is not None and gap[1] > 0]
        not_beaten = [control for control in CONTROLS if control not in beaten]
        said = f"{name} ranks better than {', '.join(beaten) or 'no control'}"
        lines.append(said + (f", not demonstrably better than {', '.join(not_beaten)}." if not_beaten else "."))
    return lines
