"""Runs without a supernet: candidates are trained by themselves."""

import dataclasses

import pytest
import torch
from scipy.stats import kendalltau

from kdnas.cli.commands import main
from kdnas.jobs._arguments import load_experiment
from kdnas.jobs._run import Run
from kdnas.jobs.export import place_of
from kdnas.ranking import controls
from kdnas.ranking.order import ranked
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment
from kdnas.students.folder import read_student
from tests.killing import no_graph  # noqa: F401


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    main(["run", "--experiment", "tests/toy.py:alone", "--out", str(folder)])
    return folder


def test_the_whole_chain_runs_without_a_supernet(alone):
    storage = RunFolder(alone)
    assert "train" not in storage.manifest["phases"]
    assert {"teacher", "search", "export", "student", "control"} <= set(storage.manifest["phases"])
    assert not (alone / "checkpoint.safetensors").exists()
    entries = storage.ranking(1)
    assert len({e.score for e in entries}) > 1


def test_its_supernet_has_shapes_and_no_weights(alone):
    run = Run(alone)
    assert {p.device for p in run.supernet.parameters()} == {torch.device("meta")}


def test_a_scorer_that_looks_at_weights_is_refused(alone, capsys):
    with pytest.raises(SystemExit):
        main(["search", str(alone), "--scorer", "accuracy"])
    assert "the scorer accuracy needs trained supernet weights" in capsys.readouterr().err


def test_a_supernet_free_experiment_is_the_same_after_json():
    made = load_experiment("tests/toy.py:alone")
    assert Experiment.from_json(made.to_json()) == made


def test_weights_cannot_be_inherited_from_no_supernet():
    made = load_experiment("tests/toy.py:alone")
    with pytest.raises(ValueError, match="there is no supernet"):
        dataclasses.replace(made, retrain=dataclasses.replace(made.retrain, weights="inherited"))


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "contrasted"
    main(["run", "--experiment", "tests/toy.py:contrasted", "--out", str(folder)])
    return folder


def test_the_same_search_under_another_score_stands_beside_it(contrasted):
    storage = RunFolder(contrasted)
    entries = storage.ranking(1)
    own = [e for e in entries if not e.is_control]
    other = [e for e in entries if e.searcher == "contrast"]
    assert len(own) == len(other) == 6
    control = storage.results()["controls"]["contrast"]
    networks = {e.architecture for e in own} | {e.architecture for e in other}
    run = Run(contrasted)
    evidence, settings = run.evidence(30, 0), run.experiment.search
    scores = [
        [run.scorer(scorer).score(run.supernet.extract(a), evidence).value for a in networks]
        for scorer in (settings.scorer, settings.contrast)
    ]
    assert control["networks"] == len(networks)
    assert control["value"] == pytest.approx(kendalltau(*scores).statistic)
    assert control["interval"][0] <= control["value"] <= control["interval"][1]
    assert ranked(other)[0].code == control["code"]
    assert "FromLabels" in control["sentence"]
    # The contrast's student is trained too, unless it is the same network.
    names = {row["name"] for row in storage.results()["rows"]}
    card = read_student(contrasted / "students" / "student")[1]
    assert ("contrast" in names) == (card.architecture != ranked(other)[0].architecture)


def test_the_comparison_of_scores_obeys_the_time_too(contrasted, monkeypatch):
    run = Run(contrasted)
    settings = run.experiment.search
    own, other = ([e for e in run.storage.ranking(1) if (e.searcher == "contrast") == c] for c in (False, True))
    apart = [e for e in own if e.architecture not in {o.architecture for o in other} and not e.is_control]
    scored = []
    monkeypatch.setattr(controls, "score_all", lambda *arguments: scored.append(arguments))
    scorers = run.scorer(settings.scorer), run.scorer(settings.contrast)
    found = controls.contrast(apart, other, scorers, "another", run.supernet, run.evidence(30, 0), 0.0)
    assert "time was over with 0 networks" in found["sentence"]
    assert scored == []


def test_the_first_batch_is_the_same_under_both_scores(contrasted):
    entries = RunFolder(contrasted).ranking(1)
    first = {e.architecture for e in [e for e in entries if not e.is_control][:2]}
    assert first & {e.architecture for e in entries if e.searcher == "contrast"}


def test_the_controllers_curves_are_in_the_metrics_and_the_report(contrasted):
    lines = [m for m in RunFolder(contrasted).lines("metrics.jsonl") if m["phase"] == "search 1"]
    assert [m["step"] for m in lines] == sorted(m["step"] for m in lines)
    assert lines[-1]["step"] == 6
    assert all(0 < m["trace"]["unique"] <= 1 and m["trace"]["entropy"] >= 0 for m in lines)
    page = (contrasted / "report.html").read_text()
    assert "entropy" in page and "unique" in page


def test_the_place_of_a_student_counts_the_searchs_own_networks_alone(contrasted):
    run = Run(contrasted)
    own = ranked([e for e in run.storage.ranking(1) if not e.is_control])
    assert place_of(run, 1) == own[0]
    with pytest.raises(ValueError, match="`place` must be between 1 and 6, got 7"):
        place_of(run, 7)
