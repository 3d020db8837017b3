"""Route-constrained optimisation with greedy anchors: the student decides which snapshot of the teacher comes next."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.data.base import Data
from kdnas.jobs._run import build_teacher
from kdnas.jobs.retrain import check_uses_teacher, retrain
from kdnas.network import Network, default_device
from kdnas.runs.files import Damaged
from kdnas.runs.steps import StudentSteps
from kdnas.settings import CardTeacher, Retrain, TeacherChoice
from kdnas.specs import Spec
from kdnas.students.folder import read_student
from kdnas.students.trust import provenance
from kdnas.tables import unstructure
from kdnas.teachers.base import Teacher

CHOICES = "anchors.json"


def retrain_along(
    student: Path,
    settings: Retrain,
    out: Path,
    *,
    threshold: float = 1.5,
    num_stages: int = 4,
    data: Spec | None = None,
    teacher: TeacherChoice = CardTeacher(),
    deploy: bool = True,
) -> dict[str, Any]:
    r"""Train a student along its teacher's route, the next snapshot chosen greedily; the same call resumes.

    The first anchor is the first snapshot. At the end of a stage, the next anchor is the farthest snapshot $j > i$ with
    $H_j \le \mathrm{threshold} \cdot H_i$, where $H_j$ is the mean over the search part of
    $\mathrm{KL}(\mathrm{teacher}_j \| \mathrm{student})$ and $i$ the anchor just learnt; the one right after it where
    none is near enough. A stage has a `num_stages`-th of the steps and a learning-rate curve of its own; the last
    snapshot, once it is reached or one stage is left, has all that remain. So the cost is that of a plain retraining.

    Args:
        student: a student folder.
        settings: of the whole training.
        out: the new student folder; what the stages leave lies in `OUT-anchors`.
        threshold: largest ratio of divergences, at least 1.
        num_stages: into how many the steps are divided, where the route has as many snapshots.
        data: other data than the student was found on.
        teacher: another route.
        deploy: as `retrain`'s, of the student.

    Returns:
        What `retrain` returns, and the `anchors`, counted from 1.

    Raises:
        ValueError: as `retrain`; the teacher is no route; numbers out of range; the distiller uses no teacher.

    Reference: Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019, section 3 (greedy
        search).
    Differs: the threshold's published value could not be verified; 1.5 is ours.
    """
    if not threshold >= 1:
        raise ValueError(f"`threshold` must be at least 1, got {threshold}: at 1 the next anchor is no harder.")
    check_uses_teacher(settings, "--greedy-anchors")
    _, card = read_student(student)
    data, source = provenance(student, card, data, teacher)
    snapshots = _snapshots(source)
    num_stages = min(num_stages, len(snapshots))
    if not 1 <= num_stages <= settings.recipe.steps:
        raise ValueError(f"`num_stages` must be from 1 to {settings.recipe.steps} steps, got {num_stages}.")
    route = [snapshot.to_json() for snapshot in snapshots]
    loaded: Data = data.build(Data)
    identity = [unstructure(settings), threshold, num_stages, data.to_json(), route, card.blueprint.to_json()]
    identity.append(loaded.fingerprint)
    steps = StudentSteps(out.parent / f"{out.name}-anchors", identity)
    anchors: list[int] = steps.read(CHOICES, [0], list[int])
    if any(not 0 <= anchor < len(snapshots) for anchor in anchors) or not anchors:
        raise Damaged(steps.folder / CHOICES, f"names snapshots that are not there: {anchors}", "Remove it.")
    current = student
    for stage in range(num_stages):
        anchor = anchors[stage] if stage < len(anchors) else _next(current, loaded, snapshots, anchors[-1], threshold)
        last = stage == num_stages - 1 or anchor == len(snapshots) - 1
        anchors = [*anchors[:stage], len(snapshots) - 1 if last else anchor]
        steps.write(CHOICES, anchors)
        train = partial(
            retrain,
            current,
            _stage_settings(settings, stage, num_stages, last=last),
            data=data,
            teacher=snapshots[anchors[-1]],
        )
        if last:
            return train(out, deploy=deploy) | {"anchors": ",".join(str(number + 1) for number in anchors)}
        train_anchor = partial(train, phase=f"anchor {anchor + 1}", deploy=False)
        current = steps.student(f"stage-{stage + 1}", train_anchor)
    raise AssertionError("the last stage returns")


def _stage_settings(settings: Retrain, stage: int, num_stages: int, *, last: bool) -> Retrain:
    """An equal share of the steps, all that remain for the last stage; inherited weights after the first."""
    share = settings.recipe.steps // num_stages
    num_steps = settings.recipe.steps - stage * share if last else share
    recipe = dataclasses.replace(settings.recipe, steps=num_steps, seed=settings.recipe.seed + stage)
    return dataclasses.replace(settings, recipe=recipe, weights=settings.weights if stage == 0 else "inherited")


def _snapshots(teacher: Spec | None) -> tuple[Spec, ...]:
    arguments = {} if teacher is None else dict(teacher.arguments)
    if arguments.get("kind") != "route":
        raise ValueError(
            "--greedy-anchors needs a route of snapshots. Give --teacher route:TEACHER,TEACHER, or a student "
            "of a run with FitTeacher(snapshots=...)."
        )
    return arguments["members"]


def _next(source: Path, data: Data, snapshots: tuple[Spec, ...], current: int, threshold: float) -> int:
    network, _ = read_student(source)
    later = [build_teacher(snapshot, data) for snapshot in snapshots[current:]]
    return current + next_anchor(divergences(network, later, data), threshold)


def divergences(network: Network, teachers: list[Teacher], data: Data) -> list[float]:
    """Mean over the search part of KL(teacher || student), for each teacher."""
    device = default_device()
    network = network.to(device).eval()
    sums = torch.zeros(len(teachers), dtype=torch.float64)
    with torch.no_grad():
        for pixels, labels in data.search.batches():
            pixels, labels = pixels.to(device), labels.to(device)
            student = network(data.normalise(pixels)).logits.float().log_softmax(1)
            for place, teacher in enumerate(teachers):
                target: Tensor = teacher.to(device)(pixels, labels).logits.float().log_softmax(1)
                sums[place] += F.kl_div(student, target, reduction="sum", log_target=True).double().cpu()
    return (sums / len(data.search)).tolist()


def next_anchor(divergence: list[float], threshold: float) -> int:
    """How many snapshots to go on: the farthest within the threshold, one at least.

    Args:
        divergence: of the anchor just learnt, and of those after it.
        threshold: largest ratio to the first.
    """
    near = [place for place, value in enumerate(divergence) if place and value <= threshold * divergence[0]]
    return max(near, default=1)
