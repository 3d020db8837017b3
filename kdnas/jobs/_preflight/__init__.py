"""What a training is about to do, in one block before its first step; a teacher that cannot teach stops it."""

import logging
from pathlib import Path

from kdnas.compilation import check_compiler
from kdnas.data.base import Data
from kdnas.jobs._preflight.cost import cost_findings, finals_finding, recipe_findings
from kdnas.jobs._preflight.cost import duration as duration
from kdnas.jobs._preflight.cost import image_seconds as image_seconds
from kdnas.jobs._preflight.cost import largest_network as largest_network
from kdnas.jobs._preflight.cost import training_seconds as training_seconds
from kdnas.jobs._preflight.data import data_findings, size_findings
from kdnas.jobs._preflight.findings import Finding, block
from kdnas.jobs._preflight.machine import device_finding
from kdnas.jobs._preflight.teacher import fitted_finding, teacher_findings
from kdnas.jobs._run import insist_or_raise
from kdnas.network import Network, default_device
from kdnas.settings import FitTeacher, Recipe
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.training.shared import check_batch

_log = logging.getLogger(__name__)


def preflight(
    data: Data,
    *,
    folder: Path,
    teacher: Spec | FitTeacher | None = None,
    space: SearchSpace | None = None,
    network: Network | None = None,
    recipe: Recipe | None = None,
    budget: object = None,
    search: tuple[int, float] | None = None,
    finals: tuple[float, Recipe] | None = None,
    size_chosen: bool = False,
) -> None:
    """Log what is about to be trained, on what, by whom and for how long; refuse a teacher that cannot teach.

    The teacher sees at most 300 search images, drawn by a generator of this function: no number of a run changes.

    Args:
        data: the data.
        folder: where the results go.
        teacher: its spec, a `FitTeacher`, or None without one.
        space: the search space, fitted to the data.
        network: what is trained, where it is a single network; with `finals` a student of the size that is trained.
        recipe: of the training.
        budget: of the search, which some network meets.
        search: number of candidates, and rough seconds of all.
        finals: number of whole trainings that the finalists and their controls cost, and their recipe.
        size_chosen: whether a person decided the size of the student's images.

    Raises:
        ValueError: unless inside of `insisting(True)`: the teacher fails, gives NaN, equal logits or probabilities, has
            other class names or an accuracy near chance, is fed another size than it says, or the student's images
            would be resized by more than a factor of 2. In any case: layers are to be compiled without a compiler, or a
            batch has no equal part for each process.
    """
    for each in (recipe, finals and finals[1], teacher.recipe if isinstance(teacher, FitTeacher) else None):
        if each is not None:
            check_batch(each, len(data.train))
            if each.execution == "compiled":
                check_compiler(default_device())
    findings = data_findings(data)
    sides = space.resolutions if space else (network.blueprint.image[1],) if network else ()
    if sides:
        findings += size_findings(data, sides, decided=size_chosen or space is None)
    seconds = 0.0
    if isinstance(teacher, FitTeacher):
        findings.append(fitted_finding(teacher, data))
    elif teacher is not None:
        of_teacher, seconds = teacher_findings(teacher, data)
        findings += of_teacher
    if budget is not None and str(budget):
        findings.append(Finding("budget", f"{budget}; there are networks within it"))
    findings.append(device_finding())
    if recipe is not None:
        findings += cost_findings(space, network, recipe, seconds, folder) + recipe_findings(recipe, data)
    if search is not None:
        findings.append(Finding("search", f"{search[0]:,} candidates, roughly {duration(search[1])}"))
    if finals is not None and (student := largest_network(space) if space else network) is not None:
        findings.append(finals_finding(student, *finals, seconds))
    _log.info(f"before the training\n{block(findings)}")
    insist_or_raise([finding.text for finding in findings if finding.kind == "fault"])


def judge_fitted(source: Spec, data: Data) -> None:
    """Log what a teacher that was trained here gives on at most 300 search images.

    Raises:
        ValueError: outside of `insisting(True)`: its accuracy is near chance.
    """
    findings, _ = teacher_findings(source, data, "Train it for more steps, or with another learning rate.")
    _log.info(f"the teacher that was trained: {findings[0].text}")
    insist_or_raise([finding.text for finding in findings if finding.kind == "fault"])
