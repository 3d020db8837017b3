"""DisWOT: training-free student search for a teacher."""

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from kdnas.network import batch_statistics
from kdnas.numerics import safe_normalize, widen
from kdnas.outputs import Outputs
from kdnas.randomness import seed_of
from kdnas.scorers._probing import Weights, probed, watching
from kdnas.scorers.base import Evidence, Score, Scorer, outputs_of
from kdnas.specs import check_literals
from kdnas.values import Amount


@final
class Diswot(Scorer):
    r"""`-(relation * M_r + semantic * M_s)`: relations of images and of channels in untrained teacher and student.

    Relation, over `b` images: `F` is the deepest feature map before pooling, `[b, dims]`; `G = F F^T`, rows of norm 1;
    `M_r = ||G_t - G_s||_F^2 / b^2`. Semantic, over classes: `w_c` is row `c` of the cross-entropy's gradient by the
    classifier's weight, `[classes, channels]` (mean over the images; Grad-CAM's channel weights);
    `E_c = w_c w_c^T` with rows of norm 1; `M_s = sum_c ||E_c,t - E_c,s||_F^2 / (channels * classes)`.

    The gradient is `(softmax(z) - onehot)^T f / b` for the classifier's input `f`, so no backward pass is needed. A row
    of `E_c` is `sign(w_ci) w_c / ||w_c||`, so `M_s` is computed without the channels x channels matrices. Zero rows
    stay zero.

    Args:
        relation: weight of `M_r`.
        semantic: weight of `M_s`; 0 leaves it out.
        num_images: how many of the evidence's images.
        weights: `fresh` for both networks, as in the paper (initialised from the evidence's seed), or `inherited`: the
            teacher's trained and the student's current weights.

    Raises:
        ValueError: student or teacher has no feature maps or no linear classifier, the classifiers differ in shape, or
            the evidence has no teacher module.

    Reference: Dong, Li, Wei, DisWOT: Student Architecture Search for Distillation WithOut Training, CVPR 2023,
        equations 2 to 7.
    Differs: the authors' scripts compare random weight matrices (NAS-Bench-201) or relations alone; this is the paper's
        definition.
    """

    def __init__(
        self, *, relation: Amount = 1.0, semantic: Amount = 1.0, num_images: int = 64, weights: Weights = "fresh"
    ) -> None:
        check_literals(type(self), locals())
        if num_images < 2:
            raise ValueError(f"`num_images` must be at least 2, got {num_images}.")
        self.relation, self.semantic, self.num_images = relation, semantic, num_images
        self.weights = weights
        self.reads_weights = weights == "inherited"

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        teacher = evidence.once((Diswot, self.weights, self.num_images), lambda: self._teacher(evidence))
        images, labels = evidence.images[: self.num_images], evidence.labels[: self.num_images]
        own = _relations(
            probed(student, self.weights, evidence.seed, evidence.images.device), images, labels, "student"
        )
        relation = float((own.relations - teacher.relations).square().mean())
        value, parts = -self.relation * relation, {"relation": relation}
        if self.semantic:
            for who, gradient in (("student", own.gradient), ("teacher", teacher.gradient)):
                if gradient is None:
                    raise ValueError(
                        f"`semantic` needs a linear classifier at the end, and the {who} has none. Set semantic=0."
                    )
            assert own.gradient is not None
            assert teacher.gradient is not None
            parts["semantic"] = _semantic(own.gradient, teacher.gradient)
            value -= self.semantic * parts["semantic"]
        return Score(value, parts)

    def _teacher(self, evidence: Evidence) -> "_Relations":
        if evidence.teacher_module is None:
            raise ValueError("scorer 'diswot' initialises the teacher anew, and the evidence has no teacher module.")
        # A seed of its own: with one seed, layers that both networks begin with would be equal.
        teacher = probed(
            evidence.teacher_module, self.weights, seed_of(evidence.seed, "teacher"), evidence.images.device
        )
        pixels, labels = evidence.pixels[: self.num_images], evidence.labels[: self.num_images]
        return _relations(teacher, pixels, labels, "teacher")


class _Relations(NamedTuple):
    """The relations of the images, `[batch, batch]`, and the classifier's gradient, `[classes, channels]`."""

    relations: Tensor
    gradient: Tensor | None


def _relations(network: nn.Module, images: Tensor, labels: Tensor, who: str) -> _Relations:
    inputs: list[Tensor] = []
    with torch.no_grad(), batch_statistics(network):
        with watching(network, (nn.Linear,), lambda _, x: inputs.append(x)):
            outputs: Outputs = outputs_of(network, images)
    if not outputs.features:
        raise ValueError(f"scorer 'diswot' needs the feature map before pooling; the {who} has none. Return Outputs.")
    rows = widen(outputs.features[-1]).flatten(1)
    largest = rows.abs().amax()
    rows = rows / torch.where(largest > 0, largest, 1.0)
    logits = widen(outputs.logits)
    slope = (logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])) / len(labels)
    last = next((x for x in reversed(inputs) if x.dim() == 2), None)
    return _Relations(safe_normalize(rows @ rows.T), None if last is None else slope.T @ widen(last))


def _semantic(student: Tensor, teacher: Tensor) -> float:
    if student.shape != teacher.shape:
        raise ValueError(
            "`semantic` needs classifiers of equal shape [classes, channels], got "
            f"{list(student.shape)} (student) and {list(teacher.shape)} (teacher). Set semantic=0 or use a teacher of "
            "the student's width."
        )
    signs, teacher_signs = student.sign(), teacher.sign()
    cosine = (safe_normalize(student) * safe_normalize(teacher)).sum(1)
    # Each row of E has norm 1 (or 0 where its channel is), and rows of equal index have cosine sign * sign * cosine.
    squares = signs.square().sum(1) + teacher_signs.square().sum(1) - 2 * cosine * (signs * teacher_signs).sum(1)
    return float(squares.clamp_min(0).sum() / student.numel())
