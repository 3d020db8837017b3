"""Runs a file that was written for the module paths of before the rooms.

Usage: `python tests/cases/old_paths.py FILE.py [ARGUMENTS]`. Each `from kdnas.old import name` is rewritten to the
module that has the name today.
"""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

MOVED = {
    "spec": "specs",
    "similarity": "similarity statistics",
    "rank_quality": "ranking.quality statistics",
    "combination": "scorers._predictor",
    "checkpoint": "runs.checkpoint runs.files",
    "files": "runs.files",
    "progress": "runs.progress",
    "run": "runs.folder",
    "search": "ranking.loop ranking.order runs.entry searchers.base costs.check",
    "stopping": "ranking.early_stopping",
    "exact": "ranking.exact",
    "scoring": "scorers.base",
    "training": "training.loop distillers.base settings randomness",
    "teachers": "teachers.base teachers.combined teachers.load teachers.zoo teachers.fitted",
    "teacher_cache": "teachers.cache",
    "data": "data.base data.augmentation data.builtin data.folders data.cifar data.load",
    "cost": "costs.count costs.budget",
    "latency": "costs.latency",
    "losses.dense.pair_wise": "losses.dense.region_similarity",
    "meter": "costs.check",
    "convert": "conversion.convert conversion.base",
    "convert_transformer": "conversion.transformer",
    "removable": "conversion.channels conversion.removal",
    "pruning": "conversion.removal conversion.channels conversion.scale_factors",
    "student": "students.folder students.card students.source students.graph students.parity",
    "source": "students.source",
    "definitions": "students.definitions",
    "quantization": "students.integers",
    "objective": "losses.objective",
    "taps": "losses.stage_pairs",
    "testing": "testing.losses",
    "cli": "cli.commands",
    "listing": "jobs.listing",
    "jobs.retrain": "jobs.retrain students.trust",
    "jobs.search": "jobs.search ranking.order ranking.controls",
    "jobs.opened": "jobs._run",
    "jobs.settings": "settings jobs._arguments",
    "jobs.guard": "training.guard",
    "jobs.train": "jobs.train training.driver evaluation",
    "jobs.chain": "jobs.chain evaluation statistics",
    "jobs.anchors": "jobs._anchors",
    "jobs.assist": "jobs._assist",
    "jobs.contestants": "jobs._contestants",
    "jobs.block_rating": "jobs._block_rating",
    "jobs.mixture": "jobs._mixture",
    "jobs.prune": "jobs.prune settings",
    "jobs.grow": "jobs.grow settings",
    "jobs.compare": "jobs.compare settings",
}
RENAMED = {
    ("run", "Run"): "RunFolder",
    ("jobs.opened", "Opened"): "Run",
    ("meter", "Meter"): "BudgetCheck",
    ("spec", "named"): "find_spec",
    ("spec", "named_with"): "parse_spec",
    ("training", "Teaches"): "Teaching",
    ("taps", "Taps"): "StagePairs",
    ("taps", "Row"): "StagePair",
    ("search", "Limits"): "SearchLimits",
    ("search", "search"): "run_search",
    ("scoring", "Saved"): "LayerCount",
    ("exact", "Found"): "Combination",
    ("exact", "Block"): "BlockTable",
    ("rank_quality", "Row"): "BenchmarkRow",
    ("losses.check", "Checked"): "GoldenCheck",
    ("losses.check", "Described"): "Description",
    ("stopping", "Stopping"): "EarlyStopping",
    ("losses.dense.pair_wise", "PairWise"): "RegionSimilarity",
    ("jobs.chain", "claimed"): "compare_accuracy",
    ("jobs.train", "drive"): "train_with_checkpoints",
    ("files", "present"): "current_folder",
    ("jobs.grow", "raised"): "next_larger",
}


class _Imports(ast.NodeTransformer):
    """Rewrites `from kdnas.old import name` to the module and name of today; `import kdnas.old` is left alone."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        old = (node.module or "").removeprefix("kdnas.")
        if node.level or old == node.module:
            return [node]
        return [ast.copy_location(_today(old, alias), node) for alias in node.names]


def _today(old: str, alias: ast.alias) -> ast.ImportFrom:
    name = RENAMED.get((old, alias.name), alias.name)
    for module in MOVED.get(old, old).split():
        if hasattr(importlib.import_module(f"kdnas.{module}"), name):
            return ast.ImportFrom(f"kdnas.{module}", [ast.alias(name, alias.asname or alias.name)], 0)
    raise ImportError(f"kdnas.{old}.{alias.name} is in none of: {MOVED.get(old, old)}. Add it to RENAMED.")


def run(path: str, *arguments: str) -> None:
    """Execute the file as `__main__`."""
    tree = _Imports().visit(ast.parse(Path(path).read_text(encoding="utf-8"), path))
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = path
    sys.argv = [path, *arguments]
    exec(compile(ast.fix_missing_locations(tree), path, "exec"), vars(main))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/cases/old_paths.py FILE.py [ARGUMENTS]")
    run(*sys.argv[1:])
