"""Accuracy after a few steps of training: the proxy of AKD and of multi-fidelity search."""

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
    """The accuracy of a copy that was trained for a few steps, with the teacher or without.

    The score is `Accuracy` on the evidence afterwards. Order of images, augmentation and fresh weights are drawn from
    the evidence's seed, so all students see the same batches and the score of one is the same whenever it is asked.

    Args:
        steps: optimiser steps.
        distiller: with a teacher (`FromTeacher`, the default), or `FromLabels` for the control without.
        weights: `fresh`, as in the papers, or `inherited`.
        batch_size: images per step.
        learning_rate: the peak.
        num_rungs: at how many times it shows a score: after all steps, a `reduction`-th of them, and so on down. A
            search with a pruner may stop it at each.
        reduction: how many times more steps a rung has than the one below.

    Raises:
        ValueError: more rungs than the steps have room for; the evidence has no data or (where the distiller asks) no
            teacher; the student is no Network.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2 (5 epochs
        with distillation as the reward); Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge
        Distillation, 2020, section 3.
    Differs: steps instead of epochs; MF-KD's Gaussian process over these scores is the searcher `gaussian_process`.
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
                f"there is at least one rung, and the lowest of {num_rungs} is a step or more: with {reduction=} (at "
                f"least 2) that takes steps >= {max(2, reduction) ** (max(1, num_rungs) - 1)}, got {steps}."
            )
        self.resources = tuple(steps // reduction**k for k in reversed(range(num_rungs)))
        self.distiller, self.weights = distiller, weights
        self.reads_weights = weights == "inherited"

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The score of one student."""
        *_, last = self.rungs(student, evidence)
        return last

    def rungs(self, student: nn.Module, evidence: Evidence) -> Iterator[Score]:
        """The score at each rung of one training, whose learning rate falls over all of its steps."""
        if evidence.data is None:
            raise ValueError("short_training trains, and the evidence holds no data. Give it the run's data set.")
        if not isinstance(student, Network):
            raise ValueError(
                f"short_training trains what a search space builds, a Network, got a {type(student).__name__}. Use a "
                "scorer that only looks, such as rdm or accuracy."
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
            found = Accuracy().score(network, evidence)
            yield Score(found.value, {**found.parts, **{f"loss_{name}": value for name, value in losses.items()}})
