"""Architecture and Choice are values."""

import json

import pytest

from kdnas.architecture import Architecture, Choice


def test_architectures_are_equal_by_content_whatever_the_order():
    first = Architecture({"depth": 2, "act": "relu", "ratio": 0.5})
    second = Architecture({"ratio": 0.5, "depth": 2, "act": "relu"})
    assert first == second and hash(first) == hash(second) and len({first, second}) == 1
    assert first != Architecture({"depth": 3, "act": "relu", "ratio": 0.5})
    assert first != Architecture({"depth": 2})


def test_an_architecture_does_not_change():
    values = {"depth": 2}
    architecture = Architecture(values)
    values["depth"] = 3
    assert architecture["depth"] == 2
    with pytest.raises(TypeError):
        architecture["depth"] = 3
    with pytest.raises(AttributeError):
        architecture.depth = 3


def test_its_dict_is_its_json():
    architecture = Architecture({"depth": 2, "act": "relu", "ratio": 3.5})
    assert Architecture(json.loads(json.dumps(dict(architecture)))) == architecture
    assert repr(architecture) == "Architecture({'depth': 2, 'act': 'relu', 'ratio': 3.5})"


def test_a_part_is_the_subtree_without_its_prefix():
    architecture = Architecture({"stage1.depth": 2, "stage1.block0.kernel": 3, "stage10.depth": 4})
    assert architecture.under("stage1") == Architecture({"depth": 2, "block0.kernel": 3})
    assert architecture.under("stage1").under("block0").integer("kernel") == 3
    assert len(architecture.under("stage")) == 0


def test_a_missing_choice_is_a_key_error_and_get_works():
    architecture = Architecture({"depth": 2})
    assert architecture.get("kernel") is None and "kernel" not in architecture and len(architecture) == 1
    with pytest.raises(KeyError):
        architecture["kernel"]


def test_a_choice_needs_distinct_options():
    with pytest.raises(ValueError, match="depth has no options"):
        Choice("depth", ())
    with pytest.raises(ValueError, match="depth has an option twice"):
        Choice("depth", (1, 2, 1))


def test_a_choice_exists_while_the_one_it_needs_is_large_enough():
    third = Choice("block2.kernel", (3, 5), "depth", 3)
    assert third.exists({"depth": 3}) and third.exists({"depth": 4})
    assert not third.exists({"depth": 2}) and not third.exists({})
    assert Choice("kernel", (3, 5)).exists({})
