"""A trained network as a list of the graph block's operations."""

import contextlib
from collections.abc import Sequence

from torch import nn

from kdnas.conversion.channels import Operation
from kdnas.conversion.export import check_forward, decomposed, export
from kdnas.conversion.lowering import HANDLERS
from kdnas.conversion.reader import Reader, TracedOperation, UnknownOperation

_SIDES = (128, 141)  # of images for which a network for every pixel is traced: their halves differ in rounding
_BILINEAR = 1


def trace(module: nn.Module, image: tuple[int, int, int], *, dense: bool = False) -> list[TracedOperation]:
    """The operations of a network in order of execution, from 1 on; number 0 stands for the images.

    `torch.export` records the network's tensor operations, whatever modules they come from. What depends on weights
    alone (a weight norm, a mask, a standardised kernel) is computed once; views and permutations become a choice of
    axes (`kdnas.conversion.axes`); operations that change nothing, or that no logit depends on, are left out.

    A network for every pixel is traced for images of two sizes of its own choice. A resize becomes one to the size of
    another map, which has that size in both, or one by a whole factor; a last one to the images' size (bilinear,
    corners not aligned) is left out, as dense networks enlarge their logits so (`Blueprint.dense`).

    Args:
        module: in evaluation mode, in float32 on the CPU.
        image: channels, height and width, which are equal unless for `dense`.
        dense: whether its logits are maps.

    Raises:
        ValueError: the network cannot be exported, has an unsupported operation, applies weights twice, has several
            inputs or outputs, or does not return logits `[batch, classes]`, for `dense` `[batch, classes, height,
            width]`; or what it computes depends on the size of the images.
    """
    if not dense:
        return _read(module, image)
    first, second = (_read(module, (image[0], side, side), dense=True) for side in _SIDES)
    if [_form(row) for row in first] != [_form(row) for row in second]:
        raise ValueError(
            "the network must be the same operations for images of every size, but they differ between "
            f"{' and '.join(f'{side} x {side}' for side in _SIDES)} (padding that depends on the size, for example). "
            "Use another network."
        )
    return _resolved(first, second)


def _read(module: nn.Module, image: tuple[int, int, int], *, dense: bool = False) -> list[TracedOperation]:
    check_forward(module, image, dense=dense)
    program = export(module, image)
    try:
        return Reader(module, program, image, HANDLERS, dense=dense).read()
    except UnknownOperation as error:
        with contextlib.suppress(UnknownOperation):  # the operation may be composed of known ones
            return Reader(module, decomposed(program, HANDLERS), image, HANDLERS, dense=dense).read()
        raise error


def _form(row: TracedOperation) -> tuple[str, tuple[int, ...], tuple[object, ...]]:
    op, inputs, values = row.operation
    return op, inputs, values[:1] if op == "resize" else values


def _resolved(first: list[TracedOperation], second: Sequence[TracedOperation]) -> list[TracedOperation]:
    """The operations of the first size, each resize with the map whose size it takes, or a factor."""
    sides = [(a.shape[2:3], b.shape[2:3]) for a, b in zip(first, second, strict=True)]
    if first[-1].operation.op == "resize" and sides[-1] == sides[0] and first[-1].operation.values[0] == _BILINEAR:
        first, sides = first[:-1], sides[:-1]
    last_use = {number: row for row, entry in enumerate(first) for number in entry.operation.inputs}
    for number, row in enumerate(first):
        if row.operation.op == "resize":
            (source,), (kind, _) = row.operation.inputs, row.operation.values
            factors = {after[0] / before[0] for before, after in zip(sides[source], sides[number], strict=True)}
            like = [other for other in range(1, number) if sides[other] == sides[number]]
            # A map that is read later is carried on in any case.
            alive = [other for other in like if last_use.get(other, 0) > number]
            if not alive and len(factors) == 1 and min(factors).is_integer():
                operation = Operation("upsample", (source,), (int(min(factors)), kind))
            elif like:
                operation = Operation("resize", (source, (alive or like)[-1]), (kind,))
            else:
                raise ValueError(
                    f"{row.module or 'the forward of the network'}: a resize to {row.shape[2]} x {row.shape[3]} for "
                    f"images of {first[0].shape[2]} x {first[0].shape[3]} cannot be converted: no map before it has "
                    "that size, and it is no whole factor. Only the last one may be to the size of the images "
                    "(bilinear, corners not aligned)."
                )
            first[number] = row._replace(operation=operation)
    return first
