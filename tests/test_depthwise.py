from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdnas import depthwise
from kdnas.compilation import compiling
from kdnas.depthwise import fast_depthwise, kernel_gradient
from kdnas.network import Network, recomputing
from kdnas.randomness import initialised, torch_rng
from kdnas.space import Blueprint, Layer
from kdnas.specs import spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space, space_from_table, table_of

sizes = st.integers(1, 5)


def depthwise_layer(bias: bool = True, **options: int) -> nn.Conv2d:
    return nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=bias, **options)


def gradients(layer: nn.Module, x: Tensor, fast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    if fast:
        with fast_depthwise(layer, x):
            output = layer(x)
    else:
        output = layer(x)
    weighted = output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(weighted.sum(), [x, *layer.parameters()])]


@settings(deadline=None)  # the first call imports much of torch
@given(height=sizes, width=sizes, rows=sizes, columns=sizes, step=st.integers(1, 3), across=st.integers(1, 3), p=sizes)
def test_the_kernels_gradient_is_that_of_pytorch_for_every_shape(
    height: int, width: int, rows: int, columns: int, step: int, across: int, p: int
) -> None:
    padding = (p, max(p - 1, 0))
    if height + 2 * padding[0] < rows or width + 2 * padding[1] < columns:
        return
    randoms = torch_rng(height, width)
    x = torch.randn(2, 3, height, width, generator=randoms, dtype=torch.float64)
    weight = torch.randn(3, 1, rows, columns, generator=randoms, dtype=torch.float64).requires_grad_()
    output = F.conv2d(x, weight, None, (step, across), padding, 1, 3)
    gradient = torch.randn(output.shape, generator=randoms, dtype=torch.float64)
    (usual,) = torch.autograd.grad(output, weight, gradient)
    torch.testing.assert_close(kernel_gradient(x, gradient, (rows, columns), (step, across), padding), usual)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_kernels_gradient_is_computed_otherwise(bias: bool, stride: int) -> None:
    layer, x = depthwise_layer(bias, stride=stride), torch.randn(3, 16, 4, 3, generator=torch_rng(0))
    x = x.contiguous(memory_format=torch.channels_last)
    usual, fast = gradients(layer, x, fast=False), gradients(layer, x, fast=True)
    assert torch.equal(usual[0], fast[0]) and torch.equal(usual[1], fast[1])
    torch.testing.assert_close(usual[2:], fast[2:])


def test_the_second_derivative_is_right() -> None:
    layer = depthwise_layer().double()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with fast_depthwise(layer, x):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    x = torch.randn(1, 16, 2, 2, generator=torch_rng(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True)


class Counted:
    """How often gradients are computed by sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, own = 0, depthwise.kernel_gradient

        def counting(*arguments: object) -> Tensor:
            self.calls += 1
            return own(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(depthwise, "kernel_gradient", counting)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (depthwise_layer(), 5),  # a map as large as the kernel
        (nn.Conv2d(16, 16, 5, padding=2, groups=8), 2),
        (nn.Conv2d(16, 32, 5, padding=2, groups=16), 2),
        (nn.Conv2d(16, 16, 5, padding=4, dilation=2, groups=16), 2),
        (nn.Conv2d(16, 16, 5, padding=2, groups=16, padding_mode="circular"), 2),
        (nn.Conv2d(16, 16, 5, padding="same", groups=16), 2),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), 2),  # few channels
    ],
)
def test_other_convolutions_are_left_to_pytorch(layer: nn.Conv2d, size: int, counted: Counted) -> None:
    x = torch.randn(2, layer.in_channels, size, size, generator=torch_rng(2))
    usual, fast = gradients(layer, x, fast=False), gradients(layer, x, fast=True)
    assert not counted.calls
    assert all(map(torch.equal, usual, fast))


def test_the_layer_is_left_as_it_was_and_half_precision_is_left_to_pytorch(counted: Counted) -> None:
    layer = nn.Sequential(OrderedDict(first=depthwise_layer(), second=depthwise_layer()))
    before = [dict(vars(module)) for module in layer.modules()]
    x = torch.randn(2, 16, 2, 2, generator=torch_rng(3))
    with pytest.raises(RuntimeError), fast_depthwise(layer, x):
        assert "forward" in vars(layer.first)
        layer(x[:, 1:])
    assert [dict(vars(module)) for module in layer.modules()] == before
    with torch.no_grad(), fast_depthwise(layer, x):
        assert "forward" not in vars(layer.first)
    with torch.autocast("cpu", torch.bfloat16), fast_depthwise(layer, x):
        layer(x).sum().backward()
    assert not counted.calls
    gradients(layer, x, fast=True)
    assert counted.calls == 2


def small_network() -> Network:
    stem = Layer(spec("kdnas.blocks.basic:ConvNormAct", inputs=3, outputs=16))
    mbconv = Layer(spec("kdnas.blocks.mbconv:MBConv", inputs=16, outputs=16, expanded=32, kernel=5))
    head = Layer(spec("kdnas.blocks.basic:PoolLinear", inputs=16, classes=3))
    return initialised(lambda: Network(Blueprint(stem, ((mbconv, mbconv),), head, (3, 4, 4))), 0)


def network_gradients(network: Network, images: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(network(images).logits.square().sum(), list(network.parameters())))


def test_networks_use_it_and_recomputed_activations_change_no_bit(counted: Counted) -> None:
    network, images = small_network(), torch.randn(8, 3, 4, 4, generator=torch_rng(4))
    kept = network_gradients(network, images)
    assert counted.calls == 2
    with recomputing():
        again = network_gradients(network, images)
    assert counted.calls == 4
    assert all(map(torch.equal, kept, again))
    with compiling(backend="eager"):
        compiled = network_gradients(network, images)
    assert counted.calls == 4
    torch.testing.assert_close(compiled, kept, rtol=1e-4, atol=1e-5)


def test_a_supernets_layers_use_it(counted: Counted) -> None:
    space = space_from_table(table_of(load_space("ofa_mbv3")) | {"resolutions": [32]})
    supernet = initialised(lambda: Supernet(space), 0)
    supernet(torch.randn(2, 3, 32, 32, generator=torch_rng(5)), space.smallest).logits.sum().backward()
    assert counted.calls
