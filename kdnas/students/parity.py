"""The comparison of all forms of a student with its network, and of the network with its card."""

import copy
import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from kdnas.blocks.basic import enlarge, split_logits
from kdnas.costs.budget import Cost
from kdnas.costs.count import counted_macs
from kdnas.data.base import normalise
from kdnas.network import Network
from kdnas.randomness import torch_rng
from kdnas.runtimes import joined
from kdnas.students.card import Card
from kdnas.students.source import shortened

TOLERANCE = 1e-5

_NUM_INPUTS = 64
_NUM_DENSE = 4  # images with logits of every pixel
_BATCH_SIZES = (1, 3)


@final
class Parity:
    """The network's logits on fixed random images, with which its other forms are compared.

    Attributes:
        differences: largest difference by file, in units of an image's largest logit or of 1, whichever is more (of the
            largest logit of all where none reaches 0.1); and `largest_logit`.

    Raises:
        ValueError: the network differs from its card, or its logits are not finite or all zero.
    """

    def __init__(self, network: Network, card: Card) -> None:
        p = self._preprocessing = card.preprocessing
        self._image_outputs = card.image_outputs
        check_card(network, card)
        rng = torch_rng("parity")
        # Brightness and contrast of their own, or pooling would make all images one.
        count = _NUM_DENSE if card.blueprint.dense else _NUM_INPUTS
        low, high = torch.rand(2, count, 1, 1, 1, generator=rng)
        self._images = low + (high - low) * torch.rand(count, len(p.mean), p.height, p.width, generator=rng)
        with torch.inference_mode():
            self._logits = self._shown(network(normalise(self._images, p)).logits)
            # A size that is neither square nor even, for networks that take any.
            other = (
                torch.rand(3, len(p.mean), p.height | 1, p.width + 3, generator=rng) if card.blueprint.dense else None
            )
            self._other = None if other is None else (other, self._shown(network(normalise(other, p)).logits))
        if not self._logits.isfinite().all():
            raise ValueError("the student's logits are not finite. Train it again with a lower learning rate.")
        sizes = self._logits.abs().flatten(1).amax(1)
        largest = float(sizes.amax())
        if largest == 0:
            raise ValueError("every logit of the student is zero, so nothing can be compared. Train it first.")
        # A logit is a sum: it is rounded like its largest terms, approximated by the largest logit of the image.
        self._scale = sizes.clamp(min=1) if largest >= 0.1 else torch.full_like(sizes, largest)
        self.differences = {"largest_logit": largest}

    def compare(
        self,
        name: str,
        form: Callable[[Tensor], Tensor],
        *,
        any_batch: bool = True,
        tolerance: float | None = None,
        input: str = "pixels",
        output: str = "logits",
    ) -> float:
        """Compare one form at every batch size, and return the largest difference.

        Args:
            name: of its file, for the message.
            form: images to logits.
            any_batch: whether it takes any batch size, else one image.
            tolerance: of the difference; None for `TOLERANCE`.
            input: `pixels` in [0, 1], or `normalised`.
            output: `logits`, or `probabilities`, whose differences are compared as they are, or `coarse_logits`, which
                are enlarged before.

        Raises:
            ValueError: it cannot be run, or its logits differ by more than the tolerance.
        """
        difference, tolerance = 0.0, TOLERANCE if tolerance is None else tolerance
        sets = [(f"{size} images", size, self._images, self._logits, self._scale) for size in _BATCH_SIZES]
        if self._other is not None:
            images, logits = self._other
            scale = logits.abs().flatten(1).amax(1).clamp(min=1)
            words = f"images of {images.shape[2]} x {images.shape[3]}"
            sets.append((words, len(images), images, logits, scale))
        for words, size, pixels, expected, scale in sets if any_batch else sets[:1]:
            images = pixels if input == "pixels" else normalise(pixels, self._preprocessing)
            if output == "probabilities":
                expected, scale = self._probabilities(expected), torch.ones_like(scale)
            try:
                with torch.inference_mode():
                    outputs = torch.cat([joined(form(batch)) for batch in images.split(size)])
                    if output == "coarse_logits":
                        outputs = enlarge(outputs, images)
            except Exception as error:
                raise ValueError(f"{name} cannot be run on {words} ({shortened(error)}).") from error
            if outputs.shape != expected.shape:
                raise ValueError(f"{name} gives {output} of shape {tuple(outputs.shape)}, not {tuple(expected.shape)}.")
            apart = (outputs - expected).abs().flatten(1).amax(1) / scale
            difference = max(difference, float(apart.nan_to_num(math.inf).amax()))
        if difference > tolerance:
            raise ValueError(
                f"{name} gives other {output} than the network: the difference is {difference:.2g}, the tolerance "
                f"{tolerance:g}. Look for a layer that depends on the batch, on the mode or on the device."
            )
        self.differences[name] = difference
        return difference

    def _shown(self, logits: Tensor) -> Tensor:
        """Logits as forms give them: those of the whole image are one number each."""
        return joined(split_logits(logits, self._image_outputs)) if self._image_outputs else logits

    def _probabilities(self, logits: Tensor) -> Tensor:
        if not self._image_outputs:
            return logits.softmax(1)
        maps, images = logits[:, : -self._image_outputs], logits[:, -self._image_outputs :]
        return torch.cat([maps.softmax(1), images.sigmoid()], 1)


def check_card(network: Network, card: Card) -> None:
    """Raise a ValueError unless the network has the cost and the number of classes of its card."""
    # On tensors without storage, as costs are measured everywhere: devices differ in the operations they count.
    bare = copy.deepcopy(network).to("meta")
    with counted_macs() as counted, torch.no_grad():
        logits = bare(torch.empty(1, *network.blueprint.image, device="meta")).logits
    measured = Cost(sum(p.numel() for p in network.parameters()), counted())
    if measured != card.cost:
        raise ValueError(
            f"the network has {measured.params:,} params and {measured.macs:,} macs, but `Card.cost` is "
            f"{card.cost.params:,} and {card.cost.macs:,}. Take it from kdnas.costs.count.cost(blueprint)."
        )
    if logits.shape[1] != len(card.class_names):
        raise ValueError(
            f"the network has {logits.shape[1]} logits, but `Card.class_names` has {len(card.class_names)} names."
        )
