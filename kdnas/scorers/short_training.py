"""Accuracy after a short training: the proxy of AKD and of multi-fidelity search."""

import dataclasses
from collections.abc import Iterator
from typing import final

from torch import nn

from kdnas.distillers.base import Distiller
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.network import Network
from kdnas.scorers._probing import Weights, probed
from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.settings import Recipe
from kdnas.specs import Spec, check_literals, spec
from kdnas.training.loop import Training


@final
class ShortTraining(Scorer):
    """Accuracy of a copy after a few training steps, with the teacher or without.

    The score is that of `Accuracy` on the evidence afterwards. Batch order, augmentation and initial weights follow
    from the evidence's seed, so that all students see the same batches and a score is reproducible.

    Args:
        steps: optimizer steps.
        distiller: with a teacher (`FromTeacher`, the default), or `FromLabels` for the control without.
        weights: `fresh`, as in the papers, or `inherited`.
        batch_size: images per step.
        learning_rate: the peak of the schedule.
        num_rungs: number of scores of one training: after all steps, after 1/`reduction` of them, and so on. A search
            with a pruner may stop at each.
        reduction: ratio of the steps of successive rungs.

    Raises:
        ValueError: too few steps for the rungs; the evidence has no data or, where the distiller uses one, no teacher;
            the student is no Network.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2 (5 epochs
        with distillation as the reward); Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge
        Distillation, 2020, section 3.
    Differs: steps instead of epochs; MF-KD's Gaussian process over these scores is searcher `gaussian_process`.
    """

    def __init__(
        self,
        *,
        steps: int = 20,
        distiller: Spec = spec(FromTeacher),
        weights: Weights = "fresh",
        batch_size: int = 64,
        learning_rate: float = 0.1,
        num_rungs: int = 1,
        reduction: int = 3,
    ) -> None:
        check_literals(type(self), locals())
        self.recipe = Recipe(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
        if num_rungs < 1 or reduction < 2 or steps < reduction ** (num_rungs - 1):
            raise ValueError(
                "`num_rungs` must be at least 1, `reduction` at least 2, and `steps` at least "
                f"reduction ** (num_rungs - 1), got {num_rungs=}, {reduction=} and {steps=}."
            )
        self.resources = tuple(steps // reduction**k for k in reversed(range(num_rungs)))
        self.distiller, self.weights = distiller, weights
        self.reads_weights = weights == "inherited"

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        *_, last = self.rungs(student, evidence)
        return last

    def rungs(self, student: nn.Module, evidence: Evidence) -> Iterator[Score]:
        """The score at each rung of one training; the learning rate schedule covers all steps."""
        if evidence.data is None:
            raise ValueError(
                "scorer 'short_training' needs a data set, and the evidence has none. Pass Evidence(data=...)."
            )
        if not isinstance(student, Network):
            raise ValueError(
                f"scorer 'short_training' needs a Network, got a {type(student).__name__}. Use a scorer that does not "
                "train, such as rdm or accuracy."
            )
        network = probed(student, self.weights, evidence.seed, evidence.images.device).requires_grad_(True)
        assert isinstance(network, Network)
        recipe = dataclasses.replace(self.recipe, seed=evidence.seed)
        training = Training(
            network,
            self.distiller.build(Distiller),
            evidence.data,
            evidence.teacher_module,
            recipe,
            evidence.images.device,
        )
        losses: dict[str, float] = {}
        for steps in self.resources:
            while training.index < steps:
                losses = training.step()
            score = Accuracy().score(network, evidence)
            yield Score(score.value, {**score.parts, **{f"loss_{name}": value for name, value in losses.items()}})
