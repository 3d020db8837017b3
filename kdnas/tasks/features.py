"""Features of a teacher: no labels are learnt from; networks are compared by what their vectors say of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.numerics import safe_normalize
from kdnas.specs import Spec, spec
from kdnas.tasks.base import Answers, Numbers, Task

NEIGHBOURS, TEMPERATURE = 20, 0.07
RIDGE = 0.01  # penalty of the linear probe, as a share of the features' mean variance times the number of images
_CHUNK = 1000  # images whose similarities to all others are in memory
_OF_CLASSES = ("cross_entropy", "soft_targets", "alpha_divergence")


@dataclass(frozen=True)
class Features(Task):
    """A network gives the features of one or several teachers, as one vector; labels are for measuring only.

    Attributes:
        widths: numbers of features of each teacher.
    """

    widths: tuple[int, ...] = ()

    name: ClassVar[str] = "features"
    answers: ClassVar[Answers] = "values"
    has_classes: ClassVar[bool] = False

    @property
    def losses(self) -> Mapping[str, Spec]:
        """Losses of classes become the cosine of features."""
        return dict.fromkeys(_OF_CLASSES, spec("kdnas.losses.response.cosine:Cosine", widths=self.widths))

    def divergence(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """One minus the cosine of two vectors, a sum over images."""
        del labels
        return (1 - (safe_normalize(logits, 1) * safe_normalize(target, 1)).sum(1)).sum()

    def as_labels(self, labels: Any, count: int) -> Tensor:
        """The labels as they are: what is measured by them was read before."""
        tensor = torch.as_tensor(labels)
        if len(tensor) != count:
            raise ValueError(f"`labels` must be as many as images, got {len(tensor)} labels for {count} images.")
        return tensor

    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        """Any labels will do."""
        del part, labels, names

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """Refused: nothing is learnt from labels.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "what learns from labels has none with --unlabelled. Use a distiller or scorer of a teacher's features, "
            "such as --distiller sandwich and --scorer rdm, or train with labels."
        )


@final
@dataclass(frozen=True)
class Neighbours(Features):
    r"""Features measured by labels: k nearest neighbours, and a linear probe beside it.

    Both leave one image out: the neighbours of an image are the other images of the part, and the probe is fitted to
    them. So no training image needs a label, nothing is drawn, and a part of one class alone says nothing.

    - k-NN: the $k$ images of largest cosine vote for their class with weights $\exp(\cos / 0.07)$; $k$ is 20, or half
      of the number of images per class where that is less, so that an image's own class is not outvoted for lack of it.
    - Linear probe: ridge regression of the one-hot labels on the centred features, with an intercept; with $H$ its hat
      matrix, the prediction without image $i$ is $(\hat y_i - H_{ii} y_i) / (1 - H_{ii})$.

    Reference: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (DINO), ICCV 2021
        (weighted k-NN, k of 20, temperature 0.07, from Wu et al., Unsupervised Feature Learning via Non-Parametric
        Instance Discrimination, CVPR 2018); Allen, The Relationship between Variable
        Selection and Data Augmentation, Technometrics 1974 (leaving one out in closed form).
    Differs: there the neighbours of test images are training images, and the probe is trained by SGD on these.
    """

    measure: ClassVar[str] = "k-NN accuracy"
    compares: ClassVar[bool] = True

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether neighbours and probe classify each image correctly, `[batch, 2]`."""
        return torch.stack([neighbour_hits(logits, labels), probe_hits(logits, labels)], 1)

    def quality(self, means: Numbers) -> Numbers:
        """The accuracy of the neighbours."""
        accuracy: Any = means[..., 0]
        return accuracy

    def details(self, means: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """The accuracy of the linear probe."""
        del names
        return {"linear probe accuracy": float(means[1])}


@final
@dataclass(frozen=True)
class Similarity(Features):
    """Features measured without labels: the mean over images and teachers of the cosine to the teacher's.

    A label is the teacher's vector for the image, of each part of length 1.
    """

    measure: ClassVar[str] = "similarity to the teacher"

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """One minus the cosine, where labels are a teacher's vectors: of training images there are none.

        Raises:
            ValueError: other labels.
        """
        if labels.shape != logits.shape:
            return super().loss(logits, labels, label_smoothing, reduction)
        distances = 1 - self.grades(logits, labels)
        return distances.mean() if reduction == "mean" else distances

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cosine of each image, a mean over teachers, `[batch]`."""
        widths = list(self.widths or (logits.shape[1],))
        parts = zip(logits.float().split(widths, 1), labels.split(widths, 1), strict=True)
        return torch.stack([F.cosine_similarity(ours, theirs, 1) for ours, theirs in parts]).mean(0)


def neighbour_hits(features: Tensor, labels: Tensor) -> Tensor:
    """Whether the nearest other images vote for each image's class, `[images]`; see `Neighbours`.

    Args:
        features: `[images, dims]`.
        labels: `[images]`.

    Example:
        >>> neighbour_hits(torch.tensor([[1.0, 0], [2, 0.1], [0, 3], [0.1, 1]]), torch.tensor([0, 0, 1, 1]))
        tensor([True, True, True, True])
    """
    features, labels = features.cpu(), labels.cpu()
    if len(features) < 2:
        return torch.zeros(len(features), dtype=torch.bool)
    unit, known = F.normalize(features.double(), dim=1), labels.unique()
    classes, hits = torch.searchsorted(known, labels), []
    count = min(NEIGHBOURS, max(1, len(unit) // (2 * len(known))))
    for places in torch.arange(len(unit)).split(_CHUNK):
        near = unit[places] @ unit.T
        near[torch.arange(len(places)), places] = -torch.inf
        cosines, neighbours = near.topk(count, 1)
        votes = torch.zeros(len(places), len(known), dtype=torch.float64)
        votes.scatter_add_(1, classes[neighbours], (cosines / TEMPERATURE).exp())
        hits.append(votes.argmax(1) == classes[places])
    return torch.cat(hits)


def probe_hits(features: Tensor, labels: Tensor) -> Tensor:
    """Whether a linear probe that was fitted to all other images finds each image's class; see `Neighbours`.

    Args:
        features: `[images, dims]`.
        labels: `[images]`.
    """
    features, labels, count = features.cpu(), labels.cpu(), len(features)
    if count < 2:
        return torch.zeros(count, dtype=torch.bool)
    known = labels.unique()
    classes = torch.searchsorted(known, labels)
    x = features.double() - features.double().mean(0)
    y = F.one_hot(classes, len(known)).double()
    left, sizes, _ = torch.linalg.svd(x, full_matrices=False)
    penalty = RIDGE * sizes.square().sum() / x.shape[1]
    shrunk = torch.where(sizes > 0, sizes.square() / (sizes.square() + penalty), 0.0)
    fitted = y.mean(0) + (left * shrunk) @ (left.T @ y)
    leverage = (1 / count + (left.square() * shrunk).sum(1))[:, None]
    alone = (fitted - leverage * y) / (1 - leverage).clamp_min(1e-9)
    return alone.argmax(1) == classes
