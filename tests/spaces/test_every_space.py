"""What must hold for every table in search_spaces/, found by walking: -k NAME runs one table's."""

import ast
import dataclasses
import functools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdnas.blocks
from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import algorithms, resolve
from kdnas.supernet import Supernet
from kdnas.tables import load_space, shared_folder, space_from_table, table_of
from tests.spaces.own_space import Own

TABLES = sorted(path.stem for path in shared_folder("search_spaces").glob("*.toml"))
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=3, deadline=None, derandomize=True, database=None)
SOME = settings(max_examples=10, deadline=None, derandomize=True, database=None)

every_table = pytest.mark.parametrize("name", TABLES)


@functools.cache
def space_of(name):
    return load_space(name)


@functools.cache
def tiny(name):
    """The space at a small input size and few classes: the same choices but for the size."""
    space = space_of(name)
    side = min(32, space.resolutions[0])
    sizes = (side,) if len(space.resolutions) == 1 else (side, side + side // 2)
    return dataclasses.replace(space, resolutions=sizes, classes=min(10, space.classes))


@functools.cache
def supernet_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = Supernet(tiny(name)).eval()
        for tensor in supernet.bank.state_dict().values():
            if tensor.dim() == 1 and tensor.is_floating_point():
                # Norms and biases at their start would hide a wrong slice, zero scales a whole branch.
                tensor.add_(0.1 * torch.rand_like(tensor))
    return supernet


def distinct(space, rng, number=8):
    """A few architectures that differ, some only in one choice."""
    found = [space.smallest, space.largest]
    found += [space.sample(rng) for _ in range(number)]
    found += [space.mutate(architecture, rng, rate=0.0) for architecture in found]
    return list(dict.fromkeys(found))


@every_table
def test_a_table_names_its_source_and_survives_the_round_trip(name):
    space = space_of(name)
    assert space.name == name and space.source and space.count() >= 2
    assert space_from_table(json.loads(json.dumps(table_of(space)))) == space


@every_table
@SOME
@given(seed=SEEDS)
def test_sampled_mutated_and_crossed_architectures_are_valid_canonical_and_survive_json(name, seed):
    space, rng = space_of(name), random.Random(seed)
    first, second = space.sample(rng), space.sample(rng)
    mutant = space.mutate(first, rng, rate=0.2)
    assert mutant != first
    for architecture in (first, second, mutant, space.cross(first, second, rng)):
        space.validate(architecture)
        assert space.canonical(architecture) == architecture
        assert Architecture(json.loads(json.dumps(dict(architecture)))) == architecture
        assert space.architecture(dict(architecture)) == architecture
        assert space.parse(space.code(architecture)) == architecture
        blueprint = space.blueprint(architecture)
        assert Blueprint.from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint


@every_table
def test_equal_networks_are_equal_values(name):
    space = space_of(name)
    found = distinct(space, random.Random(0))
    assert len({space.code(architecture) for architecture in found}) == len(found)
    assert len({space.blueprint(architecture) for architecture in found}) == len(found)


@every_table
def test_costs_lie_between_the_smallest_and_the_largest(name):
    space = space_of(name)
    if space.covering() != (space.largest,):
        pytest.skip("a choice among operations has no order")
    low, high = cost(space.blueprint(space.smallest)), cost(space.blueprint(space.largest))
    params, macs = cost(space.blueprint(space.sample(random.Random(0))))
    assert low.params <= params <= high.params and low.macs <= macs <= high.macs


@every_table
@FEW
@given(seed=SEEDS)
def test_a_subnet_is_its_extracted_student_bit_for_bit(name, seed):
    space, supernet = tiny(name), supernet_of(name)
    architecture = space.sample(random.Random(seed))
    _is_its_student(supernet, architecture)


@every_table
def test_the_smallest_largest_and_covering_subnets_are_their_students_bit_for_bit(name):
    space, supernet = tiny(name), supernet_of(name)
    for architecture in {space.smallest, space.largest, *space.covering()[:3]}:
        _is_its_student(supernet, architecture)


def _is_its_student(supernet, architecture):
    space = supernet.space
    student = supernet.extract(architecture)
    assert isinstance(student, Network) and not student.training
    generator = torch.Generator().manual_seed(0)
    side = space.blueprint(architecture).image[1]
    images = torch.randn(2, space.image_channels, side, side, generator=generator)
    with torch.no_grad():
        inside, outside = supernet(images, architecture), student(images)
    assert inside.logits.shape == (2, space.classes)
    assert torch.isfinite(inside.logits).all()
    assert torch.equal(inside.logits, outside.logits)
    assert len(inside.features) == len(outside.features) > 0
    for a, b in zip(inside.features, outside.features, strict=True):
        assert torch.equal(a, b)


@every_table
def test_every_weight_is_used_by_some_covering_architecture(name):
    space, supernet = tiny(name), supernet_of(name)
    used = set()
    for architecture in {*space.covering(), space.smallest}:
        for position, layer in space.blueprint(architecture).named_layers():
            plan = supernet._plan(position, layer)
            used |= {id(getattr(owner, attribute)) for _, owner, attribute, _ in plan.sources}
    held = {id(p): n for n, p in supernet.named_parameters()}
    unused = {held[key] for key in set(held) - used}
    # A shortcut's convolution may be used only by networks whose widths differ where the largest's are equal.
    assert all(n.endswith("project.weight") for n in unused), unused


def test_a_table_is_read_without_torch():
    code = (
        "import sys\nfrom kdnas.tables import load_space\n"
        f"for name in {TABLES!r}:\n    space = load_space(name)\n    space.blueprint(space.largest)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_blocks_import_torch_the_standard_library_and_blocks_only():
    allowed = {"torch", "kdnas", *sys.stdlib_module_names}
    for path in sorted(Path(kdnas.blocks.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                assert module.split(".")[0] in allowed, (path.name, module)
                assert not module.startswith("kdnas") or module.startswith("kdnas.blocks."), (path.name, module)


PAGE = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text()


def test_the_documentation_lists_every_table_with_its_count():
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|*\\]*)", PAGE, re.MULTILINE))
    assert sorted(name for name in rows if name in TABLES) == TABLES
    for name in TABLES:
        count = space_of(name).count()
        assert rows[name].strip() in (f"{count:,}", f"{count:.2e}"), name


def test_the_documentation_lists_every_family_with_its_keys():
    rows = dict(re.findall(r"^\| (\w+) \|(.*)\|$", PAGE, re.MULTILINE))
    shared = {field.name for field in dataclasses.fields(SearchSpace)}
    for path in (Path(kdnas.blocks.__file__).parents[1] / "spaces").glob("[!_]*.py"):
        family = resolve(algorithms("kdnas.spaces")[path.stem])
        keys = [field.name for field in dataclasses.fields(family) if field.name not in shared]
        assert re.findall(r"`(\w+)`", rows[path.stem].rpartition("|")[2]) == keys, path.stem


def test_the_documented_space_of_ones_own_is_the_one_tested_here():
    own = Path(__file__).with_name("own_space.py").read_text()
    assert own in PAGE
    assert len(own.splitlines()) <= 60


def test_a_space_of_ones_own_keeps_the_laws():
    space = space_from_table({"family": "tests.spaces.own_space:Own", "widths": [4, 8], "resolutions": [8]})
    assert isinstance(space, Own) and space.count() == (2 * (2 + 4)) ** 3
    assert table_of(space)["family"] == "tests.spaces.own_space:Own"
    supernet, rng = Supernet(space).eval(), random.Random(0)
    for architecture in (space.smallest, space.largest, *(space.sample(rng) for _ in range(5))):
        _is_its_student(supernet, architecture)
        assert cost(space.blueprint(space.smallest)).macs <= cost(space.blueprint(architecture)).macs
