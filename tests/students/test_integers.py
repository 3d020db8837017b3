"""A student in 8-bit integers: close to the float one, or not written."""

import errno
import json
import os
import signal

import onnxruntime
import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.jobs.export import export
from kdnas.students import integers
from kdnas.students.integers import quantize
from tests.toy import data


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    main(["train", "tests/toy.py", "--out", str(folder / "run")])
    main(["search", str(folder / "run"), "--num-evaluations", "4"])
    export(Run(folder / "run"), out=folder / "student")
    return folder / "student"


def test_the_int8_graph_runs_in_onnx_runtime_within_the_tolerance(student, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    main(["quantize", str(student), "--out", str(out), "--num-images", "40", "--data", "tests.toy:data", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["float accuracy"] - found["accuracy"] <= 0.02 and found["error"] < 0.3
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = data().test.take(torch.arange(30)).numpy()
    (logits,) = session.run(None, {"images": images})
    accuracy = (logits.argmax(1) == data().test.labels.numpy()).mean()
    assert accuracy == pytest.approx(found["accuracy"])
    # Its weights are integers.
    import onnx

    graph = onnx.load(out).graph
    held = {t.name: t for t in graph.initializer}
    kinds = [t.data_type for t in held.values() if len(t.dims) == 4]
    assert kinds and set(kinds) == {onnx.TensorProto.INT8}
    # Symmetric, with a scale per output channel.
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in held and len(held[node.input[0]].dims) == 4:
            scale, zero = (onnx.numpy_helper.to_array(held[name]) for name in node.input[1:])
            assert scale.shape == (held[node.input[0]].dims[0],) and not zero.any()
            kinds.pop()
    assert not kinds


def test_accuracy_that_is_lost_is_refused_and_accuracy_that_is_gained_is_not(student, tmp_path, monkeypatch):
    part = data().test
    right, wrong = (torch.nn.functional.one_hot((part.labels + k) % 3, 3).float().numpy() for k in (0, 1))
    monkeypatch.setattr("kdnas.students.integers.integers_of", lambda graph, _: b"int8")
    for ours, theirs in ((wrong, right), (right, wrong)):
        shown = {True: ours, False: theirs}
        monkeypatch.setattr("kdnas.students.integers._logits", lambda graph, _, shown=shown: shown[graph == b"int8"])
        if ours is wrong:
            with pytest.raises(ValueError, match=r"loses 100\.00% of accuracy"):
                quantize(student, tmp_path / "bad.onnx", data().train, part)
            assert not list(tmp_path.iterdir())
        else:
            assert quantize(student, tmp_path / "good.onnx", data().train, part)["accuracy"] == 1
            assert (tmp_path / "good.onnx").exists()


def test_a_graph_that_differs_too_much_is_not_written(student, tmp_path):
    part = data().train
    with pytest.raises(ValueError, match=r"more than -100\.00%"):
        quantize(student, tmp_path / "bad.onnx", part, data().test, most=-1.0)
    assert not list(tmp_path.iterdir())


def test_what_is_no_student_or_no_graph_is_refused(student, tmp_path):
    part = data().train
    with pytest.raises(ValueError, match=r"no student\.onnx"):
        quantize(tmp_path, tmp_path / "x.onnx", part, part)
    with pytest.raises(ValueError, match=r"an \.onnx file"):
        quantize(student, tmp_path / "x.bin", part, part)


def test_a_kill_leaves_the_student_as_it_is_and_the_same_command_goes_on(student, tmp_path, monkeypatch, capsys):
    def contents():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in student.iterdir()}

    before, out = contents(), tmp_path / "out" / "small.onnx"
    arguments = ["quantize", str(student), "--out", str(out), "--data", "tests.toy:data"]
    pid = os.fork()
    if not pid:
        try:
            integers.integers_of = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            main(arguments)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert contents() == before and not out.exists()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/graph")

    monkeypatch.setattr(integers, "integers_of", full)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "/tmp/graph: No space left on device. Make room" in capsys.readouterr().err
    monkeypatch.setattr(integers, "integers_of", lambda graph, _: graph)
    main(arguments)
    assert out.read_bytes() == (student / "student.onnx").read_bytes() and contents() == before
    assert [path.name for path in out.parent.iterdir()] == ["small.onnx"]
