"""The whole chain where the extra `onnx` is not installed."""

import sys

import pytest

from kdnas.cli.commands import main

PACKAGES = {"onnx", "onnxscript", "onnxruntime", "onnx_ir"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without_onnx(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])


def test_a_run_needs_no_onnx_and_says_how_to_get_the_graph(without_onnx, tmp_path, log, capsys):
    options = "--data digits --space toy --scorer params --steps 1 --batch-size 8 --num-evaluations 4 --finalists 1"
    main(["run", *options.split(), "--out", str(tmp_path / "run")])
    student = tmp_path / "run" / "students" / "student"
    names = sorted(path.name for path in student.iterdir())
    assert names == ["README.md", "config.json", "student.json", "student.py", "weights.safetensors"]
    assert log.text.count("student.onnx is left out: onnx and onnxscript and onnxruntime are not installed") == 1
    assert (tmp_path / "run" / "report.html").exists()
    readme = (student / "README.md").read_text()
    assert "the same network trained without a teacher" in readme  # the controls of the run
    for command in (["export", str(student), "--forms", "onnx"], ["quantize", str(student), "--data", "digits"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert "pip install 'kdnas[onnx]'" in capsys.readouterr().err
    assert not PACKAGES & sys.modules.keys()
