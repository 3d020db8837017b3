"""Route-constrained optimisation with greedy anchors: the student decides which snapshot of the teacher comes next."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.data.base import Data
from kdnas.jobs._run import build_teacher
from kdnas.jobs.retrain import forget_drafts, lock_settings, retrain, taught_by_teacher
from kdnas.network import Network, default_device
from kdnas.runs.files import current_folder, write_json
from kdnas.settings import Retrain
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
    teacher: Spec | None = None,
    deploy: bool = True,
) -> dict[str, Any]:
    r"""Train a student under anchors on its teacher's route, chosen greedily; goes on where it was interrupted.

    It begins with the first snapshot. When a stage is over, the next anchor is the farthest snapshot $j > i$ with
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
        ValueError: as `retrain`; the teacher is no route; numbers out of range; the distiller asks no teacher.

    Reference: Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019, section 3 (greedy
        search).
    Differs: the threshold's published value could not be verified; 1.5 is ours.
    """
    if not threshold >= 1:
        raise ValueError(f"threshold must be at least 1, got {threshold}: at 1 the next anchor is no harder.")
    taught_by_teacher(settings, "anchors")
    _, card = read_student(student)
    data, teacher = provenance(student, card, data, teacher)
    snapshots = _snapshots(teacher)
    stages = min(num_stages, len(snapshots))
    if not 1 <= stages <= settings.recipe.steps:
        raise ValueError(f"stages are 1 to {settings.recipe.steps} steps, got {num_stages}.")
    share = settings.recipe.steps // stages
    folder = out.parent / f"{out.name}-anchors"
    route = [made.to_json() for made in snapshots]
    lock_settings(folder, [unstructure(settings), threshold, stages, data.to_json(), route, card.blueprint.to_json()])
    anchors: list[int] = json.loads((folder / CHOICES).read_text()) if (folder / CHOICES).exists() else [0]
    source = student
    for stage in range(stages):
        anchor = anchors[stage] if stage < len(anchors) else _next(source, data, snapshots, anchors[-1], threshold)
        last = stage == stages - 1 or anchor == len(snapshots) - 1
        anchors = [*anchors[:stage], len(snapshots) - 1 if last else anchor]
        write_json(folder / CHOICES, anchors)
        left = settings.recipe.steps - stage * share
        recipe = dataclasses.replace(settings.recipe, steps=left if last else share, seed=settings.recipe.seed + stage)
        weights = settings.weights if stage == 0 else "inherited"
        how = dataclasses.replace(settings, recipe=recipe, weights=weights)
        given = {"data": data, "teacher": snapshots[anchors[-1]]}
        if last:
            found = retrain(source, how, out, deploy=deploy, **given)
            return found | {"anchors": ",".join(str(a + 1) for a in anchors)}
        trained = folder / f"stage-{stage + 1}"
        if not current_folder(trained).exists():
            retrain(source, how, trained, phase=f"anchor {anchor + 1}", deploy=False, **given)
        forget_drafts(trained)
        source = trained
    raise AssertionError("the last stage returns")


def _snapshots(teacher: Spec | None) -> tuple[Spec, ...]:
    held = {} if teacher is None else dict(teacher.arguments)
    if held.get("kind") != "route":
        raise ValueError(
            "greedy anchors lie on a route. Give --teacher route:SPEC,SPEC, or a student of a run with "
            "FitTeacher(snapshots=...)."
        )
    return held["members"]


def _next(source: Path, data: Spec, snapshots: tuple[Spec, ...], now: int, threshold: float) -> int:
    loaded: Data = data.build(Data)
    network, _ = read_student(source)
    later = [build_teacher(made, loaded) for made in snapshots[now:]]
    found = divergences(network, later, loaded)
    return now + next_anchor(found, threshold)


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
    near = [place for place, found in enumerate(divergence) if place and found <= threshold * divergence[0]]
    return max(near, default=1)
