"""What holds for an algorithm of any kind: how its class is declared and documented."""

import inspect
from typing import Any, ClassVar

from kdnas.specs import Spec


class AlgorithmContract:
    """What must hold for the class of a scorer, searcher or distiller.

    Attributes:
        make: the class.
        arguments: those that the contract builds it with.
    """

    make: type
    arguments: dict[str, Any] = {}  # noqa: RUF012
    _base: ClassVar[type] = object
    _without_default: ClassVar[frozenset[str]] = frozenset()

    def test_it_is_final_with_plain_keyword_only_arguments_that_have_defaults(self) -> None:
        assert issubclass(self.make, self._base), f"derive the class from {self._base.__name__}"
        assert getattr(self.make, "__final__", False), "decorate the class with @final"
        for name, parameter in inspect.signature(self.make).parameters.items():
            assert parameter.kind is parameter.KEYWORD_ONLY, f"{parameter} is not keyword-only"
            if name not in self._without_default:
                plain = isinstance(parameter.default, str | float | int | tuple | Spec)
                assert plain, f"{parameter} has no default that is a number, a string, a tuple or a Spec"

    def test_its_docstring_names_its_reference(self) -> None:
        text = inspect.cleandoc(self.make.__doc__ or "")
        assert text.splitlines()[0].endswith("."), "the docstring's first line does not end with a full stop"
        assert any(line.startswith("Reference:") for line in text.splitlines()), "no line starts with Reference:"
