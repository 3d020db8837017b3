"""Trainings that processes on any hosts share: each once, and the numbers of one process, whatever becomes of some."""

import dataclasses
import json
import shutil
import threading

import pytest
from optuna.storages import InMemoryStorage

from kdnas.jobs import _board, _shared
from kdnas.jobs._board import Board
from kdnas.jobs._run import Run, insisting
from kdnas.jobs._trainings import Trainings, log_of
from kdnas.jobs.finals import finals, shared_finals
from kdnas.jobs.predict import predict, shared_predict
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.runs.folder import RunFolder
from kdnas.runs.lock import command
from kdnas.settings import Finals
from kdnas.training import driver
from tests.toy import SealedImages, by_params


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "run"
    with insisting(True):  # the teacher has random weights
        run = train(by_params(), folder)
    search(run, dataclasses.replace(run.experiment.search, num_evaluations=12))
    return folder


def content(folder):
    """All that a command recorded, without times."""
    storage = RunFolder(folder)
    rows = [vars(row) | {"seconds": 0} for row in Trainings(Run(folder)).rows]
    results = [{**row, "seconds": 0} for row in storage.results()["rows"]]
    weights = {p.parent.name: p.read_bytes() for p in folder.glob("students/*/weights.safetensors")}
    metrics = sorted((m["phase"], m["step"], str(m["losses"])) for m in storage.lines("metrics.jsonl"))
    return sorted(rows, key=str), results, weights, metrics, [e.code for e in storage.ranking()]


class Killed(BaseException):
    """The process is no more."""


@pytest.fixture
def mortal(monkeypatch):
    """The thread called `lost` dies within its first training; others train only then. An event says that it has."""
    died, answer, close = threading.Event(), _shared.answer, Board.close
    generator = threading.Lock()  # torch's own, which processes have each for itself
    monkeypatch.setattr(driver, "CHECKPOINT_SECONDS", 0.0)

    def is_lost():
        return threading.current_thread().name == "lost"

    def cut(run, request, wire):
        if is_lost():
            acknowledged, count = wire._acknowledged, iter(range(9))

            def limited():
                acknowledged()
                if next(count) == 5:
                    raise Killed

            wire._acknowledged = limited
        else:
            assert died.wait(60)
        with generator:
            return answer(run, request, wire)

    def end(board, state):
        if is_lost():  # as a kill leaves it
            record = board.storage.get_trial(board._id(board._process)).user_attrs["process"]
            board._set(board._process, "process", {**record, "started": "before"})
            board._ended.set()
            died.set()
        else:
            close(board, state)

    monkeypatch.setattr(_shared, "answer", cut)
    monkeypatch.setattr(Board, "close", end)
    return died


def test_finals_of_several_processes_of_which_one_is_lost_equal_those_of_one(searched, tmp_path, mortal, monkeypatch):
    one, many = (shutil.copytree(searched, tmp_path / name) for name in ("one", "many"))
    settings, retrain = Finals(controls=("labels",)), by_params().retrain
    monkeypatch.setattr(SealedImages, "run", one)
    alone = finals(Run(one), settings, retrain, deploy=False, workers=1)
    monkeypatch.setattr(SealedImages, "run", many)
    outcomes = {}

    def take_part():
        name = threading.current_thread().name
        try:
            url = f"sqlite:///{tmp_path}/finals.db"
            outcomes[name] = shared_finals(Run(many), settings, retrain, url, deploy=False)
        except Killed:
            outcomes[name] = None

    with command():
        threads = [threading.Thread(target=take_part, name=name) for name in ("first", "lost", "third")]
        threads[0].start()
        while not (many / ".lock").exists():
            assert threads[0].is_alive()
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join(300)
    assert outcomes["lost"] is None and outcomes["first"] == outcomes["third"]
    without = {"seconds", "student", "finalists"}
    assert {k: v for k, v in outcomes["first"].items() if k not in without} == {
        k: v for k, v in alone.items() if k not in without
    }
    assert content(many) == content(one)
    assert not list(many.glob("trainings/*.log"))


def test_a_ranking_by_trainings_equals_that_of_one(searched, tmp_path):
    one, other = (Run(shutil.copytree(searched, tmp_path / name)) for name in ("one", "other"))
    settings = one.experiment.search
    with command():
        alone = predict(one, settings, 3, quality=False, workers=1)
        shared = shared_predict(other, settings, 3, f"sqlite:///{tmp_path}/s.db", quality=False)
    assert shared == alone and content(one.folder) == content(other.folder)


def test_a_copy_of_the_folder_is_refused(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(_board, "_DEAD", 0.2)
    storage = InMemoryStorage()
    leader, other = Board(storage, "finals"), Board(storage, "finals")
    threading.Thread(target=lambda: leader._ended.wait(20)).start()
    with pytest.raises(ValueError, match=r"copy must be the folder that the leading process \d+ on .* writes"):
        other.follow(lambda request, number: {}, shutil.copytree(searched, tmp_path / "copy"))
    leader._ended.set()


def test_a_part_with_which_ten_processes_are_lost_is_given_up():
    board = Board(InMemoryStorage(), "finals")
    board.post({"kind": "training", "name": "finalist-1", "step": 3}, 9)
    with pytest.raises(
        ValueError, match=r"10 processes that worked on finalist-1 were lost, perhaps for memory\. Mend"
    ):
        board.post({"kind": "training", "name": "finalist-1", "step": 3}, 10)


def test_a_part_that_two_processes_offer_again_is_done_once():
    storage, done = InMemoryStorage(), []
    leader, other = Board(storage, "finals"), Board(storage, "finals")
    for tries in (1, 1):
        leader.post({"kind": "training", "name": "finalist-1", "step": 3}, tries)

    def both(request, number):
        assert not other.work(lambda *_: pytest.fail("it is in hands already"))
        done.append(number)
        return {"end": {}}

    assert leader.work(both) and len(done) == 1 and not leader.work(both)


def test_what_a_lost_command_left_is_recorded_by_the_next_one_however_it_is_started(searched, tmp_path):
    run = Run(shutil.copytree(searched, tmp_path / "run"))
    settings = by_params().retrain
    trainings = Trainings(run)
    with command():
        row = trainings.train("finalist", run.space.smallest, settings, 2)
        path = log_of(run, row.name, 7)
        lines = [{"metrics": row.name, "before": 2}, {"line": {"step": 2, "losses": {}}, "phase": row.name}]
        lines.append({"row": dataclasses.asdict(dataclasses.replace(row, step=4, accuracy=0.125))})
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"row": {"na')
        assert trainings.train("finalist", run.space.smallest, settings, 4).accuracy == 0.125
    assert not path.exists() and [r.step for r in Trainings(run).rows] == [0, 2, 4]


def test_a_refusal_of_one_process_is_that_of_the_command():
    board = Board(InMemoryStorage(), "finals")

    def refuses(request, number):
        raise ValueError("the teacher does not fit.")

    shared = _shared.SharedAnswers(board, refuses)
    with pytest.raises(ValueError, match="the teacher does not fit"):
        shared.answers([{"kind": "training", "name": "finalist-1", "step": None}], lambda _: None)
