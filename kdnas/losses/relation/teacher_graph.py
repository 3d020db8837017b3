"""Distillation from a graph of teachers: class distributions, and features fused for every pair of teachers."""

import random
from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from kdnas.losses.base import Loss
from kdnas.losses.stage_pairs import Adapter
from kdnas.numerics import safe_normalize, squared_distances
from kdnas.outputs import Moment, Outputs, embedding
from kdnas.values import Seed

Distance = Literal["total_variation", "ordered"]
Fusion = Literal["compact_bilinear", "bilinear", "concatenation"]


@final
class TeacherGraph(Loss):
    r"""Matches several teachers' class distributions and the fused features of every pair of teachers.

    Logits graph, with $p_m = \mathrm{softmax}(z_m / T)$ of teacher $m$ and $p_s$ of the student:
    $L_G = T \frac1B \sum_b \sum_m w_{bm} \, \mathrm{EM}(p_{bm}, p_{bs})$. EM is the earth mover's distance,
    `total_variation`: every two classes 1 apart, $\frac12 \sum_c |p_c - p'_c|$; `ordered`: classes on a line,
    $\sum_c |F_c - F'_c|$ of the cumulative distributions. $T$ keeps the gradient's size, which falls as $1 / T$.

    Representation graph, with $f_m$ the teachers' pooled last maps:
    $L_R = \sum_{j<k} w_{jk} \, \mathrm{MMD}^2(F_{jk}, s_{jk})$ over the batch, $F_{jk}$ the fused features (signed
    square root, unit length) and $s_{jk}$ a learnt projection of the student's (unit length). The kernel is the mean of
    Gaussians of variance $(\frac14, \frac12, 1, 2, 4) \sigma^2$, $\sigma^2$ the mean squared distance between the
    $F_{jk}$ of the batch (1 where they are all equal).

    $L = a L_G + b L_R$. Edge weights are `equal`, `confidence` ($w_{bm} = \mathrm{softmax}_m(-H(p_{bm}))$, $H$ the
    entropy) or fixed numbers; $w_{jk}$ is the batch mean of $w_j w_k$, and both kinds sum to 1.

    Several teachers: `Outputs.members` of an ensemble. A single network is the only node: its distribution, and its
    features fused with themselves.

    Shapes: logits `[batch, classes]`, or maps, whose positions count as samples; features of any sizes. Divisor: batch
    ($L_G$), pairs of samples with the diagonal ($L_R$).

    Default weight 1: no published value.

    Args:
        distance: between class distributions: `total_variation` or `ordered`; default `total_variation`.
        fusion: `compact_bilinear` (a sketch of the outer product), `bilinear` (the outer product) or `concatenation`;
            default `compact_bilinear`.
        edges: weights of the teachers: `equal`, `confidence`, or one number per teacher; default `equal`.
        temperature: $T$, above 0; default 4.
        logits_weight: $a$; default 1.
        representation_weight: $b$; default 1.
        dims: length of the compact bilinear sketch; default 512.
        seed: random seed of the sketch's hashes; default 0.

    Raises:
        ValueError: an unknown option, or a number of weights other than the number of teachers.

    Reference: Zhang, Peng, Better and Faster: Knowledge Transfer from Multiple Self-supervised Learning Tasks via Graph
        Distillation for Video Classification, IJCAI 2018, arXiv 1804.10069: earth mover's distance on the logits graph,
        compact bilinear pooling and MMD on the representation graph. Sketch: Gao et al., Compact Bilinear
        Pooling, CVPR 2016, algorithm 2.
    Differs: the authors' code is not public; ground distance, bandwidths and the order of the fusion are ours. Edge
        weights are not learnt: from this term alone they would collapse onto the teacher nearest to the student.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "features")
    ranges: ClassVar[Mapping[str, str]] = {
        "edges": "[0, inf)",
        "temperature": "(0, inf)",
        "logits_weight": "[0, inf)",
        "representation_weight": "[0, inf)",
        "dims": "[1, inf)",
        "seed": "[0, inf)",
    }
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 1.2523684568226288

    def __init__(
        self,
        *,
        distance: Distance = "total_variation",
        fusion: Fusion = "compact_bilinear",
        edges: Literal["equal", "confidence"] | tuple[float, ...] = "equal",
        temperature: float = 4.0,
        logits_weight: float = 1.0,
        representation_weight: float = 1.0,
        dims: int = 512,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        if isinstance(edges, tuple) and not (min(edges, default=-1) >= 0 and sum(edges) > 0):
            raise ValueError(f"`edges` must not be negative nor all 0, got {edges}.")
        self.distance, self.fusion, self.edges, self.temperature = distance, fusion, edges, temperature
        self.logits_weight, self.representation_weight = logits_weight, representation_weight
        self.dims, self.seed = dims, seed
        self.projections = nn.ModuleList()
        self.sketches = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build the projections of the student, and the sketches' hashes."""
        members = teacher.members or (teacher,)
        for member in members:
            self.check(student, member)
        if isinstance(self.edges, tuple) and len(self.edges) != len(members):
            raise ValueError(
                f"`edges` must have one weight per teacher: {len(members)} teachers, got {len(self.edges)}."
            )
        features = [embedding(member) for member in members]
        self.sketches = nn.ModuleList(
            _Sketch(f.shape[1], self.dims, f"{self.seed}/{index}").to(f.device)
            for index, f in enumerate(features + features if len(features) == 1 else features)
        )
        width = embedding(student).shape[1]
        self.projections = nn.ModuleList(
            Adapter(width, fused.shape[1]).to(fused.device) for fused in self._fuse(features)
        )

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The two graphs' weighted sum."""
        members = teacher.members or (teacher,)
        if not len(self.projections):
            raise ValueError(
                "TeacherGraph is not prepared. Call loss.prepare(student, teacher) with the outputs of the largest "
                "student before the optimiser is created."
            )
        mine, *theirs = (
            (o.logits / self.temperature).movedim(1, -1).flatten(0, -2).log_softmax(1) for o in (student, *members)
        )
        logs = torch.stack(theirs, 1)
        weights = self._weights(logs)
        distances = self._distance(logs.exp(), mine.exp()[:, None])
        of_logits = self.temperature * (weights * distances).sum(1).mean()

        node = embedding(student)
        fused = self._fuse([embedding(m) for m in members])
        edges = [(weights[:, j] * weights[:, k]).mean() for j, k in _pairs(len(members))]
        of_features = [
            edge * _mmd(safe_normalize(projection(node[:, :, None, None]).flatten(1)), target)
            for edge, projection, target in zip(edges, self.projections, fused, strict=True)
        ]
        total = torch.stack(edges).sum()  # 0 where only one of several teachers has a weight
        of_pairs = torch.stack(of_features).sum() / torch.where(total > 0, total, 1)
        return self.logits_weight * of_logits + self.representation_weight * of_pairs

    def _weights(self, logs: Tensor) -> Tensor:
        if self.edges == "confidence":
            return (logs.exp() * logs).sum(2).softmax(1)
        weights = torch.ones(logs.shape[1]) if self.edges == "equal" else torch.tensor(self.edges)
        return (weights / weights.sum()).to(logs).expand(len(logs), -1)

    def _distance(self, teachers: Tensor, student: Tensor) -> Tensor:
        gaps = teachers - student
        if self.distance == "ordered":
            # The last cumulative sum is 1 - 1.
            return gaps.cumsum(2)[..., :-1].abs().sum(2)
        return gaps.abs().sum(2) / 2

    def _fuse(self, features: list[Tensor]) -> list[Tensor]:
        features = [safe_normalize(f) for f in features]
        if len(features) == 1:
            features = features * 2
        fused = []
        for j, k in combinations(range(len(features)), 2):
            if self.fusion == "concatenation":
                joint = torch.cat([features[j], features[k]], 1)
            elif self.fusion == "bilinear":
                joint = (features[j][:, :, None] * features[k][:, None]).flatten(1)
            else:
                joint = _convolve(self.sketches[j](features[j]), self.sketches[k](features[k]))
            fused.append(safe_normalize(joint.sign() * joint.abs().sqrt()))
        return fused


class _Sketch(nn.Module):
    """Count sketch: adds every feature, with a sign, to one of `dims` sums; places and signs are drawn from a seed."""

    def __init__(self, features: int, dims: int, seed: str) -> None:
        super().__init__()
        draw = random.Random(seed)
        place = torch.tensor([draw.randrange(dims) for _ in range(features)])
        sign = torch.tensor([2.0 * draw.randrange(2) - 1 for _ in range(features)])
        self.dims = dims
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, features]` to `[batch, dims]`."""
        return x.new_zeros(len(x), self.dims).index_add(1, self.place, x * self.sign)


def _convolve(x: Tensor, y: Tensor) -> Tensor:
    # The circular convolution of two sketches is a sketch of the outer product.
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(y), n=x.shape[1])


def _pairs(num_teachers: int) -> list[tuple[int, int]]:
    return list(combinations(range(num_teachers), 2)) or [(0, 0)]


def _mmd(student: Tensor, teacher: Tensor) -> Tensor:
    spread = squared_distances(teacher).mean()
    spread = torch.where(spread > 0, spread, 1)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        scaled = squared_distances(x, y) / spread
        return torch.stack([torch.exp(-scaled / (2 * factor)) for factor in (0.25, 0.5, 1, 2, 4)]).mean(0)

    return kernel(student, student).mean() + kernel(teacher, teacher).mean() - 2 * kernel(student, teacher).mean()
