"""Runs without a supernet: candidates are trained by themselves."""

import dataclasses

import pytest
import torch

from kdnas.cli import main
from kdnas.jobs.opened import Opened
from kdnas.jobs.settings import Experiment, load_experiment
from kdnas.run import Run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "alone"
    main(["run", "--experiment", "tests/toy.py:alone", "--out", str(folder)])
    return folder


def test_the_whole_chain_runs_without_a_supernet(alone):
    run = Run(alone)
    assert "train" not in run.manifest["phases"]
    assert {"teacher", "search", "export", "student", "control"} <= set(run.manifest["phases"])
    assert not (alone / "checkpoint.safetensors").exists()
    entries = run.ranking(1)
    assert len({e.score for e in entries}) > 1


def test_its_supernet_has_shapes_and_no_weights(alone):
    opened = Opened(alone)
    assert {p.device for p in opened.supernet.parameters()} == {torch.device("meta")}


def test_a_scorer_that_looks_at_weights_is_refused(alone, capsys):
    with pytest.raises(SystemExit):
        main(["search", str(alone), "--scorer", "accuracy"])
    assert "Accuracy looks at a supernet's weights" in capsys.readouterr().err


def test_a_supernet_free_experiment_is_the_same_after_json():
    made = load_experiment("tests/toy.py:alone")
    assert Experiment.from_json(made.to_json()) == made


def test_weights_cannot_be_inherited_from_no_supernet():
    made = load_experiment("tests/toy.py:alone")
    with pytest.raises(ValueError, match="no weights to inherit"):
        dataclasses.replace(made, retrain=dataclasses.replace(made.retrain, weights="inherited"))
