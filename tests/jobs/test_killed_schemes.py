"""SIGKILL within a contrast, a pruning, a chain of assistants, a student's own scheme, a growth: nothing is lost.

A process dies at a named place, in the midst of its work; then the same command goes on.
"""

import json
import shutil

import pytest

from kdnas.cli.commands import main
from kdnas.jobs._assist import between
from kdnas.runs.folder import RunFolder
from kdnas.scorers.short_training import ShortTraining
from kdnas.students.folder import read_student
from kdnas.tables import space_from_table
from tests.jobs.test_killed import same_weights
from tests.killing import CHECKPOINT, drafts, killed, no_graph  # noqa: F401

pytestmark = pytest.mark.slow  # each test starts a process of its own


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student small enough to have networks above it, in a run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "tests/toy.py", "--out", str(folder)])
    main(["search", str(folder), "--num-evaluations", "5"])
    main(["export", str(folder), "--place", "5"])
    return folder / "students" / "place-5"


def same_students(one, other):
    same_weights(one, other)
    cards = []
    for folder in (one, other):
        # A teacher trained in the run lies in its folder.
        text = (folder / "student.json").read_text().replace(str(folder.resolve().parent.parent), "RUN")
        cards.append(json.loads(text))
        del cards[-1]["checksum"]
        cards[-1]["origin"].pop("seconds", None)
    assert cards[0] == cards[1]


def same_results(one, other):
    """The closing tables, seconds aside, and the controls."""
    found = [RunFolder(folder).results() for folder in (one, other)]
    for results in found:
        for row in results["rows"]:
            row.pop("seconds")
    assert found[0] == found[1] and found[0]["rows"] and found[0]["controls"]


def curve(folder, phase):
    """A phase's steps and losses, every step once."""
    lines = [m for m in RunFolder(folder).lines("metrics.jsonl") if m["phase"] == phase]
    assert [m["step"] for m in lines] == list(range(lines[0]["total"]))
    return [(m["step"], m["losses"], m["lr"]) for m in lines]


def test_a_contrast_in_the_midst_of_a_line(tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    main(["train", "tests/toy.py:contrasted", "--out", str(whole)])
    shutil.copytree(whole, folder)
    calls, score = [], ShortTraining.score
    monkeypatch.setattr(ShortTraining, "score", lambda *given: calls.append(given) or score(*given))
    main(["search", str(whole)])
    all_calls = len(calls)
    # Four of six: the controller has learned from its first batch of three.
    here = "sum(e.searcher == 'contrast' for e in given[0].ranking()) == 4"
    torn = """given[0].path("ranking.jsonl").open("a").write('{"architecture": ')"""
    killed(["search", str(folder)], here, given="from kdnas.runs.folder import RunFolder", name="append", then=torn)
    ranking = folder / "ranking.jsonl"
    written, torn_line = ranking.read_text().rsplit("\n", 1)
    known = {(e.architecture, e.searcher == "contrast") for e in RunFolder(folder).ranking()}
    assert torn_line and RunFolder(folder).phase("search") is None
    calls.clear()
    main(["search", str(folder)])
    assert len(calls) == all_calls - len(known)  # nothing is scored twice
    assert ranking.read_text().startswith(written + "\n")

    def told(place):
        entries = RunFolder(place).ranking()
        assert sum(e.searcher == "contrast" for e in entries) == 6
        return [(e.code, e.score, e.parts, e.scorer, e.searcher, e.search) for e in entries]

    assert told(folder) == told(whole)
    assert RunFolder(folder).results() == RunFolder(whole).results()
    assert "value" in RunFolder(folder).results()["controls"]["contrast"]
    traces = [[m for m in RunFolder(place).lines("metrics.jsonl") if "trace" in m] for place in (folder, whole)]
    assert traces[0] == traces[1] and traces[0]
    assert len(RunFolder(folder).manifest["searches"]) == 1


PRUNE = ["prune", "tests/toy.py:pruned_by_factors", "--steps", "6", "--out"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    main([*PRUNE, str(folder)])
    return folder


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("given[0].name == 'factors.safetensors' and given[1]['training']['index'] == 4", CHECKPOINT),
        ("given[1] == 'removal-random'", {"given": "import kdnas.jobs.prune", "name": "Job._store"}),
        ("given[0].name.startswith('.trained.') and given[1]['training']['index'] == 4", CHECKPOINT),
    ],
    ids=["factors", "removal", "student"],
)
def test_a_pruning(tmp_path, pruned, place, call):
    folder = tmp_path / "run"
    killed([*PRUNE, str(folder)], place, **call)
    assert not (folder / "students" / "student").exists()
    main([*PRUNE, str(folder)])
    for name in ("removal-chosen", "removal-equal", "removal-random", "student", "control", "trained"):
        same_students(folder / "students" / name, pruned / "students" / name)
    same_results(folder, pruned)
    assert RunFolder(folder).phase("removal") == RunFolder(pruned).phase("removal") is not None
    for phase in ("factors", "trained"):
        assert curve(folder, phase) == curve(pruned, phase)
    assert drafts(folder) == []


SHARES = ["prune", "tests/toy.py:pruned", "--steps", "6", "--out"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "shares"
    main([*SHARES, str(folder)])
    return folder


@pytest.mark.parametrize(
    ("place", "call"),
    [
        (
            "given[1] == 'removals.jsonl' and len(given[0].lines('removals.jsonl')) == 3",
            {"given": "import kdnas.runs.folder", "name": "RunFolder.add"},
        ),
        ("given[1] == 'source-random'", {"given": "import kdnas.jobs.prune", "name": "Job._store"}),
        (
            "given[1].startswith('trial') and 'fresh' in given[1]",
            {"given": "import kdnas.runs.folder", "name": "RunFolder.finish"},
        ),
        ("given[0].name == 'student'", {"given": "import kdnas.jobs.prune", "name": "write_student"}),
    ],
    ids=["candidates", "removal", "trial", "delivery"],
)
def test_a_pruning_by_shares(tmp_path, shared, place, call):
    folder = tmp_path / "run"
    killed([*SHARES, str(folder)], place, **call)
    assert not (folder / "students" / "student").exists()
    before = RunFolder(folder).lines("removals.jsonl")
    main([*SHARES, str(folder)])
    assert RunFolder(folder).lines("removals.jsonl")[: len(before)] == before  # nothing is scored twice
    for place_of in (folder, shared):
        assert len({json.dumps(row["counts"]) for row in RunFolder(place_of).lines("removals.jsonl")}) == len(
            RunFolder(place_of).lines("removals.jsonl")
        )
    for name in ("removal-equal", "removal-random", "source", "student", "control", "trained"):
        same_students(folder / "students" / name, shared / "students" / name)
    same_results(folder, shared)
    trials = [
        {name: phase["accuracy"] for name, phase in RunFolder(place_of).manifest["phases"].items() if "trial:" in name}
        for place_of in (folder, shared)
    ]
    assert trials[0] == trials[1] and len(trials[0]) > 2
    assert drafts(folder) == []


def codes_above(student):
    card = read_student(student)[1]
    space = space_from_table(dict(card.space))
    return [space.code(space.largest), space.code(between(space, card.cost.macs, 0)[0])]


def assisted(student, assistants, name):
    return ["retrain", str(student), "--assistants", assistants, "--steps", "8", "--out", str(student.parent / name)]


def same_assistants(folder, killed_name, whole_name):
    one, other = (folder / f"{name}-assistants" for name in (killed_name, whole_name))
    names = [sorted(p.name for p in place.iterdir()) for place in (one, other)]
    assert names[0] == names[1]
    assert (one / "begun.json").read_text() == (other / "begun.json").read_text()
    for name in names[0]:
        if (one / name).is_dir():
            same_students(one / name, other / name)
    same_students(folder / killed_name, folder / whole_name)
    assert drafts(folder) == []


def test_the_second_assistant_of_a_chain(student):
    codes = codes_above(student)
    main(assisted(student, ",".join(codes), "chained"))
    arguments = assisted(student, ",".join(codes), "chain-killed")
    here = f"given[0].name.startswith('.trained-{codes[1]}.') and given[1]['training']['index'] == 5"
    killed(arguments, here, **CHECKPOINT)
    folder = student.parent
    assert (folder / "chain-killed-assistants" / f"trained-{codes[0]}").exists()
    assert not (folder / "chain-killed-assistants" / f"trained-{codes[1]}").exists()
    main(arguments)
    same_assistants(folder, "chain-killed", "chained")


def test_the_search_for_an_assistant_s_size(student):
    main(assisted(student, "auto", "auto"))
    folder = student.parent
    choice = json.loads((folder / "auto-assistants" / "choice.json").read_text())
    sizes = list(choice["search accuracy of the student"])
    assert len(sizes) > 1
    arguments = assisted(student, "auto", "auto-killed")
    here = f"given[0].name.startswith('.short-{sizes[1]}-student.') and given[1]['training']['index'] == 2"
    killed(arguments, here, **CHECKPOINT)
    assert not (folder / "auto-killed-assistants" / "choice.json").exists()
    main(arguments)
    assert json.loads((folder / "auto-killed-assistants" / "choice.json").read_text()) == choice
    same_assistants(folder, "auto-killed", "auto")


@pytest.mark.parametrize("distiller", ["mutual", "self_distillation", "born_again"])
def test_a_scheme_for_one_student(student, distiller):
    run, students = student.parent.parent, student.parent
    arguments = ["retrain", str(student), "--distiller", distiller, "--steps", "12", "--out"]
    whole, folder = students / distiller, students / f"{distiller}-killed"
    main([*arguments, str(whole)])
    learned = curve(run, "retrain")
    # Step 6 of 12 is in the midst of the second of born_again's three generations.
    killed([*arguments, str(folder)], "given[1]['training']['index'] == 7", **CHECKPOINT)
    if distiller == "born_again":
        assert "generation 1" in RunFolder(run).lines("metrics.jsonl")[-1]["losses"]
    assert not folder.exists()
    main([*arguments, str(folder)])
    assert curve(run, "retrain") == learned
    same_students(folder, whole)
    assert drafts(students) == []


def test_a_growth_s_second_iteration(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    arguments = ["grow", "--data", "tests.toy:data", "--space", "toy", "--num-members", "2"]
    arguments += ["--steps", "4", "--batch-size", "16", "--out"]
    main([*arguments, str(whole)])
    here = "given[0].name.startswith('grown-2.2.') and given[1]['training']['index'] == 3"
    killed([*arguments, str(folder)], here, **CHECKPOINT)
    assert sorted(p.name for p in (folder / "members").iterdir()) == ["grown-1.1", "grown-2.1"]
    main([*arguments, str(folder)])
    names = sorted(p.name for p in (whole / "members").iterdir())
    assert names == sorted(p.name for p in (folder / "members").iterdir())
    for name in names:
        same_students(folder / "members" / name, whole / "members" / name)
    same_students(folder / "student", whole / "student")
    same_results(folder, whole)
    assert curve(folder, "grown 2.2") == curve(whole, "grown 2.2")
    assert drafts(folder) == []
