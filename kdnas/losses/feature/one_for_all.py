"""Distillation across architectures: every student stage has an exit to the teacher's logits (OFA-KD)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss
from kdnas.losses.feature._connectors import Projection, part
from kdnas.numerics import as_map
from kdnas.outputs import Moment, Outputs


@final
class OneForAll(Loss):
    r"""Soft cross-entropy of the student's logits and of an exit per stage, with a stronger target class (OFA-KD).

    Feature maps of different architectures do not lie in one space, logits do. An exit of stage $l$ is a 1x1
    convolution with normalisation and ReLU, the mean over positions and a linear layer. With $p^l$ the softmax of its
    logits over $T$, $p^0$ that of the student's own, $q = \mathrm{softmax}(z_t / T)$ of the teacher, and $m_c = 1$ for
    the label, else 0,

    $L = \sum_l \frac{1}{B} \sum_b \sum_c -[(q_{bc} + m_{bc})^\gamma - m_{bc}] \log p^l_{bc}$.

    $\gamma = 1$ is the soft cross-entropy with the teacher; a larger one adds the more to the label the surer the
    teacher is of it, and takes from the other classes.

    Shapes: logits `[batch, classes]`, labels `[batch]`, student features of any sizes; of the teacher the logits alone
    are read. Divisor: batch; classes and exits are summed. Does not reach 0. Undefined for dense logits.

    Learnable parts: the exits. Default weight 1, beside the labels at 1: the authors' code.

    Args:
        gamma: $\gamma$, at least 1; default 1.5, the authors' for ImageNet; 1 is that of their code and
            for CIFAR-100.
        temperature: $T$, above 0; default 1.
        width: channels of an exit's convolution, at least 1; default 128.
        stages: the student's stages with an exit, negative indices count from the end; default `all`.
        final: whether the student's own logits are taught too; default True.

    Raises:
        ValueError: an option out of range, a stage that does not exist, dense logits; a loss that was not prepared.

    Reference: Hao, Guo, Han, Hu, Xu, Wang, One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
        Distillation, NeurIPS 2023 (arXiv 2310.19444), section 3.3.
    Differs: one kind of exit for all architectures; the authors' are depthwise convolutions for maps and a block of
        attention for tokens. One $\gamma$ for all exits. Logarithms of the softmax are formed directly.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels", "features")
    teacher_needs: ClassVar[tuple[str, ...] | None] = ("logits",)
    ranges: ClassVar[Mapping[str, str]] = {"gamma": "[1, inf)", "temperature": "(0, inf)", "width": "[1, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 5.527683161982335

    def __init__(
        self,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        width: int = 128,
        stages: str | tuple[int, ...] = "all",
        final: bool = True,
    ) -> None:
        super().__init__()
        if (isinstance(stages, str) and stages != "all") or not stages:
            raise ValueError(f"`stages` must be 'all' or a tuple of stages, got {stages!r}.")
        self.gamma, self.temperature, self.width, self.final = gamma, temperature, width, final
        self.rule: str | tuple[int, ...] = stages
        self.exits = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build an exit per stage."""
        if student.logits.dim() != 2:
            raise ValueError(
                f"OneForAll needs logits [batch, classes], got {tuple(student.logits.shape)}. Use PixelWise for maps."
            )
        classes = teacher.logits.shape[1]
        maps = [as_map(student.features[stage]) for stage in self._exit_stages(student)]
        self.exits = nn.ModuleList(_exit(x.shape[1], self.width, classes) for x in maps).to(maps[0].device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The sum over the exits and the student's own logits."""
        target = (teacher.logits / self.temperature).softmax(1)
        is_label = F.one_hot(labels, target.shape[1]).to(target.dtype)
        share = (target + is_label).pow(self.gamma) - is_label
        stages = self._exit_stages(student)
        logits = [part(self.exits, i)(as_map(student.features[stage])) for i, stage in enumerate(stages)]
        if self.final:
            logits.append(student.logits)
        values = [-(share * (z / self.temperature).log_softmax(1)).sum(1).mean() for z in logits]
        return torch.stack(values).sum()

    def _exit_stages(self, student: Outputs) -> tuple[int, ...]:
        count = len(student.features)
        if isinstance(self.rule, str):
            return tuple(range(count))
        for stage in self.rule:
            if not -count <= stage < count:
                raise ValueError(f"`stages` must name student stages 0 to {count - 1}, got {stage}.")
        return self.rule


def _exit(channels: int, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        Projection(channels, width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )
