import errno
import json
import os
from pathlib import Path

import pytest
import torch

from kdnas.runs.checkpoint import save_state
from kdnas.runs.files import (
    FORMAT,
    Damaged,
    Fields,
    append_lines,
    current_folder,
    new_folder,
    read_json,
    write_atomically,
    write_json,
    write_text,
)
from kdnas.runs.folder import Metrics
from kdnas.runs.lock import command, hold


def fill(folder, text):
    with new_folder(folder) as draft:
        (draft / "content").write_text(text)


def test_a_folder_appears_with_its_parents_and_replaces_the_one_before(tmp_path):
    folder = tmp_path / "a" / "b"
    for text in ("first", "second"):
        fill(folder, text)
        assert (folder / "content").read_text() == text
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_an_error_in_the_block_leaves_what_was_there_and_nothing_else(tmp_path):
    folder = tmp_path / "a"
    fill(folder, "first")
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as draft:
        (draft / "content").write_text("second")
        raise KeyboardInterrupt
    assert (folder / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    fill(folder, "first")
    rename = type(folder).rename

    def fail_for_the_new(path, target):
        if path.name == ".a.new":
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(type(folder), "rename", fail_for_the_new)
    with pytest.raises(OSError, match="no space"):
        fill(folder, "second")
    assert (folder / "content").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_stopped_between_the_two_renames_the_old_folder_is_still_found_and_the_next_write_goes_on(tmp_path):
    folder = tmp_path / "a"
    fill(folder, "first")
    folder.rename(tmp_path / ".a.old")  # as a kill at that moment leaves it
    (tmp_path / ".a.new").mkdir()
    (tmp_path / ".a.new" / "stale").write_text("half written")
    assert (current_folder(folder) / "content").read_text() == "first"
    with pytest.raises(KeyboardInterrupt), new_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "content").read_text() == "first"
    fill(folder, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in folder.iterdir()) == ["content"]
    assert current_folder(folder) == folder.resolve()


ADVICE = "Write it again."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it cannot be read"),
        (b'{"a": ', "it cannot be read"),
        (b"\xff\xfe{}", "it cannot be read"),
        (b'{"a": "\xff"}' + b" " * 5000, "it cannot be read"),
        (b"9" * 5000, "it cannot be read"),
        (b'{"a": ' * 100_000, "it is nested more than 64 deep"),
        (b"[" * 65 + b"]" * 65, "it is nested more than 64 deep"),
        (b"[]", "it holds no JSON object"),
        (b'{"a": "1"}', "its 'a' must be a whole number, got '1'"),
        (b'{"a": 1, "format": "x"}', "its 'format' must be a whole number"),
        (b'{"a": "' + b"x" * 10_000 + b'"}', "its 'a' must be a whole number"),
        (b'{"a": "\\u001b[31m"}', r"its 'a' must be a whole number, got '\\x1b"),
    ],
)
def test_a_damaged_file_is_refused_in_one_short_sentence(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(Damaged) as refusal:
        read_json(path, dict[str, int], ADVICE)
    message = str(refusal.value)
    assert message.startswith(f"{path} is damaged: {reason}") and message.endswith(ADVICE)
    assert len(message) < 500 and message.isprintable()


def test_a_file_of_a_newer_version_is_refused_with_both_versions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"format": 99, "checksum": "of another kind"}')
    with pytest.raises(
        ValueError, match=rf"has format 99, and kdnas \S+ reads formats up to {FORMAT}: .* Update kdnas"
    ):
        read_json(path, dict, ADVICE)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(Damaged, match="no regular file"):
        read_json(tmp_path / "a.json", dict, ADVICE)


def test_what_is_written_carries_its_format_and_half_a_surrogate_pair_is_read_as_an_escape(tmp_path):
    write_json(tmp_path / "a.json", {"a": "\ud800b"})
    assert read_json(tmp_path / "a.json", dict, ADVICE) == {"format": FORMAT, "a": "\\ud800b"}


@pytest.mark.parametrize("change", [{"a": 0.8}, {"b": []}, {"more": 1}, {"a": 0.9, "b": 1, "checksum": "x"}])
def test_another_content_than_was_written_is_refused(tmp_path, change):
    path = tmp_path / "a.json"
    write_json(path, {"a": 0.9, "b": {"c": [1, "\x1b", "é"]}, "checksum": "of an older content", "format": 1})
    assert read_json(path, dict, ADVICE)["a"] == 0.9
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(Damaged, match="its checksum is another than when it was written"):
        read_json(path, dict, ADVICE)
    path.write_text(json.dumps({name: value for name, value in content.items() if name != "checksum"}))
    with pytest.raises(Damaged, match="it has no 'checksum'"):
        read_json(path, dict, ADVICE)
    # A person who edits a file makes it one of format 1; in other people's files the key means nothing.
    for written, is_signed in (({"format": 1}, True), ({}, False)):
        path.write_text(json.dumps(content | change | written))
        assert read_json(path, dict, ADVICE, is_signed=is_signed)["a"] == (content | change)["a"]


def test_a_key_that_an_object_lacks_is_a_damage_of_its_file(tmp_path):
    fields = Fields({"a": 1}, tmp_path / "run.json", "phases.train", ADVICE)
    assert fields["a"] == 1 and fields == {"a": 1}
    with pytest.raises(Damaged, match=r"run\.json is damaged: it has no 'phases\.train\.b'"):
        fields["b"]


WRITES = {
    "atomic": lambda path: write_atomically(path, lambda draft: write_text(draft, "new")),
    "json": lambda path: write_json(path, {}),
    "append": lambda path: append_lines(path, ["line"]),
    "state": lambda path: save_state(path, {"a": torch.ones(3)}),
    "metrics": lambda path: Metrics(path, "train").write(step=1),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"metrics"}))
def test_a_disk_that_fails_is_named_with_the_file_and_nothing_is_lost(tmp_path, monkeypatch, name, number):
    path = tmp_path / "file"
    path.write_text("old\n")

    def full(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(number)) as failure:
            WRITES[name](path)
    assert failure.value.filename == str(path)
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    WRITES[name](path)  # goes on once there is room
    assert path.read_bytes() != b"old\n"


@pytest.mark.parametrize("name", ["append", "metrics"])
def test_a_full_device_is_named(tmp_path, name):
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as failure:
        WRITES[name](path)
    assert failure.value.filename == str(path)


def test_folders_are_on_the_disk_before_and_after_they_take_their_place(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())) or sync(number)
    )
    fill(tmp_path / "a", "first")
    assert synced == [str(tmp_path / ".a.new" / "content"), str(tmp_path / ".a.new"), str(tmp_path)]
    synced.clear()
    write_json(tmp_path / "b.json", {})
    assert synced[-1] == str(tmp_path) and len(synced) == 2


@pytest.mark.parametrize("is_locked", [True, False])
def test_drafts_that_kills_left_are_removed_by_the_next_who_writes_the_file(tmp_path, is_locked):
    mine, dead = os.getppid(), 2**22 + 1
    names = [f".a.json.{mine}.draft", f".b.json.{dead}.draft", f".a.json.{dead}.draft", f".a.json.{dead + 1}.draft"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[-1], (0, 0))
    with command():
        if is_locked:
            hold(tmp_path / "a.json")
        write_json(tmp_path / "a.json", {})
    left = names[:2] if is_locked else names[:3]  # without a lock, one that is new may be of another machine
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left, "a.json"])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_mask(tmp_path, mask):
    before = os.umask(mask)
    try:
        for name, write in WRITES.items():
            write(tmp_path / name)
        fill(tmp_path / "folder", "first")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
