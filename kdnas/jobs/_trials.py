"""Short trainings that decide how a student is trained: compared on the search part, never on test."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import accuracy
from kdnas.jobs.chain import say
from kdnas.jobs.retrain import prepare
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.runs.folder import RunFolder
from kdnas.runs.steps import draft_of, forget_drafts
from kdnas.settings import Retrain
from kdnas.specs import Spec, spec
from kdnas.tasks.base import Task
from kdnas.training.driver import train_with_checkpoints

SHARE = 10  # a trial has a tenth of the steps
_MATCHED = 1000  # steps after which the source's channels are not matched any more; see `LeadingChannels`
MIXTURES = {"half labels, half teacher": (0.5, 0.5), "labels": (1.0, 0.0), "a tenth labels": (0.1, 0.9)}


class Variant(NamedTuple):
    """A way to train a student.

    Attributes:
        student: the folder of the network to begin with.
        settings: its training.
        teacher: its teacher.
    """

    student: Path
    settings: Retrain
    teacher: Spec


def matching(steps: int) -> Spec:
    """The loss that matches channels in the first 1,000 of so many steps, with a weight that falls to 0."""
    return spec(LeadingChannels, until=_MATCHED / steps) if steps > _MATCHED else spec(LeadingChannels)


def mixture(name: str, steps: int, task: Task, *, features: bool) -> Spec:
    """The distiller of one of `MIXTURES` of the task's losses (`Task.distillation`), of which the first is the labels'.

    Args:
        name: a key of `MIXTURES`.
        steps: of the training.
        task: of the data.
        features: whether the student's channels are the teacher's first ones and are matched too (`LeadingChannels`),
            in the first 1,000 steps.
    """
    labels, teacher = MIXTURES[name]
    own, *others = (loss for _, loss in task.distillation)
    terms = [(labels, own), *((teacher, loss) for loss in others)]
    terms += [(LeadingChannels.weight, matching(steps))] * features
    return spec(FromTeacher, terms=tuple(term for term in terms if term[0]))


def compare(storage: RunFolder, variants: Mapping[str, Variant], data: Spec) -> str:
    """The name of the best variant after a tenth of its steps, with a learning rate curve of that length.

    Every trial is a phase of the run, so that it is trained once; a single variant is not tried.

    Args:
        storage: the run.
        variants: by name.
        data: the data of all of them.
    """
    if len(variants) == 1:
        return next(iter(variants))
    accuracies = {name: _trial(storage, name, variant, data) for name, variant in variants.items()}
    return max(accuracies, key=lambda name: accuracies[name])


def _trial(storage: RunFolder, name: str, variant: Variant, data: Spec) -> float:
    phase = f"trial: {name}"
    if storage.phase(phase) is None:
        recipe = variant.settings.recipe
        short = dataclasses.replace(recipe, steps=max(1, recipe.steps // SHARE))
        prepared = prepare(variant.student, dataclasses.replace(variant.settings, recipe=short), data, variant.teacher)
        draft = draft_of(storage.path("trial"), prepared.identity)
        seconds = train_with_checkpoints(prepared.training, phase, draft, None)
        measured = accuracy(prepared.network, prepared.data.search, prepared.data)
        storage.finish(phase, accuracy=measured, steps=short.steps, seconds=seconds)
        say(f"{phase}: {prepared.data.task.measure} {measured:.2%} on the search part")
        forget_drafts(storage.path("trial"))
    return float(storage.require(phase, "kdnas prune")["accuracy"])
