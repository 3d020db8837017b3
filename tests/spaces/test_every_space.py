"""What must hold for every table in search_spaces/, found by walking: -k NAME runs one table's."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from torch import nn

import kdnas.blocks
from kdnas.conversion.convert import convert
from kdnas.randomness import initialised
from kdnas.space import SearchSpace
from kdnas.specs import algorithms, resolve
from kdnas.tables import load_space, shared_folder, space_from_table, table_of
from kdnas.testing.spaces import SpaceContract
from tests.spaces.own_space import Own

TABLES = sorted(path.stem for path in shared_folder("search_spaces").glob("*.toml"))


def is_part(value, family):
    """Whether it is the family or a dataclass of its tables."""
    return dataclasses.is_dataclass(value) and value.__module__ == family.__module__


@functools.cache
def space_of(name):
    return load_space(name)


class TestEveryTable(SpaceContract):
    @pytest.fixture(autouse=True, params=TABLES)
    def table(self, request):
        self.space = space_of(request.param)
        self.ordered = self.space.covering() == (self.space.largest,)  # a choice among operations has no order
        self.name = request.param

    def test_it_names_its_source(self):
        assert self.space.name == self.name and self.space.source


class Residual(nn.Module):
    """A stem, two blocks that may be left out with hidden channels, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        features = self.stem(images)
        for block in self.blocks:
            features = (features + block(features)).relu()
        return self.head(features.mean((2, 3)))


@functools.cache
def converted():
    return convert(initialised(Residual, 0), image=(3, 8, 8)).space


class TestConverted(SpaceContract):
    @pytest.fixture(autouse=True)
    def conversion(self):
        self.space = converted()


class TestOwn(SpaceContract):
    space = space_from_table({"family": "tests.spaces.own_space:Own", "widths": [4, 8], "resolutions": [8]})

    def test_it_is_the_family_of_the_table(self):
        assert isinstance(self.space, Own) and self.space.count() == (2 * (2 + 4)) ** 3
        assert table_of(self.space)["family"] == "tests.spaces.own_space:Own"


def test_every_family_is_under_contract():
    spaces = [*map(space_of, TABLES), converted()]
    assert {f"{type(space).__module__}:{type(space).__name__}" for space in spaces} == {
        *algorithms("kdnas.spaces").values()
    }


def test_a_table_is_read_without_torch():
    code = (
        "import sys\nfrom kdnas.tables import load_space\n"
        f"for name in {TABLES!r}:\n    space = load_space(name)\n"
        "    space.blueprint(space.decide(lambda choice: choice.options[-1]))\n"
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


FAMILIES = [resolve(path) for name, path in algorithms("kdnas.spaces").items() if name != "converted"]
PARTS = [part for family in FAMILIES for part in vars(sys.modules[family.__module__]).values() if is_part(part, family)]


@pytest.mark.parametrize("part", dict.fromkeys(PARTS), ids=lambda part: part.__name__)
def test_every_number_of_a_table_has_a_range(part):
    hints = typing.get_type_hints(part, include_extras=True)
    plain = [name for name, kind in hints.items() if kind in (int, float, tuple[int, ...], tuple[float, ...])]
    assert not plain, f"{plain} of {part.__name__} take any number: give them a Range, such as Size"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_number_out_of_its_range_is_refused_when_the_space_is_made(family):
    space = load_space(next(name for name in TABLES if type(space_of(name)) is family))
    for field in dataclasses.fields(space):
        value = getattr(space, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if numbers and all(type(n) in (int, float) for n in numbers):
            wrong = (-1, *numbers[1:]) if isinstance(value, tuple) else -1
            with pytest.raises(ValueError, match=f"`{field.name}` must be a"):
                dataclasses.replace(space, **{field.name: wrong})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Careless(Own):
    """A family that checks nothing when it is made."""

    def __post_init__(self):
        pass


def test_a_family_that_forgets_the_check_is_checked_when_its_table_is_loaded():
    with pytest.raises(ValueError, match="`classes` must be at least 1, got 0"):
        space_from_table({"family": "tests.spaces.test_every_space:Careless", "classes": 0})
