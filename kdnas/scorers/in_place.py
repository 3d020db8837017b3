"""Similarity to the supernet's own largest subnet instead of the teacher."""

import dataclasses
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from kdnas.network import batch_statistics
from kdnas.scorers.base import Evidence, OutputScorer, Score, Scorer, outputs_of
from kdnas.specs import Spec, find_spec


@final
class InPlace(OutputScorer):
    """Another score, with the supernet's largest subnet in the teacher's place.

    The largest subnet shares its weights and its training with every candidate, so that what is left of the difference
    is the architecture's; a teacher of another family differs from all of them in the same ways. It sees the evidence
    with the evidence's own batch statistics, as the candidates do, and is run once.

    Args:
        scorer: what compares, a Spec or a name: `rdm` (the default), `loss`, `cka`.

    Raises:
        ValueError: the scorer needs more than a student's outputs, or the evidence has no supernet.

    Reference: the largest subnet as the teacher of the others is in-place distillation (Yu and Huang, Universally
        Slimmable Networks and Improved Training Techniques, ICCV 2019, section 3.3).
    Differs: there it trains, here it ranks; `experiments/nas_bench_macro.md` has both teachers side by side.
    """

    def __init__(self, *, scorer: Spec | str = "rdm") -> None:
        made = find_spec("kdnas.scorers", scorer) if isinstance(scorer, str) else scorer
        built: Scorer = made.build(Scorer)
        if not isinstance(built, OutputScorer):
            raise ValueError(
                f"in_place needs a scorer that looks at outputs alone, got {made.make}. Use rdm, loss or cka."
            )
        self.inner = built

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """The inner scorer's."""
        return self.inner.digest(stage, feature, self._by_largest(evidence))

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The inner scorer's."""
        return self.inner.judge(logits, digests, self._by_largest(evidence))

    def _by_largest(self, evidence: Evidence) -> Evidence:
        """The evidence with the largest subnet's outputs in the teacher's place."""

        def compute() -> Evidence:
            supernet = evidence.subnets(self)
            largest = supernet.extract(supernet.space.largest).eval()
            with torch.no_grad(), batch_statistics(largest):
                return dataclasses.replace(evidence, teacher=outputs_of(largest, evidence.images))

        return evidence.once(InPlace, compute)
