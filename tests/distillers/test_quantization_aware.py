"""A student trained with its numbers rounded to 8 bits, and the integer graph it leaves."""

import itertools
import sys

import onnxruntime
import pytest
import torch

from kdnas.cli.commands import main
from kdnas.distillers import quantization_aware
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.quantization_aware import QuantizationAware
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.folder import INTEGERS
from kdnas.settings import Recipe
from kdnas.space import Blueprint, layer
from kdnas.students.folder import check_place, read_student
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, TOY
from tests.patterns import traced_once  # noqa: F401

RECIPE = Recipe(steps=8, batch_size=12, learning_rate=0.05, warmup=0.0, clip=0.0)


def training(distiller, recipe=RECIPE):
    network = initialised(lambda: Network(TOY.blueprint(TOY.smallest)), 0)
    taught = Frozen(initialised(lambda: Network(TOY.blueprint(TOY.largest)), 1), preprocessing=DATA.preprocessing)
    return Training(network, distiller, DATA, taught, recipe)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trained(distiller, recipe=RECIPE):
    made = training(distiller, recipe)
    while not made.done:
        made.step()
    return made


def test_without_rounding_it_is_plain_distillation():
    rounded, plain = training(QuantizationAware(begin=1.0, freeze=1.0)), training(FromTeacher())
    for _ in range(3):
        # Batch norm is folded and unfolded, so that sums are rounded otherwise.
        assert rounded.step() == pytest.approx(plain.step(), rel=1e-3)
    one, other = dict(rounded.model.named_parameters()), dict(plain.model.named_parameters())
    assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)


def test_rounding_changes_what_is_learnt_and_the_network_s_own_weights_learn_it():
    rounded, plain = training(QuantizationAware(begin=0.0)), training(QuantizationAware(begin=1.0, freeze=1.0))
    before = weights(rounded.model)
    first, other = rounded.step(), plain.step()
    assert first["student"] != pytest.approx(other["student"], rel=1e-4)
    named = [name for name, _ in rounded.model.named_parameters() if name.endswith("weight")]
    assert all(not torch.equal(before[name], rounded.model.state_dict()[name]) for name in named)
    # The graph's weights are the network's: nothing is optimised twice, and a checkpoint holds them once.
    assert list(rounded.distiller.parameters()) == []


def test_a_branch_that_begins_at_zero_is_folded_all_the_same():
    space = load_space("elastic_resnet").fitted(classes=3, image_channels=3)
    network = initialised(lambda: Network(space.blueprint(space.smallest)), 0)
    assert any(bool((p == 0).all()) for n, p in network.named_parameters() if n.endswith("weight"))
    taught = Frozen(initialised(lambda: Network(TOY.blueprint(TOY.largest)), 1), preprocessing=DATA.preprocessing)
    made = Training(network, QuantizationAware(begin=0.0), DATA, taught, RECIPE)
    assert 0 < made.step()["student"] < 10
    # A second training of the same network has a graph of its own.
    again = Training(network, QuantizationAware(begin=0.0), DATA, taught, RECIPE)
    assert 0 < again.step()["student"] < 10


def test_weights_take_at_most_255_values_per_channel():
    made = trained(QuantizationAware(begin=0.0, freeze=0.5))
    seen = []
    for observer in made.distiller.observers:
        if observer.qscheme == torch.per_channel_symmetric:
            observer.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    made.distiller.outputs(torch.rand(4, 3, 8, 8))
    assert seen
    for given, output in seen:
        given = given.detach()
        assert not torch.equal(given, output)
        largest = given.abs().flatten(1).amax(1)[(..., *[None] * (given.dim() - 1))]
        assert ((given - output).abs() <= largest / 127 * 0.51).all()
        assert max(len(channel.unique()) for channel in output.flatten(1)) <= 255


def test_ranges_and_statistics_stand_still_at_the_end():
    made = training(QuantizationAware(begin=0.0, freeze=0.5))
    kept = []
    while not made.done:
        made.step()
        statistics = [t for n, t in made.model.state_dict().items() if "running" in n]
        ranges = [o.scale for o in made.distiller.observers if o.qscheme != torch.per_channel_symmetric]
        kept.append([t.clone() for t in (*statistics, *ranges)])
    moved = [any(not torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(kept)]
    assert moved == [True, True, True, False, False, False, False]


def test_a_training_that_is_interrupted_anywhere_ends_as_an_uninterrupted_one(tmp_path):
    whole = training(QuantizationAware(begin=0.25, freeze=0.75))
    states = []
    while not whole.done:
        save_state(tmp_path / f"{whole.index}.safetensors", whole.state())
        states.append(tmp_path / f"{whole.index}.safetensors")
        whole.step()
    for place in (1, 3, 7):
        again = training(QuantizationAware(begin=0.25, freeze=0.75))
        again.load(load_state(states[place]))
        while not again.done:
            again.step()
        mine, theirs = weights(whole.model), weights(again.model)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert all(torch.equal(a, b) for a, b in zip(scales(whole), scales(again), strict=True))


def scales(made):
    return [o.state_dict()["scale"] for o in made.distiller.observers]


@pytest.mark.slow
def test_a_retrained_student_brings_its_integer_graph(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["train", "tests/toy.py", "--out", str(folder)])
    main(["search", str(folder), "--num-evaluations", "3"])
    main(["export", str(folder)])
    out = folder / "students" / "int8"
    capsys.readouterr()
    arguments = ["retrain", str(folder / "students" / "place-1"), "--distiller", "quantization_aware", "--steps", "30"]
    main([*arguments, "--out", str(out)])
    said = capsys.readouterr().out
    assert "int8 accuracy" in said
    check_place(out)  # it is a student, and may be written anew
    session = onnxruntime.InferenceSession(out / INTEGERS, providers=["CPUExecutionProvider"])
    images = DATA.test.take(torch.arange(5))
    logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    network, _ = read_student(out)
    floating = network(DATA.normalise(images)).logits
    assert 0 < (logits - floating).norm() / floating.norm() < 0.2
    operations = [n.op_type for n in onnx_nodes(out / INTEGERS)]
    assert operations.count("DequantizeLinear") > operations.count("Conv") > 0


def onnx_nodes(path):
    import onnx

    return onnx.load(path).graph.node


def test_a_graph_that_runs_otherwise_is_refused(tmp_path, monkeypatch):
    made = trained(QuantizationAware(begin=0.0, freeze=0.5))
    # The conversion itself takes half a minute, whatever the network.
    monkeypatch.setattr("torchao.quantization.pt2e.quantize_pt2e.convert_pt2e", lambda graph: graph)
    monkeypatch.setattr("kdnas.students.integers.graph_of", lambda module, preprocessing: b"")
    monkeypatch.setattr("kdnas.students.integers._logits", lambda path, images: torch.ones(len(images), 3).numpy())
    with pytest.raises(ValueError, match="other logits in ONNX Runtime"):
        made.distiller.export_extras(made.model.eval(), DATA, tmp_path)


def test_mistakes_are_said(monkeypatch):
    with pytest.raises(ValueError, match="begin <= freeze"):
        QuantizationAware(begin=0.9, freeze=0.5)
    shape = {"inputs": 3, "outputs": 4}
    untraceable = Blueprint(
        layer("kdnas.blocks.basic:ConvNormAct", **shape),
        ((layer("tests.distillers.test_quantization_aware:Branching"),),),
        layer("kdnas.blocks.basic:PoolLinear", inputs=4, classes=3),
        (3, 8, 8),
    )
    with pytest.raises(ValueError, match="cannot be traced"):
        Training(Network(untraceable), QuantizationAware(), DATA, None, RECIPE)
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(ValueError, match=r"kdnas\[qat\]"):
        training(QuantizationAware())


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_where_nothing_is_rounded_in_one_trace_the_strict_one_is_taken(monkeypatch):
    """As under torch 2.11, whose other trace does not say which layer an operation is of."""
    export, observers, traces = torch.export.export, quantization_aware._observers, []

    def traced(*arguments, strict=False, **options):
        traces.append(strict)
        return export(*arguments, strict=strict, **options)

    monkeypatch.setattr(torch.export, "export", traced)
    monkeypatch.setattr(quantization_aware, "_observers", lambda graph: observers(graph) if traces[-1] else [])
    assert len(training(QuantizationAware(begin=0.0)).distiller.observers) > 4
    assert traces == [False, True]


def test_a_network_of_which_nothing_is_rounded_is_refused(monkeypatch):
    monkeypatch.setattr(quantization_aware, "_observers", lambda graph: [])
    with pytest.raises(ValueError, match="the student must have a layer that is rounded"):
        training(QuantizationAware(begin=0.0))
