"""Logits stored as their largest few: at most 300 bytes per image with its index and checksum."""

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

MOST = 68
"""Logits stored of an image: 2 bytes each, 2 for each class, 9 for the rest, 16 for index and checksum."""
MOST_ERROR = 1e-3
"""Bound on KL(softmax(logits) || softmax(stored)), at temperature 1, in nats."""
_LADDER = (1, 2, 4, 8, 16, 32, MOST)
_WHOLE = 255  # count that says that all logits are stored
_MOST_CLASSES = 2**16


@final
class Summary(NamedTuple):
    """What was stored of some images.

    Attributes:
        images: their number.
        size: of their logits, in bytes, without index and checksum.
        whole: number of those whose distribution is too flat, of which all logits are stored.
        error: largest KL divergence of the others.
    """

    images: int
    size: int
    whole: int
    error: float

    def and_of(self, other: "Summary") -> "Summary":
        """What was stored of these images and others."""
        return Summary(
            self.images + other.images,
            self.size + other.size,
            self.whole + other.whole,
            max(self.error, other.error),
        )

    def __str__(self) -> str:
        return (
            f"logits take {self.size / max(1, self.images):.0f} bytes per image on average, KL divergence at most "
            f"{self.error:.1e}; {self.whole:,} of {self.images:,} distributions are too flat for {MOST} logits and are "
            "stored whole"
        )


def packed(logits: Tensor) -> tuple[dict[str, Tensor], Summary]:
    r"""The largest k logits of each image, for the least k of 1, 2, 4, ... 68 with a small enough error.

    With p = softmax(logits), stored are log p of the k largest in 16 bits, the mean of p over all other classes, and
    the logarithm of the sum of exponentials, so that $\hat p_i = p_i$ for these and $(1 - \sum p) / (C - k)$
    for each other class. Where KL$(p \| \hat p)$ is above 1e-3 with 68, or a logit is not finite, all logits are
    stored.

    Args:
        logits: `[batch, classes]`.

    Raises:
        ValueError: another shape, or more than 65,536 classes.
    """
    if logits.dim() != 2 or logits.shape[1] > _MOST_CLASSES:
        raise ValueError(
            f"`cache_outputs` must be all for logits of shape {list(logits.shape)}: top_logits is for one distribution "
            f"per image, of at most {_MOST_CLASSES:,} classes."
        )
    logits = logits.detach().cpu().float()
    classes, scale = logits.shape[1], logits.double().logsumexp(1)
    sorted_logs, order = (logits.double() - scale[:, None]).sort(dim=1, descending=True, stable=True)
    counts = torch.full((len(logits),), _WHOLE, dtype=torch.uint8)
    rest, errors = torch.zeros(len(logits)), torch.zeros(len(logits), dtype=torch.float64)
    for count in sorted({min(k, classes) for k in _LADDER}):
        kept = sorted_logs[:, :count].half().double()
        others = sorted_logs[:, count:].exp().sum(1) / max(1, classes - count)
        log_rest = others.clamp_min(torch.finfo(torch.float32).tiny).log().float()
        stored = torch.cat([kept, log_rest.double()[:, None].expand(-1, classes - count)], dim=1).log_softmax(1)
        error = (sorted_logs.exp() * (sorted_logs - stored)).sum(1)
        new = (error <= MOST_ERROR) & (counts == _WHOLE)  # false where a logit is not finite
        counts[new], rest[new], errors[new] = count, log_rest[new], error[new]
    is_whole = counts == _WHOLE
    is_kept = torch.arange(min(MOST, classes)) < torch.where(is_whole, 0, counts)[:, None]
    tensors = {
        "values": sorted_logs[:, :MOST][is_kept].half(),
        "indices": (order[:, :MOST][is_kept] - _MOST_CLASSES // 2).short(),
        "counts": counts,
        "rest": rest,
        "scale": scale.float(),
        "whole": logits[is_whole],
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return tensors, Summary(len(logits), size, int(is_whole.sum()), float(errors.max()) if len(errors) else 0.0)


def unpacked(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """The logits of some images, `[rows, classes]`.

    Args:
        tensors: what `packed` returned.
        rows: indices of images.
    """
    classes, counts = tensors["whole"].shape[1], tensors["counts"].long()
    is_whole = counts == _WHOLE
    kept = torch.where(is_whole, 0, counts)
    ends = kept.cumsum(0)
    places = torch.arange(MOST)
    is_kept = places < kept[rows][:, None]
    flat = ((ends - kept)[rows][:, None] + places)[is_kept]
    logits = tensors["rest"][rows][:, None].repeat(1, classes)
    image = torch.arange(len(rows))[:, None].expand_as(is_kept)[is_kept]
    logits[image, tensors["indices"][flat].long() + _MOST_CLASSES // 2] = tensors["values"][flat].float()
    logits += tensors["scale"][rows][:, None]
    order = is_whole.long().cumsum(0) - 1
    whole = is_whole[rows]
    logits[whole] = tensors["whole"][order[rows][whole]]
    return logits
