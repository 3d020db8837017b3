"""The report of a comparison of systems as one HTML file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdnas.report.charts import Point, scatter
from kdnas.report.content import mapping
from kdnas.report.markup import (
    Column,
    Markup,
    accuracy,
    document,
    duration,
    finite,
    percent,
    table,
    tag,
    text,
    whole,
    write_page,
)
from kdnas.runs.folder import COMPARISON


def write_comparison(folder: Path) -> Path:
    """Write `report.html` into a comparison's folder from its `compare.json`, and return its path.

    Raises:
        ValueError: the folder holds no comparison, or it is damaged.
    """
    path = folder / COMPARISON
    try:
        held = json.loads(path.read_text())
        done = {n: r for n, r in held["results"].items() if "reason" not in r}
        left = {n: r["reason"] for n, r in held["results"].items() if "reason" in r}
        asked, said, teacher = held["settings"], mapping(held.get("systems")), mapping(held["teacher"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no comparison or damaged ({error!r}). Make one with `kdnas compare`.") from error
    ordered = sorted(done.items(), key=lambda item: (-item[1]["accuracy"], item[1]["macs"], item[0]))
    bounds = {name: float(bound) for name, bound in asked["budget"].items() if name == "macs"}
    sections = [
        ("result", "Result", _result(ordered, teacher, said)),
        ("cost", "Accuracy against cost", _cost(ordered, bounds)),
        ("claims", "What each run says of its student", _claims(ordered)),
        ("left", "Left out", iter([_left(left)])),
    ]
    intro = (
        f"{len(done)} systems on the same data, under the same teacher, at most "
        f"{', '.join(f'{b:,.0f} {n}' for n, b in asked['budget'].items()) or 'no bound'}, "
        f"{duration(asked['max_time'])} for all together"
    )
    page = document(f"kdnas comparison: {folder.name}", folder.name, [tag("p", intro, class_="soft")], sections)
    return write_page(folder, page)


def _result(ordered: list[tuple[str, Any]], teacher: Any, said: Any) -> Iterator[Markup]:
    if not ordered:
        yield tag("p", "No system has finished yet.", class_="missing")
        return
    columns = [
        Column("System", text, numeric=False),
        Column("What it does", text, numeric=False),
        Column("Student", accuracy),
        Column("95 % interval", text),
        Column("Params", whole),
        Column("MACs", whole),
        Column("Without a teacher", accuracy),
        Column("Random subnet", accuracy),
        Column("Networks judged", whole),
        Column("Time", duration),
    ]
    rows: list[tuple[Any, ...]] = [
        (
            name,
            said.get(name, ""),
            r["accuracy"],
            f"{percent(r['interval'][0])} to {percent(r['interval'][1])}",
            r["params"],
            r["macs"],
            r["without teacher"],
            r["random"],
            r["evaluations"],
            r["seconds"],
        )
        for name, r in ordered
    ]
    if teacher:
        shown = {name: teacher.get(name) for name in ("accuracy", "params", "macs", "seconds")}
        costs = (shown["params"], shown["macs"])
        rows.append(("teacher", "", shown["accuracy"], "", *costs, None, None, None, shown["seconds"]))
    yield table(columns, rows, marked=[0])
    top = ordered[0]
    alike = [name for name, r in ordered[1:] if r["interval"][1] >= top[1]["interval"][0]]
    sentence = f"{top[0]} has the best student."
    if alike:
        sentence += f" On these test images and one seed it is not distinguishable from {', '.join(alike)}."
    yield tag("p", sentence, class_="lead")


def _cost(ordered: list[tuple[str, Any]], bounds: dict[str, float]) -> Iterator[Markup]:
    points = [
        Point(float(r["macs"]), float(r["accuracy"]), f"{name}: {percent(r['accuracy'])}, {whole(r['macs'])} MACs")
        for name, r in ordered
        if finite(r["macs"]) is not None and finite(r["accuracy"]) is not None
    ]
    if points:
        stars = {name: i for i, (name, _) in enumerate(ordered[:3])}
        yield scatter(points, x_label="MACs", y_label="Test accuracy", y_unit="%", bounds=bounds, stars=stars)


def _claims(ordered: list[tuple[str, Any]]) -> Iterator[Markup]:
    for name, r in ordered:
        link = tag("a", name, href=f"{r['run']}/report.html")
        yield tag("p", tag("b", link), Markup(": "), " ".join(r["said"]))


def _left(left: dict[str, str]) -> Markup:
    if not left:
        return tag("p", "None: every system fits the space.", class_="soft")
    return tag("ul", *(tag("li", tag("b", name), f": {reason}") for name, reason in left.items()))
