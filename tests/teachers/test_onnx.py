"""ONNX graphs as teachers."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Teacher
from kdnas.teachers.cache import _identity
from kdnas.teachers.load import load_teacher

DATA = Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.25,) * 3)


def graph(path, *, batch="batch", size=8, classes=3, kind=TensorProto.FLOAT, metadata=None, seed=0):
    """Two convolutions with ReLU, of which the second halves the size, a mean over positions and a linear layer."""
    rng = torch.Generator().manual_seed(seed)
    weights = {
        "w1": torch.randn(4, 3, 3, 3, generator=rng),
        "w2": torch.randn(6, 4, 3, 3, generator=rng),
        "w3": torch.randn(6, classes, generator=rng),
    }
    nodes = [
        helper.make_node("Conv", ["images", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["first"]),
        helper.make_node("Conv", ["first", "w2"], ["c2"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c2"], ["second"]),
        helper.make_node("GlobalAveragePool", ["second"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w3"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", kind, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", kind, [batch, classes])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if metadata:
        helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return weights


def test_a_graph_of_every_pixel_shows_the_map_that_it_classifies(tmp_path):
    weights = graph(tmp_path / "g.onnx")
    model, value = onnx.load(tmp_path / "g.onnx"), helper.make_tensor_value_info
    del model.graph.node[4:], model.graph.output[:], model.graph.initializer[2:]
    classifier = torch.randn(3, 6, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(classifier.numpy(), "w3"))
    model.graph.node.append(helper.make_node("Conv", ["second", "w3"], ["logits"]))
    model.graph.node.append(helper.make_node("Conv", ["first", "w2"], ["more"]))  # on which no logit depends
    model.graph.output.append(value("logits", TensorProto.FLOAT, ["batch", 3, "height", "width"]))
    onnx.save(model, tmp_path / "d.onnx")
    teacher, pixels = built(tmp_path / "d.onnx", dense=True), torch.rand(2, 3, 8, 8)
    outputs, second = teacher(pixels), by_hand(weights, pixels)[1]
    torch.testing.assert_close(outputs.classified, second, rtol=1e-4, atol=1e-4)


def by_hand(weights, pixels):
    images = (pixels - 0.5) / 0.25
    first = torch.conv2d(images, weights["w1"], padding=1).relu()
    second = torch.conv2d(first, weights["w2"], padding=1, stride=2).relu()
    return first, second, second.mean((2, 3)) @ weights["w3"]


def built(path, options="", **more):
    return load_teacher(f"onnx:{path}{options}").build(Teacher, classes=3, preprocessing=DATA, **more)


@pytest.mark.parametrize(("batch", "note"), [("batch", "batches of any size"), (2, "batches of 2")])
def test_a_graph_gives_its_logits_and_the_last_map_of_each_resolution(tmp_path, batch, note):
    weights = graph(tmp_path / "g.onnx", batch=batch)
    teacher = built(tmp_path / "g.onnx")
    assert teacher.note == f"ONNX on the CPU, {note}" and teacher.module.stages == ("first", "second")
    for count in (1, 5):
        pixels = torch.rand(count, 3, 8, 8)
        outputs, (first, second, logits) = teacher(pixels), by_hand(weights, pixels)
        torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs.features[0], first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(outputs.features[1], second, rtol=1e-4, atol=1e-4)


def test_stages_can_be_named_and_class_names_are_read_from_the_metadata(tmp_path):
    graph(tmp_path / "g.onnx", metadata={"class_names": '["a", "b", "c"]'})
    source = load_teacher(f"onnx:{tmp_path / 'g.onnx'}")
    options = {"classes": 2, "preprocessing": DATA, "class_names": ("c", "a")}
    teacher = source.replace(stages=("c2",)).build(Teacher, **options)
    pixels = torch.rand(2, 3, 8, 8)
    assert [tuple(f.shape) for f in teacher(pixels).features] == [(2, 6, 4, 4)]
    assert teacher.columns == (2, 0) and teacher.note.endswith("2 of its 3 classes, by their names")
    with pytest.raises(ValueError, match=r"has no value 'secnd'.* Did you mean 'second'"):
        source.replace(stages=("secnd",)).build(Teacher, **options)


def test_two_graphs_are_two_teachers_to_a_cache(tmp_path):
    from tests.toy import data

    found = set()
    for seed in (0, 1):
        graph(tmp_path / "g.onnx", seed=seed)
        found.add(_identity(built(tmp_path / "g.onnx"), data(), 0, 1, "all")["teacher"])
    assert len(found) == 2


def test_what_is_no_graph_of_images_is_refused(tmp_path):
    path = tmp_path / "g.onnx"
    with pytest.raises(ValueError, match=r"there is no file"):
        built(path)
    path.write_bytes(b"\x00nothing")
    with pytest.raises(ValueError, match=r"is damaged, or no ONNX graph"):
        built(path)
    graph(path, classes=5)
    with pytest.raises(ValueError, match=r"has 5 classes, the data 3"):
        built(path)
    graph(path)
    with pytest.raises(ValueError, match=r"`size` of .* must be 8, which is fixed in the graph, got 16"):
        built(path, ",size=16")
    graph(path, kind=TensorProto.DOUBLE)
    with pytest.raises(ValueError, match=r"must take one batch of float32 images .* it takes images of 4 dimensions"):
        built(path)
