"""What every loss demands of its inputs, with one sentence per fault; called by `Loss`, so that no loss can lack it."""

import math
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from kdnas.outputs import Moment, Outputs

IGNORED = -100
"""The label that leaves a sample or a position out."""


def as_outputs(loss: str, needs: Container[str], outputs: object, network: str) -> Outputs:
    """The outputs, their fields checked; a tensor is taken for logits where nothing else of a network is read.

    Args:
        loss: name of the loss, for messages.
        needs: what the loss reads.
        outputs: what the caller passed.
        network: `student` or `teacher`, for messages.

    Raises:
        ValueError: something else than Outputs, fields of another kind, or a field that the loss reads is empty.
    """
    if isinstance(outputs, Tensor):
        outputs = Outputs(outputs)
    if not isinstance(outputs, Outputs):
        raise ValueError(
            f"the {network} of {loss} must be Outputs, or logits alone, got {type(outputs).__name__}. "
            "Write kdnas.losses.Outputs(logits, features)."
        )
    outputs.check(network)
    for kind in ("features", "attentions"):
        if kind in needs and not getattr(outputs, kind):
            raise ValueError(
                f"{loss} needs {kind}, but the {network} has none. Pass Outputs(logits, {kind}=(...)) with one tensor "
                "per stage."
            )
    return outputs


def check_logits(loss: str, logits: Mapping[str, Tensor], *, dense: bool) -> None:
    """Raise a ValueError unless the logits are `[batch, classes]` or maps of logits; for `dense` maps.

    Args:
        loss: name of the loss, for messages.
        logits: by network, `student` and `teacher`.
        dense: whether they must be maps.
    """
    dims = {z.dim() for z in logits.values()}
    if dims <= ({4} if dense else {2, 4}):
        return
    shapes = "[batch, classes, height, width]" if dense else "[batch, classes] or [batch, classes, height, width]"
    hint = (
        "Use a loss of another kind for logits without positions." if dims <= {2, 4} else "Check the network's output."
    )
    hint = "Pass logits [batch, tokens, classes] by Outputs.of_tokens." if 3 in dims else hint
    values = " and ".join(f"{network} {tuple(z.shape)}" for network, z in logits.items())
    raise ValueError(f"{loss} needs logits {shapes}, got {values}. {hint}")


def check_same_classes(loss: str, student: Tensor, teacher: Tensor, network: str, *, dense: bool) -> None:
    """Raise a ValueError unless two logits can be compared class by class: equal shapes, for `dense` equal classes."""
    if student.shape[1:2] != teacher.shape[1:2] or (not dense and student.shape[1:] != teacher.shape[1:]):
        raise ValueError(
            f"{loss} compares logits class by class: the student's have shape {tuple(student.shape)}, the {network}'s "
            f"{tuple(teacher.shape)}."
        )


def check_agreement(loss: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise a ValueError unless all tensors have the same device, dtype and batch, and all or none are empty."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors:
        if x.dim() < 2 or (len(x) and not x.numel()):
            raise ValueError(f"{loss} needs at least one number per sample, {name} has shape {tuple(x.shape)}.")
        if first is None:
            first = name, x
        before, y = first
        for what, ours, theirs in (
            ("batch size", len(y), len(x)),
            ("device", y.device, x.device),
            ("dtype", y.dtype, x.dtype),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{loss} needs one {what} for all tensors, got {ours} for {before} and {theirs} for {name}."
                )


def check_labels(loss: str, labels: object, logits: Tensor) -> Tensor:
    """The labels as int64, in the shape of the logits without their classes.

    Raises:
        ValueError: no labels, others than class numbers or -100, or another shape or device.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"{loss} reads labels: `labels` must be a tensor of class numbers, got {labels!r}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` of {loss} must be class numbers, that is whole numbers, got {labels.dtype}.")
    if labels.device != logits.device:
        raise ValueError(f"{loss} needs one device for all tensors, got {logits.device} and {labels.device} (labels).")
    expected = (len(logits), *logits.shape[2:])
    if (*labels.shape, 1) == expected:
        labels = labels[..., None]  # those of tokens
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"`labels` of {loss} must have shape {expected}, one per row of logits {tuple(logits.shape)}, got "
            f"{tuple(labels.shape)}."
        )
    labels = labels.long()
    if not torch.compiler.is_compiling():
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[1]))
        if wrong.any():
            raise ValueError(
                f"`labels` of {loss} must be class numbers from 0 to {logits.shape[1] - 1}, or {IGNORED} for a sample "
                f"that is left out, got {int(labels[wrong][0])}."
            )
    return labels


def check_moment(loss: str, at: object, batch: int) -> None:
    """Raise a ValueError unless `at` is a Moment, whose ids, if any, are one per sample."""
    if not isinstance(at, Moment):
        raise ValueError(f"`at` of {loss} must be a Moment, got {at!r}. Write kdnas.outputs.Moment(progress).")
    if at.ids is not None and len(at.ids) != batch:
        raise ValueError(f"`ids` of {loss} must be one per sample, got {len(at.ids)} for a batch of {batch}.")


def widths_of(outputs: Outputs, kinds: Container[str]) -> dict[str, int]:
    """Classes of the logits and channels of every feature among `kinds`, by name."""
    return {
        name: x.shape[-1] if x.dim() == 3 else x.shape[1]
        for name, x in outputs.select(kinds)
        if not name.startswith("attentions")
    }


def check_widths(
    loss: str, network: str, widths: Mapping[str, int], prepared: Mapping[str, int], *, elastic: bool
) -> None:
    """Raise a ValueError unless the widths are those with which a loss was prepared.

    Args:
        loss: name of the loss, for messages.
        network: `student` or `teacher`, for messages.
        widths: those of this call.
        prepared: those of `prepare`.
        elastic: whether features may be narrower.
    """
    for name, expected in prepared.items():
        width = widths.get(name)
        narrower = elastic and name != "logits" and width is not None and width < expected
        if width != expected and not narrower:
            unit = "classes" if name == "logits" else "channels"
            most = "at most " if elastic and name != "logits" else ""
            value = "none" if width is None else str(width)
            raise ValueError(
                f"{loss} was prepared with {most}{expected} {unit} in the {network}'s {name}, got {value}. Call "
                "loss.prepare(student, teacher) with outputs of these networks, of the largest subnet for a supernet."
            )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or an infinity."""
    values = [x.detach() for x in tensors]
    # A sum is one pass, `isfinite` twenty times as long; a sum of finite numbers may still overflow.
    if not values or math.isfinite(float(torch.stack([x.sum() for x in values]).sum())):
        return True
    return all(bool(x.isfinite().all()) for x in values)
