"""Mutation testing: small random faults in a room's source, each against the quick tests of that room.

Usage: `python benchmarks/mutants.py --room statistics --number 60 --seed 0 [--record]`, one room or `--room all`.

A mutant is one change of the syntax tree: a comparison, an operator, a constant, a sign, a condition, a returned value,
a call left out, a minimum for a maximum, a bound of a slice, a direction of sorting, two arguments swapped. Docstrings,
annotations, decorators, error texts and `__repr__` are left alone. The candidates of each function are shuffled by
the seed and taken in proportion to the function's size. Every mutant runs in a fork of a process that has imported
torch and its kin, and nothing of kdnas: the fork compiles the changed module in place of the file, then pytest runs
until the first failure. A mutant is killed by a failing test, or by `TIME_FACTOR` times the time of the tests.

`--record` writes the results to `benchmarks/mutants.md`; a change that stands there with a reason keeps the reason.
"""

import argparse
import ast
import copy
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import pkgutil
import random
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # before torch is imported; a fork has no other threads

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "mutants.md"
PRELOADED = ("numpy", "scipy.stats", "torch", "torch.utils.flop_counter", "torch._dynamo", "safetensors.torch")
PRELOADED += ("torchvision", "PIL.Image", "networkx", "hypothesis", "optuna", "sklearn.gaussian_process", "torch.onnx")
PRELOADED += ("onnx", "onnxscript", "onnxruntime", "rich.console", "cattrs", "pytest")
TIME_FACTOR, TIME_LEAST = 4, 8.0


class Room(NamedTuple):
    """Files under test, with the functions that belong to the room (all where empty), and the arguments of pytest."""

    files: dict[str, tuple[str, ...]]
    tests: tuple[str, ...]
    number: int


# Left out: what a busy machine may fail, and what takes seconds.
_QUICK = "not (milliseconds or time_limit_is_met or searched_at_once or nas_bench_macro or optimum or several_scorers "
_QUICK += "or prefixes or members or replayed or over_budget or memory_is_one or unique_architectures "
_QUICK += "or keeps_both_bounds or slower_than_promised or that_no_network_has)"
ROOMS = {
    "statistics": Room({"kdnas/statistics.py": ()}, ("tests/test_statistics.py",), 60),
    "claims": Room(
        {"kdnas/jobs/finals.py": ("_claims",), "kdnas/ranking/controls.py": ()},
        ("tests/jobs/test_claims.py", "tests/ranking/test_controls.py"),
        60,
    ),
    "costs": Room(
        {"kdnas/costs/budget.py": (), "kdnas/costs/count.py": (), "kdnas/costs/check.py": ()},
        ("tests/costs", "-k", _QUICK),
        50,
    ),
    "evaluation": Room({"kdnas/evaluation.py": ()}, ("tests/test_evaluation.py",), 20),
    "training": Room(
        {"kdnas/training/loop.py": (), "kdnas/training/driver.py": ()},
        (*(f"tests/training/test_{name}.py" for name in ("rules", "loop", "moment", "driver")),),
        60,
    ),
    "search": Room(
        {"kdnas/ranking/loop.py": (), "kdnas/ranking/order.py": ()},
        ("tests/ranking/test_order.py", "tests/ranking/test_loop.py", "-k", _QUICK),
        50,
    ),
    "scoring": Room({"kdnas/scorers/base.py": ()}, ("tests/scorers/test_base.py",), 50),
    "students": Room(
        {"kdnas/students/folder.py": (), "kdnas/students/card.py": (), "kdnas/students/parity.py": ()},
        (*(f"tests/students/test_{name}.py" for name in ("parity", "card", "folder")), "-m", "not slow"),
        50,
    ),
}


# The operators: from a node to the nodes that may stand in its place.

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
_OPPOSITES = {"min": "max", "amin": "amax", "minimum": "maximum", "argmin": "argmax", "any": "all", "ceil": "floor"}
_OPPOSITES |= {opposite: name for name, opposite in _OPPOSITES.items()}
_ORDERED = {"isinstance", "getattr", "hasattr", "setattr", "cast", "spec"}  # arguments that nobody would swap
_COMMUTATIVE = {"min", "max", "minimum", "maximum"}


def mutations(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that may replace this one, itself left as it is."""

    def changed(**fields: object) -> ast.AST:
        other = copy.copy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    match node:
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                for other in _COMPARISONS[type(operator)]:
                    yield changed(ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        case ast.BinOp(op=ast.BitOr()):
            yield node.left
            yield node.right
        case ast.BinOp() if type(node.op) in _ARITHMETIC and not (_text(node.left) or _text(node.right)):
            yield changed(op=_ARITHMETIC[type(node.op)]())
        case ast.AugAssign(op=ast.BitOr()):
            yield ast.copy_location(ast.Assign([node.target], node.value), node)
        case ast.AugAssign() if type(node.op) in _ARITHMETIC and not _text(node.value):
            yield changed(op=_ARITHMETIC[type(node.op)]())
        case ast.BoolOp():
            yield changed(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
            for i in range(len(node.values)):
                rest = node.values[:i] + node.values[i + 1 :]
                yield rest[0] if len(rest) == 1 else changed(values=rest)
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield changed(value=not node.value)
        case ast.Constant(value=int()):
            yield changed(value=node.value + 1)
            yield changed(value=node.value - 1)
        case ast.Constant(value=float()):
            yield changed(value=2 * node.value if node.value else 1.0)
            yield changed(value=node.value / 2 if node.value else -1.0)
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(
            node.test, ast.UnaryOp | ast.Compare | ast.Constant
        ):
            yield changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.comprehension() if node.ifs:
            yield changed(ifs=[])
        case ast.Return() if node.value is not None and not isinstance(node.value, ast.Constant):
            yield changed(value=ast.Constant(None))
        case ast.Expr(value=ast.Call()):
            yield ast.copy_location(ast.Pass(), node)
        case ast.Continue():
            yield ast.copy_location(ast.Break(), node)
        case ast.Break():
            yield ast.copy_location(ast.Continue(), node)
        case ast.Slice():
            if node.lower is not None:
                yield changed(lower=None)
            if node.upper is not None:
                yield changed(upper=None)
        case ast.Call():
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _OPPOSITES:
                func = copy.copy(node.func)
                setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", _OPPOSITES[name])
                yield changed(func=func)
            if name in ("sorted", "sort"):
                without = [k for k in node.keywords if k.arg != "reverse"]
                reverse = [ast.keyword("reverse", ast.Constant(True))] if len(without) == len(node.keywords) else []
                yield changed(keywords=without + reverse)
            swappable = len(node.args) == 2 and name not in _ORDERED | _COMMUTATIVE
            if swappable and not any(isinstance(a, ast.Starred) for a in node.args):
                yield changed(args=node.args[::-1])


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the tree with it, and how it is told."""

    file: str
    line: int
    function: str
    before: str
    after: str
    tree: ast.Module

    @property
    def change(self) -> str:
        """The source before and after, as one table cell."""
        return f"`{self.before}` → `{self.after}`"


class _Site(NamedTuple):
    parent: ast.AST
    field: str
    place: int | None
    function: str
    statement: ast.stmt


def _sites(tree: ast.Module) -> Iterator[_Site]:
    """Every place of a node that may be replaced, with its function and statement."""

    def visit(node: ast.AST, function: str, statement: ast.stmt | None) -> Iterator[_Site]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "type_params", "format_spec"):
                continue
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _ORDERED and field == "args":
                continue
            for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(
                    child, ast.Raise | ast.Import | ast.ImportFrom | ast.Assert
                ):
                    continue
                name = getattr(child, "name", "")
                if name == "__repr__" or (isinstance(child, ast.keyword) and child.arg == "strict"):
                    continue
                inside = isinstance(child, ast.FunctionDef | ast.ClassDef)
                here = f"{function}.{name}".lstrip(".") if inside else function
                above = child if isinstance(child, ast.stmt) else statement
                if above is not None and not inside:
                    yield _Site(node, field, place, here, above)
                yield from visit(child, here, above)

    yield from visit(tree, "", None)


def _replaced(site: _Site, node: ast.AST) -> ast.AST:
    """Put the node at its place; the node that was there."""
    if site.place is None:
        before = getattr(site.parent, site.field)
        setattr(site.parent, site.field, node)
    else:
        nodes = getattr(site.parent, site.field)
        before, nodes[site.place] = nodes[site.place], node
    return before


def _head(statement: ast.stmt) -> str:
    """The source of a statement without the statements inside it, on one line."""
    if isinstance(statement, ast.FunctionDef):
        return f"def {statement.name}({ast.unparse(statement.args)})"
    shallow = copy.copy(statement)
    for field in ("body", "orelse", "finalbody", "handlers"):
        if hasattr(shallow, field):
            setattr(shallow, field, [ast.Pass()] if field == "body" else [])
    return ast.unparse(shallow).removesuffix("\n    pass").replace("\n", " ")


def _shortened(before: str, after: str, most: int = 100) -> tuple[str, str]:
    """Both texts cut to the surroundings of what differs."""
    same = _common(before, after)
    start = max(0, same - most // 2)
    tail = _common(before[same:][::-1], after[same:][::-1])
    parts = []
    for text in (before, after):
        end = min(len(text), max(len(text) - tail, same) + most // 2)
        parts.append(("…" if start else "") + text[start:end] + ("…" if end < len(text) else ""))
    return parts[0], parts[1]


def _common(first: str, second: str) -> int:
    """The number of characters that both texts begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def candidates(file: str, functions: tuple[str, ...]) -> list[Mutant]:
    """Every mutant of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    mutants: list[Mutant] = []
    for site in list(_sites(tree)):
        if functions and site.function.split(".")[0] not in functions:
            continue
        value = getattr(site.parent, site.field)
        node = value if site.place is None else value[site.place]
        before = _head(site.statement)
        for other in mutations(node):
            ast.copy_location(other, node)
            _replaced(site, other)
            changed = site.statement if node is not site.statement else other
            assert isinstance(changed, ast.stmt)
            after = _head(changed)
            if after != before:
                line = getattr(node, "lineno", site.statement.lineno)
                text = _shortened(before, after)
                mutants.append(Mutant(file, line, site.function, *text, ast.fix_missing_locations(copy.deepcopy(tree))))
            _replaced(site, node)
    return mutants


def drawn_mutants(room: Room, number: int, seed: int) -> list[Mutant]:
    """So many mutants of a room, spread over its functions in proportion to their candidates."""
    rng = random.Random(seed)
    groups: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for file, functions in room.files.items():
        for mutant in candidates(file, functions):
            groups[mutant.file, mutant.function].append(mutant)
    ranked: list[tuple[float, Mutant]] = []
    for group in groups.values():
        rng.shuffle(group)
        ranked += [((place + rng.random()) / len(group), mutant) for place, mutant in enumerate(group)]
    chosen = [mutant for _, mutant in sorted(ranked, key=lambda pair: pair[0])[:number]]
    return sorted(chosen, key=lambda mutant: (mutant.file, mutant.line, mutant.after))


# The runs.


class _MutatedFile(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self.tree = tree

    def get_code(self, fullname: str) -> object:
        """The code of the changed tree."""
        return compile(self.tree, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.name = mutant.file.removesuffix(".py").replace("/", ".")
        self.used = False

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        """The spec of the changed module, None for every other."""
        if fullname != self.name:
            return None
        self.used = True
        file = str(ROOT / self.mutant.file)
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_MutatedFile(fullname, file, self.mutant.tree)
        )


def _child(tests: tuple[str, ...], mutant: Mutant | None, seconds: float, output: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if any(name == "kdnas" or name.startswith("kdnas.") for name in sys.modules):
        raise AssertionError("kdnas is imported before the change")
    finder = None if mutant is None else _Finder(mutant)
    if finder is not None:
        sys.meta_path.insert(0, finder)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
        "1"  # a plugin that is imported already is a warning, that is an error
    )
    plugins = ["-p", "pytest_timeout", "-p", "no:cacheprovider"]
    extra = ["-x", "--tb=no"] if mutant is not None else ["-x", "--durations=0", "--durations-min=0.3", "-rA"]
    code = int(sys.modules["pytest"].main([*tests, *plugins, *extra]))
    if finder is not None and not finder.used:
        code = 97
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Outcome(NamedTuple):
    """The exit code of pytest, minus the signal that ended it, and the processor's seconds."""

    code: int
    seconds: float
    text: str


def run(tests: tuple[str, ...], mutant: Mutant | None, seconds: float) -> Outcome:
    """Run the tests in a fork, with the change where there is one."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    path = ROOT / "benchmarks" / f".mutants-{os.getpid()}.txt"
    with path.open("w+b") as file:
        path.unlink()
        pid = os.fork()
        if pid == 0:
            try:
                _child(tests, mutant, seconds, file.fileno())
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(98)
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - began > 20 * seconds:  # one that waits needs no processor
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)
        file.seek(0)
        text = file.read().decode(errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, spent, text)


def measure(name: str, number: int, seed: int, match: str | None = None) -> tuple[list[Mutant], Counter[str]]:
    """Run a room's mutants; the survivors, and how many were killed by a test and by time."""
    room = ROOMS[name]
    baseline = run(room.tests, None, 600)
    if baseline.code != 0:
        sys.exit(f"{name}: the tests fail without any change\n{baseline.text[-4000:]}")
    tests = re.findall(r"^PASSED (\S+)", baseline.text, re.M)
    print(f"{name}: {len(tests)} tests in {baseline.seconds:.1f} s: pytest {' '.join(room.tests)}", flush=True)
    for line in re.findall(r"^ *[\d.]+s (?:call|setup) .*$", baseline.text, re.M):
        print(f"    {line.strip()}")
    mutants = drawn_mutants(room, number, seed)
    if match:
        mutants = [m for m in mutants if re.search(match, f"{m.file}:{m.line} {m.function} {m.change}")]
    limit = max(TIME_LEAST, TIME_FACTOR * baseline.seconds)
    survivors, counts, began = [], Counter[str](tests=len(tests)), time.monotonic()
    for index, mutant in enumerate(mutants, 1):
        outcome = run(room.tests, mutant, limit)
        if outcome.code == 97:
            sys.exit(f"{name}: the tests do not import {mutant.file}")
        kind = "survived" if outcome.code == 0 else "killed" if outcome.code > 0 else "killed by time"
        counts[kind] += 1
        if outcome.code == 0:
            survivors.append(mutant)
        left = (time.monotonic() - began) / index * (len(mutants) - index)
        where = f"{mutant.file}:{mutant.line} {mutant.function or 'module'}"
        print(f"{name} {index}/{len(mutants)}, {left / 60:.1f} min left: {kind:8} {where}: {mutant.change}", flush=True)
    return survivors, counts


# The table.

_HEADER = """# Mutants

Small random faults (`mutants.py`), each against the quick tests of its room. A survivor is a change that these tests
accept; its reason says why no test can or need tell. Lines are those of the commit that the room's row names.

"""
_ROW = re.compile(r"(?<!\\)\|")


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in _ROW.split(line.strip())[1:-1]]


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def record(name: str, seed: int, survivors: list[Mutant], counts: Counter[str]) -> None:
    """Write a room's row and survivors into the table; other rooms' stay."""
    rows: dict[str, list[str]] = {}
    listed: dict[str, list[list[str]]] = defaultdict(list)
    for line in TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else ():
        cells = _cells(line)
        if len(cells) == 8 and cells[0] in ROOMS:
            rows[cells[0]] = cells
        elif len(cells) == 4 and cells[0] in ROOMS:
            listed[cells[0]].append(cells)
    reasons = {(where.split(":")[0], change): reason for cells in listed.values() for _, where, change, reason in cells}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "kdnas", "tests", "benchmarks/mutants.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    commit = commit.strip() + (" with changes" if dirty else "")
    killed = counts["killed"] + counts["killed by time"]
    number = killed + counts["survived"]
    command = f"`--room {name} --number {number} --seed {seed}`"
    rows[name] = [name, str(number), str(killed), str(counts["killed by time"])]
    rows[name] += [str(counts["survived"]), str(counts["tests"]), commit, command]
    listed[name] = [
        [name, f"{m.file}:{m.line}", m.change, reasons.get((m.file, m.change), "unexplained")] for m in survivors
    ]
    text = _HEADER + _line("room", "mutants", "killed", "of these by time", "survived", "tests", "commit", "run")
    text += _line(*["---"] * 8) + "".join(_line(*rows[room]) for room in ROOMS if room in rows)
    total, alive = (sum(int(row[i]) for row in rows.values()) for i in (1, 4))
    unexplained = sum(cells[3] == "unexplained" for rows_of_room in listed.values() for cells in rows_of_room)
    text += f"\nOf {total} mutants {alive} survived, {unexplained} of them unexplained ({unexplained / total:.1%}).\n\n"
    text += "## Survivors\n\n" + _line("room", "where", "change", "reason") + _line(*["---"] * 4)
    text += "".join(_line(*cells) for room in ROOMS for cells in listed[room])
    TABLE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run small random faults of a room's source against its tests.")
    parser.add_argument("--room", choices=[*ROOMS, "all"], default="all", help="which room (default: %(default)s)")
    parser.add_argument("--number", type=int, help="how many mutants (default: the room's own number)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--match", help="of those drawn, only what matches this pattern (file:line function change)")
    parser.add_argument("--record", action="store_true", help="write the results to benchmarks/mutants.md")
    options = parser.parse_args()
    if options.match and options.record:
        parser.error("--record is for whole draws. Leave --match out.")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for module in PRELOADED:
        importlib.import_module(module)
    for package in ("_pytest", "_pytest.assertion", "_pytest.config", "_pytest.mark"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    gc.freeze()
    for name in ROOMS if options.room == "all" else [options.room]:
        survivors, counts = measure(name, options.number or ROOMS[name].number, options.seed, options.match)
        print(f"{name}: {counts['survived']} survived", flush=True)
        for mutant in survivors:
            print(f"    {mutant.file}:{mutant.line} {mutant.change}")
        if options.record:
            record(name, options.seed, survivors, counts)
    gc.unfreeze()


if __name__ == "__main__":
    main()
