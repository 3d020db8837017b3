import json
import subprocess
import sys

import pytest

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.runs.files import Damaged
from kdnas.runs.folder import MANIFEST, METRICS, RANKING, RESULTS, OtherSettings, RunFolder

JOB = {"steps": 3, "space": {"family": "toy"}}


def entry(code):
    return Entry(Architecture({"a": 1}), code, 0.5, {"x": 1.0}, 1, 2, 3, 0.1, "rdm", "evolution", 1)


def test_a_run_is_created_once_and_opened_again_by_the_same_job(tmp_path):
    run = RunFolder.create(tmp_path / "r", JOB, 7)
    run.finish("train", seconds=1.0)
    again = RunFolder.create(tmp_path / "r", JOB, 7)
    assert again.phase("train") == {"seconds": 1.0}
    assert set(again.manifest) >= {"kdnas", "torch", "python", "commit", "seed", "created", "job", "phases"}
    assert again.manifest["seed"] == 7


def begun(folder, job):
    """A run in which something was trained."""
    run = RunFolder.create(folder, job, 0)
    run.path("checkpoint.safetensors").write_bytes(b"")
    return run


def test_another_job_in_the_same_folder_is_refused_naming_the_difference(tmp_path):
    begun(tmp_path, JOB)
    with pytest.raises(OtherSettings, match=r"with other settings: steps is 3 there and 4 here\. Use") as refused:
        RunFolder.create(tmp_path, {**JOB, "steps": 4}, 0)
    assert refused.value.differences == [("steps", 3, 4)]


def test_a_difference_deep_in_a_job_is_named_by_its_path(tmp_path):
    begun(tmp_path, {"grow": {"space": {"widths": [4, 8]}, "num_members": 2}})
    with pytest.raises(OtherSettings, match=r"grow.num_members is 2 there and 3 here"):
        RunFolder.create(tmp_path, {"grow": {"space": {"widths": [4, 8]}, "num_members": 3}}, 0)
    with pytest.raises(OtherSettings, match=r"grow.space.widths is 4, 8 there and none here \(2 settings differ\)"):
        RunFolder.create(tmp_path, {"grow": {"space": {}, "num_members": 3}}, 0)


def test_settings_are_named_as_people_write_them(tmp_path):
    rdm = {"make": "kdnas.scorers.rdm:Rdm", "arguments": {"compare": ["a", "b"], "share": 0.5}}
    begun(tmp_path, {"scorer": rdm})
    with pytest.raises(OtherSettings, match=r"scorer is rdm,compare=a, b,share=0\.5 there and accuracy here"):
        RunFolder.create(tmp_path, {"scorer": {"make": "kdnas.scorers.accuracy:Accuracy", "arguments": {}}}, 0)


def test_a_run_that_failed_before_anything_was_trained_is_replaced(tmp_path):
    RunFolder.create(tmp_path, JOB, 0).metrics("teacher").write(step=0, value=1.0)
    run = RunFolder.create(tmp_path, {**JOB, "steps": 4}, 0)
    assert run.manifest["job"]["steps"] == 4 and not run.path(METRICS).exists()


@pytest.mark.parametrize("what", ["phase", "search", "file", "folder"])
def test_a_run_in_which_something_was_done_is_not_replaced(tmp_path, what):
    run = RunFolder.create(tmp_path, JOB, 0)
    if what == "phase":
        run.finish("teacher", seconds=1.0)
    elif what == "search":
        run.manifest["searches"].append({})
        run.save()
    else:
        (run.path("teacher").mkdir if what == "folder" else run.path("notes").touch)()
    with pytest.raises(OtherSettings):
        RunFolder.create(tmp_path, {**JOB, "steps": 4}, 0)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("work of years")
    with pytest.raises(ValueError, match=r"holds something else \(thesis.tex\)"):
        RunFolder.create(tmp_path, JOB, 0)
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", JOB, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run"):
        RunFolder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"there is no run in .*: it has no run\.json"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").write_text('{"job": ')
    with pytest.raises(ValueError, match="damaged"):
        RunFolder(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        RunFolder(tmp_path)


def test_a_phase_that_is_not_finished_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="Run: kdnas train X"):
        RunFolder.create(tmp_path, JOB, 0).require("train", "kdnas train X")


def test_metrics_of_steps_taken_again_are_replaced(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    metrics = run.metrics("train")
    for step in range(5):
        metrics.write(step=step, value="first")
    other = run.metrics("teacher")
    other.write(step=0, value="other")
    run.metrics("train", before=3).write(step=3, value="again")
    lines = [(m["phase"], m["step"], m["value"]) for m in run.lines(METRICS)]
    assert lines == [
        ("train", 0, "first"),
        ("train", 1, "first"),
        ("train", 2, "first"),
        ("teacher", 0, "other"),
        ("train", 3, "again"),
    ]


def test_a_ranking_survives_a_last_line_cut_short(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.append([entry("a"), entry("b")])
    path = run.path(RANKING)
    path.write_text(path.read_text()[:-20])
    assert [e.code for e in run.ranking()] == ["a"]
    run.append([entry("c")])
    assert [e.code for e in run.ranking()] == ["a", "c"]
    assert run.ranking(1)[0] == entry("a")
    assert run.ranking(2) == []


def test_no_flipped_bit_changes_a_line_unseen(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.append([entry("a"), entry("b")])
    path, entries = run.path(RANKING), run.ranking()
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        bit = place % 8
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            assert run.ranking() == entries, (place, bit)
        except ValueError as error:
            refused += 1
            assert "ranking.jsonl, line " in str(error) and len(str(error)) < 500
    assert refused > 0.9 * len(content)


@pytest.mark.parametrize("left", [0, 1, None])
def test_lines_that_are_missing_are_reported(tmp_path, log, left):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.append([entry("a"), entry("b")])
    run.finish("search")
    run.append([entry("c")])  # more than the manifest knows of
    assert len(RunFolder(tmp_path).ranking()) == 3 and not log.records
    path = run.path(RANKING)
    if left is None:
        path.unlink()
    else:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:left]))
    assert len(RunFolder(tmp_path).ranking()) == (left or 0)
    words = f"{2 - (left or 0)} of 2 lines are missing."
    assert [record.getMessage() for record in log.records] == [f"{path}: {words}"]
    lenient = RunFolder(tmp_path, strict=False)
    lenient.ranking()
    assert lenient.problems == [f"{RANKING}: {words}"]


def test_metrics_that_are_taken_again_are_not_missing(tmp_path, log):
    run = RunFolder.create(tmp_path, JOB, 0)
    for count in (5, 2):
        metrics = run.metrics("train", before=0)
        for step in range(count):
            metrics.write(step=step, value=1.0)
        run.finish("train")
    assert len(RunFolder(tmp_path).lines(METRICS)) == 2 and not log.records


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.path(RANKING).write_text('{"a": \n' + json.dumps(entry("b").to_json()) + "\n")
    with pytest.raises(ValueError, match="line 1, is damaged"):
        run.ranking()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"colour": 1}, "it has the unknown key 'colour'"),
        ({"macs": None}, "its 'macs' must be a whole number, got None"),
        ({"score": "high"}, "its 'score' must be a number, got 'high'"),
        ({"score": float("nan")}, "its 'score' must be finite, got nan"),
        ({"architecture": [1]}, "its 'architecture' must be an object, got \\[1\\]"),
        ({"params": True}, "its 'params' must be a whole number, got True"),
    ],
)
def test_a_line_that_is_no_entry_is_named_with_its_fault(tmp_path, change, problem):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.append([entry("a")])
    run.add(RANKING, [entry("b").to_json() | change])
    with pytest.raises(ValueError, match=f"ranking.jsonl, line 2, is damaged: {problem}"):
        run.ranking()


def test_a_line_without_a_value_is_named(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    line = entry("a").to_json()
    del line["score"]
    run.add(RANKING, [line])
    with pytest.raises(ValueError, match="line 1, is damaged: it has no 'score'"):
        run.ranking()


def test_results_keep_one_row_per_name_and_all_controls(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.record_result({"name": "teacher", "accuracy": 0.5})
    run.record_result({"name": "student", "accuracy": 0.6})
    run.record_result({"name": "student", "accuracy": 0.7})
    run.record_controls({"tau macs": {"value": 0.1}})
    run.record_controls({"random": {"value": 0.2}})
    assert [(r["name"], r["accuracy"]) for r in run.results()["rows"]] == [("teacher", 0.5), ("student", 0.7)]
    assert set(run.results()["controls"]) == {"tau macs", "random"}


def test_a_reader_that_is_not_strict_leaves_out_what_is_damaged_and_names_it(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.append([entry("a"), entry("b")])
    run.path(RANKING).write_text('{"a": \n[1]\n\n' + run.path(RANKING).read_text() + '{"code"')
    run.path(RESULTS).write_text("[]")
    run.path(MANIFEST).write_bytes(b'{"job": "\xff"}')
    tolerant = RunFolder(tmp_path, strict=False)
    assert tolerant.manifest == {} and tolerant.results() == {"rows": [], "controls": {}}
    assert [line["code"] for line in tolerant.lines(RANKING)] == ["a", "b"]
    unreadable, other, cut = tolerant.problems
    assert unreadable.startswith("run.json cannot be read (") and unreadable.endswith("; it is left out.")
    assert other == "results.json holds no JSON object; it is left out."
    assert cut == "ranking.jsonl: 3 of 5 lines cannot be read and are left out."


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"rows": []}', '{"rows": {}, "controls": {}}', '{"rows": [], "controls": 1}']
)
def test_a_strict_reader_refuses_damaged_results(tmp_path, content):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.path(RESULTS).write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is damaged: .* Remove it; the next phase writes it anew"):
        run.results()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc", "a\0", ".."])
def test_no_name_in_a_file_leads_out_of_its_run(tmp_path, name):
    run = RunFolder.create(tmp_path / "run", JOB, 0)
    with pytest.raises(Damaged, match="which leads out of it"):
        run.path("students", name)


def test_what_a_record_lacks_is_a_damage_of_the_manifest(tmp_path):
    run = RunFolder.create(tmp_path, JOB, 0)
    run.finish("search", seconds=1.0)
    run.manifest["searches"] = [{"state": "done"}]
    for read in (lambda: run.require("search", "")["search"], lambda: run.search(1)["settings"]):
        with pytest.raises(
            Damaged, match=r"run\.json is damaged: it has no '(phases\.search\.search|searches\.0\.sett)"
        ):
            read()
    for number in (0, 2):
        with pytest.raises(Damaged, match=f"has no search {number}"):
            run.search(number)


def test_a_folder_that_is_not_there_is_empty_to_a_reader_that_is_not_strict(tmp_path):
    run = RunFolder(tmp_path / "none", strict=False)
    assert run.manifest == {} and run.lines(METRICS) == [] and run.problems == []


@pytest.mark.parametrize("module", ["kdnas.runs.folder", "kdnas.report"])
def test_reading_a_run_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
