"""Searches and finals by processes of their own on real databases, of which some are killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from kdnas.jobs import _storage
from kdnas.jobs._board import Board, joined
from kdnas.jobs._run import Run
from kdnas.jobs._shared import SharedAnswers
from kdnas.jobs._storage import opened
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.settings import Finals
from kdnas.tables import unstructure
from tests.jobs.test_shared_search import facts, settings, trained  # noqa: F401
from tests.jobs.test_shared_trainings import content, searched  # noqa: F401
from tests.toy import SealedImages, by_params

pytestmark = pytest.mark.real

JOIN = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from kdnas.jobs._run import Run
from kdnas.jobs._shared import SharedAnswers
from kdnas.jobs import search as job
from kdnas.runs.lock import command
from kdnas.settings import Search
from kdnas.tables import structure
import json
folder, url, settings = sys.argv[1:]
plain = job.scored
def slow(run, scorer, evidence, codes):
    time.sleep(0.5 * len(codes))
    return plain(run, scorer, evidence, codes)
job.scored = slow
with command():
    job.shared_search(Run(folder), structure(json.loads(settings), Search), url)
"""


FINALS = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kdnas.jobs._run import Run
from kdnas.jobs._shared import SharedAnswers
from kdnas.jobs.finals import shared_finals
from kdnas.runs.lock import command
from kdnas.settings import Finals, Retrain
from kdnas.tables import structure
from kdnas.training import driver
from tests.toy import SealedImages
folder, url, settings, retrain = sys.argv[1:]
SealedImages.run = Path(folder)
driver.CHECKPOINT_SECONDS = 0.0
with command():
    settings, retrain = structure(json.loads(settings), Finals), structure(json.loads(retrain), Retrain)
    shared_finals(Run(folder), settings, retrain, url, deploy=False)
"""


@pytest.fixture
def server(tmp_path):
    """A PostgreSQL server: its URL, and a function that stops and starts it."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb") or (binaries and binaries[-1] / "initdb")
    if not found:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    pytest.importorskip("psycopg")
    tools, port = Path(found).resolve().parent, 20000 + os.getpid() % 20000
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # the server refuses to be run by root
    folder = Path("/tmp") / f"kdnas-postgresql-{os.getpid()}"
    folder.mkdir()
    if user:
        shutil.chown(folder, "postgres")

    def call(*words):
        subprocess.run([str(word) for word in words], check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)

    def power(on):
        options = ["-o", f"-p {port} -k {folder} -c fsync=off"] if on else ["-m", "immediate"]
        call(tools / "pg_ctl", "-D", folder / "data", "-l", folder / "log", "-w", *options, "start" if on else "stop")

    call(tools / "initdb", "-D", folder / "data", "-U", "me", "--auth", "scram-sha-256", "--pwfile", secret(folder))
    power(True)
    call("env", "PGPASSWORD=word", tools / "createdb", "-h", "127.0.0.1", "-p", port, "-U", "me", "kdnas")
    yield f"postgresql://me:word@127.0.0.1:{port}/kdnas", power
    power(False)
    shutil.rmtree(folder)


@pytest.fixture
def mysql(tmp_path):
    """The URL of a MariaDB server."""
    found = shutil.which("mariadbd") or shutil.which("mysqld")
    install = shutil.which("mariadb-install-db")
    if not (found and install):
        pytest.skip("no MariaDB server is installed: apt-get install mariadb-server")
    pytest.importorskip("pymysql")
    folder, port = Path("/tmp") / f"kdnas-mariadb-{os.getpid()}", 20000 + (os.getpid() + 1) % 20000
    common = ["--no-defaults", f"--datadir={folder}/data"]
    user = ["--user=mysql"] if os.getuid() == 0 else []
    folder.mkdir()
    if user:
        shutil.chown(folder, "mysql")
    words = [install, *common, *user, "--auth-root-authentication-method=normal"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    statements = ("CREATE DATABASE kdnas", "CREATE USER me@'127.0.0.1' IDENTIFIED BY 'word'")
    statements += ("GRANT ALL ON kdnas.* TO me@'127.0.0.1'",)
    (folder / "init.sql").write_text("".join(f"{statement};\n" for statement in statements))  # one a line
    (folder / "init.sql").chmod(0o644)
    own = [
        f"--port={port}",
        "--skip-name-resolve",
        "--bind-address=127.0.0.1",
        f"--socket={folder}/s",
        f"--init-file={folder}/init.sql",
    ]
    process = subprocess.Popen([found, *common, *user, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"mysql+pymysql://me:word@127.0.0.1:{port}/kdnas"
    try:
        waited(lambda: reaches(url))
        yield url
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def reaches(url):
    try:
        with opened(url):
            return True
    except ValueError:
        time.sleep(0.5)
        return False


@pytest.fixture
def proxy(server):
    """The URL of Optuna's proxy in front of PostgreSQL."""
    pytest.importorskip("grpc")
    port = 20000 + (os.getpid() + 2) % 20000
    code = "import sys, optuna; url, port = sys.argv[1:]; optuna.storages.run_grpc_proxy_server("
    code += "optuna.storages.RDBStorage(url), host='127.0.0.1', port=int(port))"
    url = server[0].replace("postgresql:", "postgresql+psycopg:")
    process = subprocess.Popen([sys.executable, "-c", code, url, str(port)])
    yield f"grpc://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def secret(folder):
    path = folder / "password"
    path.write_text("word")
    path.chmod(0o644)
    return path


def started(folder, url, settings):  # noqa: F811
    words = [sys.executable, "-c", JOIN, str(folder), url, json.dumps(unstructure(settings))]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def shared(run, url, settings, power=None):  # noqa: F811
    """Four processes search; one is killed with a part in its hands, and the server is away for a while."""
    with opened(url) as storage:
        Board(storage, "prepared").close(TrialState.COMPLETE)
        processes = [started(run.folder, url, settings)]
        waited(lambda: len(storage.get_all_studies()) == 2)
        study = next(s for s in storage.get_all_studies() if s.study_name != "prepared")._study_id
        processes += [started(run.folder, url, settings) for _ in range(3)]
        waited(lambda: len([t for t in storage.get_all_trials(study) if t.user_attrs.get("leads") is False]) == 3)
        os.kill(processes[1].pid, signal.SIGKILL)
        if power is not None:
            power(False)
            time.sleep(20)
            power(True)
        assert [process.wait(300) for process in processes] == [0, -signal.SIGKILL, 0, 0]
        return [t for t in storage.get_all_trials(study) if "part" in t.user_attrs]


def waited(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def check(run, parts, alone):
    complete = [
        (t.user_attrs["part"]["score"], code)
        for t in parts
        if t.state.name == "COMPLETE"
        for code in t.user_attrs["part"]["codes"]
    ]
    assert len(complete) == len(set(complete))
    assert facts(Run(run).ranking()) == alone


@pytest.fixture
def more(settings):  # noqa: F811
    return dataclasses.replace(settings, num_evaluations=60, num_images=30)


def test_sqlite(trained, more, tmp_path):  # noqa: F811
    one, four = (shutil.copytree(trained, tmp_path / name) for name in ("one", "four"))
    alone = facts(search(Run(one), more, workers=1))
    check(four, shared(Run(four), f"sqlite:///{tmp_path}/search.db", more), alone)


def test_postgresql_that_is_away_for_twenty_seconds(trained, more, tmp_path, server):  # noqa: F811
    url, power = server
    one, four = (shutil.copytree(trained, tmp_path / name) for name in ("one", "four"))
    alone = facts(search(Run(one), more, workers=1))
    check(four, shared(Run(four), url, more, power), alone)


def test_postgresql_with_a_wrong_password(server):
    said = "cannot be used: .*password authentication failed.* Check server, name"
    with pytest.raises(ValueError, match=said) as error, opened(server[0].replace(":word@", ":secret@")):
        pass
    assert "secret" not in str(error.value)


def check_finals(searched, tmp_path, url, monkeypatch):  # noqa: F811
    """Three processes train; each of them is killed in its turn, and another one started in its place."""
    one, many = (shutil.copytree(searched, tmp_path / name) for name in ("one", "many"))
    settings = Finals(controls=("labels", "random"))  # noqa: F811
    retrain = dataclasses.replace(by_params().retrain, recipe=dataclasses.replace(by_params().retrain.recipe, steps=24))
    monkeypatch.setattr(SealedImages, "run", one)
    finals(Run(one), settings, retrain, deploy=False, workers=1)
    words = [sys.executable, "-c", FINALS, str(many), url, json.dumps(unstructure(settings))]
    start = lambda: subprocess.Popen([*words, json.dumps(unstructure(retrain))])  # noqa: E731
    processes = [start()]
    waited((many / ".lock").exists)
    processes += [start(), start()]
    for place in (2, 1, 0):
        states = set(many.glob("trainings/*.log"))
        victim = processes[place]
        waited(lambda v=victim, s=states: v.poll() is not None or set(many.glob("trainings/*.log")) - s)
        victim.kill()
        victim.wait()
        processes.append(start())
    assert [process.wait(300) for process in processes[3:]] == [0, 0, 0]
    assert content(many) == content(one)


def test_finals_with_sqlite(searched, tmp_path, monkeypatch):  # noqa: F811
    check_finals(searched, tmp_path, f"sqlite:///{tmp_path}/finals.db", monkeypatch)


def test_finals_with_postgresql(searched, tmp_path, server, monkeypatch):  # noqa: F811
    check_finals(searched, tmp_path, server[0], monkeypatch)


def check_claims(url):
    """Forty parts, done by eight threads with connections of their own, each once."""
    parts, done = [f"part {number}" for number in range(40)], []
    requests = [{"kind": "training", "name": name, "step": 3} for name in parts]

    def answer(request, number):
        done.append(request["name"])
        return {"end": {"name": request["name"], "long": "x" * 30_000}}

    def follow():
        with joined(url, "claims") as board:
            board.follow(answer)

    with joined(url, "claims") as board:
        threads = [threading.Thread(target=follow) for _ in range(7)]
        for thread in threads:
            thread.start()
        ends = SharedAnswers(board, answer).answers(requests, lambda _: None)
    for thread in threads:
        thread.join(60)
    assert [end["end"]["name"] for end in ends] == parts == sorted(done, key=parts.index)


def test_claims_on_postgresql(server):
    check_claims(server[0])


def test_claims_on_mysql(mysql):
    check_claims(mysql)
    with (
        pytest.raises(ValueError, match=r"Access denied.* Check server") as error,
        opened(mysql.replace("word@", "x@")),
    ):
        pass
    assert ":x@" not in str(error.value)


def test_claims_through_a_proxy(proxy, monkeypatch):
    monkeypatch.setattr(_storage, "_ANSWER", 60.0)
    check_claims(proxy)


def test_claims_on_sqlite(tmp_path):
    check_claims(f"sqlite:///{tmp_path}/claims.db")
