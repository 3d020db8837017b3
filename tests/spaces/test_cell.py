"""NAS-Bench-201: counts, the benchmark's own equality of cells, costs, and the graph's arithmetic."""

import csv
import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kdnas.architecture import Architecture
from kdnas.blocks.cell import Cell as CellBlock
from kdnas.blocks.cell import PooledResidual
from kdnas.costs.count import cost
from kdnas.spaces.cell import Cell
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SPACE = load_space("nas_bench_201")
SMALL = dataclasses.replace(SPACE, widths=(4, 6), num_cells=1, resolutions=(8,))
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))

# Rows of the released table: string, unique string.
ROWS = [
    ("|none~0|+|avg_pool_3x3~0|nor_conv_3x3~1|+|none~0|nor_conv_1x1~1|skip_connect~2|", "#+#+#+(0)@avg_pool_3x3"),
    ("|none~0|+|none~0|avg_pool_3x3~1|+|avg_pool_3x3~0|none~1|skip_connect~2|", "#+#+#+(0)@avg_pool_3x3"),
    (
        "|skip_connect~0|+|none~0|skip_connect~1|+|nor_conv_3x3~0|nor_conv_3x3~1|skip_connect~2|",
        "#+0+(0)@nor_conv_3x3+(0)@nor_conv_3x3",
    ),
    (
        "|avg_pool_3x3~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|",
        "#+((0)@avg_pool_3x3)@avg_pool_3x3+(0)@nor_conv_3x3",
    ),
    (
        "|nor_conv_1x1~0|+|nor_conv_1x1~0|none~1|+|skip_connect~0|avg_pool_3x3~1|skip_connect~2|",
        "#+(0)@nor_conv_1x1+((0)@nor_conv_1x1)@avg_pool_3x3+0",
    ),
    (
        "|skip_connect~0|+|skip_connect~0|none~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        "(#+0)@nor_conv_3x3+(0)@avg_pool_3x3+(0)@nor_conv_3x3",
    ),
    (
        "|none~0|+|nor_conv_1x1~0|nor_conv_1x1~1|+|avg_pool_3x3~0|skip_connect~1|avg_pool_3x3~2|",
        "#+(#+(0)@nor_conv_1x1)@avg_pool_3x3+(0)@avg_pool_3x3",
    ),
    (
        "|skip_connect~0|+|nor_conv_3x3~0|skip_connect~1|+|nor_conv_3x3~0|nor_conv_3x3~1|skip_connect~2|",
        "(0)@nor_conv_3x3+(0)@nor_conv_3x3+(0)@nor_conv_3x3+0",
    ),
    (
        "|nor_conv_1x1~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|none~0|nor_conv_3x3~1|skip_connect~2|",
        "#+((0)@nor_conv_1x1)@nor_conv_3x3+((0)@nor_conv_1x1)@nor_conv_3x3+(0)@nor_conv_3x3",
    ),
    (
        "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|nor_conv_1x1~0|avg_pool_3x3~1|avg_pool_3x3~2|",
        "(((0)@nor_conv_3x3)@avg_pool_3x3+(0)@nor_conv_1x1)@avg_pool_3x3+((0)@nor_conv_3x3)@avg_pool_3x3+(0)@nor_conv_1x1",
    ),
]

# Released costs: parameters in millions, and FLOPs, which count ten more for the classifier's bias.
COSTS = [
    (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        1.531546,
        220.11969,
    ),
    ("|none~0|+|none~0|none~1|+|none~0|none~1|none~2|", 0.073306, 7.78305),
    (
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|",
        0.802426,
        113.95137,
    ),
    (
        "|skip_connect~0|+|none~0|nor_conv_3x3~1|+|avg_pool_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        0.802426,
        113.95137,
    ),
]


def literal(*operations):
    """An architecture as spelled, not canonical."""
    return Architecture({c.name: o for c, o in zip(SPACE.choices, operations, strict=True)})


def spelled(code):
    return literal(*(edge.rpartition("~")[0] for node in code.split("+") for edge in node.strip("|").split("|")))


def test_there_are_15625_cells_and_6466_of_them_are_unique():
    assert SPACE.count() == 15625
    canonical = set(SPACE.all())
    assert len(canonical) == 6466
    assert len({SPACE.unique(architecture) for architecture in canonical}) == 6466
    assert len({SPACE.blueprint(architecture) for architecture in canonical}) == 6466


@pytest.mark.parametrize(("code", "unique"), ROWS)
def test_released_strings_are_reproduced(code, unique):
    assert SPACE.unique(spelled(code)) == unique
    assert SPACE.unique(SPACE.parse(code)) == unique
    assert SPACE.parse(SPACE.code(SPACE.parse(code))) == SPACE.parse(code)


@pytest.mark.parametrize(("code", "params", "flops"), COSTS)
def test_released_costs_are_reproduced(code, params, flops):
    measured = cost(SPACE.blueprint(SPACE.parse(code)))
    assert measured.params == round(params * 1e6)
    assert measured.macs + 10 == round(flops * 1e6)


def test_a_canonical_cell_computes_what_every_spelling_of_it_computes():
    """Each operation replaced by some function that keeps zero, the cells computed in numpy."""
    rng = np.random.default_rng(0)
    matrices = {name: rng.normal(size=(3, 3)) for name in SPACE.operations}

    def apply(name, x):
        if name == "none":
            return 0 * x
        return x if name == "skip_connect" else np.tanh(matrices[name] @ x)

    def output(cell):
        nodes = [np.ones(3), np.zeros(3), np.zeros(3), np.zeros(3)]
        for (source, target), name in zip(EDGES, cell.values(), strict=True):
            nodes[target] = nodes[target] + apply(name, nodes[source])
        return nodes[3]

    pick, outputs = random.Random(0), {}
    for _ in range(3000):
        cell = literal(*(pick.choice(SPACE.operations) for _ in range(6)))
        canonical = SPACE.canonical(cell)
        assert SPACE.canonical(canonical) == canonical
        outputs.setdefault(canonical, output(canonical))
        np.testing.assert_allclose(output(cell), outputs[canonical], atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Where the input of a node comes from first does not matter.
        (
            ("skip_connect", "nor_conv_1x1", "none", "none", "none", "skip_connect"),
            ("skip_connect", "none", "nor_conv_1x1", "none", "none", "skip_connect"),
        ),
        # Nothing leads on from node 1.
        (
            ("nor_conv_3x3", "none", "none", "skip_connect", "none", "none"),
            ("none", "none", "none", "skip_connect", "none", "none"),
        ),
        # A convolution of nothing is nothing.
        (
            ("none", "none", "none", "skip_connect", "nor_conv_3x3", "none"),
            ("none", "none", "none", "skip_connect", "none", "none"),
        ),
    ],
)
def test_equal_cells_are_equal_values(first, second):
    assert SPACE.canonical(literal(*first)) == SPACE.canonical(literal(*second))
    assert SPACE.blueprint(literal(*first)) == SPACE.blueprint(literal(*second))


def test_a_cell_adds_up_its_edges_at_the_nodes():
    # Node 1 = x, node 2 = x + x, node 3 = pooled x + node 1 + node 2.
    cell = CellBlock(
        2, ("skip_connect", "skip_connect", "skip_connect", "avg_pool_3x3", "skip_connect", "skip_connect")
    )
    x = torch.randn(1, 2, 4, 4)
    pooled = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    torch.testing.assert_close(cell(x), pooled + 3 * x)


def test_a_cell_of_nothing_gives_zero():
    assert torch.equal(CellBlock(2, ("none",) * 6)(torch.ones(1, 2, 4, 4)), torch.zeros(1, 2, 4, 4))


def test_the_residual_block_takes_an_odd_side():
    assert PooledResidual(2, 4)(torch.ones(2, 2, 5, 5)).shape == (2, 4, 3, 3)


def test_a_subnet_is_its_student_and_every_operation_of_every_edge_has_its_own_weights():
    supernet, rng, images = Supernet(SMALL).eval(), random.Random(0), torch.randn(2, 3, 8, 8)
    for _ in range(6):
        architecture = SMALL.sample(rng)
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))
    edges = {name.split(".")[4] for name, _ in supernet.named_parameters() if ".edges." in name}
    assert edges == {"nor_conv_1x1", "nor_conv_3x3"}
    bank = sum(p.numel() for p in supernet.bank["stages_0_0:shared"].parameters())
    assert bank == 6 * (4 * 4 * (9 + 1) + 2 * 2 * 4)


def test_the_uniform_networks_use_every_weight_together():
    supernet, used = Supernet(SMALL), set()
    for architecture in SMALL.covering():
        SMALL.validate(architecture)
        supernet.zero_grad(set_to_none=True)
        supernet(torch.randn(2, 3, 8, 8), architecture).logits.square().sum().backward()
        used |= {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in supernet.named_parameters()}


def test_a_smaller_set_of_operations_is_a_space_of_its_own():
    space = dataclasses.replace(SMALL, operations=("skip_connect", "nor_conv_3x3"), resolutions=(8, 16))
    assert space.count() == 2 * 2**6
    assert space.parse(space.code(space.largest)) == space.largest
    with pytest.raises(ValueError, match="must be one of"):
        space.parse(COSTS[1][0] + "@8")


@pytest.mark.parametrize("code", ["", "|none~0|", COSTS[1][0][:-1], COSTS[1][0].replace("~2", "~1"), "000000"])
def test_a_wrong_string_is_refused(code):
    with pytest.raises(ValueError, match="a code of nas_bench_201 must be"):
        SPACE.parse(code)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operations": ("skip_conect", "none")}, "Did you mean 'skip_connect'"),
        ({"operations": ("skip_connect", "none")}, "must be in the order"),
        ({"num_cells": 0}, "`num_cells` must be at least 1, got 0"),
    ],
)
def test_a_wrong_table_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Cell(**fields)


def test_every_row_of_the_released_table_is_in_its_class():
    path = Path(os.environ.get("KDNAS_DATA", "absent")) / "nas_bench_201_public.csv"
    if not path.is_file():
        pytest.skip("needs nas_bench_201_public.csv in the folder KDNAS_DATA names")
    values = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            architecture = SPACE.parse(row["arch"])
            assert SPACE.unique(spelled(row["arch"])) == row["unique"]
            assert values.setdefault(row["unique"], architecture) == architecture
    assert len(set(values.values())) == len(values)


def test_rows_of_one_class_differ_as_trainings_of_one_network_do():
    """Every cell was trained by itself, so results inside a class are near, not equal."""
    path = Path(os.environ.get("KDNAS_DATA", "absent")) / "nas_bench_201_public.csv"
    if not path.is_file():
        pytest.skip("needs nas_bench_201_public.csv in the folder KDNAS_DATA names")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for column in ("cifar10_test", "cifar100_test", "imagenet16_test"):
        stored: dict[str, list[float]] = {}
        for row in rows:
            stored.setdefault(SPACE.unique(spelled(row["arch"])), []).append(float(row[column]))
        within = np.concatenate([np.subtract(found, np.mean(found)) for found in stored.values() if len(found) > 1])
        every = np.array([float(row[column]) for row in rows])
        assert len(within) > len(stored)
        assert within.std() < 0.1 * every.std(), column
