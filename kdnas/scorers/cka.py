"""Similarity to the teacher by linear centred kernel alignment (CKA)."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from kdnas.scorers.base import Evidence, OutputScorer, Score
from kdnas.similarity import unit_gram


@final
class Cka(OutputScorer):
    """CKA of student and teacher stages: `mean_t max_l CKA(stage_l, stage_t)`, in [0, 1], higher is more similar.

    For every teacher stage `t`, the most similar student stage `l`; linear CKA of the stages' flattened feature maps,
    centred over the images. The logits are one more stage of both. 1 for the teacher itself, 0 for a stage that is
    constant over the images.

    Reference: Kornblith, Norouzi, Lee, Hinton, Similarity of Neural Network Representations Revisited, ICML 2019,
        section 3. The best student stage per teacher stage is TGSA's (Bashivan et al., ICCV 2019).
    Differs: the paper analyses trained networks, here CKA ranks subnets; the logits are a stage too; computed from the
        images' Gram matrices, which equals the paper's product over features and is cheaper for few images.
    """

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """CKA of this stage with every teacher stage, `[teacher stages]`."""
        del stage
        stages = (*evidence.teacher.features, evidence.teacher.logits)
        teacher = evidence.once(Cka, lambda: torch.stack([unit_gram(f) for f in stages]))
        return teacher @ unit_gram(feature).to(teacher.dtype)

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The mean over teacher stages of the largest CKA."""
        best = torch.stack([*digests, self.digest(len(digests), logits, evidence)]).amax(0)
        parts = {f"teacher_stage_{i}": round(v, 6) for i, v in enumerate(best.tolist())}
        similarity = float(best.mean())
        return Score(similarity, {"similarity": similarity, **parts})
