"""Cross-layer distillation with semantic calibration (SemCKD)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss
from kdnas.losses.feature._connectors import BatchNorm, LeadingConvolution, Projection
from kdnas.numerics import as_map, safe_normalize, same_positions
from kdnas.outputs import Moment, Outputs

# The length of queries and keys: the authors' at a batch of 64.
DIMS = 16


@final
class CrossLayer(Loss):
    r"""Squared differences between all pairs of layers, weighted by a learnt attention (SemCKD).

    Student layer $l$ of sample $b$ has a descriptor and from it, by an MLP of two layers, a query $q_{bl}$ of length 1;
    teacher layer $k$ a key $k_{bk}$. With $a_{blk} = \mathrm{softmax}_k(\langle q_{bl}, k_{bk} \rangle / T)$ and a
    regressor $\phi_{lk}$ (1x1, 3x3, 1x1 convolutions, normalised, ReLU between),
    $L = \frac{1}{B L_s} \sum_{b,l,k} a_{blk}\,\mathrm{mean}_{chw} (\phi_{lk}(s_l) - t_k)^2$.

    Shapes: maps of any channels and size; a pair is average-pooled to the smaller height and width. Divisor: batch,
    student layers, elements of a map; the attention sums to 1 over teacher layers. Regressors: student layers *
    teacher layers of them.

    Default weight 400: the authors' code on CIFAR-100 (50 on ImageNet).

    Args:
        descriptor: `pooled`, the channels averaged over positions, for any batch size; `gram_row`, the paper's row of
            the batch's Gram matrix, which depends on the batch's size and order. Default `pooled`.
        batch_size: for `gram_row`, the number of images per step; default None.
        temperature: $T$, above 0; default 1, at which no layer outweighs another by more than e^2, since queries and
            keys have length 1.

    Raises:
        ValueError: an unknown descriptor, `gram_row` without its batch size or with another batch, a temperature that
            is not positive; a loss that was not prepared.

    Reference: Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021, equations 4 to 7;
        DefangChen/SemCKD models/util.py.
    Differs: the default descriptor is pooled, since the paper's needs full batches of one size. `gram_row` is the
        code's, without normalisation.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    weight: ClassVar[float] = 400.0
    ranges: ClassVar[Mapping[str, str]] = {"batch_size": "[1, inf)", "temperature": "(0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 0.47408230448307453

    def __init__(
        self,
        *,
        descriptor: Literal["pooled", "gram_row"] = "pooled",
        batch_size: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if (descriptor == "gram_row") != (batch_size is not None):
            raise ValueError(f"`batch_size` must be set exactly for gram_row, got {batch_size} for {descriptor}.")
        self.descriptor, self.batch_size, self.temperature = descriptor, batch_size, temperature
        self.queries, self.keys, self.regressors = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build an MLP per layer and a regressor per pair of layers."""
        ours, theirs = ([as_map(f) for f in outputs.features] for outputs in (student, teacher))
        self.queries, self.keys = (nn.ModuleList(self._embedder(f) for f in maps) for maps in (ours, theirs))
        self.regressors = nn.ModuleList(_regressor(s.shape[1], t.shape[1]) for s in ours for t in theirs)
        self.to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted differences, averaged over batch and student layers."""
        shares = self.attention(student, teacher)
        total = shares.new_zeros(len(shares))
        for l, s in enumerate(student.features):  # noqa: E741
            for k, t in enumerate(teacher.features):
                ours, theirs = same_positions(as_map(s), as_map(t))
                ours = self.regressors[l * len(self.keys) + k](ours)
                total = total + shares[:, l, k] * (ours - theirs).square().mean((1, 2, 3))
        return total.mean() / len(self.queries)

    def attention(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The weights of the teacher layers for each student layer, `[batch, student layers, teacher layers]`."""
        if (len(self.queries), len(self.keys)) != (len(student.features), len(teacher.features)):
            raise ValueError(
                f"this loss was prepared for {len(self.queries)} student and {len(self.keys)} teacher layers, got "
                f"{len(student.features)} and {len(teacher.features)}. Call loss.prepare(student, teacher) first."
            )
        query, key = (
            torch.stack([self._embed(f, mlp) for f, mlp in zip(features, mlps, strict=True)], 1)
            for features, mlps in ((student.features, self.queries), (teacher.features, self.keys))
        )
        return (query @ key.transpose(1, 2) / self.temperature).softmax(2)

    def _embedder(self, feature: Tensor) -> nn.Module:
        inputs, dims = feature.shape[1], DIMS
        if self.batch_size is not None:
            inputs, dims = self.batch_size, max(1, self.batch_size // 4)
        return nn.Sequential(LeadingConvolution(inputs, 2 * dims, 1), nn.ReLU(), nn.Conv2d(2 * dims, dims, 1))

    def _embed(self, feature: Tensor, mlp: nn.Module) -> Tensor:
        feature = as_map(feature)
        if self.batch_size is None:
            descriptor = feature.mean((2, 3))
        elif len(feature) != self.batch_size:
            raise ValueError(
                f"descriptor='gram_row' needs batches of batch_size={self.batch_size} samples, got {len(feature)}. "
                "Drop the last, smaller batch, or use descriptor='pooled'."
            )
        else:
            descriptor = feature.flatten(1) @ feature.flatten(1).T
        return safe_normalize(mlp(descriptor[:, :, None, None]).flatten(1))


def _regressor(student_channels: int, teacher_channels: int) -> nn.Sequential:
    wide = 2 * teacher_channels
    return nn.Sequential(
        Projection(student_channels, wide),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding=1, bias=False),
        BatchNorm(wide),
        nn.ReLU(),
        nn.Conv2d(wide, teacher_channels, 1, bias=False),
    )
