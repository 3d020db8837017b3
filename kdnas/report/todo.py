"""What a run does not hold yet, and the command that makes it."""

import shlex

from kdnas.report.folder import Found
from kdnas.report.markup import Markup, tag


def commands(found: Found) -> dict[str, tuple[str, str]]:
    """Per step of a run, in their order: what is said while it is not done, and the command that does it."""
    folder = shlex.quote(found.name)
    student = next(iter(found.students), "place1")
    path = shlex.quote(f"{found.name}/students/{student}")
    return {
        "train": (
            "The supernet is not trained yet. The same command goes on with a run that was stopped.",
            f"kdnas train EXPERIMENT --out {folder}",
        ),
        "search": ("No architecture is scored yet.", f"kdnas search {folder}"),
        "export": ("No student is exported yet.", f"kdnas export {folder} --place 1 --out {path}"),
        "retrain": ("No student is retrained yet.", f"kdnas retrain {path}"),
    }


def next_command(found: Found) -> tuple[str, str] | None:
    """The first step that is not done yet; None for a finished run."""
    trained = bool(found.phase("train")) or bool(found.searches)
    done = {"train": trained, "search": found.searches, "export": found.students, "retrain": found.closing}
    return next((commands(found)[step] for step, is_done in done.items() if not is_done), None)


def missing(sentence: str, command: str, lead: str = "Made by") -> Markup:
    """A line for something that is not there."""
    return tag("p", f"{sentence} {lead}: ", tag("code", command), class_="missing")
