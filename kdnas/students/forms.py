"""The forms of a student that other programs load, each compared with the network before it is written."""

import copy
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import chained, enlarge, split_logits
from kdnas.costs.latency import timed
from kdnas.data.base import Data
from kdnas.runs.files import FULL, plain, write_bytes
from kdnas.runs.folder import CONFIG, GRAPH, INTEGERS, MODEL, PROGRAM, SOURCE, XNNPACK
from kdnas.runtimes import (
    Function,
    executorch_bytes,
    executorch_function,
    lacking,
    pt2_bytes,
    pt2_function,
    require,
)
from kdnas.specs import nearest
from kdnas.students.card import Card
from kdnas.students.graph import example_of, graph_of, load_graph
from kdnas.students.integers import write_integers
from kdnas.students.parity import Parity
from kdnas.students.stock import write_timm
from kdnas.values import shown

_log = logging.getLogger(__name__)

Record = dict[str, Any]
"""What `student.json` says of a form: `file`, `bytes`, `milliseconds`, `threads` and `difference`; or `problem`."""
_REPEATS = 11
_TOLERANCE_OF_XNNPACK = 1e-4  # its kernels sum in another order and contract multiplications with additions

Input = Literal["pixels", "normalised"]
Output = Literal["logits", "probabilities", "coarse_logits"]


@final
@dataclass(frozen=True)
class Interface:
    """What a form takes and returns.

    Attributes:
        input: `pixels` in [0, 1], which are normalised inside, or `normalised` images.
        output: `logits`, or `probabilities`: their softmax; or `coarse_logits`, of a network that answers for every
            pixel those at its own stride, before they are enlarged to the size of the images.

    Raises:
        ValueError: another word.
    """

    input: Input = "pixels"
    output: Output = "logits"

    def __post_init__(self) -> None:
        for name, kind in (("input", Input), ("output", Output)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` must be {' or '.join(get_args(kind))}, got {getattr(self, name)!r}.")

    def check(self, card: Card) -> None:
        """Raise a ValueError for coarse logits of a network for whole images."""
        if self.output == "coarse_logits" and not card.blueprint.dense:
            raise ValueError(
                "`output` must be logits or probabilities for a network of whole images, got coarse_logits."
            )

    def module(self, student: nn.Module, card: Card) -> nn.Module:
        """The module that a form is written from, of student.py's."""
        module: Any = copy.deepcopy(student)
        if self.input == "normalised":
            module.mean.zero_()
            module.std.fill_(1)
        if self.output == "coarse_logits":
            return _Coarse(module, card)
        return nn.Sequential(module, _Shares()) if self.output == "probabilities" else module


@final
class _Coarse(nn.Module):
    """The logits of a network that answers for every pixel, at its own stride.

    Args:
        student: of student.py.
        card: the student's.
    """

    def __init__(self, student: nn.Module, card: Card) -> None:
        super().__init__()
        self.student, self.image_outputs, self.reads = student, card.image_outputs, card.blueprint.head.reads

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """`[batch, classes, height / stride, width / stride]`, and the logits of the whole image, if any."""
        student: Any = self.student
        x = student.stem((images - student.mean) / student.std)
        logits: Tensor = chained([*student.stages, student.head], self.reads, x)
        if not self.image_outputs:
            return logits
        return logits[:, : -self.image_outputs], split_logits(enlarge(logits, images), self.image_outputs)[1]


@final
class _Shares(nn.Module):
    """Probabilities of logits: their softmax, and of those of the whole image the sigmoid of each."""

    def forward(self, logits: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """In the form of the logits."""
        if isinstance(logits, Tensor):
            return logits.softmax(1)
        return logits[0].softmax(1), logits[1].sigmoid()


class Draft(NamedTuple):
    """A student folder that is being written.

    Attributes:
        folder: with the card, the weights and student.py.
        student: the module of student.py.
        card: the student's.
        parity: the comparison with its network.
        interface: of the forms.
        data: for the calibration of integers; None where it is not known.
        timed: whether forms are timed; what a run writes by itself is not, so that it is the same with the same seed.
    """

    folder: Path
    student: nn.Module
    card: Card
    parity: Parity
    interface: Interface = Interface()
    data: Data | None = None
    timed: bool = False

    @property
    def module(self) -> nn.Module:
        """The module that forms are written from."""
        return self.interface.module(self.student, self.card)

    def record(self, file: str, form: Function, *, any_batch: bool = True, tolerance: float | None = None) -> Record:
        """Compare a form that was written, and measure it."""
        interface = self.interface if file != SOURCE else Interface()
        difference = self.parity.compare(
            file, form, any_batch=any_batch, tolerance=tolerance, input=interface.input, output=interface.output
        )
        record: Record = {"file": file, "bytes": (self.folder / file).stat().st_size, "difference": difference}
        record |= self.time(form)
        changed = {name: value for name, value in vars(interface).items() if value != getattr(Interface, name)}
        return record | changed | ({} if any_batch else {"batch": 1})

    def time(self, form: Function) -> Record:
        """Milliseconds of one image, the median of some calls, and the number of threads; nothing if not `timed`."""
        if not self.timed:
            return {}
        image = example_of(self.card.preprocessing, 1)
        seconds = statistics.median(timed(lambda: form(image), torch.device("cpu"), _REPEATS))
        return {"milliseconds": round(1e3 * seconds, 4), "threads": torch.get_num_threads()}


def _pt2(draft: Draft) -> Record:
    path = draft.folder / PROGRAM
    write_bytes(
        path,
        pt2_bytes(
            draft.module,
            example_of(draft.card.preprocessing),
            any_size=draft.card.blueprint.dense,
        ),
    )
    return draft.record(PROGRAM, pt2_function(path))


def _onnx(draft: Draft) -> Record:
    interface, card = draft.interface, draft.card
    names = json.dumps(list(card.class_names), ensure_ascii=False)
    metadata = {"class_names": names, **vars(interface)}
    content = graph_of(
        draft.module,
        card.preprocessing,
        interface.output,
        metadata,
        any_size=card.blueprint.dense,
        has_image_outputs=card.image_outputs > 0,
    )
    write_bytes(draft.folder / GRAPH, content)
    return draft.record(GRAPH, load_graph(draft.folder / GRAPH))


def _pte(draft: Draft) -> Record:
    path = draft.folder / XNNPACK
    example = example_of(draft.card.preprocessing, 1)
    write_bytes(path, executorch_bytes(draft.module.eval(), example))
    function = executorch_function(path, torch.get_num_threads())
    return draft.record(XNNPACK, function, any_batch=False, tolerance=_TOLERANCE_OF_XNNPACK)


def _int8(draft: Draft) -> Record:
    if draft.interface != Interface():
        raise ValueError("the graph in integers takes pixels and returns logits. Drop --input and --output.")
    if draft.data is None:
        raise ValueError("the ranges of integers are those of training images, and no data is known. Add --data.")
    path, preprocessing = draft.folder / INTEGERS, draft.card.preprocessing
    graph = graph_of(draft.student, preprocessing, has_image_outputs=draft.card.image_outputs > 0)
    comparison = write_integers(path, graph, draft.data)
    record = {"file": INTEGERS, "bytes": path.stat().st_size, **comparison}
    return record | draft.time(load_graph(path))


def _timm(draft: Draft) -> Record:
    return draft.record(MODEL, write_timm(draft.folder, draft.student, draft.card))


class _Form(NamedTuple):
    """One form.

    Attributes:
        files: that it writes, and that are removed where it fails.
        extra: that it needs; "" for none.
        write: writes it.
    """

    files: tuple[str, ...]
    extra: str
    write: Callable[[Draft], Record]


FORMS: Mapping[str, _Form] = {
    "onnx": _Form((GRAPH,), "onnx", _onnx),
    "pt2": _Form((PROGRAM,), "", _pt2),
    "int8": _Form((INTEGERS,), "onnx", _int8),
    "pte": _Form((XNNPACK,), "executorch", _pte),
    "timm": _Form((MODEL, CONFIG), "timm", _timm),
}
"""By name, what `kdnas export --forms` writes beside student.py."""
DEFAULT = ("onnx",)
"""Written where nobody names others, as far as their extras are installed."""


def chosen_forms(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        ValueError: an unknown form, or its extra is not installed.
    """
    for name in names:
        if name not in FORMS:
            raise ValueError(f"a form must be one of {', '.join(FORMS)}, got {shown(name)}.{nearest(name, FORMS)}")
        if FORMS[name].extra:
            require(FORMS[name].extra, f"the form {name}")
    return tuple(dict.fromkeys(names))


def available_forms() -> tuple[str, ...]:
    """The default forms whose extras are installed; of each other a line is logged."""
    for name in DEFAULT:
        if reason := lacking(FORMS[name].extra):
            _log.info(f"{', '.join(FORMS[name].files)} is left out: {reason}, then kdnas export STUDENT --forms {name}")
    return tuple(name for name in DEFAULT if not lacking(FORMS[name].extra))


def write_forms(draft: Draft, names: Sequence[str]) -> dict[str, Record]:
    """Write forms into a draft; of one that fails nothing is left, and its record says why."""
    records: dict[str, Record] = {}
    for name in names:
        form = FORMS[name]
        try:
            records[name] = form.write(draft)
        except Exception as error:  # other libraries may raise anything, and the student itself is sound
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            for file in form.files:
                (draft.folder / file).unlink(missing_ok=True)
            reason = plain(f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}", 400)
            records[name] = {"problem": reason}
            _log.warning(f"{form.files[0]} is left out: {reason}")
    return records


def forms_table(records: Mapping[str, Record]) -> str:
    """The records as lines of text."""
    lines = []
    for name, record in records.items():
        if "problem" in record:
            lines.append(f"{name:<8} left out: {record['problem']}")
            continue
        parts = [f"{record['bytes']:,} bytes"]
        if "milliseconds" in record:
            threads = record["threads"]
            parts.append(f"{record['milliseconds']:.3g} ms an image on {threads} thread{'s' * (threads != 1)}")
        parts += [f"{key} {record[key]:.2g}" for key in ("difference", "error") if key in record]
        lines.append(f"{name:<8} {record['file']}: {', '.join(parts)}")
    return "\n".join(lines)
