"""The steps of a run that are not done yet, and their commands."""

import shlex

from markupsafe import Markup

from kdnas.report.content import RunContent
from kdnas.report.markup import tag


def commands(run: RunContent) -> dict[str, tuple[str, str]]:
    """Per step of a run, in their order: a sentence for while it is not done, and the command that does it."""
    folder = shlex.quote(run.name)
    student = next(iter(run.students), "place1")
    path = shlex.quote(f"{run.name}/students/{student}")
    return {
        "train": (
            "The supernet is not trained yet. The same command resumes a run that was stopped.",
            f"kdnas train EXPERIMENT --out {folder}",
        ),
        "search": ("No architecture is scored yet.", f"kdnas search {folder}"),
        "export": ("No student is exported yet.", f"kdnas export {folder} --place 1 --out {path}"),
        "retrain": ("No student is retrained yet.", f"kdnas retrain {path}"),
    }


def next_command(run: RunContent) -> tuple[str, str] | None:
    """The first step that is not done yet; None for a finished run."""
    trained = bool(run.phase("train")) or bool(run.rankings)
    done = {"train": trained, "search": run.rankings, "export": run.students, "retrain": run.closing}
    return next((commands(run)[step] for step, is_done in done.items() if not is_done), None)


def missing(sentence: str, command: str, lead: str = "Command") -> Markup:
    """A line for content that is missing."""
    return tag("p", f"{sentence} {lead}: ", tag("code", command), class_="missing")
