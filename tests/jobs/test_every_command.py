"""Every command that writes, ended at its writes: by SIGKILL, SIGTERM, a full disk, a disk that refuses.

A place is a call that changes a folder. What was killed goes on with the same command and ends as if nothing had
happened; what was stopped or had no room says so in one sentence, and leaves nothing half-written. Each command ends
in one of these ways; in `make fuzz` in all of them, one after another, before it may go on to its end.
"""

import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from kdnas.cli.commands import main, parser, sub_parsers
from tests import faults, toy

pytestmark = pytest.mark.slow  # processes of their own

TOY = str(Path(toy.__file__))
DATA = ["--data", "tests.toy:data"]
SHORT = ["--steps", "2", "--batch-size", "16"]
CHEAP = ["--budget", "macs=70k", "--num-evaluations", "2", "--finalists", "1", "--scorer", "params"]
STUDENT = "run/students/place-1"
WRITERS = {
    "demo": ["--out", "new"],
    "run": [*DATA, "--teacher", "fit,width=8", "--space", "toy", *SHORT, *CHEAP, "--out", "new"],
    "fit": [*DATA, "--width", "8", *SHORT, "--out", "new"],
    "train": [TOY, "--steps", "2", "--out", "new"],
    "search": ["run", "--num-evaluations", "4", "--scorer", "params"],
    "search by workers": ["run", "--num-evaluations", "4", "--scorer", "params", "--workers", "2"],
    "search in a database": ["run", "--num-evaluations", "4", "--scorer", "params", "--storage", "sqlite:///scores.db"],
    "search by trainings": ["run", "--num-evaluations", "4", "--scorer", "params", "--trainings", "3", "--no-quality"],
    "finals": ["run", "--finalists", "1", "--steps", "2"],
    "why": ["run", "00.00."],
    "convert": ["tests.toy:steady_cnn", "--size", "8", "--out", "new"],
    "export": ["run", "--place", "2"],
    "export again": ["run"],
    "export of forms": [STUDENT, "--forms", "onnx"],
    "latency": ["run", "--target", "eager,threads=1", "--write-script", "measure.py"],
    "retrain": [STUDENT, "--steps", "2"],
    "retrain under assistants": [STUDENT, "--assistants", "111111", "--steps", "2", "--batch-size", "16"],
    "prune": [TOY + ":pruned", "--steps", "2", "--out", "new"],
    "quantize": [STUDENT, "--num-images", "8"],
    "compare": [*DATA, "--space", "toy", "--budget", "macs=70k", "--systems", "spos", "--out", "new"],
    "grow": [*DATA, "--space", "toy", "--num-members", "2", "--no-controls", *SHORT, "--out", "new"],
    "report": ["run"],
    "report of two": ["run", "other", "--out", "both.html"],
    "track": ["run", "--to", "tensorboard"],
}
READERS = {
    "doctor": [*DATA, "--teacher", "fit,width=8", "--space", "toy", *SHORT, "--out", "new"],
    "plan": [*DATA, "--teacher", "fit,width=8", "--space", "toy", *SHORT, "--out", "new"],
    "rank-check": ["run", "truth.csv", "--scorer", "rdm"],
    "why, read-only": ["run", "00.00.", "--read-only"],
    "push": [STUDENT, "no-name"],
    "list": ["losses"],
    "losses": ["--check"],
    "taps": ["checkpoint:run/teacher", "toy", *DATA],
}
LONG = {"demo", "prune", "compare", "search by workers", "search in a database"}
"""Left to `make fuzz`: they take seconds."""
WITHOUT_LOCK = {"latency", "report", "report of two"}
"""They write one file, which appears whole."""
ERRORS = [errno.EROFS, errno.EIO, errno.EDQUOT]
SENTENCE = re.compile(
    r"kdnas [a-z-]+: \S*(new|run|other|measure|both|runs)\S*: [A-Z][\w /-]+\. "
    r"(Make room; the same command goes on|Check the path and the disk)\."
    r"|kdnas [a-z-]+: No usable temporary directory found in .+ Check the path and the disk\."
    r"|kdnas search: the storage (does not answer|sqlite:\S* cannot be used)\b.+\."
)


def words(name):
    return [re.split("[ ,]", name)[0], *(WRITERS | READERS)[name]]


def command(name, folder, fault=None):
    return faults.command(words(name), folder, fault, faults.prepare)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with a ranking and a student, another one, and a table."""
    folder = tmp_path_factory.mktemp("world")
    for arguments in (
        ["train", TOY, "--steps", "2", "--out", "run"],
        ["search", "run", "--num-evaluations", "5", "--scorer", "params"],
        ["export", "run"],
    ):
        ended = faults.command(arguments, folder, before=faults.prepare)
        assert ended.code == 0, ended.err
    shutil.copytree(folder / "run", folder / "other")
    codes = [json.loads(line)["code"] for line in (folder / "run" / "ranking.jsonl").read_text().splitlines()]
    (folder / "truth.csv").write_text("\n".join(["arch,mean_acc", *(f"{c},{i}" for i, c in enumerate(codes))]))
    return folder


def test_every_command_is_a_writer_or_a_reader():
    """Whoever adds a command adds a row."""
    named = [{words(name)[0] for name in table} for table in (WRITERS, READERS)]
    assert named[0] | named[1] == set(sub_parsers(parser()))
    assert named[0] & named[1] == {"why"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.fuzz if n == "plan" else ()) for n in READERS])
def test_a_reader_changes_nothing(world, name):
    ended = command(name, world)
    locks = {place.split(".lock")[0] for place in ended.places if ".lock" in place}
    assert [place for place in ended.places if ".lock" not in place] == [], ended
    assert ended.code == (2 if name == "push" else 0), ended.err
    assert not locks or name in ("doctor", "plan")


KINDS = ("kill", "stop", "refuse", "full")


def fault_of(kind, rng):
    refuse = functools.partial(faults.refusing, number_of=rng.choice(ERRORS))
    return {"kill": faults.kill, "stop": faults.stop, "refuse": refuse, "full": faults.full}[kind]


def end_at_places(world, folder, name, kinds):
    """End a command once in each of some ways, then compare its end with that of one that was left alone."""
    whole, tried = folder / "whole", folder / "tried"
    for place in (whole, tried):
        shutil.copytree(world, place)
    ended = command(name, whole)
    assert ended.code == 0, ended.err
    faults.check_synced(ended.places)
    # The places after the last file took its place are not before the end of the work.
    last = max(
        number for number, place in enumerate(ended.places, 1) if not {"os.remove", "os.fsync"} & {*place.split()}
    )
    if name not in WITHOUT_LOCK:
        unlocked = [place for place in ended.places if place.startswith("unlocked ") and ".lock" not in place]
        assert [place for place in unlocked if not place.startswith(("unlocked os.mkdir", "unlocked os.fsync ."))] == []
    rng = random.Random(f"{name} {kinds}")
    for kind, place in zip(kinds, sorted(rng.choices(range(1, last + 1), k=len(kinds))), strict=True):
        before = faults.remains(tried)
        ended = command(name, tried, fault_of(kind, rng)(place))
        if ended.code == 0 or is_done(tried, whole):  # what goes on has fewer places
            break
        check_end(ended, f"{name}, {kind} at place {place} of {last}: {ended}")
        if kind in ("full", "stop"):
            assert set(faults.remains(tried)) <= set(before), (kind, place)
        for path in faults.remains(tried):  # as if it were long ago
            os.utime(tried / path, (0, 0))
    else:
        ended = command(name, tried)
        assert ended.code == 0, ended.err
    assert is_done(tried, whole), faults.differences(tried, whole)
    assert faults.remains(tried) == [] or ended.code


def is_done(tried, whole):
    """Whether a command has done its work, though what was left by its end may lie there."""
    rest = tuple(faults.remains(tried))
    return all(difference.startswith(rest) for difference in faults.differences(tried, whole))


def check_end(ended, told):
    if ended.code == -signal.SIGKILL:
        return
    message = ended.err.strip().splitlines()[-1]
    if ended.code == 128 + signal.SIGTERM:
        assert re.fullmatch(
            r"kdnas [a-z-]+: stopped by SIGTERM; the same command goes on from the last checkpoint\.", message
        )
    else:
        assert ended.code == 2 and SENTENCE.fullmatch(message), told
    assert "Traceback" not in ended.err, told


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in LONG])
def test_a_command_that_is_ended_goes_on_and_ends_alike(world, tmp_path, name):
    end_at_places(world, tmp_path, name, [KINDS[list(WRITERS).index(name) % len(KINDS)]])


@pytest.mark.fuzz
@pytest.mark.parametrize("name", WRITERS)
def test_a_command_that_is_ended_in_all_ways_goes_on_and_ends_alike(world, tmp_path, name):
    kinds = list(KINDS)
    random.Random(name).shuffle(kinds)
    end_at_places(world, tmp_path, name, kinds)


def paused(at):
    """Stand still at a place which is about no lock."""
    count = 0

    def fault(_, place):
        nonlocal count
        count += ".lock" not in place
        if count == at:
            os.kill(os.getpid(), signal.SIGSTOP)

    return fault


def wait_until_paused(process):
    while process.is_alive():
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.05)
    raise AssertionError("it has ended")


FIRST = [name for name in WRITERS if " " not in name and name not in WITHOUT_LOCK | {"track"}]
OFTEN = ("fit", "search")
"""Firsts of `make test`, one with a new place and one with a run; the others are in `make fuzz`."""
SECOND = {
    **{name: [*WRITERS[name][:-1], "PLACE"] for name in FIRST if "--out" in WRITERS[name]},
    "run": [*DATA, "--space", "toy", *SHORT, "--out", "PLACE"],
    "search": ["PLACE"],
    "search by workers": ["PLACE", "--workers", "2"],
    "search in a database": ["PLACE", "--storage", "sqlite://"],
    "finals": ["PLACE"],
    "why": ["PLACE", "00.00."],
    "export": ["PLACE"],
    "retrain": ["PLACE/students/place-1"],
    "quantize": ["PLACE/students/place-1"],
    "export elsewhere": ["other", "--out", "PLACE/students/place-1"],
    "retrain elsewhere": ["other/students/place-1", "--out", "PLACE/students/place-1", "--force"],
    "export forms": ["PLACE/students/place-1", "--forms", "onnx"],
}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it looks at processes by /proc")
@pytest.mark.parametrize(
    "first", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.fuzz) for name in FIRST]
)
def test_of_two_commands_the_second_is_told_who_the_first_is(world, tmp_path, monkeypatch, capsys, first):
    """The first is suspended in the midst of its writing, which changes nothing."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    place = "new" if "new" in WRITERS[first] else "run"
    with faults.started(words(first), tmp_path, paused(6 if place == "new" else 2), faults.prepare) as (process, _):
        wait_until_paused(process)
        if place == "new" and Path(place).exists():
            shutil.copytree("run/students", "new/students", dirs_exist_ok=True)
        before = contents(tmp_path)
        for second, arguments in SECOND.items():
            with pytest.raises(SystemExit) as end:
                main([second.split()[0], *(text.replace("PLACE", place) for text in arguments)])
            message = capsys.readouterr().err.splitlines()[-1]
            assert end.value.code == 2, second
            told = f"is being written by `kdnas {first}` (process {process.pid} on {socket.gethostname()}, since 20"
            is_nothing_yet = place == "new" and re.search("there is no |has no finished phase|is no run of", message)
            is_other = (first == "compare") != (second == "compare") and "holds something else" in message
            assert told in message or is_nothing_yet or is_other, (second, message)
            assert contents(tmp_path) == before, second
        if place == "run":
            for reader in (["report", "run"], ["why", "run", "00.00.", "--read-only"], ["list", "losses"]):
                main(reader)
