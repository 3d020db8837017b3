"""Trainings side by side: the same numbers as one after another, whatever becomes of the processes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdnas.jobs import _workers
from kdnas.jobs._memory import keep
from kdnas.jobs._run import Run, insisting
from kdnas.jobs._trainings import Trainings, one_thread
from kdnas.jobs._workers import Wire, Workers, check_workers, default_workers
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.runs.folder import RunFolder
from kdnas.settings import Finals
from tests.toy import SealedImages, by_params


class Process:
    """A process that answers what it is told to, and then ends."""

    def __init__(self, answers):
        self.answers = answers

    def kill(self):
        pass

    close = kill

    def conversation(self, request):
        yield from self.answers[request["name"]]


@pytest.fixture
def processes(monkeypatch):
    """Every process that is started answers with the next of these."""
    listed = []
    monkeypatch.setattr(_workers, "_Worker", lambda *_: Process(listed.pop(0)))
    return listed


def run_of(tmp_path, **job):
    (tmp_path / "run").mkdir()
    manifest = {"format": 1, "job": job, "phases": {}, "searches": []}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    return Run(tmp_path / "run")


def test_answers_come_in_the_order_of_the_requests_and_the_rest_is_told(tmp_path, processes):
    told = []
    both = {"a": [{"step": 1}, {"row": 2}, {"end": "A"}], "b": [{"end": "B"}]}
    processes += [both, both]
    with Workers(run_of(tmp_path), 2) as workers:
        answers = workers.answers([{"name": "a"}, {"name": "b"}], told.append)
    assert answers == [{"end": "A"}, {"end": "B"}] and told == [{"step": 1}, {"row": 2}]


def test_what_a_killed_process_was_asked_is_asked_again_and_once_only(tmp_path, processes):
    processes += [{"a": [{"step": 1}]}, {"a": [{"end": "A"}]}]
    run = run_of(tmp_path)
    with Workers(run, 1) as workers:
        assert workers.answers([{"name": "a"}], lambda _: None) == [{"end": "A"}]
    processes += [{"a": []}, {"a": []}]
    with Workers(run, 1) as workers, pytest.raises(ValueError, match="the process that works on a was killed 2 times"):
        workers.answers([{"name": "a"}], lambda _: None)


@pytest.mark.parametrize(("message", "error"), [({"refusal": "no."}, ValueError), ({"error": "Trace"}, RuntimeError)])
def test_what_a_process_raises_is_raised_here(tmp_path, processes, message, error):
    processes.append({"a": [message]})
    with Workers(run_of(tmp_path), 1) as workers, pytest.raises(error, match=next(iter(message.values()))):
        workers.answers([{"name": "a"}], lambda _: None)


def test_a_worker_waits_until_what_it_tells_is_recorded(tmp_path):
    order = []
    wire = Wire(SimpleNamespace(write=order.append, flush=lambda: None), lambda: order.append("recorded"))
    metrics = wire.metrics("finalist-1", 3)
    metrics.write(step=4)
    assert [json.loads(text) for text in order[::2]] == [
        {"metrics": "finalist-1", "before": 3},
        {"line": {"step": 4}, "phase": "finalist-1"},
    ]
    assert order[1::2] == ["recorded", "recorded"]


def test_objects_of_this_process_are_trained_here(tmp_path):
    run = run_of(tmp_path, teacher=keep(nn.Linear(1, 1)).to_json())
    with one_thread():
        assert default_workers(run) == check_workers(run, None) == 1
    with pytest.raises(ValueError, match="`workers` must be 1 where the teacher or the data are objects"):
        check_workers(run, 2)


def test_trainings_that_the_processes_of_torchrun_share_go_one_after_another(tmp_path, monkeypatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert default_workers(run) == 2
    monkeypatch.setattr("kdnas.jobs._workers.number", lambda: 2)
    assert default_workers(run) == 1


@pytest.mark.slow
def test_results_are_those_of_one_after_another_where_a_process_ends_too(tmp_path, monkeypatch):
    with insisting(True):  # the teacher has random weights
        run = train(by_params(), tmp_path / "one")
    search(run, run.experiment.search)
    shutil.copytree(run.folder, tmp_path / "two")
    settings = Finals(controls=("labels", "random", "longer"), seeds=2)
    monkeypatch.setattr(SealedImages, "run", tmp_path / "one")
    finals(Run(tmp_path / "one"), settings, by_params().retrain, deploy=False, workers=1)
    answers, cut = Workers.answers, []

    def cut_off(workers, requests, tell):
        """The first process finds its input closed at its first row, as it does where its parent is killed."""

        def recorded(message):
            tell(message)
            if not cut:
                cut.append(workers._started[0].process.stdin.close())

        return answers(workers, requests, recorded)

    monkeypatch.setattr(Workers, "answers", cut_off)
    monkeypatch.setattr(SealedImages, "run", tmp_path / "two")
    finals(Run(tmp_path / "two"), settings, by_params().retrain, deploy=False, workers=2)
    assert cut

    def content(name):
        folder = RunFolder(tmp_path / name)
        rows = [vars(row) | {"seconds": 0} for row in Trainings(Run(tmp_path / name)).rows]
        results = [{**row, "seconds": 0} for row in folder.results()["rows"]]
        weights = {p.parent.name: p.read_bytes() for p in (tmp_path / name / "students").glob("*/weights.safetensors")}
        metrics = sorted((m["phase"], m["step"], str(m["losses"])) for m in folder.lines("metrics.jsonl"))
        return rows, results, weights, metrics

    assert content("one") == content("two")
