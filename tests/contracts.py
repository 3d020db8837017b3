"""A contract's test class for every file of a kind's folder, found by walking it."""

import importlib
from pathlib import Path

from kdnas.specs import algorithms, resolve


def contracts(package, contract, options):
    """Test classes by file name. `options` has the attributes of a file's class that differ from the contract's."""
    paths = algorithms(package)
    files = {p.stem for p in Path(importlib.import_module(package).__path__[0]).glob("*.py") if p.stem[0] != "_"}
    assert set(paths) == files - {"base"} and set(options) <= set(paths), (files, set(options))
    classes = {}
    for name, path in paths.items():
        algorithm = resolve(path)
        assert algorithm.__module__ == f"{package}.{name}"
        attributes = {"make": algorithm, **options.get(name, {})}
        classes[name] = type(f"Test{algorithm.__name__}", (contract,), attributes)
    return classes
