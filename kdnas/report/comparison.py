"""The report of a comparison of systems as one HTML file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from markupsafe import Markup

from kdnas.report.charts import Point, scatter
from kdnas.report.content import mapping
from kdnas.report.markup import (
    Column,
    accuracy,
    document,
    duration,
    finite,
    percent,
    scaled,
    table,
    tag,
    text,
    title,
    whole,
    write_page,
)
from kdnas.runs.files import Damaged, read_json
from kdnas.runs.folder import COMPARISON, Input, JsonObject
from kdnas.runs.schema import mismatch
from kdnas.values import Amount, Index, Share

Results = list[tuple[str, JsonObject]]
_AGAIN = "Compare again, in another folder."


class _Teacher(TypedDict):
    accuracy: Share
    params: Index
    macs: Index | None
    seconds: Amount
    balanced_accuracy: NotRequired[Share]


class _Settings(TypedDict):
    budget: dict[str, Any]
    max_time: float


class _Comparison(TypedDict):
    settings: _Settings
    results: dict[str, JsonObject]
    teacher: _Teacher | None
    systems: NotRequired[dict[str, str]]
    measure: NotRequired[str]
    data: NotRequired[dict[str, str]]
    inputs: NotRequired[list[Input]]
    teacher_job: NotRequired[JsonObject | None]
    retrain_steps: NotRequired[int | None]
    step_seconds: NotRequired[dict[str, float]]
    plans: NotRequired[dict[str, dict[str, float]]]
    seconds: NotRequired[float]


_Result = TypedDict(
    "_Result",
    {
        "accuracy": Share,
        "balanced_accuracy": NotRequired[Share],
        "interval": tuple[float, float],
        "params": Index,
        "macs": Index,
        "evaluations": Index,
        "without teacher": float | None,
        "random": float | None,
        "said": list[str],
        "seconds": Amount,
        "run": str,
    },
)


def write_comparison(folder: Path) -> Path:
    """Write `report.html` into a comparison's folder from its `compare.json`, and return its path.

    Raises:
        ValueError: the folder holds no comparison, or it is damaged.
    """
    content = read_comparison(folder)
    settings, results = content["settings"], content["results"]
    ordered, measure = best_first(results), content.get("measure", "accuracy")
    bounds = {name: float(bound) for name, bound in settings["budget"].items() if name == "macs"}
    sections = [
        ("result", "Result", _result(ordered, mapping(content["teacher"]))),
        ("cost", f"{title(measure)} against cost", _cost(ordered, bounds, measure)),
        ("claims", "Each system, and claims on its student", _claims(ordered, mapping(content.get("systems")))),
        ("left", "Left out", iter([_left({name: r["reason"] for name, r in results.items() if "reason" in r})])),
    ]
    intro = (
        f"{len(ordered)} systems on the same data, under the same teacher, at most "
        f"{', '.join(f'{b:,.0f} {n}' for n, b in settings['budget'].items()) or 'no bound'}, "
        f"{duration(settings['max_time'])} for all together"
    )
    page = document(f"kdnas comparison: {folder.name}", folder.name, [tag("p", intro, class_="soft")], sections)
    return write_page(folder, page)


def read_comparison(folder: Path) -> JsonObject:
    """The content of `compare.json`.

    Raises:
        ValueError: the folder holds no comparison, or it is damaged.
    """
    path = folder / COMPARISON
    if not path.exists():
        raise ValueError(f"{folder} is no comparison: it has no {COMPARISON}. Create one with `kdnas compare`.")
    content = read_json(path, _Comparison, _AGAIN)
    for name, result in content["results"].items():
        reason = "" if "reason" in result else mismatch(result, _Result, f"results.{name}")
        if reason:
            raise Damaged(path, reason, _AGAIN)
    return content


def best_first(results: JsonObject) -> Results:
    """The systems that have a result: the most accurate student first, then the cheapest."""
    results = {name: r for name, r in results.items() if "reason" not in r}
    return sorted(results.items(), key=lambda item: (-item[1]["accuracy"], item[1]["macs"], item[0]))


def verdict(ordered: Results) -> str:
    """A sentence on the best system, and on those whose intervals overlap its own."""
    (best, top), *others = ordered
    alike = [name for name, r in others if r["interval"][1] >= top["interval"][0]]
    sentence = f"{best} has the best student."
    if alike:
        sentence += f" On these test images and one seed it is not distinguishable from {', '.join(alike)}."
    return sentence


def _result(ordered: Results, teacher: JsonObject) -> Iterator[Markup]:
    if not ordered:
        yield tag("p", "No system has finished yet.", class_="missing")
        return
    balances = any("balanced_accuracy" in r for _, r in ordered)
    columns = [
        Column("System", text, numeric=False),
        Column("Student", accuracy),
        Column("95 % interval", text, numeric=False),
        *[Column("Balanced over classes", accuracy)] * balances,
        Column("Params", scaled),
        Column("MACs", scaled),
        Column("Without a teacher", accuracy),
        Column("Random subnet", accuracy),
        Column("Time", duration),
    ]
    rows: list[tuple[Any, ...]] = [
        (
            name,
            r["accuracy"],
            f"{percent(r['interval'][0])} to {percent(r['interval'][1])}",
            *[r.get("balanced_accuracy")] * balances,
            r["params"],
            r["macs"],
            r["without teacher"],
            r["random"],
            r["seconds"],
        )
        for name, r in ordered
    ]
    if teacher:
        values = [teacher.get(name) for name in ("accuracy", "params", "macs", "seconds")]
        balanced = [teacher.get("balanced_accuracy")] * balances
        rows.append(("teacher", values[0], "", *balanced, *values[1:3], None, None, values[3]))
    yield table(columns, rows, marked=[0])
    yield tag("p", verdict(ordered), class_="lead")


def _cost(ordered: Results, bounds: dict[str, float], measure: str) -> Iterator[Markup]:
    points = [
        Point(float(r["macs"]), float(r["accuracy"]), f"{name}: {percent(r['accuracy'])}, {whole(r['macs'])} MACs")
        for name, r in ordered
        if finite(r["macs"]) is not None and finite(r["accuracy"]) is not None
    ]
    if points:
        stars = {name: i for i, (name, _) in enumerate(ordered[:3])}
        yield scatter(points, x_label="MACs", y_label=f"Test {measure}", y_unit="%", bounds=bounds, stars=stars)


def _claims(ordered: Results, systems: JsonObject) -> Iterator[Markup]:
    for name, r in ordered:
        link = tag("a", name, href=f"./{r['run']}/report.html")  # relative, whatever the name
        purpose = f"{systems[name].rstrip('.')}. " if systems.get(name) else ""
        judged = f"{whole(r['evaluations'])} networks judged. "
        yield tag("p", tag("b", link), Markup(": "), purpose, judged, " ".join(r["said"]))


def _left(left: dict[str, str]) -> Markup:
    if not left:
        return tag("p", "None: every system fits the space.", class_="soft")
    return tag("ul", *(tag("li", tag("b", name), f": {reason}") for name, reason in left.items()))
