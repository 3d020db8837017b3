"""Differentiable feature aggregation: a learnt weighted sum of a stage's teacher layers as a hint (DFA)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss, Stage
from kdnas.losses.stage_pairs import Adapter
from kdnas.numerics import as_map
from kdnas.outputs import Moment, Outputs
from kdnas.tasks.segmentation import at_labels

Groups = tuple[tuple[int, tuple[int, ...]], ...]


@final
class Aggregation(Loss):
    r"""Squared distance between each student stage and a learnt weighted sum of teacher layers (DFA).

    Student stage $i$ has a group of teacher maps $T_{i1}, ..., T_{in}$; $A_i = \sum_j \alpha_{ij} T_{ij}$ with
    $\alpha_i = \mathrm{softmax}(\beta_i)$, uniform at first, and connectors, 1x1 convolutions, $F_s$ to the teacher's
    channels and $F_t$ to the student's.

    - Without `at.remaining`, the distillation of the second stage: $L = \sum_i \frac{1}{B C H W} |F_s(S_i) - A_i|^2$,
      $\beta$ fixed.
    - With `at.remaining`, the bridge loss of the search: $L = \sum_i \gamma_{ST} \frac{1}{B C H W} |F_s(S_i) - A_i|^2 +
      \gamma_{TS}\,\mathrm{CE}(\mathrm{rest}(i, F_t(A_i)), y)$, with a gradient to $\beta$. The first term alone moves
      $\beta$ to the shallow layers that the student already matches; the second prefers layers that help to classify.

    `at.remaining(i, map)`, the $\mathrm{rest}$ of the formula, gives the logits of the student's layers after stage $i$
    for `map` `[batch, student channels, h, w]` in place of stage $i$'s output. The distiller, which knows the student,
    passes it during the stage `search`.

    Stages: `search`, then `distil`. `staged=False` is the second alone, with the current $\beta$.

    Shapes: the teacher maps of a group have equal channels and are average-pooled to the smallest size of group and
    student. Divisor: every element of a map, summed over groups; cross-entropy by the batch (and positions).

    Default weight 1: the paper's is unknown.

    Args:
        groups: `((student stage, (teacher stage, ...)), ...)`; negative indices count from the end. Default
            `resolution`: each teacher stage belongs to the deepest student stage of the nearest resolution, and a
            group keeps the teacher stages with the channels of its deepest.
        student_to_teacher: $\gamma_{ST}$; default 1.
        teacher_to_student: $\gamma_{TS}$; default 1.
        staged: begin with the search; default True.

    Raises:
        ValueError: groups of another form, stages that do not exist, unequal channels in a group; a loss that was not
            prepared.

    Reference: Guan et al., Differentiable Feature Aggregation Search for Knowledge Distillation, ECCV 2020, section 3.
    Differs: squared differences are means. The proportions are learnt on the training batches; the paper's bi-level
        search learns them on validation batches, as the distiller `aggregation` does. The authors published no code;
        the constants are ours.
    """

    needs: ClassVar[tuple[str, ...]] = ("features", "labels")
    ranges: ClassVar[Mapping[str, str]] = {"student_to_teacher": "[0, inf)", "teacher_to_student": "[0, inf)"}
    golden: ClassVar[float] = 1.5146041251303313

    def __init__(
        self,
        *,
        groups: str | Groups = "resolution",
        student_to_teacher: float = 1.0,
        teacher_to_student: float = 1.0,
        staged: bool = True,
    ) -> None:
        super().__init__()
        if (isinstance(groups, str) and groups != "resolution") or not groups:
            raise ValueError(
                f"`groups` must be resolution or ((student stage, (teacher stage, ...)), ...), got {groups!r}."
            )
        self.rule, self.staged = groups, staged
        self.student_to_teacher, self.teacher_to_student = student_to_teacher, teacher_to_student
        self.groups: Groups = ()
        self.betas = nn.ParameterList()
        self.to_teacher, self.to_student = nn.ModuleList(), nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Group the teacher's stages, and build the proportions and connectors."""
        self.groups = self._resolve_groups(student.features, teacher.features)
        self.betas = nn.ParameterList()
        self.to_teacher, self.to_student = nn.ModuleList(), nn.ModuleList()
        for i, members in self.groups:
            own, wide = as_map(student.features[i]).shape[1], as_map(teacher.features[members[0]]).shape[1]
            self.betas.append(nn.Parameter(torch.zeros(len(members))))
            self.to_teacher.append(Adapter(own, wide))
            self.to_student.append(Adapter(wide, own))
        self.to(student.logits.device)

    def alpha(self) -> tuple[Tensor, ...]:
        """The proportions of each group; each sums to 1."""
        return tuple(beta.softmax(0) for beta in self.betas)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The bridge loss where `at` has the remaining layers, otherwise the hint with fixed proportions."""
        if not self.groups:
            raise ValueError("Aggregation is not prepared. Call loss.prepare(student, teacher) first.")
        values = []
        for index, ((i, members), alpha) in enumerate(zip(self.groups, self.alpha(), strict=True)):
            s = as_map(student.features[i])
            if at.remaining is None:
                alpha = alpha.detach()
            maps = [as_map(teacher.features[j]) for j in members]
            size = (min(f.shape[2] for f in (s, *maps)), min(f.shape[3] for f in (s, *maps)))
            mixed = torch.stack([a * _resize(t, size) for a, t in zip(alpha, maps, strict=True)]).sum(0)
            hint = (self.to_teacher[index](_resize(s, size)) - mixed).square().mean()
            if at.remaining is None:
                values.append(hint)
                continue
            # A narrower subnet takes the leading channels, as its own layers would give.
            substitute = self.to_student[index](_resize(mixed, (s.shape[2], s.shape[3])))[:, : s.shape[1]]
            logits = at.remaining(i, substitute).to(substitute.dtype)
            bridge = F.cross_entropy(at_labels(logits, labels) if logits.dim() == 4 else logits, labels)
            values.append(self.student_to_teacher * hint + self.teacher_to_student * bridge)
        return torch.stack(values).sum()

    def stages(self) -> tuple[Stage, ...]:
        """`search` for a third of the steps, then `distil`."""
        if not self.staged:
            return super().stages()
        return (Stage("search", 1 / 3, through=True), Stage("distil", 2 / 3))

    def _resolve_groups(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Groups:
        if isinstance(self.rule, str):
            return _by_resolution([as_map(s) for s in student], [as_map(t) for t in teacher])
        groups = []
        for i, members in self.rule:
            for index, stages, network in ((i, student, "student"), *((j, teacher, "teacher") for j in members)):
                if not -len(stages) <= index < len(stages):
                    raise ValueError(f"`groups` must name {network} stages 0 to {len(stages) - 1}, got {index}.")
            shapes = [tuple(as_map(teacher[j]).shape[1:]) for j in members]
            if len({shape[0] for shape in shapes}) != 1:
                raise ValueError(
                    f"the teacher maps of a group must have equal channels, since they are summed, got {shapes} for "
                    f"student stage {i} {tuple(student[i].shape[1:])}. Put them into separate groups."
                )
            groups.append((i % len(student), tuple(j % len(teacher) for j in members)))
        return tuple(groups)


def _by_resolution(student: list[Tensor], teacher: list[Tensor]) -> Groups:
    groups: dict[int, list[int]] = {}
    for j, t in enumerate(teacher):
        # Of equally near student stages the deepest.
        nearest = min(reversed(range(len(student))), key=lambda i: abs(_log_size(student[i]) - _log_size(t)))
        groups.setdefault(nearest, []).append(j)
    return tuple(
        (i, tuple(j for j in members if teacher[j].shape[1] == teacher[members[-1]].shape[1]))
        for i, members in sorted(groups.items())
    )


def _log_size(feature: Tensor) -> float:
    return torch.tensor(feature.shape[2:]).double().prod().log().item()


def _resize(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)
