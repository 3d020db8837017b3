"""A run that learns a teacher's features and no labels: its data and losses, and what it does without."""

import dataclasses
from collections.abc import Sequence
from inspect import signature
from typing import Any, get_args

from kdnas.data.assembly import without_labels as labels_may_lack
from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.distillers.block_wise import BlockWise
from kdnas.distillers.conflict_free import ConflictFree
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._arguments import as_data, listed, losses_of
from kdnas.jobs._trials import matching
from kdnas.losses.base import Loss
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.losses.response.cosine import Cosine
from kdnas.losses.response.logit_regression import LogitRegression
from kdnas.settings import Experiment, FitTeacher, Prune, Search
from kdnas.specs import Spec, resolve, spec
from kdnas.teachers.unlabelled import unlabelled, widths_of

SCORER = spec("kdnas.scorers.rdm:Rdm")
"""Similarity of a subnet's features to the teacher's."""
_OF_CLASSES = {"accuracy", "loss"}


def data_of(data: Any, teacher: Spec | FitTeacher, *, unlabelled: bool) -> Spec:
    """The spec of a data set, for learning its labels or a teacher's features.

    Raises:
        ValueError: as `as_data` or `as_unlabelled`.
    """
    return as_unlabelled(data, teacher) if unlabelled else as_data(data)


def as_unlabelled(data: Any, teacher: Spec | FitTeacher) -> Spec:
    """The spec of a data set for learning a teacher's features.

    Args:
        data: with or without labels, as `as_data` takes it.
        teacher: makes the teacher.

    Raises:
        ValueError: the teacher would be trained here, or it or the data cannot be read.
    """
    if isinstance(teacher, FitTeacher):
        raise ValueError(
            "--unlabelled needs a teacher that is trained, got fit, which learns from labels. Name one by --teacher, "
            "such as timm:NAME or hf:FOLDER."
        )
    with labels_may_lack():
        source = as_data(data)
        plain: Data = source.build(Data)
    return spec(unlabelled, data=source, teacher=teacher, widths=widths_of(teacher, plain.preprocessing))


def without_labels(experiment: Experiment, losses: str | Sequence[str]) -> Experiment:
    """The experiment with nothing that needs labels or classes.

    Supernet and students learn by the cosine to the teacher's vector and the losses that are named; candidates are
    scored by their similarity to the teacher, unless another score is asked for.

    Args:
        experiment: with data of `as_unlabelled`.
        losses: as `losses_of` reads them.

    Raises:
        ValueError: a distiller without losses of a teacher, or a loss or score of labels or classes.
    """
    terms = _terms(experiment.train.data, losses)
    second = experiment.second
    retrain = dataclasses.replace(experiment.retrain, distiller=spec(FromTeacher, terms=terms))
    controls = tuple(control for control in experiment.finals.controls if control != "labels")
    return dataclasses.replace(
        experiment,
        train=dataclasses.replace(experiment.train, distiller=_taught(experiment.train.distiller, terms)),
        search=_searched(experiment.search),
        second=None if second is None else _searched(second),
        retrain=retrain,
        finals=dataclasses.replace(experiment.finals, controls=controls),
    )


def pruned_without_labels(settings: Prune, losses: str | Sequence[str]) -> Prune:
    """The pruning with nothing that needs labels or classes.

    What is left learns by the cosine to the teacher's vector and the losses that are named; where it is cut out of its
    teacher, channels are matched too, as with labels.

    Args:
        settings: with data of `as_unlabelled`.
        losses: as `losses_of` reads them.

    Raises:
        ValueError: scale factors, which are trained on labels, or a loss of labels or classes.
    """
    if settings.method != "shares":
        raise ValueError(f"`method` must be shares with --unlabelled, got {settings.method}, which learns from labels.")
    terms = _terms(settings.data, losses)
    if settings.source == "teacher":
        terms += ((LeadingChannels.weight, matching(settings.retrain.steps)),)
    return dataclasses.replace(settings, distiller=spec(FromTeacher, terms=terms))


def _terms(data: Spec, losses: str | Sequence[str]) -> tuple[tuple[float, Spec], ...]:
    """The cosine to the teacher's vector, and the losses that are named."""
    more = losses_of(listed(losses))
    for _, loss in more:
        _check_loss(loss)
    return ((1.0, spec(Cosine, widths=data["widths"])), *(term for term in more if resolve(term[1].make) is not Cosine))


def _searched(search: Search) -> Search:
    """The search by similarity to the teacher where it has no score of its own."""
    search = dataclasses.replace(search, scorer=SCORER if search.scorer == Search.scorer else search.scorer)
    for source in filter(None, (search.scorer, search.contrast)):
        _check_scorer(source)
    return search


def _taught(distiller: Spec | None, terms: tuple[tuple[float, Spec], ...]) -> Spec | None:
    """The supernet's distiller with these losses alone; one that compares stages only stays as it is."""
    if distiller is None or resolve(distiller.make) is BlockWise:
        return distiller
    parameters = signature(resolve(distiller.make)).parameters
    if resolve(distiller.make) is ConflictFree:
        inner = dict(distiller.arguments).get("inner", parameters["inner"].default)
        return distiller.replace(inner=_taught(inner, terms))
    smoothing = parameters.get("label_smoothing")
    if smoothing is None or type(None) not in get_args(smoothing.annotation):
        raise ValueError(
            f"--unlabelled needs a distiller that can do without labels, got {distiller.name}, which reads labels or "
            "classes. Use sandwich, single_path, fair_paths, block_wise or conflict_free."
        )
    changed = distiller.replace(terms=terms, label_smoothing=None)
    changed.build(Distiller)
    return changed


def reads_classes(source: Spec) -> str:
    """The name of a score of labels or of the logits of classes, also inside of another one; empty where none is."""
    inner = [value for _, value in source.arguments]
    inner = [part for value in inner for part in (value if isinstance(value, tuple) else (value,))]
    names = {source.name, *(part.name if isinstance(part, Spec) else str(part) for part in inner)}
    deeper = (reads_classes(part) for part in inner if isinstance(part, Spec))
    return next(iter(sorted(names & _OF_CLASSES)), "") or next(filter(None, deeper), "")


def _check_scorer(source: Spec) -> None:
    if name := reads_classes(source):
        raise ValueError(
            f"the score {name} reads labels or the logits of classes, and with --unlabelled there are none. Use "
            "rdm, cka or nwot."
        )


def _check_loss(loss: Spec) -> None:
    kind: Any = resolve(loss.make)
    if not isinstance(kind, type) or not issubclass(kind, Loss):
        return
    reads_classes = "logits" in kind.needs and kind not in (Cosine, LogitRegression)
    if "labels" in kind.needs or reads_classes:
        what = "labels" if "labels" in kind.needs else "the logits of classes"
        raise ValueError(
            f"--loss {loss.name} reads {what}, and with --unlabelled there are none. Use a loss of features, such as "
            "hint, similarity_preserving or representational, or drop it."
        )
