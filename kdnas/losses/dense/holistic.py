"""Adversarial distillation of whole segmentation maps."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss, frozen
from kdnas.numerics import safe_norm, same_positions
from kdnas.outputs import Moment, Outputs
from kdnas.values import Seed


@final
class Holistic(Loss):
    r"""Adversarial loss on whole segmentation maps, conditioned on the image (Wasserstein GAN).

    With $p$, $q$ the student's and the teacher's class probabilities at every position, $I$ the image averaged
    to their size, and $D$ one score per sample:

    - student: $L = -\frac{1}{B} \sum_b D(p, I)$;
    - discriminator, by `adversary`: $\frac{1}{B} \sum_b [D(p, I) - D(q, I)
      + \mu (|\nabla_x D(x, I)| - 1)^2]$ at $x = \epsilon q + (1 - \epsilon) p$, one $\epsilon$ per sample.

    Shapes: logits `[batch, classes, height, width]`; of two sizes the larger is averaged to the smaller. Where
    both networks' outputs have `images`, the discriminator gets them too. Divisor: batch. Only differences of the
    value have a meaning. Undefined for logits without positions.

    Learnable part: $D$, three convolutions of stride 2, one self-attention, and a 1x1 convolution averaged over
    positions, for which the authors use an optimiser of its own with a learning rate of 4e-4. Default weight 0.1:
    the authors' code.

    Args:
        penalty: $\mu$, the weight of the gradient penalty; default 10.
        width: channels of the first convolution, doubled by each of the next two, at least 1; default 64.
        seed: random seed of $\epsilon$, which also depends on the training's progress; default 0.

    Raises:
        ValueError: logits are not maps, the classes differ, the loss was not prepared, or it was prepared with images
            and there are none.

    Reference: Liu, Chen, Liu, Qin, Luo, Wang, Structured Knowledge Distillation for Semantic Segmentation, CVPR
        2019 (arXiv 1903.04197), section 3, holistic distillation; Gulrajani et al., Improved Training of Wasserstein
        GANs, NIPS 2017, equation 3.
    Differs: as in the paper the discriminator gets the image; the released one does not, gets scores instead of
        probabilities, and has spectral normalisation and a second self-attention beside the penalty.
    """

    weight: ClassVar[float] = 0.1
    ranges: ClassVar[Mapping[str, str]] = {"penalty": "[0, inf)", "width": "[1, inf)", "seed": "[0, inf)"}
    golden: ClassVar[float] = 0.2240961839213031
    discriminator_rates: ClassVar[Mapping[str, float]] = {"discriminator": 4e-4}
    dense: ClassVar[bool] = True

    def __init__(self, *, penalty: float = 10.0, width: int = 64, seed: Seed = 0) -> None:
        super().__init__()
        self.penalty, self.width, self.seed = penalty, width, seed
        self.sees_images = False
        self.discriminator = nn.Sequential()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build the discriminator."""
        self.sees_images = student.images is not None and teacher.images is not None
        extra = student.images.shape[1] if student.images is not None and self.sees_images else 0
        self.discriminator = _discriminator(student.logits.shape[1] + extra, self.width).to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The student's loss."""
        p, _, image = self._critic_inputs(student, teacher)
        return -frozen(self.discriminator, torch.cat([p, image], 1)).mean()

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The discriminator's loss."""
        p, q, image = self._critic_inputs(student, teacher)
        scores = self.discriminator(torch.cat([p, image], 1)) - self.discriminator(torch.cat([q, image], 1))
        # The generator reads the low 32 bits of its seed.
        generator = torch.Generator().manual_seed(self.seed + round(at.progress * 2**31))
        share = torch.rand(len(p), 1, 1, 1, generator=generator, dtype=torch.float64).to(p)
        with torch.enable_grad():
            between = (share * q + (1 - share) * p).requires_grad_()
            score = self.discriminator(torch.cat([between, image], 1)).sum()
            (slope,) = torch.autograd.grad(score, between, create_graph=True)
        return scores.mean() + self.penalty * (safe_norm(slope.flatten(1)) - 1).square().mean()

    def _critic_inputs(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        if not len(self.discriminator):
            raise ValueError("Holistic has no discriminator yet. Call prepare(student, teacher) first.")
        z_s, z_t = same_positions(student.logits, teacher.logits)
        image = z_t[:, :0]
        if self.sees_images:
            if teacher.images is None:
                raise ValueError(
                    "Holistic was prepared with images, but these outputs have none. Pass images in every batch, or "
                    "prepare without."
                )
            image = F.adaptive_avg_pool2d(teacher.images, (z_s.shape[2], z_s.shape[3]))
        return z_s.softmax(1), z_t.softmax(1), image


class _SelfAttention(nn.Module):
    """Self-attention over positions, added to the input; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.key = nn.Conv2d(channels, max(1, channels // 8), 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        attention = (query.transpose(1, 2) @ key).softmax(-1)
        return x + self.scale * (value @ attention.transpose(1, 2)).unflatten(2, x.shape[2:])


def _discriminator(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.LeakyReLU(0.1),
        nn.Conv2d(2 * width, 4 * width, 3, 2, 1),
        nn.LeakyReLU(0.1),
        _SelfAttention(4 * width),
        nn.Conv2d(4 * width, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(0),
    )
