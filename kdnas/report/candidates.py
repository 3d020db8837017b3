"""The candidates of the searches: scores against costs, the ranked table, the students."""

import shlex
from collections.abc import Iterator, Sequence

from markupsafe import Markup

from kdnas.report.charts import Point, scatter
from kdnas.report.content import RunContent, SearchRanking, mapping
from kdnas.report.drawing import drawing
from kdnas.report.markup import Column, decimal, finite, join, scaled, table, tag, text, whole
from kdnas.report.todo import commands, missing
from kdnas.runs.folder import CARD, STUDENTS, WEIGHTS, JsonObject
from kdnas.space import Blueprint
from kdnas.trust import admit

_MOST_PLACES = 50
_MOST_CLASSES = 12
_SPENT = {
    "memory": Column("Memory, bytes", whole),
    "latency": Column("Latency, ms", lambda seconds: decimal((finite(seconds) or 0) * 1e3)),
}


def front(run: RunContent) -> Iterator[Markup]:
    """Score against MACs and against params, for the last search."""
    if not run.rankings:
        yield missing(*commands(run)["search"])
        return
    search = run.rankings[-1]
    scorer = search.common("scorer")
    unit, label = ("%", "accuracy") if scorer == "accuracy" else ("", f"score ({scorer})")
    charts = []
    for cost, name in (("macs", "MACs"), ("params", "params")):
        places = [
            i
            for i, row in enumerate(search.rows)
            if finite(row.get("score")) is not None and (finite(row.get(cost)) or 0) > 0
        ]
        points = [Point(search.rows[i][cost], search.rows[i]["score"], _tooltip(search.rows[i], i)) for i in places]
        bounds = {f"budget {scaled(b)}": b for n, b in run.budget().items() if n == cost}
        stars = {names: places.index(i) for names, i in _starred(run, search).items() if i in places}
        if points:
            charts.append(scatter(points, x_label=name, y_label=label, y_unit=unit, bounds=bounds, stars=stars))
    if not charts:
        yield tag("p", "No architecture has both a score and a cost.", class_="missing")
        return
    yield tag("p", f"{_summary(search)} Higher is better, further left is cheaper.", class_="soft")
    yield tag("div", *charts, class_="pair")
    if run.students and not _starred(run, search):
        yield tag("p", "The exported students are not among the architectures of this search.", class_="soft")


def _starred(run: RunContent, search: SearchRanking) -> dict[str, int]:
    """Names of the students to their index in the ranking; of one architecture the first, such as `student`."""
    names: dict[int, str] = {}
    for name, student in run.students.items():
        place = search.index_of(student.get("architecture"))
        if place is not None and "architecture" in student:
            names.setdefault(place, name)
    return {name: place for place, name in names.items()}


def _tooltip(row: JsonObject, index: int) -> str:
    lines = [f"place {index + 1:,}: {row.get('code', '')}", f"score {decimal(row.get('score'))}"]
    lines += [f"{whole(row.get('macs'))} MACs", f"{whole(row.get('params'))} params"]
    return "\n".join([*lines, f"{text(row.get('layers'))} layers"])


def _summary(search: SearchRanking) -> str:
    repeated = search.num_evaluations - len(search.rows)
    repetitions = f" ({repeated:,} scored again)" if repeated else ""
    return (
        f"Search {search.number}: {len(search.rows):,} architectures{repetitions}, "
        f"scorer {search.common('scorer')}, searcher {search.common('searcher')}."
    )


def ranking(run: RunContent) -> Iterator[Markup]:
    """The best of the last search as a table; earlier searches unfold."""
    if not run.rankings:
        yield missing(*commands(run)["search"])
        return
    *earlier, last = run.rankings
    yield tag("p", f"{_summary(last)} The best {min(_MOST_PLACES, len(last.rows))}:", class_="soft")
    yield _ranked(run, last)
    for search in reversed(earlier):
        yield tag("details", tag("summary", _summary(search)), _ranked(run, search))


def _ranked(run: RunContent, search: SearchRanking) -> Markup:
    rows = search.rows[:_MOST_PLACES]
    spent = [name for name in _SPENT if any(name in mapping(row.get("spent")) for row in rows)]
    columns = [
        Column("Place", whole),
        Column("Code", text, numeric=False, code=True),
        Column("Score", decimal),
        Column("Params", whole),
        Column("MACs", whole),
        Column("Layers", whole),
        *(_SPENT[name] for name in spent),
    ]
    lines = [
        (
            place,
            row.get("code"),
            row.get("score"),
            row.get("params"),
            row.get("macs"),
            row.get("layers"),
            *(mapping(row.get("spent")).get(name) for name in spent),
        )
        for place, row in enumerate(rows, 1)
    ]
    marked = set(_starred(run, search).values())
    ranked = table(columns, lines, visible=12, marked=marked, what="places")
    parts = [(place, _parts(row)) for place, row in enumerate(rows, 1) if mapping(row.get("parts"))]
    if not parts:
        return ranked
    columns = [Column("Place", whole), Column("Parts", text, numeric=False)]
    return join([ranked, tag("details", tag("summary", "What the scores consist of"), table(columns, parts))])


def _parts(row: JsonObject) -> str:
    return ", ".join(f"{name} {decimal(value)}" for name, value in mapping(row.get("parts")).items())


def students(run: RunContent) -> Iterator[Markup]:
    """A drawing per distinct student."""
    if not run.students:
        yield missing(*commands(run)["export"])
        return
    same: dict[str, list[str]] = {}
    for name, student in run.students.items():
        same.setdefault(str(student.get("architecture", name)), []).append(name)
    for place, names in enumerate(same.values()):
        content = _student(run, names)
        title = ", ".join(names)
        if place == 0:
            yield usage(run, names[0])
            yield tag("h3", title)
            yield content
        else:
            yield tag("details", tag("summary", title), content)


def usage(run: RunContent, name: str) -> Markup:
    """What a student takes and gives, and the commands that load it."""
    student, path = run.students[name], f"{run.name}/{STUDENTS}/{name}"
    size = mapping(student.get("preprocessing"))
    image = mapping(student.get("blueprint")).get("image")
    facts = []
    if isinstance(image, list) and len(image) == 3:
        given = [image[0], size.get("height", image[1]), size.get("width", image[2])]
        words = f"Images of {' × '.join(map(text, given))}, values from 0 to 1, normalised inside"
        inside = f"; the network computes on {' × '.join(map(text, image))}" if given != image else ""
        facts.append(f"{words}{inside}.")
    names = student.get("class_names")
    if isinstance(names, list) and names:
        shown = ", ".join(map(str, names[:_MOST_CLASSES])) + (", …" if len(names) > _MOST_CLASSES else "")
        facts.append(f"{len(names)} classes, in the order of the logits: {shown}.")
    python = f"student = kdnas.load_student({path!r}); logits = student(images)"
    lines = [
        ("Python", f"import kdnas; {python}"),
        (
            "Python without kdnas",
            f"cd {shlex.quote(path)}; python -c 'from student import load; student = load(\"{WEIGHTS}\")'",
        ),
        ("8-bit integers", f"kdnas quantize {shlex.quote(path)}"),
    ]
    columns = [Column("To load it", text, numeric=False), Column("Command", text, numeric=False, code=True)]
    return join([tag("p", " ".join(facts)) if facts else Markup(""), table(columns, lines), _forms(student)])


def _forms(student: JsonObject) -> Markup:
    """The files of a student with their size, speed and difference from the network, and what was left out."""
    records = {name: mapping(record) for name, record in mapping(student.get("forms")).items()}
    rows = [
        (r.get("file"), r.get("bytes"), r.get("milliseconds"), r.get("threads"), r.get("difference", r.get("error")))
        for r in records.values()
        if "problem" not in r
    ]
    columns = [
        Column("Form", text, numeric=False, code=True),
        Column("Bytes", whole),
        Column("ms for one image", decimal),
        Column("Threads", whole),
        Column("Difference of the logits", lambda value: "–" if finite(value) is None else f"{finite(value):.1e}"),
    ]
    left = [
        tag("p", f"{name} is left out: {r['problem']}", class_="missing")
        for name, r in records.items()
        if "problem" in r
    ]
    return join([*([table(columns, rows)] if rows else []), *left])


def _student(run: RunContent, names: Sequence[str]) -> Markup:
    student = run.students[names[0]]
    parts: list[Markup] = []
    if run.rankings:
        place = run.rankings[-1].index_of(student.get("architecture"))
        if place is not None:
            row = run.rankings[-1].rows[place]
            words = f"Place {place + 1:,} of {len(run.rankings[-1].rows):,}, score {decimal(row.get('score'))}, code "
            parts.append(tag("p", words, tag("code", row.get("code", "–")), "."))
    cost = mapping(student.get("cost"))
    if cost:
        parts.append(tag("p", f"{whole(cost.get('params'))} params, {whole(cost.get('macs'))} MACs."))
    try:
        admit(student["blueprint"], CARD)  # a drawing builds the layers
        blueprint = Blueprint.from_json(student["blueprint"])
    except (KeyError, TypeError, ValueError, AttributeError):
        path = shlex.quote(f"{run.name}/students/{names[0]}")
        folder = shlex.quote(run.name)
        parts.append(missing(f"{CARD} has no blueprint that can be drawn here.", f"kdnas export {folder} --out {path}"))
        return join(parts)
    return join([*parts, drawing(blueprint)])
