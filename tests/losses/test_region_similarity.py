import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdnas.losses.dense.region_similarity import RegionSimilarity
from kdnas.losses.example import example
from kdnas.outputs import Outputs
from kdnas.randomness import torch_rng


def nodes(x, rows, columns, pool):
    """Every node's patch, where the grid divides the map: `[batch, nodes, channels]`."""
    height, width = x.shape[2] // rows, x.shape[3] // columns
    found = [
        [
            pool(sample[:, i * height : (i + 1) * height, j * width : (j + 1) * width], axis=(1, 2))
            for i in range(rows)
            for j in range(columns)
        ]
        for sample in x.numpy()
    ]
    return np.array(found)


def reference(student, teacher, rows, columns, pool):
    total, batch, count = 0.0, len(student), rows * columns
    grids = [nodes(x, rows, columns, pool) for x in (student, teacher)]
    for b in range(batch):
        for i in range(count):
            for j in range(count):
                s, t = (
                    grid[b, i] @ grid[b, j] / np.linalg.norm(grid[b, i]) / np.linalg.norm(grid[b, j]) for grid in grids
                )
                total += (s - t) ** 2
    return total / (batch * count**2)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), tuple(features))


def test_two_nodes_by_hand():
    # Student nodes (1, 0) and (0, 1): cosine 0. Teacher nodes (1, 1) twice: cosine 1. Two of four pairs differ by 1.
    student = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    teacher = torch.ones(1, 2, 1, 2)
    assert RegionSimilarity()(outputs(student), outputs(teacher), torch.zeros(1)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("pool", ["max", "average"])
def test_agrees_with_a_loop(pool):
    student, teacher, labels = example()
    value = RegionSimilarity(pool=pool, taps=((0, 0),))(student, teacher, labels).item()
    expected = reference(student.features[0], teacher.features[0], 2, 2, {"max": np.max, "average": np.mean}[pool])
    assert value == pytest.approx(expected, rel=1e-12)


def test_a_finer_grid_agrees_with_a_loop():
    student, teacher, labels = example()
    value = RegionSimilarity(grid=10, taps=((1, 1),))(student, teacher, labels).item()
    assert value == pytest.approx(reference(student.features[1], teacher.features[1], 4, 3, np.max), rel=1e-12)


def test_golden_compares_the_deepest_stages():
    student, teacher, labels = example()
    # On maps of 4x3 the two columns of nodes overlap in the middle column.
    wide = [torch.cat([f[..., :2], f[..., 1:]], -1) for f in (student.features[1], teacher.features[1])]
    expected = reference(*wide, 2, 2, np.max)
    assert RegionSimilarity()(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    assert RegionSimilarity.golden == pytest.approx(expected, rel=1e-12)


def test_the_maps_that_are_classified_are_compared_where_the_heads_have_layers_of_their_own():
    student, teacher, labels = example()
    deep, own, theirs = RegionSimilarity()(student, teacher, labels), student.features[0], teacher.features[0]
    value = RegionSimilarity()(student._replace(classified=own), teacher._replace(classified=theirs), labels)
    assert value.item() == pytest.approx(reference(own, theirs, 2, 2, np.max), rel=1e-12) != pytest.approx(deep.item())
    # A network whose head has none shows that of its last stage.
    mixed = RegionSimilarity()(student._replace(classified=own), teacher, labels)
    assert torch.equal(mixed, RegionSimilarity(taps=((0, -1),))(student, teacher, labels))
    # Explicit pairs count from the last stage.
    last = RegionSimilarity(taps=((-1, -1),))(student._replace(classified=own), teacher, labels)
    assert torch.equal(last, deep)


def test_the_size_of_a_map_does_not_matter():
    student, teacher, labels = example()
    larger = student._replace(features=tuple(7 * f for f in student.features))
    expected = RegionSimilarity()(student, teacher, labels).item()
    assert RegionSimilarity()(larger, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_where_a_node_lies_does_not_matter_as_long_as_it_is_the_same_in_both_maps(seed):
    rng = torch_rng(seed)
    maps = [torch.randn(2, channels, 3, 4, generator=rng, dtype=torch.float64) for channels in (3, 5)]
    order = torch.randperm(12, generator=rng)
    moved = [x.flatten(2)[:, :, order].unflatten(2, (3, 4)) for x in maps]
    loss = RegionSimilarity(grid=4)  # each position is a node
    value, other, one_side = (
        loss(outputs(s), outputs(t), torch.zeros(2)) for s, t in (maps, moved, (moved[0], maps[1]))
    )
    assert other.item() == pytest.approx(value.item(), rel=1e-12)
    assert torch.equal(order, torch.arange(12)) or one_side.item() != pytest.approx(value.item(), rel=1e-6)


def test_equal_maps_and_single_nodes_give_zero():
    student, teacher, labels = example()
    assert RegionSimilarity()(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-15)
    assert RegionSimilarity(grid=1)(student, teacher, labels).item() == pytest.approx(0, abs=1e-15)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`grid` must be at least 1"):
        RegionSimilarity(grid=0)
    with pytest.raises(ValueError, match="`pool` must be one of max, average"):
        RegionSimilarity(pool="mean")
