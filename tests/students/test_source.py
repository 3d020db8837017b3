import ast
import dataclasses
import importlib
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.space import Blueprint, layer
from kdnas.specs import spec
from kdnas.students.modules import importable
from kdnas.students.source import student_source
from kdnas.tables import load_space, shared_folder

SPACES = sorted(path.stem for path in shared_folder("search_spaces").glob("*.toml"))
HEAD = layer("kdnas.blocks.basic:PoolLinear", inputs=4, classes=3)
STEM = layer("kdnas.blocks.basic:ConvNormAct", inputs=1, outputs=4)
NAMES = ("cat", "dog", "owl")


def blueprint_with(*layers, size=6):
    return Blueprint(STEM, (layers,), HEAD, (1, size, size))


def as_is(image):
    """Preprocessing that changes nothing."""
    return Preprocessing(height=image[1], width=image[2], mean=(0.0,) * image[0], std=(1.0,) * image[0])


def written(blueprint, names=NAMES):
    return student_source(blueprint, as_is(blueprint.image), names)


def run(source):
    """The names the source defines, run where only torch and the standard library can be imported."""

    def only_torch(name, *rest):
        assert importable(name), f"imports {name}"
        return __import__(name, *rest)

    import builtins

    names = {"__name__": "student", "__builtins__": {**vars(builtins), "__import__": only_torch}}
    exec(compile(source, "student.py", "exec"), names)
    return names


def assert_same(blueprint, source):
    """The written class takes the network's weights strictly and computes the same bits."""
    torch.manual_seed(0)
    network = Network(blueprint).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    student = run(source)["Student"]().eval()
    assert list(student.state_dict()) == list(network.state_dict())
    student.load_state_dict(network.state_dict(), strict=True)
    images = torch.rand(2, *blueprint.image)
    with torch.inference_mode():
        expected = network(images).logits
        assert torch.equal(student(images), expected)
    assert expected.abs().max() > 0


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a user's own and makes it importable."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in [n for n, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", None))]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def sources():
    """For every space, two architectures at a small resolution and their code."""
    made = {}
    for name in SPACES:
        space = load_space(name)
        if min(space.resolutions) > 32:
            space = dataclasses.replace(space, resolutions=(32,))
        made[name] = []
        for architecture in (space.smallest, space.sample(random.Random(1))):
            blueprint = space.blueprint(architecture)
            classes = [f"class {i}" for i in range(space.classes)]
            made[name].append((blueprint, student_source(blueprint, as_is(blueprint.image), classes)))
    return made


@pytest.mark.parametrize("name", SPACES)
def test_the_code_of_every_space_computes_what_the_network_does(name, sources):
    for blueprint, source in sources[name]:
        assert_same(blueprint, source)


def test_the_code_of_every_space_imports_torch_and_the_standard_library_only(sources):
    for pairs in sources.values():
        for _, source in pairs:
            tree = ast.parse(source)
            top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            modules = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
            modules |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
            assert all(map(importable, modules)), modules
            inside = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n not in top}
            assert not inside


def test_the_code_of_every_space_is_clean_and_formatted(sources, tmp_path):
    for name, pairs in sources.items():
        for place, (_, source) in enumerate(pairs):
            (tmp_path / f"{name}_{place}.py").write_text(source)
    config = ["--no-cache", "--config", str(Path(__file__).parents[2] / "pyproject.toml"), str(tmp_path)]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_block_is_copied_with_all_it_uses(module):
    module(
        "helpers",
        """
        from dataclasses import dataclass
        from torch import nn

        # Tuned by hand.
        SLOPE = 0.1
        SLOPES = {"soft": SLOPE}
        SLOPES["hard"] = 2 * SLOPE
        UNUSED = "not copied"

        @dataclass(frozen=True)
        class Setting:
            slope: float = SLOPE

        class Base(nn.Module):
            def __init__(self, channels: int) -> None:
                super().__init__()
                self.inner = nn.Conv2d(channels, channels, 1)
        """,
    )
    module(
        "own",
        """
        import math
        from torch import Tensor
        import torch.nn.functional as functional
        from helpers import SLOPES, Base, Setting as S

        def scaled(x: Tensor, by: float) -> Tensor:
            return x * math.sqrt(by)

        class Outer:
            class Block(Base):
                \"\"\"Mine.\"\"\"

                def forward(self, x: Tensor) -> Tensor:
                    # A comment of mine.
                    setting = S(SLOPES["hard"])
                    return scaled(functional.leaky_relu(self.inner(x), setting.slope), by=2.0)
        """,
    )
    blueprint = blueprint_with(layer("own:Outer.Block", channels=4), layer(torch.nn.Identity))
    source = written(blueprint)
    assert_same(blueprint, source)
    assert "# Tuned by hand.\nSLOPE = 0.1" in source and 'SLOPES["hard"]' in source
    assert "Outer.Block(channels=4)" in source and "nn.Identity()" in source
    assert "UNUSED" not in source and "helpers import" not in source


def test_two_things_of_one_name_get_two(module):
    module("first", "def scaled(x):\n    return 2 * x\n")
    module(
        "second",
        """
        from torch import nn
        import first
        from first import scaled as doubled

        def scaled(x):
            return 3 * x

        class ConvNormAct(nn.Module):
            def forward(self, x):
                return scaled(doubled(first.scaled(x)))

        class Student(ConvNormAct):
            pass
        """,
    )
    blueprint = blueprint_with(layer("second:ConvNormAct"), layer("second:Student"))
    source = written(blueprint)
    assert_same(blueprint, source)
    assert "class ConvNormAct_2(nn.Module):" in source and "class Student_2(ConvNormAct_2):" in source


def test_a_module_comes_after_those_it_uses(module):
    module("alpha", "from zeta import Base\n\n\nclass Block(Base):\n    pass\n")
    module(
        "zeta", "from torch import nn\n\n\nclass Base(nn.Module):\n    def forward(self, x):\n        return 2 * x\n"
    )
    blueprint = blueprint_with(layer("alpha:Block"))
    assert_same(blueprint, written(blueprint))


def test_packages_relative_imports_and_names_for_type_checking_are_followed(module):
    module("package.__init__", "from package.blocks import Block\n")
    module("package.parts", "from torch import nn\n\nPARTS = (nn.ReLU, nn.SiLU)\n\nUNITS: list[str] = ['a']\n")
    module(
        "package.blocks",
        """
        from __future__ import annotations
        from typing import TYPE_CHECKING
        from torch import nn
        from . import parts
        from .parts import UNITS
        if TYPE_CHECKING:
            from torch import Tensor

        class Block(nn.Module):
            def __init__(self, which: int) -> None:
                super().__init__()
                self.act = parts.PARTS[which]()

            def forward(self, x: Tensor) -> Tensor:
                return self.act(x) * len(UNITS)
        """,
    )
    blueprint = blueprint_with(layer("package:Block", which=1))
    source = written(blueprint)
    assert_same(blueprint, source)
    assert "from __future__ import annotations" in source


def test_every_kind_of_argument_is_written_in_the_order_of_the_signature(module):
    module(
        "own",
        """
        from torch import nn

        class Block(nn.Module):
            def __init__(self, sizes=(), text=None, limit=1.0, flags=(), count=0):
                super().__init__()
                assert (sizes, text, limit) == ((3,), 'say "hi"', float("inf")) and flags == (True, (1, None))
                self.limit = count

            def forward(self, x):
                return x * self.limit
        """,
    )
    flags = (True, (1, None))
    block = layer("own:Block", count=2, sizes=(3,), text='say "hi"', limit=float("inf"), flags=flags)
    source = written(blueprint_with(block))
    assert_same(blueprint_with(block), source)
    assert """Block(sizes=(3,), text='say "hi"', limit=float("inf"), flags=(True, (1, None)), count=2)""" in source


def test_a_layer_may_take_modules_written_as_specs():
    convolution = spec("kdnas.blocks.basic:ConvNormAct", inputs=4, outputs=4)
    inner = (spec("kdnas.blocks.mixture:Member", parts=(convolution, spec(torch.nn.ReLU)), height=6, width=6),)
    blueprint = blueprint_with(layer("kdnas.blocks.mixture:Member", parts=(convolution, *inner), height=6, width=6))
    source = written(blueprint)
    assert_same(blueprint, source)
    assert "nn.ReLU()," in source
    assert max(map(len, source.splitlines())) <= 120
    assert Blueprint.from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint


def test_a_spec_of_anything_but_a_module_is_refused():
    called = spec("subprocess:call", args="true")
    deeper = spec("kdnas.blocks.mixture:Member", parts=(called,), height=6, width=6)
    for inner in (called, deeper):
        block = layer("kdnas.blocks.mixture:Member", parts=(inner,), height=6, width=6)
        with pytest.raises(ValueError, match=r"subprocess:call at stages.0.0 must be a class"):
            written(blueprint_with(block))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy\n\n\nclass Block(nn.Module):\n    scale = numpy.pi\n", "uses 'pi' of numpy"),
        (
            "from safetensors.torch import save\n\n\nclass Block(nn.Module):\n    save = save\n",
            "'save' of safetensors.torch",
        ),
        (
            "class Block(nn.Module):\n    def forward(self, x):\n        import numpy\n",
            "imports 'numpy' inside a block",
        ),
        (
            "globals()['scale'] = 2\n\nclass Block(nn.Module):\n    def forward(self, x):\n        return scale * x\n",
            "no readable definition of 'scale'",
        ),
        (
            "def Block():\n    return nn.Identity()\n",
            "own:Block at stages.0.0 must be a class derived from torch.nn.Module",
        ),
        ("class Block:\n    pass\n", "own:Block at stages.0.0 must be a class derived from torch.nn.Module"),
    ],
)
def test_code_that_cannot_stand_alone_is_refused(module, text, message):
    module("own", "from torch import nn\n" + text)
    with pytest.raises(ValueError, match=message):
        written(blueprint_with(layer("own:Block")))


def test_modules_that_use_each_other_are_refused(module):
    module(
        "one",
        "import two\nfrom torch import nn\n\n\nclass Block(nn.Module):\n    def go(self):\n        return two.go()\n",
    )
    module("two", "import one\n\n\ndef go():\n    return one.Block()\n")
    with pytest.raises(ValueError, match="one, two use each other"):
        written(blueprint_with(layer("one:Block")))


def test_the_students_module_normalises_and_resizes_as_the_network_is_fed():
    blueprint = blueprint_with()
    preprocessing = Preprocessing(height=9, width=7, mean=(0.25,), std=(0.5,))
    student = run(student_source(blueprint, preprocessing, NAMES))["Student"]().eval()
    assert {"mean", "std"}.isdisjoint(student.state_dict())
    network = Network(blueprint).eval()
    network.load_state_dict(student.state_dict())
    images = torch.rand(2, 1, 9, 7)
    assert torch.equal(student(images), network((images - 0.25) / 0.5).logits)
    assert "resize(x, 6, 6)" in student_source(blueprint, preprocessing, NAMES)
    assert "resize(x" not in written(blueprint)


def test_class_names_are_written_as_they_are():
    names = ['a "b"', "it's", "naïve", "猫", "tab\t", "\\"]
    assert run(written(blueprint_with(), names))["CLASS_NAMES"] == names
    assert run(written(blueprint_with(), [f"class {i}" for i in range(1000)]))["CLASS_NAMES"][-1] == "class 999"


def test_the_code_is_the_same_every_time():
    blueprint = load_space("digits").blueprint(load_space("digits").largest)
    assert written(blueprint) == written(blueprint)
