"""The report of a run: whole, partial and hostile folders; the pieces it is made of."""

import html.parser
import json
import math
import random
import shutil
from pathlib import Path

import pytest

from kdnas.costs.count import cost
from kdnas.report import write_report
from kdnas.report.axis import Axis
from kdnas.report.charts import Point, bars, curves, heat_map, scatter
from kdnas.report.content import RunContent, SearchRanking
from kdnas.report.drawing import drawing
from kdnas.report.markup import Column, Markup, decimal, duration, percent, scaled, table, tag, whole
from kdnas.space import SearchSpace
from kdnas.tables import load_space

SECTIONS = ("result", "controls", "student", "front", "ranking", "training", "time", "settings")


def make_run(folder: Path, *, num_architectures: int = 120, steps: int = 600, seed: int = 0) -> SearchSpace:
    """A finished run as the commands write it, with numbers made up."""
    rng = random.Random(seed)
    space = load_space("nas_bench_macro")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    while len(rows) < num_architectures:
        architecture = space.sample(rng)
        code = space.code(architecture)
        real = [int(digit) for digit in code if digit != "."]
        macs = 8_000_000 + sum(digit * 4_000_000 + rng.randrange(900_000) for digit in real)
        score = 0.6 + 0.3 * (1 - math.exp(-macs / 4e7)) + rng.gauss(0, 0.02)
        rows.append(
            {
                "architecture": dict(architecture),
                "code": code,
                "score": score,
                "parts": {"positions": score + 0.01, "teacher_layers": score - 0.02},
                "params": macs // 60 + rng.randrange(50_000),
                "macs": macs,
                "layers": sum(digit > 0 for digit in real),
                "seconds": 0.12,
                "scorer": "similarity",
                "searcher": "evolution",
                "search": 1,
            }
        )
    write_lines(folder / "ranking.jsonl", rows)
    best = max((row for row in rows if row["macs"] <= 45e6), key=lambda row: row["score"])
    blueprint = space.blueprint(space.parse(best["code"]))
    student = {
        "architecture": best["architecture"],
        "blueprint": blueprint.to_json(),
        "cost": cost(blueprint)._asdict(),
        "class_names": [str(digit) for digit in range(10)],
        "preprocessing": {"height": 128, "width": 128, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    for name in ("student", "control"):
        write(folder / "students" / name / "student.json", student)
    lines = []
    for phase, names, total in (
        ("teacher", ("cross_entropy",), steps // 2),
        ("train", ("largest", "random0", "random1", "smallest"), steps),
        ("student", ("cross_entropy", "soft_targets"), steps),
        ("control", ("cross_entropy",), steps),
    ):
        for step in range(1, total + 1, 2):
            done = step / total
            losses = {n: (k + 1) * 2.3 * math.exp(-4 * done) + rng.random() * 0.1 for k, n in enumerate(names)}
            line = {"phase": phase, "step": step, "total": total, "seconds": 30 * done, "lr": 0.1 * (1 - done)}
            line["losses"] = losses
            if step % 50 == 1:
                if phase == "train":
                    line["health"] = {n: (0.97 - k * 0.03) * (1 - math.exp(-5 * done)) for k, n in enumerate(HEALTH)}
                else:
                    line["accuracy"] = 0.98 * (1 - math.exp(-6 * done - 0.1))
            lines.append(line)
    write_lines(folder / "metrics.jsonl", lines)
    job = {
        "steps": steps,
        "budget": {"macs": 45e6, "params": None},
        "distiller": {"make": "kdnas.distillers.sandwich:Sandwich", "arguments": {"num_random": 2}},
        "data": {"make": "kdnas.data:Digits", "arguments": {}},
        "optimizer": {"lr": 0.1, "momentum": 0.9},
    }
    phases = {
        "teacher": {"seconds": 18.4, "accuracy": 0.9785, "params": 1_272_330, "macs": 311_422_976},
        "train": {"seconds": 41.9, "steps": steps},
        "search": {"seconds": 14.6, "budget": {"macs": 45e6}},
        "export": {"seconds": 2.3},
        "student": {"seconds": 16.0, "steps": steps, "accuracy": 0.9713},
        "control": {"seconds": 12.8, "steps": steps, "accuracy": 0.9584},
    }
    run = {"kdnas": "0.1.0", "torch": "2.15.0", "python": "3.11.2", "commit": "8cf06da2aa", "seed": 0}
    write(folder / "run.json", {**run, "created": "2026-11-20T12:00:00", "job": job, "phases": phases})
    size = {"params": best["params"], "macs": best["macs"]}
    closing = [
        {"name": "teacher", "accuracy": 0.9785, "params": 1_272_330, "macs": 311_422_976, "seconds": 18.4},
        {"name": "student", "accuracy": 0.9713, **size, "seconds": 16.0},
        {"name": "control", "accuracy": 0.9584, **size, "seconds": 12.8},
    ]
    write(folder / "results.json", {"rows": closing, "controls": CONTROLS})
    return space


HEALTH = ("largest", "middle", "smallest")
CONTROLS = {
    "tau macs": {"value": 0.61, "interval": [0.49, 0.71], "sentence": "Kendall's tau with MACs: 0.61 [0.49, 0.71]."},
    "tau params": {
        "value": 0.55,
        "interval": [0.42, 0.66],
        "sentence": "Kendall's tau with params: 0.55 [0.42, 0.66].",
    },
    "tau layers": {"value": 0.47, "interval": [-0.33, 0.59], "sentence": "Kendall's tau with layers: 0.47."},
    "tau zen": {"sentence": "Agreement with zen is left out: the time is over."},
    "random search": {
        "value": 0.81,
        "interval": [0.8, 0.82],
        "sentence": "The search is not distinguishable from random search with 120 evaluations.",
    },
    "distillation": {
        "value": 0.0129,
        "interval": [0.001, 0.027],
        "sentence": "The student's test accuracy less that of the student without a teacher: +1.29 points.",
    },
    "choice": {
        "value": 0.0029,
        "interval": [-0.011, 0.017],
        "sentence": "The student's test accuracy less that of 1 random subnet within the budget, trained alike: +0.29.",
    },
}


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


class Walk(html.parser.HTMLParser):
    """Reads a page strictly: every element is closed in order; collects ids, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)
        self.attributes += attributes
        if name != "meta":
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def ids(self) -> list[str | None]:
        return [value for name, value in self.attributes if name == "id"]

    @property
    def said(self) -> str:
        return " ".join(self.text)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    make_run(folder)
    return folder


def read(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_a_finished_run_has_every_section_and_is_well_formed(demo):
    page = Walk(read(demo))
    assert tuple(i for i in page.ids if i in SECTIONS) == SECTIONS
    assert "Next:" not in page.said and "Command:" not in page.said
    assert page.tags.count("h1") == 1
    links = [value for name, value in page.attributes if name == "href"]
    assert sorted(links) == sorted(f"#{name}" for name in SECTIONS)


def test_the_page_needs_nothing_beside_itself(demo):
    page = read(demo)
    low = page.lower()
    for outside in ("http", "src=", "url(", "<script", "<link", "@import", "//cdn", "<img", "<iframe"):
        assert outside not in low, outside
    assert len(page) < 400_000


def test_equal_folders_give_equal_pages_and_no_other_file_is_left(demo):
    assert read(demo) == read(demo)
    assert sorted(p.name for p in demo.iterdir() if "report" in p.name) == ["report.html"]


def test_the_closing_table_says_what_results_json_says(demo):
    said = Walk(read(demo)).said
    assert (
        "Distillation helped: the student reaches 97.13 % test accuracy, 1.29 points [+0.10, +2.70] above the same "
        "network trained without the teacher."
    ) in said
    for number in ("97.85 %", "311,422,976", "1,272,330", "18.4 s", "+1.29 points"):
        assert number in said, number
    for control in CONTROLS.values():
        assert control["sentence"] in said
    assert "−0.330 to 0.590" in said


@pytest.mark.parametrize(
    ("accuracy", "interval", "words"),
    [
        (
            0.97,
            [0.001, 0.04],
            "Distillation helped: the student reaches 97.00 % test accuracy, 2.00 points [+0.10, +4.00] above",
        ),
        (
            0.94,
            [-0.02, -0.001],
            "Distillation did not help: the student reaches 94.00 % test accuracy, 1.00 points [−2.00, −0.10] below",
        ),
        (
            0.96,
            [-0.01, 0.03],
            "Whether distillation helped cannot be told from these test images: the student reaches 96.00 %",
        ),
        (0.95, None, "the same network without the teacher 95.00 %, a difference of +0.00 points."),
    ],
)
def test_the_verdict_is_one_sentence_that_the_interval_decides(tmp_path, accuracy, interval, words):
    rows = [{"name": "student", "accuracy": accuracy}, {"name": "control", "accuracy": 0.95}]
    controls = {} if interval is None else {"distillation": {"interval": interval}}
    write(tmp_path / "results.json", {"rows": rows, "controls": controls})
    page = read(tmp_path)
    assert page.count('class="lead"') == 1 and words in Walk(page).said


def test_without_a_control_the_verdict_compares_with_the_teacher(tmp_path):
    rows = [{"name": "teacher", "accuracy": 0.97}, {"name": "student", "accuracy": 0.95}]
    write(tmp_path / "results.json", {"rows": rows})
    assert "The student reaches 95.00 % test accuracy, 2.00 points below its teacher." in Walk(read(tmp_path)).said


def test_student_and_control_are_in_one_chart(demo):
    page = read(demo)
    section = page[page.index('id="result"') : page.index('id="controls"')]
    assert section.count("<svg") == 1
    for name in ("Student, distilled", "Control: student without a teacher"):
        assert f"</i>{name}<b>" in section, name


def test_the_agreement_with_size_is_behind_a_fold(demo):
    page = read(demo)
    section = page[page.index('id="controls"') : page.index('id="student"')]
    before, fold = section.split("<details>")
    assert "random search" in before and "1 random subnet" in before and "Kendall" not in before
    for name in ("tau macs", "tau zen"):
        assert CONTROLS[name]["sentence"].replace("'", "&#39;") in fold


def test_how_the_student_is_used_is_said(demo):
    section = Walk(read(demo)[read(demo).index('id="student"') - 9 : read(demo).index('id="front"') - 9]).said
    assert (
        "Images of 3 × 128 × 128, values from 0 to 1, normalised inside; the network computes on 3 × 32 × 32."
        in section
    )
    assert "10 classes, in the order of the logits: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in section
    assert f"kdnas.load_student('{demo.name}/students/student')" in section
    assert "kdnas quantize" in section


def test_a_loss_of_millions_is_explained(tmp_path):
    values = (4_975_070.0, 2e6, 3.5)
    for tops, explained in ((values, True), ((12.0, 8.0, 3.5), False)):
        lines = [{"phase": "train", "step": s, "total": 3, "losses": {"random0": v}} for s, v in enumerate(tops)]
        write_lines(tmp_path / "metrics.jsonl", lines)
        said = Walk(read(tmp_path)).said
        assert ("The loss of random0 was 4,975,070 at step 0 of 3, and at the end 3.5000." in said) == explained


def test_the_ranked_table_has_fifty_places_best_first_with_the_student_marked(demo):
    page = read(demo)
    section = page[page.index('id="ranking"') : page.index('id="training"')]
    ranked, parts = section.split("What the scores consist of")
    assert ranked.count("<tr") == parts.count("<tr") == 51
    assert "<details><summary>38 more places</summary></details>" in ranked
    rows = [json.loads(line) for line in (demo / "ranking.jsonl").read_text().splitlines()]
    codes = [row["code"] for row in sorted(rows, key=lambda row: -row["score"])]
    codes = list(dict.fromkeys(codes))
    places = [section.index(f">{code}<") for code in codes[:50]]
    assert places == sorted(places)
    assert section.count('class="marked"') == 1


def test_rows_are_in_the_order_in_which_export_counts_places():
    from kdnas.ranking.order import ranked
    from kdnas.runs.entry import Entry

    rng = random.Random(3)
    space = load_space("nas_bench_macro")
    entries = {}
    for _ in range(200):
        architecture = space.sample(rng)
        score, macs = rng.choice((0.1, 0.2, 0.3)), rng.choice((10, 20, 30))
        code = space.code(architecture)
        entries[code] = Entry(architecture, code, score, {}, 1, macs, 3, 0.1)
    expected = [entry.code for entry in ranked(list(entries.values()))]
    assert [
        row["code"] for row in SearchRanking.of(1, [entry.to_json() for entry in entries.values()]).rows
    ] == expected


def test_controls_take_no_place_of_those_that_export_counts(tmp_path):
    row = {"parts": {}, "params": 1, "macs": 10, "layers": 3, "seconds": 0.1, "scorer": "rdm", "search": 1}
    found = [("00", 0.1, "evolution"), ("11", 0.9, "random control"), ("00", 0.8, "random control")]
    found += [("22", 0.7, "contrast"), ("01", 0.2, "evolution")]
    rows = [{**row, "code": c, "architecture": {"a": c}, "score": s, "searcher": by} for c, s, by in found]
    write_lines(tmp_path / "ranking.jsonl", rows)
    (search,) = RunContent.read(tmp_path).rankings
    assert [(one["code"], one["score"]) for one in search.rows] == [("01", 0.2), ("00", 0.1)]


def test_controls_and_a_teacher_are_named_in_plain_words(tmp_path):
    names = ("student", "random 1", "contrast", "single network", "mine")
    write(tmp_path / "results.json", {"rows": [{"name": name, "accuracy": 0.5} for name in names], "controls": {}})
    phases = ("teacher 2", "control", "random control 1", "mine")
    lines = [{"phase": phase, "step": 0, "total": 1, "losses": {"student": 0.7}} for phase in phases]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = read(tmp_path)
    for name in (
        "Control: random subnet 1 within the budget, distilled",
        "Control: best subnet under the other score, distilled",
        "Control: single network of at most its MACs, without a teacher",
        "mine",
    ):
        assert f">{name}</td>" in page, name
    training = page[page.index('id="training"') : page.index('id="time"')].split("<h3>")[1:]
    titles = [
        "Teacher, member 2",
        "Control: student without a teacher",
        "Search 1: random search at equal cost",
        "mine",
    ]
    assert [section.partition("</h3>")[0] for section in training] == titles
    assert ["</i>teacher<b>" in section for section in training] == [True, False, False, False]
    assert ["</i>student<b>" in section for section in training] == [False, True, True, True]


def test_budget_and_student_are_marked_in_the_charts(demo):
    page = read(demo)
    section = page[page.index('id="front"') : page.index('id="ranking"')]
    assert section.count("<svg") == 2
    assert section.count("budget 45.0 M") == 1  # the budget is on MACs, not on params
    assert section.count('<path d="M') == 4  # a front and a student in both
    assert section.count(">student</text>") == 2


def test_each_phase_has_its_losses_and_its_health(demo):
    page = read(demo)
    section = page[page.index('id="training"') : page.index('id="time"')]
    assert section.count("<svg") == 8
    for name in ("largest", "random0", "random1", "smallest", "middle", "soft_targets"):
        assert f"</i>{name}<b>" in section, name


def test_the_student_is_drawn_layer_by_layer(demo):
    page = read(demo)
    section = page[page.index('id="student"') : page.index('id="front"')]
    student = json.loads((demo / "students/student/student.json").read_text())
    layers = 2 + sum(map(len, student["blueprint"]["stages"]))
    assert section.count("<li") == layers
    assert section.count('class="box"') == layers
    assert f"{student['cost']['macs']:,} MACs" in Walk(page).said
    assert section.count("<h3") == 1  # the control is the same network


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("run.json",),
        ("metrics.jsonl",),
        ("run.json", "metrics.jsonl"),
        ("ranking.jsonl",),
        ("run.json", "metrics.jsonl", "ranking.jsonl"),
        ("results.json",),
        ("students",),
        ("run.json", "metrics.jsonl", "ranking.jsonl", "students"),
    ],
)
def test_a_partial_folder_gives_a_whole_page_and_the_next_command(demo, tmp_path, kept):
    folder = tmp_path / "my run"
    folder.mkdir()
    for name in kept:
        copy = shutil.copytree if (demo / name).is_dir() else shutil.copyfile
        copy(demo / name, folder / name)
    page = Walk(read(folder))
    assert tuple(i for i in page.ids if i in SECTIONS) == SECTIONS
    if "results.json" in kept:
        return
    step = "train EXPERIMENT --out"
    if "run.json" in kept or "ranking.jsonl" in kept:
        step = "search"
    if "ranking.jsonl" in kept:
        step = "retrain" if "students" in kept else "export"
    assert "Next:" in page.said
    command = page.text[next(i for i, t in enumerate(page.text) if "Next:" in t) + 1]
    assert command.startswith(f"kdnas {step} '") and "my run" in command


def test_links_out_of_a_run_are_left_out(demo, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copyfile(demo / "run.json", folder / "run.json")
    for name in ("results.json", "students"):
        (folder / name).symlink_to(demo / name)
    said = Walk(read(folder)).said
    assert "results.json is a link that leads out of the run; it is left out." in said
    assert "student.json is a link that leads out of the run; it is left out." in said


def test_files_cut_short_are_named_and_the_rest_is_shown(demo, tmp_path):
    for name in ("run.json", "metrics.jsonl", "ranking.jsonl", "results.json"):
        content = (demo / name).read_text()
        (tmp_path / name).write_text(content[: len(content) * 2 // 3])
    (tmp_path / "students/half").mkdir(parents=True)
    (tmp_path / "students/half/student.json").write_text('{"architecture": {')
    (tmp_path / "students/.half.new").mkdir()
    (tmp_path / "students/.half.new/student.json").write_text("{}")
    page = Walk(read(tmp_path))
    assert "run.json cannot be read" in page.said and "student.json cannot be read" in page.said
    assert "metrics.jsonl: 1 of" in page.said and "ranking.jsonl: 1 of 80 lines" in page.said
    assert ".half.new" not in page.said


def test_values_of_another_kind_or_not_finite_do_not_stop_the_report(tmp_path):
    write(tmp_path / "run.json", {"job": [1], "phases": {"train": None, "search": {"seconds": "long"}}})
    rows = [
        {"score": None, "macs": 5, "code": "a"},
        {"score": float("nan"), "macs": 5, "params": 1e300, "code": "b", "parts": [1], "search": 1},
        {"score": 0.5, "macs": 0, "params": 3, "code": "c", "architecture": {"x": 1}, "search": 1},
        {"score": True, "macs": "many", "code": "d", "search": float("inf")},
    ]
    write_lines(tmp_path / "ranking.jsonl", rows)
    lines = [
        {"phase": "train", "step": 0, "losses": {"a": float("nan"), "b": 1.0}, "health": [3], "seconds": None},
        {"phase": "train", "step": 1, "losses": {"a": float("inf"), "b": 1.0}, "lr": "x"},
        {"phase": "train", "step": None, "losses": 3},
        {"step": 3},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    write(
        tmp_path / "results.json", {"rows": [{"name": "student"}, 3], "controls": {"macs": {"interval": [1]}, "x": 2}}
    )
    write(tmp_path / "students/s/student.json", {"architecture": {"x": 1}, "blueprint": {"image": 3}})
    page = Walk(read(tmp_path))
    assert "2 logged losses are not finite" in page.said
    assert "nan" not in page.said.split() and "inf" not in page.said.split()
    assert "student.json has no blueprint that can be drawn here" in page.said


def test_after_a_resumption_each_step_counts_once(tmp_path):
    lines = [{"phase": "train", "step": s, "total": 9, "losses": {"a": 100.0}} for s in (1, 2, 3)]
    lines += [{"phase": "train", "step": s, "total": 9, "losses": {"a": 0.5}} for s in (2, 3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    page = read(tmp_path)
    assert page.count('class="hit"') == 3
    assert "<b>0.5000</b>" in page


def test_text_is_escaped_everywhere(tmp_path):
    make_run(tmp_path, num_architectures=5, steps=20)
    evil = "<script>alert('x')</script>\"&amp;\ud800"
    for name in ("run.json", "results.json"):
        value = json.loads((tmp_path / name).read_text())
        value = json.loads(json.dumps(value).replace("8cf06da2aa", "<b>").replace('"teacher"', json.dumps(evil)))
        value.setdefault("controls", {})[evil] = {"sentence": evil, "value": evil, "interval": evil}
        value.setdefault("job", {})[evil] = {"make": evil, "arguments": {evil: evil}}
        write(tmp_path / name, value)
    rows = [json.loads(line) for line in (tmp_path / "ranking.jsonl").read_text().splitlines()]
    write_lines(
        tmp_path / "ranking.jsonl",
        [{**row, "code": evil + row["code"], "scorer": evil, "searcher": evil, "parts": {evil: 1.0}} for row in rows],
    )
    line = {"phase": evil, "step": 1, "losses": {evil: 1.0}, "health": {evil: 0.5}}
    write_lines(tmp_path / "metrics.jsonl", [line])
    student = json.loads((tmp_path / "students/student/student.json").read_text())
    student["blueprint"]["stem"]["make"] = "kdnas.blocks.basic:" + evil
    write(tmp_path / "students/<i>&/student.json", {**student, "architecture": {evil: 1}})
    page = read(tmp_path)
    assert "<script" not in page and "<i>&/" not in page and 'alert("' not in page
    assert "alert('x')</script>\"&amp;\\ud800" in Walk(page).said.replace("\n", "")


def test_a_network_with_layers_of_foreign_code_is_not_drawn_as_drawing_builds_them(demo, tmp_path):
    student = json.loads((demo / "students/student/student.json").read_text())
    student["blueprint"]["stages"][0][0]["make"] = "nowhere.to_be.found:Block"
    write(tmp_path / "students/one/student.json", student)
    page = Walk(read(tmp_path))
    assert "student.json has no blueprint that can be drawn here" in page.said


def test_a_folder_that_is_not_there_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"existing run folder.*kdnas train EXPERIMENT --out"):
        write_report(tmp_path / "none")


# The pieces.


def test_an_axis_is_logarithmic_from_twenty_times_on():
    assert not Axis.around([1.0, 20.0], 0, 100).log
    wide = Axis.around([1e5, 1e7], 0, 100)
    assert wide.log
    assert wide.place(1e6) == pytest.approx(50)
    assert [name for _, name in wide.ticks()] == ["100 k", "200 k", "500 k", "1 M", "2 M", "5 M", "10 M"]
    assert not Axis.around([0.0, 100.0], 0, 1).log and not Axis.around([-1.0, 100.0], 0, 1).log


@pytest.mark.parametrize(
    "values",
    [[0.7412, 0.7498], [0.0, 1e9], [5.0], [0.0], [1.0, 1.0 + 1e-15], [-3e-9, 2e-9], [1e-9, 1e9], [1e99, -1e99], [-5.0]],
)
def test_ticks_are_round_distinct_and_inside(values):
    axis = Axis.around(values, 10, 90)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 11
    assert all(10 - 1e-6 <= axis.place(value) <= 90 + 1e-6 for value, _ in ticks)
    assert len({name for _, name in ticks}) == len(ticks)
    assert all(10 <= axis.place(value) <= 90 for value in values)


def test_ticks_of_fractions_are_per_cent():
    assert [name for _, name in Axis.around([0.2, 0.98], 0, 1, unit="%").ticks()] == [
        "20 %",
        "40 %",
        "60 %",
        "80 %",
        "100 %",
    ]


def numbers(picture: str, element: str, look: str, *names: str) -> list[tuple[float, ...]]:
    """Attributes of the elements of a class, as numbers."""
    found = []
    for piece in picture.split(f"<{element} ")[1:]:
        given = dict(part.split("=") for part in piece[: piece.index(">")].replace('"', "").split(" ") if "=" in part)
        if f'class="{look}"' in piece[: piece.index(">")]:
            found.append(tuple(float(given[name]) for name in names))
    return found


def test_points_and_bounds_lie_where_the_axes_say():
    points = [Point(100.0, 0.2, "worse"), Point(50.0, 0.4, "better"), Point(200.0, 0.3, "dear")]
    picture = scatter(points, x_label="MACs", y_label="score", bounds={"budget": 150.0}, stars={"chosen": 1})
    x = Axis.around([50.0, 200.0], 72, 540 - 16)
    y = Axis.around([0.2, 0.4], 330 - 46, 16)
    (worse,), (dear,) = (numbers(picture, "circle", look, "cx", "cy") for look in ("point", "point over"))
    assert worse == pytest.approx((x.place(100), y.place(0.2)), abs=0.06)
    assert dear == pytest.approx((x.place(200), y.place(0.3)), abs=0.06)
    assert numbers(picture, "circle", "front", "cx", "cy") == [pytest.approx((x.place(50), y.place(0.4)), abs=0.06)]
    (line,) = numbers(picture, "line", "bound", "x1", "x2", "y1", "y2")
    assert line == pytest.approx((x.place(150), x.place(150), 16, 330 - 46), abs=0.06)


def test_a_scatter_draws_at_most_two_thousand_points_but_the_whole_front():
    rng = random.Random(1)
    points = [Point(float(i + 1), i + rng.random() / 2, f"p{i}") for i in range(3000)]
    flat = [Point(float(i + 1), 0.0, f"q{i}") for i in range(3000)]
    rising = scatter(points, x_label="MACs", y_label="score")
    assert rising.count("<circle") == 3000  # all of them on the front
    assert 2000 <= scatter(flat, x_label="MACs", y_label="score").count("<circle") <= 2001


def test_long_curves_are_averaged_and_keep_their_last_value():
    picture = curves({"loss": [(float(s), float(s % 2)) for s in range(10_000)]}, x_label="step", y_label="loss")
    assert picture.count('class="hit"') == 200
    assert "<b>1.0000</b>" in picture
    assert "step 49\nloss: 0.5000" in picture  # fifty steps of 0, 1, 0, 1, ...


def test_bars_are_as_long_as_their_values():
    picture = bars({"short": 1.0, "long": 4.0, "none": 0.0}, write=duration)
    assert [value for name, value in Walk(picture).attributes if name == "style"] == [
        "width:25.0%",
        "width:100.0%",
        "width:0.0%",
    ]
    assert "4.0 s" in picture and bars({}).startswith("<figure")


def test_a_heat_map_says_every_value_and_frames_the_best_of_each_row():
    picture = heat_map(["a", "b"], ["x", "y"], [[0.25, -1.0], [float("nan"), 0.5]], row_label="t", column_label="s")
    Walk(picture)
    for said in ("a, x: 0.25", "a, y: -1.00", "b, x: no value", "b, y: 0.50"):
        assert said in picture
    assert picture.count(" best") == 2
    assert 'fill-opacity="0.64"' in picture  # the largest magnitude
    with pytest.raises(ValueError, match="`values` must have 2 rows of 1 numbers"):
        heat_map(["a", "b"], ["x"], [[1.0]])


def test_pieces_without_content_are_still_pictures():
    for picture in (
        curves({}, x_label="x", y_label="y"),
        curves({"a": []}, x_label="x", y_label="y"),
        scatter([], x_label="x", y_label="y"),
        heat_map([], [], []),
    ):
        assert "svg" in Walk(picture).tags


def test_a_drawing_shares_the_macs_among_all_layers():
    space = load_space("toy")
    picture = drawing(space.blueprint(space.largest))
    page = Walk(picture)
    shares = [float(value[6:-1]) for name, value in page.attributes if name == "style" and value]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert picture.count("<li") == 2 + 4
    listed = [float(cell[:-2].split("· ")[-1]) for cell in page.text if cell.endswith(" %")]
    assert sum(listed) == pytest.approx(200, abs=0.6)  # per layer, below its box and in the table


def test_a_table_escapes_text_and_keeps_markup():
    columns = [Column("<n>", numeric=False), Column("v", whole)]
    made = table(columns, [("<b>", 1234567), (Markup("<b>x</b>"), None)], marked=[1])
    assert "&lt;n&gt;" in made and "&lt;b&gt;" in made and "<b>x</b>" in made
    assert "1,234,567" in made and "–" in made
    assert made.count('class="marked"') == 1


def test_a_table_hides_rows_only_where_that_saves_some():
    rows = [(i,) for i in range(14)]
    assert "details" not in table([Column("n", whole)], rows, visible=12)
    assert "<summary>3 more rows</summary>" in table([Column("n", whole)], [*rows, (14,)], visible=12)


def test_numbers_as_people_read_them():
    assert [scaled(v) for v in (0, 7, 999, 1000, 999_960, 1_234_567, 45e6, 3.11e11, None)] == [
        "0", "7", "999", "1.00 k", "1.00 M", "1.23 M", "45.0 M", "311 G", "–",
    ]  # fmt: skip
    assert [duration(v) for v in (0, 4.25, 59.96, 185, 7620)] == [
        "0.0 s",
        "4.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert [decimal(v) for v in (0.73125, -0.5, 0, 12345.6, 1e-6, True)] == [
        "0.7312", "-0.5000", "0.0000", "12,346", "1.000e-06", "–",
    ]  # fmt: skip
    assert percent(0.973) == "97.3 %"
    assert tag("a", "<", title='"', class_="x", x_y=1.25) == '<a title="&#34;" class="x" x-y="1.2">&lt;</a>'
    assert tag("i", Markup("<b>")) == "<i><b></i>"


def test_steps_are_those_that_were_taken_and_a_finalist_that_was_stopped_has_ended(tmp_path):
    rows = [{"name": name, "step": step, "steps": 8} for name, step in (("finalist-1", 8), ("finalist-2", 4))]
    finals = {"finals": {"winner": "finalist-1", "rows": rows}}
    lines = [
        {"phase": name, "step": step, "total": 8, "seconds": 2.0, "losses": {"student": 1.0}}
        for name, step in (("finalist-1", 7), ("finalist-2", 3), ("control-1", 5))
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    for phases in ({}, finals):
        write(tmp_path / "run.json", {"job": {}, "phases": phases, "searches": []})
        page = read(tmp_path)
        ended = bool(phases)
        assert ("Finalist 2 (so far)" not in page) == ended and "Finalist 1 (so far)" not in page
        assert "(so far)" in page  # the control
        assert all(f"Step {count} of 8" in page for count in (8, 4, 6))
        time = page[page.index('id="time"') :]
        assert all(f">{count}</td>" in time for count in (8, 4, 6)) and ">7</td>" not in time


def test_the_finalists_stand_with_their_curves_the_student_first_and_what_it_loses_leads(tmp_path):
    rows = [
        {"name": "finalist-1", "place": 1, "code": "010", "score": 0.9, "step": 50, "steps": 100, "accuracy": 0.91},
        {"name": "finalist-2", "place": 4, "code": "111", "score": 0.8, "step": 100, "steps": 100, "accuracy": 0.97},
        {
            "name": "finalist-3",
            "place": 7,
            "code": "000",
            "score": 0.7,
            "step": 3,
            "steps": 100,
            "problem": "loss is NaN",
        },
    ]
    phases = {"finals": {"search": 1, "winner": "finalist-2", "rows": rows}}
    write(tmp_path / "run.json", {"job": {}, "phases": phases, "searches": []})
    names = ("finalist-1", "finalist-2", "finalist-2-seed-1", "control-1")
    lines = [{"phase": name, "step": 9, "total": 100, "accuracy": 0.5, "losses": {"student": 1.0}} for name in names]
    write_lines(tmp_path / "metrics.jsonl", lines + [{**line, "step": 19, "accuracy": 0.8} for line in lines])
    closing = [
        {"name": "student", "accuracy": 0.96, "seeds": [0.95, 0.97], "training": "finalist-2"},
        {"name": "control", "accuracy": 0.94, "seeds": [0.94, 0.94], "training": "control-1"},
        {"name": "random networks", "accuracy": 0.95, "seeds": [0.95, 0.95], "training": "random-3"},
    ]
    lost = {"value": -0.01, "interval": [-0.02, 0.0], "sentence": "Points lost to the best control: -1.00."}
    write(tmp_path / "results.json", {"rows": closing, "controls": {"points lost": lost}})
    page = read(tmp_path)
    section = page[page.index('id="finalists"') :]
    places = [section.index(text) for text in ("Finalist 2", "Finalist 1", "Finalist 3")]
    assert places == sorted(places) and "ended early: loss is NaN" in section and "97.00" in section
    assert page.index("Points lost to the best control") < page.index('id="finalists"')
    assert "means over 2 seeds" in page and "The student against its controls" in page
    assert "Control: best of as many random networks" in page
    assert "<h3>Finalist 2, further seed 1" not in page and "<h3>Finalist 2" in page
