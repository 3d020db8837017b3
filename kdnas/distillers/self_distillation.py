"""Self-distillation: a network's last stage is the teacher of its earlier exits."""

from collections.abc import Iterator
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Step
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network


class _Exit(nn.Module):
    """A stage's map at the last stage's width, pooled, and its logits."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.adapter = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.adapter(feature).mean((2, 3))
        return pooled, self.classifier(pooled)


@final
class SelfDistillation(Distiller):
    r"""Every stage but the last has an exit, which learns from the labels and from the network's own outputs.

    `L = CE(z, y) + sum_i [(1 - share) CE(z_i, y) + share * KL(p || p_i) T^2 + hint * mean((f_i - f)^2)]`: `z_i` and
    `f_i` are exit i's logits and pooled features, `z` and `f` the network's own, as fixed targets; the last mean is
    over batch and channels. The exits are learnable parts of this distiller and are absent from the student; they act
    through their gradients in its stages. No teacher is used.

    Args:
        share: share of the divergence; the labels have the remaining one. In [0, 1].
        temperature: T.
        hint: weight of the features' distance.

    Raises:
        ValueError: a share outside [0, 1], a negative weight, or a network of one stage or without maps.

    Reference: Zhang et al., Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
        Distillation, ICCV 2019, equations 1 to 5; share 0.3 and hint 0.03 are the authors'.
    Differs: an exit's adapter is one 1x1 convolution with batch norm, the paper's a bottleneck that also shrinks the
        map; features are compared after pooling.
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"
    of_images: ClassVar[bool] = True

    def __init__(self, *, share: float = 0.3, temperature: float = 3.0, hint: float = 0.03) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be in [0, 1], got {share}.")
        if hint < 0:
            raise ValueError(f"`hint` must not be negative, got {hint}.")
        self.share, self.hint = share, hint
        self.divergence = SoftTargets(temperature=temperature)
        self.exits = nn.ModuleList()

    @property
    def uses_teacher(self) -> bool:
        """No: the network is its own."""
        return False

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the exits."""
        assert isinstance(model, Network)
        outputs = model(batch.images)
        maps = [feature for feature in outputs.features if feature.dim() == 4]
        if len(maps) < 2:
            raise ValueError(f"self_distillation needs at least 2 stages of feature maps, the network has {len(maps)}.")
        width, classes = maps[-1].shape[1], outputs.logits.shape[1]
        self.exits.extend(_Exit(feature.shape[1], width, classes) for feature in maps[:-1])

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The network's own loss and every exit's, in one."""
        del step
        assert isinstance(model, Network)
        outputs = model(batch.images)
        maps = [feature for feature in outputs.features if feature.dim() == 4]
        end, target = outputs.detach(), maps[-1].detach().mean((2, 3))
        loss = batch.task.loss(outputs.logits.float(), batch.labels)
        for feature, exit_ in zip(maps[:-1], self.exits, strict=True):
            pooled, logits = exit_(feature)
            loss = loss + (1 - self.share) * batch.task.loss(logits.float(), batch.labels)
            loss = loss + self.share * self.divergence(outputs._replace(logits=logits), end, batch.labels)
            loss = loss + self.hint * F.mse_loss(pooled.float(), target.float())
        yield "student", loss
