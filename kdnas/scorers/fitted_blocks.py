"""DNA's rating for any network, with adapters fitted to the evidence."""

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from kdnas.losses.stage_pairs import StagePairs
from kdnas.numerics import as_map, same_positions, widen
from kdnas.outputs import Outputs
from kdnas.scorers.base import Evidence, OutputScorer, Score
from kdnas.similarity import relative_l1
from kdnas.specs import check_literals

_FIT, _RATE = slice(0, None, 2), slice(1, None, 2)


@final
class FittedBlocks(OutputScorer):
    r"""`-sum_i weight_i * relative_l1(stage_i, teacher stage_i)`: mean absolute errors over the teacher's deviations.

    With `adapters="fitted"` a student stage is first mapped to the teacher's channels by the 1x1 convolution with bias
    that is best in least squares on every second image of the evidence; the rating is that of the other images, so a
    wide stage gains nothing by overfitting. A teacher stage rates 0 against itself (up to rounding), and the scale of
    the teacher's feature map cancels. With `adapters="none"` stages of equal shape are compared
    directly, which is meaningful only after block-wise distillation. Larger maps are average-pooled to the smaller.

    Args:
        adapters: `fitted` or `none`.
        pairs: which stages are compared, as in `StagePairs`: `resolution`, `order`, `rdm` or explicit pairs
            of stages.
        weights: one per pair; 1 each by default, as in the authors' code.

    Raises:
        ValueError: student or teacher has no feature maps, shapes differ with `adapters="none"`, or fewer than 4
            images.

    Reference: Li et al., Blockwisely Supervised NAS with Knowledge Distillation, CVPR 2020, equations 6 and 7.
    Differs: the input of a student's stage is the student's previous stage, not the teacher's, so that any network can
        be rated; the adapters are fitted to the evidence in closed form, whereas DNA trains blocks of the teacher's
        width; scorer `blocks` uses trained adapters.
    """

    def __init__(
        self,
        *,
        adapters: Literal["fitted", "none"] = "fitted",
        pairs: str | tuple[tuple[int, int], ...] = "resolution",
        weights: tuple[float, ...] = (),
    ) -> None:
        check_literals(type(self), locals())
        self.adapters, self.pairs, self.weights = adapters, StagePairs(pairs=pairs), weights

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """The stage's feature map and a cache of its ratings, which subnets that share the stage share."""
        del stage, evidence
        return feature, {}

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """Minus the weighted sum over the pairs."""
        student, teacher = Outputs(logits, tuple(f for f, _ in digests)), evidence.teacher._replace(classified=None)
        for who, outputs in (("student", student), ("teacher", teacher)):
            if not outputs.features:
                raise ValueError(
                    f"scorer 'fitted_blocks' compares stages; the {who} has none. Return Outputs with features, or use "
                    "loss or accuracy."
                )
        rows = self.pairs.prepare(student, teacher)
        if self.weights and len(self.weights) != len(rows):
            raise ValueError(f"`weights` must have one number per pair, got {len(self.weights)} for {len(rows)} pairs.")
        ratings = []
        for row in rows:
            feature, memory = digests[row.student]
            if row.teacher not in memory:
                memory[row.teacher] = self._rate(feature, teacher.features[row.teacher])
            ratings.append(memory[row.teacher])
        weights = self.weights or (1.0,) * len(rows)
        value = -sum(w * r for w, r in zip(weights, ratings, strict=True))
        return Score(value, {f"stage_{row.student}": r for row, r in zip(rows, ratings, strict=True)})

    def _rate(self, student: Tensor, teacher: Tensor) -> float:
        if self.adapters == "none":
            return float(relative_l1(student, teacher))
        if len(student) < 4:
            raise ValueError(f"adapters='fitted' needs at least 4 images, got {len(student)}. Use more search images.")
        like = next((f for f in (student, teacher) if f.dim() == 4), None)
        aspect = 1.0 if like is None else like.shape[2] / like.shape[3]
        s, t = (widen(f) for f in same_positions(as_map(student, aspect), as_map(teacher, aspect)))
        weight = _least_squares(_rows(s[_FIT]), _rows(t[_FIT]))
        return float(relative_l1(_with_ones(_rows(s[_RATE])) @ weight, _rows(t[_RATE])))


def _rows(feature: Tensor) -> Tensor:
    return feature.movedim(1, -1).flatten(0, -2).double()


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _least_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """The weights and, in the last row, the bias: `[student channels + 1, teacher channels]`."""
    # Channels are scaled first, so that one small ridge suits all of them; a dead channel stays zero.
    scale = student.abs().amax(0)
    scale = torch.cat([torch.where(scale > 0, scale, 1.0), scale.new_ones(1)])
    rows = _with_ones(student) / scale
    gram = rows.T @ rows
    # Dead and repeated channels make the normal equations singular; the ridge selects a solution of small weights.
    ridge = 1e-8 * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, rows.T @ teacher) / scale[:, None]
