"""Exact costs, by hand; budgets and their errors."""

import dataclasses
import random
import statistics

import pytest
import torch

from kdnas.blocks.mbconv import MBConv
from kdnas.costs.budget import Budget, Cost, amount
from kdnas.costs.count import _ALIKE, _SAME, _measure, _of_nodes, _run, cost, feature_shapes, layer_costs, sum_costs
from kdnas.network import Network
from kdnas.space import Blueprint, layer
from kdnas.spaces.toy import Toy
from kdnas.tables import load_space
from tests.counting import counted

SPACE = Toy()
SMALLEST = SPACE.blueprint(SPACE.smallest)


def test_the_smallest_toy_network_by_hand():
    convolutions = 3 * 4 * 9 * 64, 4 * 4 * 9 * 64, 4 * 4 * 9 * 16  # stem and stage 0 at 8 x 8, stage 1 at 4 x 4
    params = 3 * 4 * 9 + 2 * 4 * 4 * 9 + 3 * 2 * 4 + 4 * 10 + 10
    assert cost(SMALLEST) == Cost(params, sum(convolutions) + 4 * 10)
    assert layer_costs(SMALLEST)["stages.1.0"] == Cost(4 * 4 * 9 + 8, convolutions[2])


def test_an_inverted_residual_by_hand():
    # 8 channels to 24 to 16, kernel 5, stride 2 on 8 x 8, squeezed to 8, projecting shortcut after pooling to 4 x 4
    block = layer(MBConv, inputs=8, outputs=16, expanded=24, kernel=5, stride=2, squeezed=8, shortcut="project")
    blueprint = Blueprint(layer("torch.nn:Identity"), ((block,),), layer("torch.nn:Flatten"), (8, 8, 8))
    macs = 8 * 24 * 64 + 24 * 25 * 16 + 2 * 24 * 8 + 24 * 16 * 16 + 8 * 16 * 16
    assert cost(blueprint).macs == macs
    assert feature_shapes(blueprint)["stages.0.0"] == (1, 16, 4, 4)


def test_costs_add_up_and_parameters_are_the_networks():
    largest = SPACE.blueprint(SPACE.largest)
    assert sum_costs(layer_costs(largest).values()) == cost(largest)
    assert sum_costs([]) == Cost(0, 0)
    assert cost(largest).params == sum(p.numel() for p in Network(largest).parameters())


_MAP, _VECTOR = (2, 8, 9, 7), (2, 8)


@pytest.mark.parametrize(
    ("node", "shapes"),
    [
        (("conv", (0,), 8, 12, 3, 1, 1, 1, 0, 0), (_MAP,)),
        (("conv", (0,), 8, 12, 3, 2, 0, 1, 0, 1), (_MAP,)),
        (("conv", (0,), 8, 16, 3, 2, 2, 2, 4, 1), (_MAP,)),
        (("conv", (0,), 8, 8, 5, 1, 2, 1, 1, 0), (_MAP,)),
        (("conv", (0,), 8, 6, 1, 1, 0, 1, 0, 0, 7, 3, 1), (_MAP,)),
        (("norm", (0,), 8, 1e-5, 0.1), (_MAP,)),
        (("linear", (0,), 8, 3, 1), (_VECTOR,)),
        (("linear", (0,), 8, 3, 0), (_VECTOR,)),
        (("times", (0,), 2.0), (_MAP,)),
        (("clamp", (0,), 0.0, 6.0), (_MAP,)),
        *(((name, (0,)), (_MAP,)) for name in sorted(_SAME - {"times", "plus", "clamp", "elu", "leaky_relu"})),
        (("add", (-1, 0)), (_MAP, _MAP)),
        (("mul", (-1, 0)), (_MAP, (2, 8, 1, 1))),
        (("cat", (-1, 0)), (_MAP, (2, 3, 9, 7))),
        (("slice", (0,), 2, 3), (_MAP,)),
        (("max_pool", (0,), 3, 2, 1), (_MAP,)),
        (("mean", (0,)), (_MAP,)),
    ],
    ids=str,
)
def test_a_graph_s_nodes_cost_what_is_counted_when_the_whole_graph_runs(node, shapes):
    nodes = (node, ("relu", (1,)), ("add", (1, 2)))
    graph = layer("kdnas.blocks.graph:Graph", nodes=nodes)
    assert _of_nodes(nodes, shapes) == _run.__wrapped__(graph, shapes) == _measure.__wrapped__(graph, shapes)


@pytest.mark.parametrize("node", [("conv", (0,), 4, 6, 3, 1, 0, 1, 0, 0), ("linear", (0,), 9, 2, 0)])
def test_a_graph_that_cannot_compute_on_its_inputs_is_refused_by_its_name(node):
    graph = layer("kdnas.blocks.graph:Graph", nodes=(("relu", (0,)), node))
    with pytest.raises(ValueError, match=r"the layer .*relu.* must compute on inputs of shape"):
        _measure(graph, ((1, 8, 2, 2),))


def test_shapes_are_those_of_the_networks_features():
    blueprint = SPACE.blueprint(SPACE.largest)
    with torch.no_grad():
        outputs = Network(blueprint).eval()(torch.zeros(1, 3, 8, 8))
    shapes = feature_shapes(blueprint)
    assert [shapes["stages.0.1"], shapes["stages.1.1"]] == [f.shape for f in outputs.features]
    assert shapes["head"] == (1, 10)


@pytest.mark.parametrize("operation", sorted(_ALIKE, key=str), ids=str)
def test_operations_that_are_left_out_return_what_is_of_their_input_s_shape(operation):
    image = torch.rand(2, 3, 4)
    output = operation(image.clone())
    assert (output.shape, output.dtype) == (image.shape, image.dtype)


def test_a_norm_s_own_statistics_are_left_out_and_other_channels_are_still_refused():
    norm = layer(torch.nn.BatchNorm2d, num_features=4)
    blueprint = Blueprint(norm, ((layer(torch.nn.ReLU),),), layer(torch.nn.Flatten), (4, 8, 8))
    assert cost(blueprint) == Cost(8, 0) and feature_shapes(blueprint)["stages.0.0"] == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="BatchNorm2d"):
        cost(dataclasses.replace(blueprint, image=(3, 8, 8)))


def test_macs_grow_with_the_image_and_parameters_do_not():
    bigger = dataclasses.replace(SMALLEST, image=(3, 16, 16))
    head = 4 * 10
    assert cost(bigger).params == cost(SMALLEST).params
    assert cost(bigger).macs - head == 4 * (cost(SMALLEST).macs - head)


def test_a_budget_admits_what_is_within_every_bound():
    budget = Budget.parse(["macs=5e6", "params=1000"])
    assert budget == Budget(params=1000, macs=5e6)
    assert budget.admits(Cost(1000, 5_000_000))
    assert not budget.admits(Cost(1001, 1)) and not budget.admits(Cost(1, 5_000_001))
    assert Budget().admits(Cost(10**12, 10**15))


def test_the_excess_is_the_largest_relative_overshoot():
    budget = Budget(params=100, macs=1000)
    assert budget.excess(Cost(150, 1200)) == pytest.approx(0.5)
    assert budget.excess(Cost(50, 900)) == pytest.approx(-0.1)
    assert Budget().excess(Cost(1, 1)) == 0


def test_a_budget_prints_and_survives_its_mapping():
    budget = Budget(macs=5e6)
    assert str(budget) == "macs <= 5,000,000" and str(Budget()) == "no bound"
    assert Budget(**budget.bounds()) == budget
    assert Budget.parse([]) == Budget()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["macs"], "a budget must be name=number, such as macs=5e6, got 'macs'"),
        (["mac=5e6"], "a budget bounds params, macs, memory, latency or size, got 'mac'. Did you mean 'macs'"),
        (["macs=5e6", "macs=1"], "macs is bounded twice"),
        (["macs=many"], "the bound of macs must be a number, with one of the units k, K, M, G or none, got 'many'"),
        (["macs=0"], "the bound of macs must be positive and finite, got 0"),
        (["macs=1,000"], "without commas, got 'macs=1,000'"),
        (["macs=1M,params=1k"], "Write each bound by itself"),
        (["MACs=1M"], "Did you mean 'macs'"),
        (["macs=-1"], "the bound of macs must be positive and finite, got -1"),
        (["macs=nan"], "the bound of macs must be positive and finite, got nan"),
    ],
)
def test_a_wrong_budget_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(texts)


def test_a_warm_cost_builds_no_layer_again():
    space, rng = load_space("nas_bench_macro"), random.Random(0)
    for _ in range(30):
        cost(space.blueprint(space.sample(rng)))
    architectures = [space.sample(rng) for _ in range(20)]
    used = [counted(lambda a=a: cost(space.blueprint(a)))[1] for a in architectures]
    assert statistics.median(used) < 2000


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latency", 0.0123456, "12.3 ms"),
        ("latency", 1.5, "1.5 s"),
        ("latency", 0.9999, "1,000 ms"),
        ("latency", 3600.0, "3,600 s"),
        ("memory", 1234567.4, "1,234,567 bytes"),
        ("params", 1234.6, "1,235"),
        ("macs", 5e6, "5,000,000"),
    ],
)
def test_amounts_have_their_unit(name, value, text):
    assert amount(name, value) == text
    assert str(Budget(**{name: value})) == f"{name} <= {text}"


def test_several_bounds_are_printed_in_the_order_of_the_fields():
    assert str(Budget(latency=0.005, params=10)) == "params <= 10, latency <= 5 ms"


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("macs= 2.5 k ", 2500),
        ("macs=1K", 1000),
        ("params=.5M", 5e5),
        ("macs=2G", 2e9),
        ("macs=1e3", 1000),
        ("memory=2B", 2),
        ("memory=2kB", 2000),
        ("memory=3GB", 3e9),
        ("memory=3KiB", 3072),
        ("memory=3MiB", 3145728),
        ("memory=1GiB", 1073741824),
        ("memory=7k", 7000),
        ("latency=2s", 2.0),
        ("latency=3us", 3e-6),
    ],
)
def test_every_unit_by_hand(text, bound):
    (parsed,) = Budget.parse([text]).bounds().values()
    assert parsed == pytest.approx(bound, rel=1e-12)


def test_an_excess_needs_what_is_bounded_and_takes_more():
    assert Budget(memory=10).excess(Cost(1, 1), memory=25, latency=9.0) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="this bounds params and macs, got a bound on memory"):
        Budget(memory=10).excess(Cost(1, 1))


def test_a_network_that_cannot_compute_on_its_images_is_refused_with_layer_and_shape():
    wide = layer("torch.nn:Conv2d", in_channels=3, out_channels=4, kernel_size=5)
    head = layer("kdnas.blocks.basic:PoolLinear", inputs=4, classes=2)
    with pytest.raises(ValueError, match=r"the layer Conv2d.* must compute on inputs of shape \[3, 2, 2\]"):
        cost(Blueprint(wide, (), head, (3, 2, 2)))
