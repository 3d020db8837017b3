import pytest

from kdnas.runs.files import current_folder, new_folder


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
