"""A trained network as an elastic supernet whose largest subnet is that network."""

from collections import Counter

from torch import nn

from kdnas.conversion.base import Conversion
from kdnas.conversion.chain import chain
from kdnas.conversion.export import answers_pixels
from kdnas.conversion.importance import Importance, channel_importance
from kdnas.conversion.transformer import transformer


def convert(
    module: nn.Module,
    *,
    image: tuple[int, int, int] = (3, 224, 224),
    name: str = "converted",
    needs_choices: bool = True,
    importance: Importance = channel_importance,
    divisor: int = 0,
) -> Conversion:
    """An elastic supernet from a trained network.

    A plain vision transformer is recognised by its parts (`kdnas.conversion.transformer`). Any other network is
    traced, cut into a chain of parts and made elastic in depth and in the width of its channel groups
    (`kdnas.conversion.chain`). The weights are copied, the channels sorted by importance, and the largest subnet is
    compared with the source.

    Args:
        module: returns logits `[batch, classes]`, or `[batch, classes, height, width]` for images of any size, also at
            a stride; convolutions, batch norms, linear layers, pooling, sums, products,
            concatenations and the usual activations, without control flow on values; or a plain vision transformer.
        image: channels, height and width, which are equal unless the logits are maps.
        name: of the space.
        needs_choices: whether a network in which nothing is elastic is refused; scale factors need no choices.
        importance: by which the channels of a traced network are sorted, such as
            `functools.partial(channel_importance, method="activation", images=images)`.
        divisor: widths that are narrower than the source's are multiples of it; 0 for 8, and for 4 below 64 channels.

    Raises:
        ValueError: the network cannot be traced or has an unsupported operation, nothing in it is elastic, the images
            are not square and the logits no maps, or the largest subnet differs from the source.
    """
    module = module.eval()
    dense = answers_pixels(module, image)
    if image[1] != image[2] and not dense:
        raise ValueError(f"a search space's images must be square, got {image[1]} x {image[2]}. Resize them.")
    conversion = None if dense else transformer(module, image, name, divisor)
    conversion = conversion or chain(module, image, name, importance, divisor, dense=dense)
    if needs_choices and not any(row.elastic for row in conversion.report):
        raise ValueError(
            "nothing in the network can be made elastic: no block may be left out and no width narrowed. "
            f"{_why(conversion)}"
        )
    return conversion


def _why(conversion: Conversion, most: int = 3) -> str:
    """The reasons, the most frequent first, each with some of its modules."""
    reasons = Counter(row.reason for row in conversion.report)
    sentences = []
    for reason, count in reasons.most_common(most):
        modules = [row.module for row in conversion.report if row.reason == reason]
        sentences.append(f"{', '.join(modules[:most])}{', ...' * (count > most)}: {reason}.")
    return " ".join(sentences)
