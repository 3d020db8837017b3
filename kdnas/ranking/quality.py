"""How well scores rank networks of known accuracy, compared with size controls."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.runs.files import plain
from kdnas.space import SearchSpace
from kdnas.specs import nearest
from kdnas.statistics import (
    Array,
    kendall,
    percentiles,
    points_lost,
    precision_at_top,
    regret,
    resampled_kendall,
    resampled_spearman,
    spearman,
)
from kdnas.values import real, shown

CONTROLS = ("params", "macs", "layers", "non_minimal")
TRAINED = 5  # best-scored networks that are trained, of which the best one is kept, for the points lost
_SHARES = (0.01, 0.05, 0.1)
_QUANTILES = (0.25, 0.5, 0.75, 1.0)
_LEAST = 10  # rows below which a rank correlation is meaningless


@final
@dataclass(frozen=True)
class BenchmarkRow:
    """A row of a table of true accuracies.

    Attributes:
        code: as in the table.
        architecture: the canonical architecture of the code.
        truth: the accuracy.
        params: exact, from the space's blueprint, as are the next two.
        macs: multiply-accumulates.
        layers: number of layers of all stages.
        non_minimal: number of choices with another than their first, smallest option; on NAS-Bench-Macro the number of
            layers other than the identity.
    """

    code: str
    architecture: Architecture
    truth: float
    params: int
    macs: int
    layers: int
    non_minimal: int


def read_table(
    path: Path, space: SearchSpace, column: str | Sequence[str], *, least: int = _LEAST
) -> list[BenchmarkRow]:
    """The rows of a CSV file with a header.

    Args:
        path: the file.
        space: the search space of the codes in column `arch`, or in the first column where there is no `arch`.
        column: the column of true accuracies, or several names, of which the first that there is counts.
        least: smallest number of rows.

    Raises:
        ValueError: the file or column does not exist, a code is invalid in the space, an accuracy is not finite (the
            message has the line), or there are too few rows.
    """
    columns = [column] if isinstance(column, str) else list(column)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. Pass a CSV file with a header, a column of codes and a column {columns[0]!r}."
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            names = list(reader.fieldnames or ())
            truths = next((name for name in columns if name in names), None)
            if truths is None:
                how = " Name it with --column." if isinstance(column, str) else ""
                near = nearest(columns[0], [shown(n)[1:-1] for n in names])
                raise ValueError(f"{path} has no column {shown(columns[0])}.{near}{how}")
            codes = "arch" if "arch" in names else names[0]
            rows = [_row(line, codes, truths, space, f"{path}, line {reader.line_num}") for line in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error.reason}). Pass a CSV file.") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no table ({error}). Pass a CSV file.") from error
    if len(rows) < least:
        raise ValueError(f"{path} must have at least {least} rows, got {len(rows)}.")
    return rows


def _row(line: Mapping[str, Any], codes: str, column: str, space: SearchSpace, place: str) -> BenchmarkRow:
    code = str(line[codes] or "")
    try:
        architecture = space.parse(code)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{place}: column {codes!r} must be a code of {space.name or 'the space'}, got {shown(code)}: "
            f"{plain(str(error))}"
        ) from error
    try:
        truth = real(str(line[column]).strip())
    except (TypeError, ValueError):
        truth = math.nan
    if not math.isfinite(truth):
        raise ValueError(f"{place}: column {column!r} must be a finite number, got {shown(line[column])}.")
    blueprint = space.blueprint(architecture)
    c = cost(blueprint)
    non_minimal = sum(architecture.get(choice.name, choice.options[0]) != choice.options[0] for choice in space.choices)
    return BenchmarkRow(code, architecture, truth, c.params, c.macs, sum(map(len, blueprint.stages)), non_minimal)


def canonical_rows(rows: Sequence[BenchmarkRow]) -> list[int]:
    """Index of the first row of every distinct network; other rows are other spellings of it."""
    first: dict[Architecture, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.architecture, i)
    return list(first.values())


def groups(rows: Sequence[BenchmarkRow]) -> dict[str, list[int]]:
    """Row indices of the groups on which a ranking is measured: `all`, `canonical`, and parts of the latter.

    `top tenth` is the tenth of highest accuracy, `macs 1/5` to `macs 5/5` are the MACs quintiles, `layers N` and
    `non_minimal N` the networks with equal values. Groups of fewer than 10 rows are left out, and those by
    `non_minimal` where they equal those by `layers`.
    """
    canonical = canonical_rows(rows)
    parts = {"all": list(range(len(rows))), "canonical": canonical}
    truths = np.array([rows[i].truth for i in canonical])
    # Ties are ordered by code, so that groups do not depend on the order of the table.
    by_truth = sorted(canonical, key=lambda i: (-rows[i].truth, rows[i].code))
    parts["top tenth"] = by_truth[: math.ceil(0.1 * len(truths))]
    by_macs = sorted(canonical, key=lambda i: (rows[i].macs, rows[i].code))
    for i, part in enumerate(np.array_split(np.array(by_macs), 5), 1):
        parts[f"macs {i}/5"] = part.tolist()
    by_size: dict[str, dict[int, list[int]]] = {"layers": {}, "non_minimal": {}}
    for i in canonical:
        for name, indices in by_size.items():
            indices.setdefault(getattr(rows[i], name), []).append(i)
    equal_parts = sorted(by_size["layers"].values()) == sorted(by_size["non_minimal"].values())
    for name, indices in by_size.items():
        if name == "layers" or not equal_parts:
            parts |= {f"{name} {value}": indices[value] for value in sorted(indices)}
    return {name: indices for name, indices in parts.items() if len(indices) >= _LEAST}


def quality(
    scores: Mapping[str, Sequence[float]], rows: Sequence[BenchmarkRow], *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """All statistics of all scores on all groups of rows, with 95 % percentile bootstrap intervals.

    The result is `{"budgets": {quantile: macs}, "groups": {group: {"rows": n, "scores": {score: statistics}}},
    "within": {kind: {score: statistics}}}`. Statistics are `tau` (Kendall's tau-b) and `rho` (Spearman), on
    all and canonical rows also `top 1%`, `top 5%`, `top 10%` (precision), `regret q25` ... `regret q100` and `lost q25`
    ... `lost q100` of the best five (budgets at MACs quantiles of all rows), each a `[value, low, high]`; `tau - NAME`
    is the difference of tau to the control `NAME`'s on the same resamples.
    `within` has one number per kind of part, `layers`, `non_minimal`, `macs` (quintiles): tau averaged over the parts,
    each counting with its number of pairs. An undefined correlation, such as the tau of a constant score, is 0; a
    regret without a network within the budget is None.

    Args:
        scores: name to one number per row, higher is better. The controls `CONTROLS` are added.
        rows: the table.
        resamples: resamples of the bootstrap, drawn within a group and equal for all scores.
        seed: seed of the bootstrap.

    Raises:
        ValueError: a score has another length, is not finite, or has the name of a control.
    """
    all_scores: dict[str, Array] = {}
    for name, values in scores.items():
        array = np.asarray(values, float)
        if name in CONTROLS:
            raise ValueError(f"scores must not have the name of a control, got {name!r}. Rename it.")
        if array.shape != (len(rows),) or not np.isfinite(array).all():
            bad = [rows[i].code for i in np.flatnonzero(~np.isfinite(array))[:1]] if len(array) == len(rows) else []
            fault = f"a value that is not finite for {bad[0]}" if bad else f"{len(array)} numbers for {len(rows)} rows"
            raise ValueError(f"score {name!r} must have one finite number per row, got {fault}.")
        all_scores[name] = array
    all_scores |= {name: np.array([getattr(row, name) for row in rows], float) for name in CONTROLS}
    truths = np.array([row.truth for row in rows])
    macs = np.array([row.macs for row in rows], float)
    budgets = {f"q{round(100 * q)}": float(np.quantile(macs, q)) for q in _QUANTILES}
    measured: dict[str, Any] = {}
    samples: dict[str, dict[str, Array]] = {}
    for place, (group, indices) in enumerate(groups(rows).items()):
        index = np.array(indices)
        draws = np.random.default_rng((seed, place)).integers(len(index), size=(resamples, len(index)))
        statistics: dict[str, dict[str, Any]] = {}
        taus: dict[str, Array] = {}
        for name, values in all_scores.items():
            s, t = values[index], truths[index]
            taus[name] = resampled_kendall(s, t, draws)
            statistics[name] = {
                "tau": _with_interval(kendall(s, t), taus[name]),
                "rho": _with_interval(spearman(s, t), resampled_spearman(s, t, draws)),
            }
            if group in ("all", "canonical"):
                whole = _of_choice(s, t, macs[index], budgets)
                resampled = _of_choice(s[draws], t[draws], macs[index][draws], budgets)
                statistics[name] |= {n: _with_interval(float(v), resampled[n]) for n, v in whole.items()}
        for name in scores:
            for control in CONTROLS:
                gap = statistics[name]["tau"][0] - statistics[control]["tau"][0]
                statistics[name][f"tau - {control}"] = _with_interval(gap, taus[name] - taus[control])
        measured[group] = {"rows": len(index), "scores": statistics}
        samples[group] = taus
    return {"budgets": budgets, "groups": measured, "within": _within(measured, samples, list(all_scores))}


def _with_interval(value: float, resampled: Array) -> list[float | None]:
    """`[value, low, high]`, with None where undefined."""
    defined = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or not len(defined):
        return [value if math.isfinite(value) else None, None, None]
    return [float(value), *percentiles(defined)]


def _of_choice(scores: Array, truths: Array, macs: Array, budgets: Mapping[str, float]) -> dict[str, Array]:
    """Points lost by the best few, precision at the top and regret, of `[..., networks]`."""
    precisions = {f"top {round(100 * share)}%": precision_at_top(scores, truths, share) for share in _SHARES}
    lost = {f"lost {name}": points_lost(scores, truths, macs, bound, TRAINED) for name, bound in budgets.items()}
    regrets = {f"regret {name}": regret(scores, truths, macs, bound) for name, bound in budgets.items()}
    return lost | precisions | regrets


def _within(
    measured: Mapping[str, Any], samples: Mapping[str, Mapping[str, Array]], names: Sequence[str]
) -> dict[str, dict[str, list[float | None]]]:
    """Tau of each score, averaged over the groups of each kind, weighted by their number of pairs."""
    averages: dict[str, dict[str, list[float | None]]] = {}
    for kind in ("layers", "non_minimal", "macs"):
        parts = [group for group in measured if group.startswith(f"{kind} ")]
        if parts:
            pairs = np.array([measured[part]["rows"] * (measured[part]["rows"] - 1) / 2 for part in parts])
            weights = pairs / pairs.sum()
            averages[kind] = {}
            for name in names:
                value = sum(w * measured[p]["scores"][name]["tau"][0] for w, p in zip(weights, parts, strict=True))
                resampled = sum(w * samples[p][name] for w, p in zip(weights, parts, strict=True))
                averages[kind][name] = _with_interval(float(value), np.asarray(resampled))
    return averages
