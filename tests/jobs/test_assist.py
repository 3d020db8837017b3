"""Teacher assistants: a chain by codes, a size that is searched, and a resumption that trains nothing twice."""

import json
import math
import shutil

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.jobs import _assist as assist
from kdnas.jobs._run import Run
from kdnas.jobs.export import export
from kdnas.students.folder import read_student
from kdnas.tables import load_space
from tests.killing import no_graph  # noqa: F401


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assisted") / "run"
    main(["train", "tests/toy.py", "--out", str(folder)])
    main(["search", str(folder), "--num-evaluations", "5", "--scorer", "rdm"])
    run = Run(folder)
    export(run, place=5)
    return run


def retrained(storage, name, assistants):
    student, out = storage.storage.path("students", "place-5"), storage.storage.path("students", name)
    main(
        [
            "retrain",
            str(student),
            "--assistants",
            assistants,
            "--steps",
            "4",
            "--batch-size",
            "16",
            "--force",
            "--out",
            str(out),
        ]
    )
    return out


def test_each_assistant_is_taught_by_the_one_before_and_the_last_teaches_the_student(
    storage, monkeypatch, capsys, tmp_path
):
    calls = []
    original = assist.retrain

    def watched(student, settings, out, **options):
        calls.append((student.name, out.name, None if options["teacher"] is None else options["teacher"]["path"]))
        return original(student, settings, out, **options)

    monkeypatch.setattr(assist, "retrain", watched)
    space = storage.space
    student = read_student(storage.storage.path("students", "place-5"))[1].cost.macs
    codes = [space.code(space.largest), space.code(assist.between(space, student, 0)[0])]
    out = retrained(storage, "chained", ",".join(codes))
    assert [c[1] for c in calls] == [f"trained-{codes[0]}", f"trained-{codes[1]}", "chained"]
    assert calls[0][2].endswith("run/teacher")
    assert calls[1][2].endswith(f"trained-{codes[0]}") and calls[2][2].endswith(f"trained-{codes[1]}")
    assert "assistants" in capsys.readouterr().out
    network, card = read_student(out)
    assert network.blueprint == read_student(storage.storage.path("students", "place-5"))[0].blueprint
    assert (out / "student.onnx").exists()
    part = storage.data.test
    with torch.no_grad():
        logits = network.eval()(storage.data.normalise(part.take(torch.arange(len(part))))).logits
    assert card.origin["test_accuracy"] == pytest.approx(float((logits.argmax(1) == part.labels).double().mean()))
    calls.clear()
    moved = shutil.copytree(storage.folder, tmp_path / "moved")  # with its teacher; the last training is done anew
    retrained(Run(moved), "chained", ",".join(codes))
    assert [c[1] for c in calls] == ["chained"] and calls[0][2].startswith(str(moved))


def test_the_size_is_searched_once_and_the_choice_kept(storage):
    out = retrained(storage, "auto", "auto")
    folder = out.parent / "auto-assistants"
    held = json.loads((folder / "choice.json").read_text())
    found = held["search accuracy of the student"]
    assert 1 <= len(found) <= 3 and found[held["chosen"]] == max(found.values())
    student = read_student(out)[1].cost.macs
    for code in found:
        assert read_student(folder / f"fresh-{code}")[1].cost.macs > student
    before = (folder / "choice.json").stat().st_mtime_ns
    retrained(storage, "auto", "auto")
    assert (folder / "choice.json").stat().st_mtime_ns == before


def test_sizes_are_tried_in_short_pairs_and_the_one_whose_student_learns_best_is_trained_in_full(storage, monkeypatch):
    calls, original = [], assist.retrain

    def watched(student, settings, out, **options):
        taught = options["teacher"]["path"].rpartition("/")[2]
        calls.append((out.name, settings.recipe.steps, settings.weights, taught))
        return original(student, settings, out, **options | {"deploy": False})

    largest, smallest = storage.space.largest, storage.space.smallest
    found = iter([0.4, 0.9])
    monkeypatch.setattr(assist, "retrain", watched)
    monkeypatch.setattr(assist, "between", lambda *_: [largest, smallest])
    monkeypatch.setattr(assist, "accuracy", lambda *_: next(found))
    student, out = storage.storage.path("students", "place-5"), storage.storage.path("students", "tried")
    arguments = ["--assistants", "auto", "--steps", "8", "--batch-size", "16", "--weights", "inherited"]
    main(["retrain", str(student), *arguments, "--out", str(out)])
    one, other = storage.space.code(largest), storage.space.code(smallest)
    assert calls == [
        (f"short-{one}", 2, "fresh", "teacher"),
        (f"short-{one}-student", 2, "fresh", f"short-{one}"),
        (f"short-{other}", 2, "fresh", "teacher"),
        (f"short-{other}-student", 2, "fresh", f"short-{other}"),
        (f"trained-{other}", 8, "fresh", "teacher"),
        ("tried", 8, "inherited", f"trained-{other}"),
    ]


def test_assistants_trained_otherwise_are_not_taken_for_these(storage, capsys):
    code = storage.space.code(storage.space.largest)
    retrained(storage, "once", code)
    student, out = storage.storage.path("students", "place-5"), storage.storage.path("students", "once")
    with pytest.raises(SystemExit):
        main(
            [
                "retrain",
                str(student),
                "--assistants",
                code,
                "--steps",
                "5",
                "--batch-size",
                "16",
                "--force",
                "--out",
                str(out),
            ]
        )
    assert "other settings" in capsys.readouterr().err


def test_a_code_of_another_space_is_refused(storage, capsys):
    with pytest.raises(SystemExit):
        retrained(storage, "wrong", "999")
    assert "999" in capsys.readouterr().err


def refused(storage, capsys, *options):
    out = storage.storage.path("students", "refused")
    with pytest.raises(SystemExit) as stopped:
        main(["retrain", str(storage.storage.path("students", "place-5")), *options, "--out", str(out)])
    assert stopped.value.code == 2 and not out.with_name("refused-assistants").exists()
    return capsys.readouterr().err


def test_an_assistant_smaller_than_the_student_or_larger_than_the_one_before_is_refused(storage, capsys):
    space = storage.space
    student = read_student(storage.storage.path("students", "place-5"))[1].cost.macs
    smallest, largest = space.code(space.smallest), space.code(space.largest)
    middle = space.code(assist.between(space, student, 0)[0])
    said = refused(storage, capsys, "--assistants", smallest)
    assert f"at least the student's {student:,} MACs, got {smallest}" in said and "largest first" in said
    assert f"got {largest} with" in refused(storage, capsys, "--assistants", f"{middle},{largest}")


@pytest.mark.parametrize("how", [("--teacher", "none"), ("--distiller", "mutual"), ("--distiller", "born_again")])
def test_assistants_whom_nobody_asks_are_not_trained(storage, capsys, how):
    assert "needs a distiller that uses a teacher" in refused(storage, capsys, "--assistants", "auto", *how)


def test_what_a_kill_left_beside_a_finished_assistant_is_removed(storage):
    code = storage.space.code(storage.space.largest)
    out = retrained(storage, "tidy", code)
    folder = out.parent / "tidy-assistants"
    left = folder / f".trained-{code}.0123456789ab.draft.safetensors"
    left.write_text("unfinished")
    retrained(storage, "tidy", code)
    assert not left.exists() and not list(folder.glob(".*"))


def test_three_sizes_are_evenly_spread_in_the_logarithm_of_the_macs():
    space = load_space("digits")
    least, most = (math.log(cost(space.blueprint(a)).macs) for a in (space.smallest, space.largest))
    sizes = [math.log(cost(space.blueprint(a)).macs) for a in assist.between(space, round(math.exp(least)), 0)]
    assert [(size - least) / (most - least) for size in sizes] == pytest.approx([0.25, 0.5, 0.75], abs=0.05)


def test_sizes_lie_between_student_and_largest(storage):
    space = storage.space
    least = cost(space.blueprint(space.smallest)).macs
    sizes = [cost(space.blueprint(a)).macs for a in assist.between(space, least, 0)]
    assert sizes == sorted(sizes) and least < sizes[0] and sizes[-1] < cost(space.blueprint(space.largest)).macs
