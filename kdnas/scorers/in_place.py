"""Similarity to the supernet's largest subnet instead of the teacher."""

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
    """Another score, with the supernet's largest subnet as the teacher.

    The largest subnet shares weights and training with every candidate, so that the remaining difference is that of the
    architectures; a teacher of another family differs from all candidates in the same ways. It is run once, with the
    batch statistics of the evidence, as the candidates are.

    Args:
        scorer: a Spec or a name of an output scorer: `rdm` (the default), `loss` or `cka`.

    Raises:
        ValueError: the scorer is no `OutputScorer`, or the evidence has no supernet.

    Reference: the largest subnet as the teacher of the others is in-place distillation (Yu and Huang, Universally
        Slimmable Networks and Improved Training Techniques, ICCV 2019, section 3.3).
    Differs: there it is a training method, here a ranking; `experiments/nas_bench_macro.md` compares both teachers.
    """

    def __init__(self, *, scorer: Spec | str = "rdm") -> None:
        scorer_spec = find_spec("kdnas.scorers", scorer) if isinstance(scorer, str) else scorer
        inner: Scorer = scorer_spec.build(Scorer)
        if not isinstance(inner, OutputScorer):
            raise ValueError(
                f"`scorer` must need the student's outputs alone, got {scorer_spec.make}. Use rdm, loss or cka."
            )
        self.inner = inner

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """That of the inner scorer."""
        return self.inner.digest(stage, feature, self._by_largest(evidence))

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """That of the inner scorer."""
        return self.inner.judge(logits, digests, self._by_largest(evidence))

    def _by_largest(self, evidence: Evidence) -> Evidence:
        """The evidence with the largest subnet as the teacher."""

        def compute() -> Evidence:
            supernet = evidence.subnets(self)
            largest = supernet.extract(supernet.space.largest).eval()
            with torch.no_grad(), batch_statistics(largest):
                return dataclasses.replace(evidence, teacher=outputs_of(largest, evidence.images))

        return evidence.once(InPlace, compute)
