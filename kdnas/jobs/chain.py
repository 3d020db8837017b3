"""The whole chain: teacher, supernet, ranking, export, finals, report."""

import logging
from pathlib import Path

from kdnas.evaluation import teacher_row as teacher_row
from kdnas.jobs._run import Run
from kdnas.jobs._run import closing_table as closing_table
from kdnas.jobs.export import export
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.report import write_report
from kdnas.settings import Experiment
from kdnas.tables import unstructure

say = logging.getLogger(__name__).info


def chain(
    experiment: Experiment, folder: Path, *, deploy: bool = True, size_chosen: bool = False, workers: int | None = None
) -> Run:
    """Teacher, supernet, ranking, export of place 1, training of the finalists and their controls, report.

    Finished phases are skipped, so that the same call resumes. After each phase the command for the next one is logged.

    Args:
        experiment: all settings.
        folder: the run folder.
        deploy: whether to write and compare every form of the student.
        size_chosen: whether a person decided the size of the student's images.
        workers: number of trainings of finalists and controls side by side; by default see `default_workers`.
    """
    run = train(experiment, folder, size_chosen=size_chosen)
    say(f"next: kdnas search {folder}")
    if run.storage.phase("search") is None:
        search(run, experiment.search)
    if experiment.second is not None and run.storage.phase("export") is None:
        settings = unstructure(experiment.second)
        if not any(s == {"settings": settings, "state": "done"} for s in run.storage.manifest.get("searches", [])):
            search(run, experiment.second)
    say(f"next: kdnas export {folder} --place 1 --out {folder}/students/place-1")
    if run.storage.phase("export") is None:
        run.storage.finish("export", **export(run, deploy=False))
    say(f"next: kdnas finals {folder}")
    if run.storage.phase("student") is None:
        finals(run, experiment.finals, experiment.retrain, deploy=deploy, workers=workers)
    say(f"next: kdnas report {folder}")
    write_report(run.folder)
    return run
