"""Factor transfer (FT)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import FeatureLoss, Stage
from kdnas.losses.feature._connectors import LeadingConvolution, paired_maps, part
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map, safe_normalize, same_positions
from kdnas.outputs import Moment, Outputs


@final
class FactorTransfer(FeatureLoss):
    r"""Distance between the unit-length factors of the student's and the teacher's map (FT).

    A paraphraser, a convolutional autoencoder of the teacher's map, gives $F_t = E(t)$ in $k C_t$ channels; a
    translator of the student's map gives $F_s$. Flattened and of length 1 per sample, summed over the pairs,
    $L = \frac{1}{B n} \sum_b |\hat F_{s,b} - \hat F_{t,b}|_p^p$ with $n$ numbers in a factor.

    Stages: `paraphraser` (`preparation`: the reconstruction $|D(E(t)) - t|$ of the teacher's maps, without labels and
    without a student), then `student` (this loss with the other terms; the paraphraser is fixed). `staged=False`
    adds the reconstruction to the loss instead, and both learn together.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`; the larger factor is
    average-pooled. A zero factor stays 0. Divisor: every element of a factor.

    Default weight 500: the authors' code (RepDistiller 200, torchdistill 1000).

    Args:
        taps: how stages are paired, as in `StagePairs`; default ((-1, -1),): the last of each, as in the paper.
        weights: one weight per pair; default None: 1 each.
        rate: $k$, the factor's channels as a share of the teacher's, above 0; default 0.5.
        p: the norm, 1 or 2; default 1.
        reconstruction: `l2`, the paper's mean squared error, or `l1`, the mean absolute error of the authors' code;
            default `l2`.
        staged: train the paraphraser first; default True.

    Raises:
        ValueError: a rate that is not positive, another p, an unknown reconstruction; a loss that was not prepared.

    Reference: Kim, Park, Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
        equations 1 to 3; Jangho-Kim/Factor-Transfer-pytorch.
    Differs: reconstruction by the paper's squared error, where the code has the absolute one. The translator has no
        batch normalisation. Factors of unequal size are pooled, where the code needs equal ones.
    """

    weight: ClassVar[float] = 500.0
    ranges: ClassVar[Mapping[str, str]] = {"rate": "(0, inf)"}
    golden: ClassVar[float] = 0.06309861883440085

    def __init__(
        self,
        *,
        taps: str | Pairs = ((-1, -1),),
        weights: tuple[float, ...] | None = None,
        rate: float = 0.5,
        p: Literal[1, 2] = 1,
        reconstruction: Literal["l2", "l1"] = "l2",
        staged: bool = True,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.rate, self.p, self.reconstruction, self.staged = rate, p, reconstruction, staged
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build a paraphraser and a translator for each pair."""
        super().build(student, teacher, elastic=elastic)
        self.encoders, self.decoders, self.translators = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s, t in paired_maps(self.taps, student, teacher):
            own, wide = s.shape[1], t.shape[1]
            factor = max(1, round(self.rate * wide))
            encoder = _leaky(*(nn.Conv2d(a, b, 3, padding=1) for a, b in _widths(wide, factor)))
            decoder = _leaky(*(nn.ConvTranspose2d(b, a, 3, padding=1) for a, b in reversed(_widths(wide, factor))))
            translator = _leaky(*(LeadingConvolution(a, b, 3, padding=1) for a, b in _widths(own, factor)))
            self.encoders.append(encoder.to(s.device))
            self.decoders.append(decoder.to(s.device))
            self.translators.append(translator.to(s.device))

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The factors' difference; with `staged=False` plus the paraphraser's reconstruction error."""
        value = super().compute(student, teacher, labels, at)
        return value if self.staged else value + self.pretrain(teacher)

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The difference of one pair's factors."""
        with torch.no_grad():
            theirs = part(self.encoders, pair)(as_map(teacher))
        ours, theirs = same_positions(part(self.translators, pair)(as_map(student)), theirs)
        difference = safe_normalize(ours.flatten(1)) - safe_normalize(theirs.flatten(1))
        return difference.abs().pow(self.p).mean()

    def pretrain(self, teacher: Outputs) -> Tensor:
        """The paraphrasers' reconstruction error, a mean over elements, summed over the pairs."""
        part(self.encoders, 0)  # raises unless prepared
        errors = []
        for index, (_, j) in enumerate(self.taps.pairs):
            t = as_map(teacher.maps[j])
            error = self.decoders[index](self.encoders[index](t)) - t
            errors.append(error.square().mean() if self.reconstruction == "l2" else error.abs().mean())
        return torch.stack(errors).sum()

    def stages(self) -> tuple[Stage, ...]:
        """`paraphraser` for a tenth of the steps, then `student`."""
        if not self.staged:
            return super().stages()
        return (Stage("paraphraser", 0.1, trains="parts", uses="preparation"), Stage("student", 0.9))


def _widths(channels: int, factor: int) -> list[tuple[int, int]]:
    return [(channels, channels), (channels, factor), (factor, factor)]


def _leaky(*convolutions: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(layer for c in convolutions for layer in (c, nn.LeakyReLU(0.1))))
