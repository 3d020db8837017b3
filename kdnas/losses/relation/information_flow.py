"""Information flow: similarities between samples, layer by layer."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss, Stage, connected_zero
from kdnas.losses.stage_pairs import Pairs, StagePairs
from kdnas.numerics import safe_normalize, safe_sqrt, squared_distances, widen
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec

Embedding = Literal["flat", "pooled"]

# Added to a cosine kernel's probabilities under the logarithm: opposite samples have probability 0.
EPSILON = 1e-7


@final
class InformationFlow(Loss):
    r"""Divergence between the samples' similarities in each layer; intermediate layers fade out during training.

    For embeddings $e$ of one layer, kernels $K^{cos}_{ij} = (\cos(e_i, e_j) + 1) / 2$ and
    $K^{t}_{ij} = 1 / (1 + |e_i - e_j|)$ (Student t), rows divided by their sums: $P_{ij}$ of the teacher, $Q_{ij}$ of
    the student. The loss of a pair of layers is Jeffreys' divergence under both kernels,
    $D = \sum_{K} \frac1B \sum_{ij} (P_{ij} - Q_{ij}) (\log P_{ij} - \log Q_{ij})$, and

    $L = D_{last} + w(e) \sum_{intermediate} D_l$, $w(e) = w_0 \gamma^e$, epoch
    $e = \mathrm{epochs} \cdot \mathrm{progress}$: the intermediate layers matter in the first epochs, which the authors
    call critical.

    Shapes: maps `[batch, channels, h, w]` or tokens of any sizes; kernels are `[batch, batch]` by matrix products.
    Divisor: batch (a mean over rows); layers are summed. One sample: 0.

    `progress` is assigned by the training loop; `intermediate_weight` is the schedule, a function of it.

    Stages: a student of another family learns better from an auxiliary teacher of its own family. A network passed as
    `auxiliary` is a learnable part of this loss: first it is trained on the teacher's deepest layer (40 epochs), then
    frozen and used in place of the teacher (50 epochs). Without it the teacher is used directly.

    Default weight 1 and $w_0 = 100$, $\gamma = 0.7$, 50 epochs: the authors'.

    Args:
        taps: how the student's stages are paired with the (auxiliary) teacher's: `resolution` (default), `rdm`, `order`
            or explicit pairs, as in `StagePairs`.
        embedding: `flat` (whole maps, as the authors do) or `pooled` (channel means); default `flat`.
        first_weight: $w_0$; default 100.
        decay: $\gamma$, per epoch, in (0, 1]; default 0.7.
        epochs: length of the schedule in epochs, whatever the run's; default 50.
        auxiliary: an untrained network of the student's family, from images to `Outputs`, or its Spec; default None.

    Raises:
        ValueError: an unknown embedding, a decay outside (0, 1], or an auxiliary teacher and outputs without images.

    Reference: Passalis, Tzelepi, Tefas, Heterogeneous Knowledge Distillation using Information Flow Modeling,
        CVPR 2020, arXiv 2005.00727, section 3; passalis/pkth nn/pkt_transfer.py, kernels "combined".
    Differs: a mean over rows, the authors' value times the batch, so that the strength does not fall with the batch;
        safe normalisation and an epsilon of 1e-7 under the cosine kernel's logarithm, which is NaN for opposite
        samples in the authors' code; logarithms of the t kernel are formed directly.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    ranges: ClassVar[Mapping[str, str]] = {"first_weight": "[0, inf)", "decay": "(0, 1]", "epochs": "[1, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.45378469481799216

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        embedding: Embedding = "flat",
        first_weight: float = 100.0,
        decay: float = 0.7,
        epochs: int = 50,
        auxiliary: nn.Module | Spec | None = None,
    ) -> None:
        super().__init__()
        self.taps = StagePairs(pairs=taps)
        self.embedding, self.first_weight, self.decay, self.epochs = embedding, first_weight, decay, epochs
        self.auxiliary: nn.Module | None = auxiliary.build(nn.Module) if isinstance(auxiliary, Spec) else auxiliary

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the student's stages with the teacher's, or the auxiliary teacher's."""
        if self.auxiliary is not None:
            self.auxiliary.to(student.logits.device)
            teacher = self._auxiliary(student)
        self.taps.prepare(student, teacher, elastic)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The deepest pair's divergence plus the weighted ones of the others."""
        if self.auxiliary is not None:
            teacher = self._auxiliary(student)
        pairs = self.taps(student, teacher)
        values = [_divergence(self._embedded(s), self._embedded(t)) for s, t in pairs]
        weight = self.intermediate_weight(at.progress)
        return values[-1] + sum((weight * value for value in values[:-1]), start=connected_zero(values[-1]))

    def intermediate_weight(self, progress: float) -> float:
        """The weight of all layers but the deepest after this share of the run."""
        return self.first_weight * self.decay ** (self.epochs * progress)

    def pretrain(self, teacher: Outputs) -> Tensor:
        """The divergence of the auxiliary teacher's deepest layer from the teacher's."""
        if self.auxiliary is None:
            raise ValueError("InformationFlow without `auxiliary` has no parts that are trained before use.")
        self.auxiliary.train()
        mine = self.auxiliary(_images(teacher))
        return _divergence(self._embedded(mine.features[-1]), self._embedded(teacher.features[-1]))

    def stages(self) -> tuple[Stage, ...]:
        """The training of the auxiliary teacher, if there is one, then the transfer."""
        if self.auxiliary is None:
            return super().stages()
        return (
            Stage("auxiliary teacher", 4 / 9, trains="parts", uses="preparation"),
            Stage("transfer", 5 / 9, trains="student"),
        )

    def _auxiliary(self, outputs: Outputs) -> Outputs:
        assert self.auxiliary is not None
        self.auxiliary.eval()
        with torch.no_grad():
            auxiliary: Outputs = self.auxiliary(_images(outputs))
        return auxiliary.map(widen)

    def _embedded(self, feature: Tensor) -> Tensor:
        if self.embedding == "flat" or feature.dim() == 2:
            return feature.flatten(1)
        return feature.mean((2, 3)) if feature.dim() == 4 else feature.mean(1)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    if len(student) < 2:
        return connected_zero(student)
    cosine = _jeffreys(*(_log_cosine(e) for e in (student, teacher)))
    return cosine + _jeffreys(*(_log_student_t(e) for e in (student, teacher)))


def _jeffreys(log_q: Tensor, log_p: Tensor) -> Tensor:
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).mean()


def _log_cosine(rows: Tensor) -> Tensor:
    rows = safe_normalize(rows)
    kernel = ((rows @ rows.T).clamp(-1, 1) + 1) / 2
    return (kernel / kernel.sum(1, keepdim=True) + EPSILON).log()


def _log_student_t(rows: Tensor) -> Tensor:
    other = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)  # the diagonal is 0, not a rounding error
    return (-safe_sqrt(squared_distances(rows) * other).log1p()).log_softmax(1)


def _images(outputs: Outputs) -> Tensor:
    if outputs.images is None:
        raise ValueError(
            "the auxiliary teacher needs images, but these outputs have none. Use a network that passes them on in "
            "Outputs.images, or auxiliary=None."
        )
    return outputs.images
