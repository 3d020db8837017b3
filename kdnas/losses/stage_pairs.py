"""Pairs of student and teacher stages, and the adapters between them."""

import math
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.numerics import as_map, same_positions
from kdnas.outputs import Outputs
from kdnas.similarity import dissimilarity, rdm_similarity

Alignment = Literal["nothing", "positions", "channels"]
Pairs = tuple[tuple[int, int], ...]


@final
class Adapter(nn.Module):
    """A 1x1 convolution from a student's channels to a teacher's, also for every narrower subnet.

    A student with fewer channels than the widest uses the leading columns of the weight, as the supernet's layers do.
    Initialised as the identity where the channels are equal, else orthogonal.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_channels, student_channels))
        if student_channels == teacher_channels:
            nn.init.eye_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, student channels, h, w]` to `[batch, teacher channels, h, w]`."""
        if x.shape[1] > self.weight.shape[1]:
            raise ValueError(
                f"this adapter was prepared for at most {self.weight.shape[1]} student channels, got {x.shape[1]}. "
                "Prepare the loss with the outputs of the largest subnet."
            )
        return F.conv2d(x, self.weight[:, : x.shape[1], None, None])


class StagePair(NamedTuple):
    """A pair of stages, a line of the table of `kdnas taps`; the shapes are without the batch."""

    student: int
    teacher: int
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    adapter: str
    parameters: int


@final
class StagePairs(nn.Module):
    """Pairs the stages of two networks and aligns each pair.

    Args:
        pairs: `resolution` (default): each student stage with the deepest teacher stage of the nearest resolution;
            student stages with the same nearest teacher stages are spread over them evenly, last with last. `rdm`: with
            the teacher stage of the most similar dissimilarity matrix. `order`: first with first, for equal numbers of
            stages. `classified`: the one pair of the maps that the two classifiers read, see below. Or explicit pairs
            `((student stage, teacher stage), ...)`; negative indices count from the last stage.
        alignment: `nothing` (default); `positions`: both are average-pooled to the smaller height and width;
            `channels`: in addition an `Adapter` maps the student's channels to the teacher's.

    The map that is classified is that of the last stage, unless a head has layers of its own before the classifier of
    every position; then it is `Outputs.classified`, and its index is the number of stages.
    """

    def __init__(self, *, pairs: str | Pairs = "resolution", alignment: Alignment = "nothing") -> None:
        super().__init__()
        if isinstance(pairs, str) and pairs not in ("resolution", "rdm", "order", "classified"):
            raise ValueError(f"`taps` must be resolution, rdm, order, classified or explicit pairs, got {pairs!r}.")
        self.by, self.alignment = pairs, alignment
        self.pairs: Pairs = ()
        self.adapters = nn.ModuleDict()

    def prepare(self, student: Outputs, teacher: Outputs, elastic: bool = False) -> tuple[StagePair, ...]:
        """Choose the pairs and build their adapters.

        Args:
            student: outputs of the largest student.
            teacher: outputs of the teacher on the same images.
            elastic: the student's widths change from subnet to subnet, so an adapter is needed for equal widths too.

        Returns:
            The pairs with their shapes and adapters.

        Raises:
            ValueError: a stage does not exist, or a pair cannot be matched; the message has both shapes.
        """
        self.pairs = self._choose(student, teacher)
        self.adapters.clear()
        table = []
        for index, (i, j) in enumerate(self.pairs):
            s, t = student.maps[i], teacher.maps[j]
            adapter = "none"
            if self.alignment != "nothing":
                try:
                    s_map, t_map = _maps(s, t)
                except ValueError as error:
                    raise ValueError(
                        f"student stage {i} {tuple(s.shape)} and teacher stage {j} {tuple(t.shape)} "
                        f"cannot be matched: {error}"
                    ) from error
                if s.dim() != t.dim():
                    adapter = "tokens to map"
                if s_map.shape[2:] != t_map.shape[2:]:
                    adapter = "pool"
                if self.alignment == "channels" and (elastic or s_map.shape[1] != t_map.shape[1]):
                    self.adapters[str(index)] = Adapter(s_map.shape[1], t_map.shape[1]).to(s.device)
                    adapter = "conv1x1" if adapter == "none" else f"{adapter} + conv1x1"
            count = sum(p.numel() for p in self.adapters[str(index)].parameters()) if str(index) in self.adapters else 0
            table.append(StagePair(i, j, tuple(s.shape[1:]), tuple(t.shape[1:]), adapter, count))
        return tuple(table)

    def forward(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """The aligned pairs, student first."""
        # Losses without learnable parts may be called unprepared.
        pairs = self.pairs or self._choose(student, teacher)
        for index, maps, network in (
            (max(i for i, _ in pairs), student.maps, "student"),
            (max(j for _, j in pairs), teacher.maps, "teacher"),
        ):
            if index >= len(maps):
                raise ValueError(
                    f"the pairs {pairs} name stage {index} of the {network}, which has {len(maps)} now. Prepare "
                    "the loss with outputs of the same stages."
                )
        aligned = []
        for index, (i, j) in enumerate(pairs):
            s, t = student.maps[i], teacher.maps[j]
            if self.alignment != "nothing":
                s, t = same_positions(*_maps(s, t))
                if str(index) in self.adapters:
                    s = self.adapters[str(index)](s)
                elif self.alignment == "channels" and s.shape[1] != t.shape[1]:
                    raise ValueError(
                        f"student stage {i} {tuple(student.maps[i].shape)} and teacher stage {j} "
                        f"{tuple(teacher.maps[j].shape)} differ in channels, but there is no adapter. Call "
                        "loss.prepare(student, teacher) with the outputs of the largest student before the optimiser "
                        "is created, with elastic=True for a supernet."
                    )
            aligned.append((s, t))
        return aligned

    def get_extra_state(self) -> Tensor:
        """The pairs, `[pairs, 2]`: a rule may choose others on another day, `rdm` on a trained student for example."""
        return torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the pairs that `get_extra_state` gave."""
        self.pairs = tuple((int(i), int(j)) for i, j in state.tolist())

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        state_dict.setdefault(
            f"{prefix}_extra_state", self.get_extra_state()
        )  # checkpoints of before pairs were stored
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _choose(self, ours: Outputs, theirs: Outputs) -> Pairs:
        student, teacher = ours.features, theirs.features
        if not student or not teacher:
            raise ValueError(
                f"both networks need stages to pair, got {len(student)} of the student, {len(teacher)} of the teacher."
            )
        if not isinstance(self.by, str):
            return tuple((_index(i, ours, "student"), _index(j, theirs, "teacher")) for i, j in self.by)
        if self.by == "classified":
            return ((len(ours.maps) - 1, len(theirs.maps) - 1),)
        if self.by == "order":
            if len(student) != len(teacher):
                shapes = [[tuple(f.shape[1:]) for f in side] for side in (student, teacher)]
                raise ValueError(
                    f"taps='order' needs equal numbers of stages, got student {shapes[0]} and teacher {shapes[1]}."
                )
            return tuple((i, i) for i in range(len(student)))
        if self.by == "rdm":
            matrices = [dissimilarity(t.detach()) for t in teacher]
            return tuple(
                (i, max(range(len(teacher)), key=lambda j: float(rdm_similarity(matrix, matrices[j]))))
                for i, matrix in enumerate(dissimilarity(s.detach()) for s in student)
            )
        return _by_resolution([_positions(s) for s in student], [_positions(t) for t in teacher])


def _by_resolution(student: list[int], teacher: list[int]) -> Pairs:
    nearest = []
    for size in student:
        distances = [abs(math.log(size / t)) for t in teacher]
        nearest.append([j for j, d in enumerate(distances) if math.isclose(d, min(distances), abs_tol=1e-9)])
    pairs = []
    for i, group in enumerate(nearest):
        peers = [k for k, other in enumerate(nearest) if other == group]
        # The j-th of n student stages gets the teacher stage at the same depth of its group; last with last.
        place = (peers.index(i) + 1) * len(group) / len(peers)
        pairs.append((i, group[math.ceil(place) - 1]))
    return tuple(pairs)


def _maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as maps; tokens get the aspect ratio of the map they are compared with."""
    map_like = next((f for f in (student, teacher) if f.dim() == 4), None)
    aspect = 1.0 if map_like is None else map_like.shape[2] / map_like.shape[3]
    return as_map(student, aspect), as_map(teacher, aspect)


def _positions(feature: Tensor) -> int:
    return max(1, feature[0].numel() // (feature.shape[2] if feature.dim() == 3 else feature.shape[1]))


def _index(index: int, outputs: Outputs, network: str) -> int:
    count = len(outputs.features)
    if not -count <= index < len(outputs.maps):
        raise ValueError(f"`taps` must name {network} stages 0 to {len(outputs.maps) - 1}, got {index}.")
    return index + count if index < 0 else index
