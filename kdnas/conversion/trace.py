"""A trained network as a list of the graph block's operations."""

import contextlib

from torch import nn

from kdnas.conversion.export import check_forward, decomposed, export
from kdnas.conversion.lowering import HANDLERS
from kdnas.conversion.reader import Reader, TracedOperation, UnknownOperation


def trace(module: nn.Module, image: tuple[int, int, int]) -> list[TracedOperation]:
    """The operations of a network in order of execution, from 1 on; number 0 stands for the images.

    `torch.export` records the network's tensor operations, whatever modules they come from. What depends on weights
    alone (a weight norm, a mask, a standardised kernel) is computed once; views and permutations become a choice of
    axes (`kdnas.conversion.axes`); operations that change nothing, or that no logit depends on, are left out.

    Args:
        module: in evaluation mode, in float32 on the CPU.
        image: channels, height and width, which are equal.

    Raises:
        ValueError: the network cannot be exported, has an unsupported operation, applies weights twice, has several
            inputs or outputs, or does not return logits `[batch, classes]`.
    """
    check_forward(module, image)
    program = export(module, image)
    try:
        return Reader(module, program, image, HANDLERS).read()
    except UnknownOperation as error:
        with contextlib.suppress(UnknownOperation):  # the operation may be composed of known ones
            return Reader(module, decomposed(program, HANDLERS), image, HANDLERS).read()
        raise error
