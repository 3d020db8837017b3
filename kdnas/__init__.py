"""Distillation-aware neural architecture search: the student that learns best from your teacher.

The names offered here are imported on first use; `import kdnas` imports no torch.
"""

import sys as _sys

# `python -m kdnas` searches the working folder before the standard library, so any command would run a json.py there.
if _sys.argv[:1] == ["-m"] and not _sys.flags.safe_path:
    _options = [*_sys.orig_argv, "-m", ""]
    if "-mkdnas" in _options or _options[_options.index("-m") + 1].partition(".")[0] == "kdnas":
        del _sys.path[0]

from importlib.metadata import version as _version

from kdnas.specs import face

__version__ = _version("kdnas")

__getattr__, __dir__ = face(
    __name__,
    {
        # What is done: commands of the command line, with the same arguments.
        "run": "kdnas.jobs.commands",
        "doctor": "kdnas.jobs.commands",
        "plan": "kdnas.jobs.commands",
        "fit": "kdnas.jobs.commands",
        "train": "kdnas.jobs.commands",
        "search": "kdnas.jobs.commands",
        "finals": "kdnas.jobs.commands",
        "why": "kdnas.jobs.commands",
        "export": "kdnas.jobs.commands",
        "retrain": "kdnas.jobs.commands",
        "prune": "kdnas.jobs.commands",
        # What is decided.
        "Budget": "kdnas.costs.budget",
        "Experiment": "kdnas.settings",
        "FitTeacher": "kdnas.settings",
        "Recipe": "kdnas.settings",
        "spec": "kdnas.specs",
        # What people type.
        "load_data": "kdnas.data.load",
        "load_space": "kdnas.tables",
        "load_student": "kdnas.students.load",
        "load_teacher": "kdnas.teachers.load",
        # What comes back.
        "Run": "kdnas.jobs._run",
        "Supernet": "kdnas.supernet",
        # The kinds of algorithms.
        "data": "kdnas.data",
        "distillers": "kdnas.distillers",
        "losses": "kdnas.losses",
        "scorers": "kdnas.scorers",
        "searchers": "kdnas.searchers",
        "spaces": "kdnas.spaces",
        "teachers": "kdnas.teachers",
        "testing": "kdnas.testing",
    },
)
