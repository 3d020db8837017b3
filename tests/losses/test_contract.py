"""Every loss in the folder keeps the contract of kdnas.testing, found by walking: -k NAME runs one loss's."""

import importlib
import inspect
import re
from fractions import Fraction

import pytest

from kdnas.losses.base import Loss
from kdnas.specs import algorithms, resolve
from kdnas.testing.losses import LossContract


def is_loss(path):
    try:
        made = resolve(path)
    except Exception:
        return True  # a file that cannot be imported fails in its own tests, not in the collection of all
    return not (isinstance(made, type) and not issubclass(made, Loss))


FOUND = {name: path for name, path in algorithms("kdnas.losses").items() if is_loss(path)}


class TestEveryLoss(LossContract):
    @pytest.fixture(autouse=True, params=FOUND)
    def named(self, request):
        self.make = resolve(FOUND[request.param])
        self.path = FOUND[request.param]

    def test_its_docstring_gives_the_default_of_every_option(self):
        text = inspect.getdoc(self.make)
        for name, parameter in inspect.signature(self.make).parameters.items():
            entry = re.search(rf"^ +{name}: (.*(?:\n {{8,}}.*)*)", text, re.MULTILINE)
            assert entry, f"{name} is not documented"
            default = re.search(r"\(default\)|[Dd]efault\s+`?([^\s`;:,]*[^\s`;:,.])", entry[1])
            assert default, f"{name}: no default in {entry[1]!r}"
            value = parameter.default
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert float(Fraction(default[1])) == value, f"{name}: documented {default[1]}, but {value}"
            elif isinstance(value, str):
                assert f"`{value}`" in entry[1], f"{name}: {value} is not in {entry[1]!r}"
            elif value is None or isinstance(value, bool):
                assert default[1] == str(value), f"{name}: documented {default[1]}, but {value}"

    def test_its_file_defines_one_public_class_named_after_it(self):
        module = importlib.import_module(self.path.partition(":")[0])
        own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        assert [c.__name__ for c in own if not c.__name__.startswith("_")] == [self.make.__name__]


def test_the_walk_finds_losses_and_not_what_they_share():
    assert FOUND
    assert not {"base", "example", "check"} & set(FOUND)
