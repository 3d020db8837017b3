"""Searches whose scores several processes compute: each candidate once, the ranking that of one process."""

import contextlib
import dataclasses
import random
import shutil
import sqlite3
import threading
import time

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from sqlalchemy import event

from kdnas.cli.commands import main
from kdnas.jobs import _board, _storage, _workers
from kdnas.jobs._board import Board
from kdnas.jobs._run import Run, insisting
from kdnas.jobs._scoring import answer, split
from kdnas.jobs._shared import SharedSearch, scores
from kdnas.jobs._storage import opened
from kdnas.jobs._trainings import one_thread
from kdnas.jobs.search import search, shared_search
from kdnas.jobs.train import train
from kdnas.scorers.base import LayerCount, tree_order
from kdnas.specs import find_spec, spec
from tests.toy import by_params, experiment

IN_PLACE, NWOT = (find_spec("kdnas.scorers", name) for name in ("in_place", "nwot"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base, folder = by_params(), tmp_path_factory.mktemp("shared") / "run"
    with insisting(True):  # the teacher has random weights
        train(
            dataclasses.replace(base, train=dataclasses.replace(base.train, distiller=experiment().train.distiller)),
            folder,
        )
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Run(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def settings(trained):
    given = Run(trained).experiment.search
    return dataclasses.replace(given, scorer=IN_PLACE, contrast=NWOT, num_evaluations=12, num_images=16)


@pytest.fixture(scope="module")
def alone(trained, settings, tmp_path_factory):
    """The ranking of one process."""
    with one_thread():
        return facts(search(Run(shutil.copytree(trained, tmp_path_factory.mktemp("alone") / "run")), settings))


@pytest.fixture
def quick(monkeypatch):
    """A process is dead after a fifth of a second."""
    for name, value in {"_BEAT": 0.02, "_DEAD": 0.2, "_WAIT": (0.005, 0.01)}.items():
        monkeypatch.setattr(_board, name, value)


def facts(entries):
    return [(e.code, e.score, e.parts, e.searcher) for e in entries]


def parts_of(storage):
    trials = storage.get_all_trials(storage.get_all_studies()[0]._study_id)
    return [trial for trial in trials if "part" in trial.user_attrs]


def by_length(log):
    """A score that needs no network, and a list of what was scored."""

    def score(name, codes):
        log.extend((name, code) for code in codes)
        return {"scores": [[float(sum(map(ord, code))), {}, 1.0] for code in codes], "layers": [2 * len(codes), 3]}

    return score


def shared(board, run, log):
    return SharedSearch(board, run.space, scores(by_length(log)))


def test_workers_give_the_ranking_of_one_process(run, settings, alone, monkeypatch):
    class InThisProcess:
        def __init__(self, opened, *_):
            self.run = Run(opened.folder)

        def conversation(self, request):
            yield {"end": answer(self.run, request, None)}

        def kill(self):
            pass

        close = kill

    monkeypatch.setattr(_workers, "_Worker", InThisProcess)
    assert facts(search(run, settings, workers=2)) == alone
    assert "layer evaluations instead of" in run.storage.phase("search")["saved"]


def test_parts_are_neighbours_in_the_choice_tree(run):
    space = run.space
    candidates = list(dict.fromkeys(space.sample(random.Random(seed)) for seed in range(30)))
    parts = split(space, candidates, 4)
    assert [index for part in parts for index in part] == tree_order(space, candidates)
    assert len(parts) == 4 and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert split(space, candidates[:2], 4) == [[index] for index in tree_order(space, candidates[:2])]


@pytest.mark.parametrize("change", [{"exact": True}, {"pruner": spec("optuna.pruners:MedianPruner")}])
def test_what_takes_one_step_after_another_is_not_shared(run, settings, change, tmp_path):
    other = dataclasses.replace(settings, **change)
    with pytest.raises(ValueError, match="`workers` does not go with a"):
        search(run, other, workers=2)
    with pytest.raises(ValueError, match="`storage` does not go with a"):
        shared_search(run, other, f"sqlite:///{tmp_path}/s.db")


def test_two_processes_score_every_candidate_once(run, quick):
    storage, logs = InMemoryStorage(), ([], [])
    first, second = Board(storage, "search"), Board(storage, "search")
    assert first.leads and not second.leads and first.parallel == 2
    follower = threading.Thread(target=second.follow, args=(scores(by_length(logs[1])),))
    follower.start()
    candidates = list(dict.fromkeys(run.space.sample(random.Random(seed)) for seed in range(40)))
    codes, count = [run.space.code(a) for a in candidates], LayerCount()
    evaluate = shared(first, run, logs[0]).of("search")
    values = evaluate(candidates[:25], count) + evaluate(candidates, count)
    first.close(TrialState.COMPLETE)
    follower.join(5)
    assert not follower.is_alive()
    assert [score.value for score in values] == [float(sum(map(ord, code))) for code in [*codes[:25], *codes]]
    assert sorted(logs[0] + logs[1]) == sorted(("search", code) for code in codes)
    assert count.evaluated == 2 * len(codes) and all(t.state == TrialState.COMPLETE for t in parts_of(storage))


def test_a_part_of_a_dead_process_is_scored_by_another_and_what_it_says_later_is_dropped(run, quick):
    storage, log = InMemoryStorage(), []
    leader, lost = Board(storage, "search"), Board(storage, "search")
    candidates = list(run.space.sample(random.Random(seed)) for seed in range(3))
    codes = list(dict.fromkeys(run.space.code(a) for a in candidates))
    leader.post({"score": "search", "codes": codes})
    search = shared(leader, run, log)

    def dies(request, number):
        lost._ended.set()  # no more signs of life
        time.sleep(0.05)
        assert search.of("search")(candidates[:1], LayerCount())
        return by_length([])(request["score"], ["another"] * len(request["codes"]))

    assert lost.work(dies)
    assert log and {t.state for t in parts_of(storage)} == {TrialState.COMPLETE, TrialState.FAIL}
    assert ("search", "another") not in search.scores


def test_a_search_goes_on_with_the_scores_that_are_in_the_storage(run, quick):
    storage, log = InMemoryStorage(), []
    candidates = [run.space.smallest, run.space.largest]
    board = Board(storage, "search")
    first = shared(board, run, log).of("search")(candidates, LayerCount())
    board.close(TrialState.FAIL)
    later = Board(storage, "search")
    assert later.leads
    assert shared(later, run, log).of("search")(candidates, LayerCount()) == first and len(log) == 2
    assert shared(later, run, log).of("contrast")(candidates, LayerCount()) == first and len(log) == 4


IDLE = scores(by_length([]))


def test_a_process_leads_where_the_first_is_not_heard_of_and_ends_where_it_was_stopped(run, quick):
    storage = InMemoryStorage()
    leader, follower = Board(storage, "search"), Board(storage, "search")
    leader.close(TrialState.FAIL)
    with pytest.raises(ValueError, match=r"the process that leads this command was stopped\. Start the same command"):
        follower.follow(IDLE)
    follower.close(TrialState.FAIL)
    silent, second, third = (Board(storage, "search") for _ in range(3))
    assert (silent.leads, second.leads, third.leads) == (True, False, False)
    silent._ended.set()
    outcomes = {}
    thread = threading.Thread(target=lambda: outcomes.update(third=third.follow(IDLE)))
    thread.start()
    assert not second.follow(IDLE) and second.leads
    second.close(TrialState.COMPLETE)
    thread.join(5)
    assert outcomes == {"third": True}
    with pytest.raises(ValueError, match="this process was not heard of for 0 seconds, so that another one leads"):
        silent.parts()


def test_a_result_that_is_none_is_computed_again(run, quick, caplog):
    storage, log = InMemoryStorage(), []
    board = Board(storage, "search")
    code = run.space.code(run.space.smallest)
    for result in ({}, {"scores": [], "layers": [0, 0]}, {"scores": 3, "layers": [0, 0]}, "text"):
        attributes = {"part": {"score": "search", "codes": [code]}, "result": result}
        storage.create_new_trial(board._study, optuna.trial.create_trial(value=0.0, user_attrs=attributes))
    assert shared(board, run, log).of("search")([run.space.smallest], LayerCount())
    assert len(log) == 1 and caplog.text.count("holds no scores") == 4


def test_a_storage_that_is_away_for_a_while_is_waited_for(quick, monkeypatch, caplog):
    board, calls = Board(InMemoryStorage(), "search"), []
    monkeypatch.setattr(_board.time, "sleep", calls.append)

    def away(times):
        if len(calls) < times:
            raise StorageInternalError("An exception is raised during the commit.") from OSError("no route\nto host")
        return "there"

    assert board._call(away, 4) == "there" and calls == [0.5, 1.0, 2.0, 4.0]
    assert caplog.text.count("the storage does not answer (no route); it is tried again for five minutes.") == 1
    monkeypatch.setattr(_board, "_PATIENCE", -1.0)
    with pytest.raises(ValueError, match=r"the storage does not answer \(no route\). Once it does"):
        board._call(away, 9)


def test_an_error_that_does_not_pass_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_board.time, "sleep", lambda seconds: pytest.fail("it is waited for"))
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("CREATE TABLE studies (x INTEGER)")
    refused = pytest.raises(
        ValueError, match="the storage cannot be used: table studies has no column named study_name"
    )
    with refused, opened(f"sqlite:///{tmp_path}/a.db") as storage:
        Board(storage, "search")


def test_a_full_disk_is_said_at_once_and_the_command_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.setattr(_board.time, "sleep", lambda seconds: None)  # Optuna tries five times
    monkeypatch.setattr(_board, "_PATIENCE", -1.0)
    url = f"sqlite:///{tmp_path}/s.db"
    with opened(url) as storage:
        board, engine = Board(storage, "search"), storage._backend.engine

        @event.listens_for(engine, "connect")
        def is_full(connection, _):
            connection.execute("PRAGMA max_page_count = 1")  # as if no page could be added

        engine.dispose()
        said = r"the storage cannot be used: database or disk is full\. Make room there; the same command goes on\."
        with pytest.raises(ValueError, match=said):
            board.post({"score": "search", "codes": ["x" * 100_000]})
        board._ended.set()
    with _board.joined(url, "search") as later:
        later.post({"score": "search", "codes": ["x" * 100_000]})
        assert len(later.parts()) == 1


def test_no_connection_is_open_after_a_search_whether_it_ends_well_or_not(tmp_path):
    for error in (None, ValueError("it failed")):
        with contextlib.suppress(ValueError), _board.joined(f"sqlite:///{tmp_path}/s.db", "search") as board:
            pool = board.storage._backend.engine.pool
            assert pool.checkedin()
            if error is not None:
                raise error
        assert not board._life.is_alive() and not pool.checkedout()
        assert board.storage._backend.engine.pool is not pool and not pool.checkedin()


def test_of_two_processes_that_claim_a_part_at_once_on_sqlite_one_gets_it(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    with _board.joined(url, "search") as one, _board.joined(url, "search") as two:
        one.post({"score": "search", "codes": ["x"]})
        (part,) = [t for t in one._trials() if "part" in t.user_attrs]
        claims, threads = [], []
        two._id(part.number)

        @event.listens_for(one.storage._backend.engine, "after_cursor_execute")
        def meanwhile(connection, cursor, statement, *rest):
            """Right after the first has read that the part is free, the second claims it."""
            if "trials.state" in statement and not threads:
                threads.append(threading.Thread(target=lambda: claims.append(two._claim(part))))
                threads[0].start()
                threads[0].join(0.3)

        claims.append(one._claim(part))
        threads[0].join(30)
    assert sorted(claims) == [False, True]


def old_tables(folder):
    with opened(f"sqlite:///{folder}/old.db"):
        pass
    with sqlite3.connect(folder / "old.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.execute("UPDATE version_info SET schema_version = 1, library_version = '0.1.0'")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "must be a URL such as sqlite:///search.db"),
        ("search.db", "must be a URL such as sqlite:///search.db"),
        ("nosuch://host/name", "no database is called nosuch"),
        ("sqlite:////no/such/folder/s.db", "unable to open database file. Check server, name and password."),
        ("sqlite:///{}/old.db", "has tables of another version of Optuna"),
        ("sqlite:///{}/other.db", "must be a database of Optuna's alone, it has the table bookmarks"),
        ("sqlite:///{}/text.db", "file is not a database"),
        ("mysql//me:secret@h/db?password=secret", "must be a URL such as"),
        ("mysql:/me:secret@h/se:cret@h", "must be a URL such as"),
        ("postgresql://me:secret@h:port/db", "must be a URL such as"),
        ("mysql+pymysql://me@127.0.0.1:1/name?password=secret", "pymysql"),
        ("mysql://me@127.0.0.1:1/name", "pymysql"),
        ("oracle+nosuchdriver://me@127.0.0.1:1/name", "no database is called oracle+nosuchdriver"),
        ("mysql+pymysql://me:secret@127.0.0.1:1/name", "pymysql"),
        ("grpc://127.0.0.1:1", "grpc"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(url, said, tmp_path, monkeypatch):
    old_tables(tmp_path)
    (tmp_path / "text.db").write_text("no database " * 99)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE bookmarks (x INTEGER)")
    monkeypatch.setattr(_storage, "_ANSWER", 0.1)
    with pytest.raises(ValueError) as error, opened(url.format(tmp_path)):
        pass
    assert said in str(error.value) and "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workers", "2", "--storage", "sqlite:///s.db"], "`--workers` does not go with --storage"),
        (["--trainings", "3", "--workers", "2", "--storage", "sqlite:///s.db"], "`--workers` does not go with"),
        (["--storage", "s.db"], "must be a URL"),
        (["--workers", "10000000"], "`--workers` must be at most 1024, got 10000000"),
    ],
)
def test_the_command_line_refuses_what_cannot_be_shared(run, options, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["search", str(run.folder), *options])
    assert end.value.code == 2 and said in capsys.readouterr().err
