"""How well a score ranks networks whose true accuracies are known, and whether it says more than size does."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.space import SearchSpace
from kdnas.specs import nearest
from kdnas.statistics import (
    Array,
    kendall,
    percentiles,
    precision_at_top,
    regret,
    resampled_kendall,
    resampled_spearman,
    spearman,
)

CONTROLS = ("params", "macs", "layers", "non_minimal")
_SHARES = (0.01, 0.05, 0.1)
_QUANTILES = (0.25, 0.5, 0.75, 1.0)
_LEAST = 10  # rows below which a rank correlation says nothing


@final
@dataclass(frozen=True)
class BenchmarkRow:
    """A network of a table of true accuracies.

    Attributes:
        code: as the table spells it.
        architecture: the canonical architecture of the code.
        truth: the accuracy.
        params: exact, by the space's own blueprint, as are the next two.
        macs: multiply-accumulates.
        layers: of all stages.
        non_minimal: choices that do not take their first, smallest option; on NAS-Bench-Macro the layers that are no
            identity.
    """

    code: str
    architecture: Architecture
    truth: float
    params: int
    macs: int
    layers: int
    non_minimal: int


def read_table(path: Path, space: SearchSpace, column: str) -> list[BenchmarkRow]:
    """The rows of a CSV file with a header.

    Args:
        path: the file.
        space: whose codes are in the column `arch`, or in the first one where none is named so.
        column: of the true accuracies.

    Raises:
        ValueError: no such file or column, a code that is not the space's, an accuracy that is no finite number, or
            fewer than 10 rows; the line is named.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Give a CSV file with a header, a column of codes and {column!r}.")
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        names = list(reader.fieldnames or ())
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}.{nearest(column, names)} Name it with --column.")
        codes = "arch" if "arch" in names else names[0]
        rows = [_row(line, codes, column, space, f"{path}, line {reader.line_num}") for line in reader]
    if len(rows) < _LEAST:
        raise ValueError(f"{path} has {len(rows)} rows; a ranking is measured on at least {_LEAST}.")
    return rows


def _row(line: Mapping[str, Any], codes: str, column: str, space: SearchSpace, place: str) -> BenchmarkRow:
    code = str(line[codes] or "")
    try:
        architecture = space.parse(code)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{place}: {code!r} in column {codes!r} is no code of {space.name or 'the space'}: {error}"
        ) from error
    try:
        truth = float(line[column])
    except (TypeError, ValueError):
        truth = math.nan
    if not math.isfinite(truth):
        raise ValueError(f"{place}: {column} must be a finite number, got {line[column]!r}.")
    blueprint = space.blueprint(architecture)
    c = cost(blueprint)
    non_minimal = sum(architecture.get(choice.name, choice.options[0]) != choice.options[0] for choice in space.choices)
    return BenchmarkRow(code, architecture, truth, c.params, c.macs, sum(map(len, blueprint.stages)), non_minimal)


def canonical_rows(rows: Sequence[BenchmarkRow]) -> list[int]:
    """Index of the first row of every distinct network: other spellings would count it several times."""
    first: dict[Architecture, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.architecture, i)
    return list(first.values())


def groups(rows: Sequence[BenchmarkRow]) -> dict[str, list[int]]:
    """The rows on which a ranking is measured, by name: `all`, `canonical`, and parts of the latter.

    `top tenth` holds the truly best tenth, `macs 1/5` to `macs 5/5` the MACs quintiles, `layers N` and `non_minimal N`
    networks of equal depth and equal number of non_minimal choices. Parts of fewer than 10 rows are left out, and
    those by `non_minimal` where they are those by `layers`.
    """
    canonical = canonical_rows(rows)
    found = {"all": list(range(len(rows))), "canonical": canonical}
    truths = np.array([rows[i].truth for i in canonical])
    # Stable by code, so that ties at an edge fall the same way whatever the order of the table.
    by_truth = sorted(canonical, key=lambda i: (-rows[i].truth, rows[i].code))
    found["top tenth"] = by_truth[: math.ceil(0.1 * len(truths))]
    by_macs = sorted(canonical, key=lambda i: (rows[i].macs, rows[i].code))
    for i, part in enumerate(np.array_split(np.array(by_macs), 5), 1):
        found[f"macs {i}/5"] = part.tolist()
    parts: dict[str, dict[int, list[int]]] = {"layers": {}, "non_minimal": {}}
    for i in canonical:
        for name, held in parts.items():
            held.setdefault(getattr(rows[i], name), []).append(i)
    same = sorted(parts["layers"].values()) == sorted(parts["non_minimal"].values())
    for name, held in parts.items():
        if name == "layers" or not same:
            found |= {f"{name} {value}": held[value] for value in sorted(held)}
    return {name: held for name, held in found.items() if len(held) >= _LEAST}


def quality(
    scores: Mapping[str, Sequence[float]], rows: Sequence[BenchmarkRow], *, resamples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Every statistic of every score on every group of rows, with 95 % percentile bootstrap intervals, as plain values.

    The result is `{"budgets": {quantile: macs}, "groups": {group: {"rows": n, "scores": {score: statistics}}},
    "within": {kind: {score: statistics}}}`. Statistics are `tau` (Kendall's tau-b) and `rho` (Spearman), on
    all and canonical rows also `top 1%`, `top 5%`, `top 10%` (precision) and `regret q25` ... `regret q100` (budgets at
    MACs quantiles of all rows), each a `[value, low, high]`; `tau - NAME` is the difference of tau to the control
    `NAME`'s on the same resamples.
    `within` has one number per kind of part, `layers`, `non_minimal`, `macs` (quintiles): tau averaged over the parts,
    each counting with its number of pairs. A statistic that is undefined, such as the tau of a constant score, is 0, as
    in `kdnas.similarity`; a regret without any network within the budget is None.

    Args:
        scores: name to one number per row, higher is better. The controls `CONTROLS` are added.
        rows: the table.
        resamples: of the bootstrap; rows are drawn with replacement within a group, the same for all scores.
        seed: of the bootstrap.

    Raises:
        ValueError: a score of another length or that is not finite, or named as a control.
    """
    every: dict[str, Array] = {}
    for name, values in scores.items():
        array = np.asarray(values, float)
        if name in CONTROLS:
            raise ValueError(f"a score must not be named {name!r}, which is a control. Give it another name.")
        if array.shape != (len(rows),) or not np.isfinite(array).all():
            bad = [rows[i].code for i in np.flatnonzero(~np.isfinite(array))[:1]] if len(array) == len(rows) else []
            fault = f"is not finite for {bad[0]}" if bad else f"has {len(array)} numbers for {len(rows)} rows"
            raise ValueError(f"the score {name} {fault}. A ranking needs one finite number per row.")
        every[name] = array
    every |= {name: np.array([getattr(row, name) for row in rows], float) for name in CONTROLS}
    truths = np.array([row.truth for row in rows])
    macs = np.array([row.macs for row in rows], float)
    budgets = {f"q{round(100 * q)}": float(np.quantile(macs, q)) for q in _QUANTILES}
    measured: dict[str, Any] = {}
    samples: dict[str, dict[str, Array]] = {}
    for place, (group, indices) in enumerate(groups(rows).items()):
        index = np.array(indices)
        drawn_rows = np.random.default_rng((seed, place)).integers(len(index), size=(resamples, len(index)))
        statistics: dict[str, dict[str, Any]] = {}
        taus: dict[str, Array] = {}
        for name, values in every.items():
            s, t = values[index], truths[index]
            taus[name] = resampled_kendall(s, t, drawn_rows)
            statistics[name] = {
                "tau": _with_interval(kendall(s, t), taus[name]),
                "rho": _with_interval(spearman(s, t), resampled_spearman(s, t, drawn_rows)),
            }
            if group in ("all", "canonical"):
                whole = _of_choice(s, t, macs[index], budgets)
                resampled = _of_choice(s[drawn_rows], t[drawn_rows], macs[index][drawn_rows], budgets)
                statistics[name] |= {n: _with_interval(float(v), resampled[n]) for n, v in whole.items()}
        for name in scores:
            for control in CONTROLS:
                gap = statistics[name]["tau"][0] - statistics[control]["tau"][0]
                statistics[name][f"tau - {control}"] = _with_interval(gap, taus[name] - taus[control])
        measured[group] = {"rows": len(index), "scores": statistics}
        samples[group] = taus
    return {"budgets": budgets, "groups": measured, "within": _within(measured, samples, list(every))}


def _with_interval(value: float, resampled: Array) -> list[float | None]:
    """`[value, low, high]`, with None for what is undefined."""
    defined = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or not len(defined):
        return [value if math.isfinite(value) else None, None, None]
    return [float(value), *percentiles(defined)]


def _of_choice(scores: Array, truths: Array, macs: Array, budgets: Mapping[str, float]) -> dict[str, Array]:
    """Precision at the top and regret, of `[..., networks]`."""
    precisions = {f"top {round(100 * share)}%": precision_at_top(scores, truths, share) for share in _SHARES}
    return precisions | {f"regret {name}": regret(scores, truths, macs, bound) for name, bound in budgets.items()}


def _within(
    measured: Mapping[str, Any], samples: Mapping[str, Mapping[str, Array]], names: Sequence[str]
) -> dict[str, dict[str, list[float | None]]]:
    """Per kind of part and score, tau averaged over the parts by their number of pairs."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for kind in ("layers", "non_minimal", "macs"):
        parts = [group for group in measured if group.startswith(f"{kind} ")]
        if parts:
            pairs = np.array([measured[part]["rows"] * (measured[part]["rows"] - 1) / 2 for part in parts])
            weights = pairs / pairs.sum()
            found[kind] = {}
            for name in names:
                value = sum(w * measured[p]["scores"][name]["tau"][0] for w, p in zip(weights, parts, strict=True))
                drawn = sum(w * samples[p][name] for w, p in zip(weights, parts, strict=True))
                found[kind][name] = _with_interval(float(value), np.asarray(drawn))
    return found
