"""Examples in docstrings run as written, each within a number of function calls, and the names below have one.

Another module joins with a line in `EXAMPLES`: its names that must have an example.
"""

import ast
import doctest
import importlib
import inspect
import itertools

import pytest
import torch

import kdnas
from kdnas.data import digits
from tests.counting import counted

# What is imported on first use counts for nobody's example: scikit-learn, and torch's compiler by the first optimizer.
digits()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)

EXAMPLES = {
    "kdnas.architecture": ("Architecture", "Choice", "Value"),
    "kdnas.costs.budget": ("Budget",),
    "kdnas.data.load": ("load_data",),
    "kdnas.jobs._run": ("Run",),
    "kdnas.jobs.commands": (
        "doctor",
        "export",
        "finals",
        "fit",
        "plan",
        "prune",
        "retrain",
        "run",
        "search",
        "train",
        "why",
    ),
    "kdnas.ranking.table": ("Ranking",),
    "kdnas.settings": ("Experiment", "FitTeacher", "Recipe"),
    "kdnas.space": ("SearchSpace",),
    "kdnas.students.load": ("load_student",),
    "kdnas.teachers.load": ("load_teacher",),
    "kdnas.specs": ("Spec", "check_literals", "face", "find_spec", "parse_spec", "spec"),
    "kdnas.supernet": ("Supernet",),
    "kdnas.tables": ("load_space",),
}
LIMIT = 4_000_000
"""Function calls per docstring: some seconds of computing."""


def examples(module):
    """The docstrings with examples of a module's own classes, functions and assignments, by name."""
    tests = doctest.DocTestFinder().find(module)
    names = {test.name.removeprefix(f"{module.__name__}."): test for test in tests}
    body = ast.parse(inspect.getsource(module)).body
    for assignment, text in itertools.pairwise(body):
        if isinstance(assignment, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            name = ast.unparse(assignment.targets[0])
            where = (module.__dict__, name, module.__file__, text.lineno)
            names[name] = doctest.DocTestParser().get_doctest(str(text.value.value), *where)
    return {name: test for name, test in names.items() if test.examples}


def run(test):
    """What an example printed instead of its expected output, and the number of function calls it took."""
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    calls = counted(lambda: runner.run(test, out=output.append))[1]
    return "".join(output), calls


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_names_of_a_module_have_an_example(name):
    missing = set(EXAMPLES[name]) - examples(importlib.import_module(name)).keys()
    assert not missing, f"no example in the docstrings of {sorted(missing)}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_module_run_as_written(name):
    for where, test in examples(importlib.import_module(name)).items():
        output, calls = run(test)
        assert not output, output
        assert calls < LIMIT, f"the example of {where} takes {calls:,} function calls"


def test_every_name_of_the_front_door_is_among_them():
    values = {name: getattr(kdnas, name) for name in dir(kdnas)}
    modules = {name: value.__module__ for name, value in values.items() if not inspect.ismodule(value)}
    assert len(modules) > 14
    for name, module in modules.items():
        assert name in EXAMPLES.get(module, ()), f"{name} of {module}"


def test_an_example_with_another_output_fails():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert "Expected:\n    3\nGot:\n    2" in run(wrong)[0]


def test_the_calls_of_an_example_are_counted():
    def calls(count):
        text = f">>> sum(abs(i) for i in range({count}))\n{count * (count - 1) // 2}\n"
        output, number = run(doctest.DocTestParser().get_doctest(text, {}, "calls", None, 0))
        assert not output
        return number

    assert calls(6000) - calls(1000) == pytest.approx(10_000, rel=0.1)
