"""Compiled layers compute what the layers' own code computes, each distinct layer by one program."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from kdnas.blocks.basic import ConvNormAct, DropPath
from kdnas.compilation import check_compiler, compiled, compiling
from kdnas.costs.count import layer_inputs
from kdnas.network import Network, hooked
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised, python_rng
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen

CPU = torch.device("cpu")


class Counting:
    """A backend that counts the programs that it makes, forward and backward of a layer as one."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def backend():
    torch._dynamo.reset()
    return Counting()


def stepped(model, images, *architecture):
    """Logits, gradients and running statistics of one step from the same weights."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.zero_grad()
    logits = model(images, *architecture).logits
    logits.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    after = {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(before)
    return logits.detach(), gradients, after


def distinct_layers(blueprint):
    return {(layer.make, shapes) for _, layer, shapes in layer_inputs(blueprint)}


def test_a_distinct_layer_is_compiled_once_and_not_for_every_architecture(backend):
    space = load_space("toy")
    supernet, rng = initialised(lambda: Supernet(space), 0).train(), python_rng(0, "architectures")
    images = torch.rand(4, *space.blueprint(space.largest).image)
    known, counts = set(), []
    for architecture in (space.largest, space.largest, space.smallest, space.sample(rng), space.sample(rng)):
        expected, before = stepped(supernet, images, architecture), backend.count
        with compiling(backend=backend):
            result = stepped(supernet, images, architecture)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
        distinct = distinct_layers(space.blueprint(architecture))
        counts.append((backend.count - before, len(distinct - known)))
        known |= distinct
    assert counts == [(new, new) for _, new in counts]
    assert counts[1] == (0, 0)
    assert backend.count == len(known) > 8  # the number at which PyTorch would stop


def test_networks_of_the_same_layers_share_their_programs(backend):
    blueprint = load_space("toy").blueprint(load_space("toy").smallest)
    images = torch.rand(4, *blueprint.image)
    for seed in (0, 1):
        network = initialised(lambda: Network(blueprint), seed).train()
        expected, keys = stepped(network, images), list(network.state_dict())
        with compiling(backend=backend):
            torch.testing.assert_close(stepped(network, images), expected, rtol=0, atol=1e-6)
            assert list(network.state_dict()) == keys
        assert backend.count == len(distinct_layers(blueprint))
        assert not any("forward" in vars(module) for module in network.modules())


def test_attention_maps_are_seen(backend):
    space = dataclasses.replace(load_space("autoformer_t"), resolutions=(32,))
    blueprint = space.blueprint(space.smallest)
    network, images = initialised(lambda: Network(blueprint), 0).eval(), torch.rand(1, *blueprint.image)
    expected = network(images)
    with compiling(backend=backend):
        network(images)
        count = backend.count
        outputs = network(images)
    assert len(outputs.attentions) == len(expected.attentions) > 0
    torch.testing.assert_close(outputs.attentions, expected.attentions)
    assert backend.count == count > 0


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x):
        return x + self.layers(x)


def test_parts_around_a_hook_are_compiled_and_the_hook_sees_its_output(backend):
    network, x, seen = nn.Sequential(*(Block(4) for _ in range(3))), torch.rand(2, 4), []
    watched = network[1].layers[0]
    with compiling(backend=backend), torch.no_grad():
        with compiled(network):
            network(x)
        assert backend.count == 1  # of three equal blocks
        with hooked([watched], after=lambda *values: seen.append(values[2])), compiled(network):
            network(x)
    assert torch.equal(seen[0], watched(network[0](x)))


def test_a_teacher_of_other_modules_shows_the_same(backend):
    network = nn.Sequential(nn.Sequential(ConvNormAct(3, 4), ConvNormAct(4, 4)), nn.Flatten(), nn.Linear(256, 3))
    teacher = Frozen(
        network, preprocessing=Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.2,) * 3), stages=("0.0.0", "0")
    )
    pixels = torch.rand(4, 3, 8, 8)
    expected = teacher(pixels)
    with compiling(backend=backend):
        outputs = [teacher(pixels) for _ in range(2)][-1]
    torch.testing.assert_close(outputs, expected)
    assert backend.count == 1 and len(outputs.features) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ here")
def test_the_default_backend_gives_the_same_up_to_rounding_dropped_paths_among_it():
    layer = nn.Sequential(ConvNormAct(3, 4, activation="hswish"), DropPath(0.5)).train()
    images, results = torch.rand(8, 3, 6, 6), []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.random.fork_rng(devices=[]), compiling(enabled), compiled(layer):
            torch.manual_seed(0)
            output = layer(images)
            output.square().mean().backward()
        results.append((output.detach(), [p.grad.clone() for p in layer.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_a_layer_that_cannot_be_compiled_is_a_sentence():
    torch._dynamo.reset()

    def broken(graph, inputs):
        raise RuntimeError("no kernel")

    block = Block(4)
    with (
        pytest.raises(ValueError, match=r"a layer cannot be compiled .*no kernel"),
        compiling(backend=broken),
        compiled(block),
    ):
        block(torch.rand(2, 4))
    assert "forward" not in vars(block)


@pytest.mark.parametrize(
    ("device", "variable", "message"),
    [("cpu", "CXX", "a compiler, no-compiler for the device cpu"), ("cuda", "CC", "no-compiler for the device cuda")],
)
def test_a_missing_compiler_is_a_sentence(monkeypatch, device, variable, message):
    monkeypatch.setenv(variable, "no-compiler")
    with pytest.raises(ValueError, match=message):
        check_compiler(torch.device(device))
