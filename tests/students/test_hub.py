import sys
import types

import pytest

import kdnas.runtimes
from kdnas.cli.commands import main
from kdnas.students.folder import write_student
from kdnas.students.hub import push_student
from tests.students.test_folder import SPACE, card_of, trained


@pytest.fixture
def student(tmp_path):
    blueprint = SPACE.blueprint(SPACE.smallest)
    write_student(tmp_path / "a", trained(blueprint), card_of(blueprint, architecture=SPACE.smallest), forms=())
    (tmp_path / "a" / "__pycache__").mkdir()
    return tmp_path / "a"


@pytest.fixture
def hub(monkeypatch):
    """A hub that records what it is asked for."""
    calls = []

    class HfApi:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, **options):
            if options["revision"] == "closed":
                raise RuntimeError("403: no rights")
            calls.append(options)
            return types.SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    monkeypatch.setattr(kdnas.runtimes, "_is_installed", lambda module: True)
    return calls


def test_the_files_of_a_student_are_uploaded_privately(student, hub, capsys):
    main(["push", str(student), "owner/name"])
    (repo, options), upload = hub
    assert (repo, options) == ("owner/name", {"private": True, "exist_ok": True})
    names = ["README.md", "config.json", "student.json", "student.py", "weights.safetensors"]
    assert upload["allow_patterns"] == names and upload["folder_path"] == str(student)
    assert "https://hub/commit" in capsys.readouterr().out
    push_student(student, "owner/name", private=False)
    assert hub[2][1]["private"] is False


def test_what_cannot_be_uploaded_is_one_sentence_and_nothing_is_sent(student, hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="the hub refused owner/name: 403: no rights"):
        push_student(student, "owner/name", revision="closed")
    hub.clear()
    for repo in ("name", "../name", "owner/na me", "owner/name/more", "-x/y"):
        with pytest.raises(ValueError, match="`repo` must be OWNER/NAME"):
            push_student(student, repo)
    with pytest.raises(ValueError, match="there is no student"):
        push_student(tmp_path / "nothing", "owner/name")
    (student / "student.py").write_text("import os")
    with pytest.raises(ValueError, match=r"student\.py is damaged"):
        push_student(student, "owner/name")
    monkeypatch.setattr(kdnas.runtimes, "_is_installed", lambda module: False)
    (student / "student.py").unlink()
    with pytest.raises(ValueError, match=r"has no student\.py"):
        push_student(student, "owner/name")
    assert not hub
