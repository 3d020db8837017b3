"""The whole chain, and what it may claim: the closing table with its controls."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import student_hits
from kdnas.evaluation import teacher_row as teacher_row
from kdnas.jobs._run import Run
from kdnas.jobs._run import closing_table as closing_table
from kdnas.jobs.export import card_of, export, inherited, place_of
from kdnas.jobs.retrain import retrain
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.ranking.order import ranked
from kdnas.report import write_report
from kdnas.runs.entry import CONTRAST, RANDOM
from kdnas.runs.folder import STUDENTS, RunFolder
from kdnas.settings import Experiment, Retrain
from kdnas.specs import spec
from kdnas.statistics import compare_accuracy
from kdnas.students.folder import write_student
from kdnas.tables import unstructure

say = logging.getLogger(__name__).info


def chain(experiment: Experiment, folder: Path, *, deploy: bool = True, size_chosen: bool = False) -> Run:
    """Teacher, supernet, ranking, export, retraining with and without a teacher, closing table, report.

    Finished phases are skipped, so that the same call resumes. After each phase the command for the next one is logged.

    Args:
        experiment: all settings.
        folder: the run folder.
        deploy: whether to write and compare every form of the student.
        size_chosen: whether a person decided the size of the student's images.
    """
    run = train(experiment, folder, size_chosen=size_chosen)
    if all(row["name"] != "teacher" for row in run.storage.results()["rows"]):
        run.storage.record_result({"name": "teacher", **teacher_row(run.teacher, run.data)})
    say(f"next: kdnas search {folder}")
    if run.storage.phase("search") is None:
        search(run, experiment.search)
    if experiment.second is not None and run.storage.phase("export") is None:
        settings = unstructure(experiment.second)
        if not any(s == {"settings": settings, "state": "done"} for s in run.storage.manifest.get("searches", [])):
            search(run, experiment.second)
    say(f"next: kdnas export {folder} --place 1 --out {folder}/students/place-1")
    if run.storage.phase("export") is None:
        run.storage.finish("export", **export(run, deploy=deploy))
    say(f"next: kdnas retrain {folder}/students/place-1")
    for name, source, settings in _trainings(run, experiment.retrain):
        if run.storage.phase(name) is None:
            out = run.storage.path(STUDENTS, name)
            # Only what may be deployed is checked; the controls are for the table.
            result = retrain(source, settings, out, phase=name, deploy=deploy and name == "student")
            row = {key: result[key] for key in ("accuracy", "params", "macs", "seconds")}
            run.storage = RunFolder(run.folder)
            run.storage.record_result({"name": name, **row})
            run.storage.finish(name, **row)
    run.storage.record_controls(dict(_claims(run)))
    say(f"next: kdnas report {folder}")
    write_report(run.storage.folder)
    return run


def _trainings(run: Run, settings: Retrain) -> Iterator[tuple[str, Path, Retrain]]:
    """The student, the same student without a teacher, and random subnets within the budget with one."""
    best = run.storage.path(STUDENTS, "place-1")
    yield "student", best, settings
    yield "control", best, dataclasses.replace(settings, distiller=spec(FromLabels))
    number = run.storage.require("search", "kdnas search")["search"]
    best_architecture = place_of(run, 1).architecture
    entries = [e for e in run.storage.ranking(number) if e.architecture != best_architecture]
    random = [e for e in entries if e.searcher == RANDOM][: settings.num_random]
    contrast = ranked([e for e in run.storage.ranking(number) if e.searcher == CONTRAST])[:1]
    controls = [(f"random {index}", f"drawn-{index}", entry) for index, entry in enumerate(random, 1)]
    controls += [("contrast", "contrasted", entry) for entry in contrast if entry.architecture != best_architecture]
    for name, source, entry in controls:
        folder = run.storage.path(STUDENTS, source)
        if not folder.exists():
            origin = {"control": name, "score": entry.score}
            network = inherited(run, entry.architecture)
            write_student(folder, network, card_of(run, network, entry.architecture, origin), deploy=False)
        yield name, folder, settings


def _claims(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the test images say about distillation, and about the choice, with 95 % bootstrap intervals over images."""
    names = [row["name"] for row in run.storage.results()["rows"]]
    hits = {}
    for name in names:
        if name != "teacher":
            hits[name] = student_hits(run.storage.path(STUDENTS, name), run.data)
    random = [hits[name] for name in hits if name.startswith("random")]
    pairs = {
        "distillation": (hits["control"], "the same student trained without a teacher", "distillation did not help"),
    }
    if random:
        other = f"{len(random)} random subnet{'s' if len(random) > 1 else ''} within the budget, trained alike"
        pairs["choice"] = (np.mean(random, 0), other, "the ranking chose no better than chance")
    if "contrast" in hits:
        words = "the best subnet of the same search under the other score, trained alike"
        pairs["contrasted"] = (hits["contrast"], words, "the other score chose better")
    for name, (other, words, otherwise) in pairs.items():
        yield name, compare_accuracy("student", hits["student"], other, words, otherwise)
