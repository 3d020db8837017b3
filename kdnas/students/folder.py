"""A student as a folder that needs no kdnas: what it is, its weights, its network as code and as an ONNX graph."""

import builtins
import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdnas.architecture import Architecture
from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.data.base import Data, normalise
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.runs.files import current_folder, new_folder
from kdnas.runs.folder import CARD, GRAPH, INTEGERS, SOURCE, WEIGHTS
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import nearest
from kdnas.students.definitions import importable
from kdnas.students.source import check_modules, student_source
from kdnas.tables import structure, table_of, unstructure

TOLERANCE = 1e-5

_FORMAT = 1
_OPSET = 20
_NUM_INPUTS = 64
_BATCH_SIZES = (1, 3)


@final
@dataclass(frozen=True, kw_only=True)
class Card:
    """What a student is.

    Attributes:
        architecture: its choices, or None for a network that is of no space.
        space: the table of its space, or None.
        blueprint: its network.
        cost: params and macs, as ranked.
        preprocessing: how images become its input.
        class_names: one per logit.
        origin: where it comes from (run, place, scorer, accuracy), plain JSON.
    """

    architecture: Architecture | None
    space: Mapping[str, Any] | None
    blueprint: Blueprint
    cost: Cost
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        channels = self.blueprint.image[0]
        if channels != len(self.preprocessing.mean):
            raise ValueError(
                f"the network takes {channels} channels, and the preprocessing normalises "
                f"{len(self.preprocessing.mean)}. Give a mean and a std for each."
            )
        if not self.class_names:
            raise ValueError("a student needs the names of its classes, got none.")

    @classmethod
    def of(
        cls,
        network: Network,
        data: Data,
        origin: Mapping[str, Any],
        architecture: Architecture | None = None,
        space: SearchSpace | None = None,
    ) -> "Card":
        """The card of a network for the classes and images of a data set.

        Args:
            network: the student.
            data: gives preprocessing and class names.
            origin: where the student comes from, plain JSON.
            architecture: its choices, for a subnet of a space.
            space: that space.
        """
        return cls(
            architecture=architecture,
            space=None if space is None else table_of(space),
            blueprint=network.blueprint,
            cost=cost(network.blueprint),
            preprocessing=data.preprocessing,
            class_names=data.class_names,
            origin=origin,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Card.

        Its keys `format`, `input` and `output` say how to use the files beside it.
        """
        p = self.preprocessing
        return {
            "format": _FORMAT,
            "architecture": None if self.architecture is None else dict(self.architecture),
            "space": None if self.space is None else dict(self.space),
            "cost": self.cost._asdict(),
            "input": {
                "name": "images",
                "shape": ["batch", len(p.mean), p.height, p.width],
                "dtype": "float32",
                "values": f"0 to 1, not normalised: {SOURCE} and {GRAPH} do that inside",
            },
            "output": {"name": "logits", "shape": ["batch", len(self.class_names)]},
            "preprocessing": unstructure(p),
            "class_names": list(self.class_names),
            "origin": dict(self.origin),
            "blueprint": self.blueprint.to_json(),
        }

    @classmethod
    def from_json(cls, value: Any) -> "Card":
        """The Card that `to_json` wrote.

        Raises:
            ValueError: a key is missing or unknown, a value has another type, or the format is a later one.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"a student is a JSON object, got {type(value).__name__}.")
        if value.get("format") != _FORMAT:
            raise ValueError(
                f"a student has format {_FORMAT}, got {value.get('format')!r}. Read it with the kdnas that wrote it."
            )
        known = ["format", "input", "output", *cls.__dataclass_fields__]
        for key in value:
            if key not in known:
                raise ValueError(f"unknown key {key!r}.{nearest(key, known)}")
        for key in cls.__dataclass_fields__:
            if key not in value:
                raise ValueError(f"{key} is missing.")
        for key, kind in (("class_names", list), ("origin", dict), ("blueprint", dict), ("cost", dict)):
            if not isinstance(value[key], kind):
                raise ValueError(f"{key} must be a JSON {kind.__name__}, got {value[key]!r}.")
        architecture, space = value["architecture"], value["space"]
        try:
            return cls(
                architecture=None if architecture is None else Architecture(architecture),
                space=None if space is None else dict(space),
                blueprint=Blueprint.from_json(value["blueprint"]),
                cost=Cost(**structure(value["cost"], dict[str, int])),
                preprocessing=structure(value["preprocessing"], Preprocessing),
                class_names=structure(value["class_names"], tuple[str, ...]),
                origin=value["origin"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a value has the wrong form ({type(error).__name__}: {error}).") from error


def write_student(
    folder: str | Path,
    network: Network,
    card: Card,
    *,
    deploy: bool = True,
    more: Callable[[Path], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Write a student folder: student.json, weights.safetensors, student.py, student.onnx.

    The folder appears whole or not at all, and replaces only a student. The files are read back and compared before:
    the network, student.py with the weights, and student.onnx must give the same logits on 64 images at batch sizes 1
    and 3, within 1e-5 of the largest logit of an image or of 1, whichever is more; where no logit reaches 0.1, of
    the largest of all. The network's parameters and multiply-accumulates must equal the card's.

    Args:
        folder: where to write.
        network: the student; written in float32, unchanged itself.
        card: what it is.
        deploy: write and compare every form; False writes student.json and weights.safetensors alone, which is all that
            kdnas reads: for teachers, snapshots and controls.
        more: writes another form into the folder (`student-int8.onnx`) and says what it measured.

    Returns:
        Largest difference of the logits by file, in the units above, and the largest logit; empty without `deploy`.

    Raises:
        ValueError: a comparison fails, the network cannot be expressed in one of the forms, or the folder holds
            something else. Then nothing is written.
    """
    folder = Path(folder)
    check_place(folder)
    if network.blueprint != card.blueprint:
        raise ValueError("the network was built from another blueprint than the card's. Pass card.blueprint's network.")
    network = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    text = json.dumps(_json(card), indent=2, ensure_ascii=False) + "\n"
    parity = _Parity(network, card) if deploy else None
    with new_folder(folder) as draft:
        (draft / CARD).write_text(text, encoding="utf-8")
        (draft / WEIGHTS).write_bytes(save({name: t.contiguous().clone() for name, t in network.state_dict().items()}))
        if parity is None:
            return {}
        source = student_source(card.blueprint, card.preprocessing, card.class_names)
        (draft / SOURCE).write_text(source, encoding="utf-8")
        student = load_source(draft)
        parity.compare(SOURCE, student)
        (draft / GRAPH).write_bytes(graph_of(student, card.preprocessing))
        parity.compare(GRAPH, _runtime(draft / GRAPH))
        measured = {} if more is None else more(draft)
    return parity.found | measured


def read_student(folder: str | Path) -> tuple[Network, Card]:
    """The network, in eval mode, and what it is.

    Raises:
        ValueError: a file is missing, damaged, or belongs to another student.
    """
    folder = Path(folder)
    held = current_folder(folder)
    for path in (held, held / CARD, held / WEIGHTS):
        if not path.exists():
            raise ValueError(f"{folder} is no student: there is no {path.name}. Write one with `kdnas export`.")
    try:
        card = Card.from_json(json.loads((held / CARD).read_text(encoding="utf-8")))
        check_modules(card.blueprint)
        with torch.random.fork_rng(devices=[]):
            network = Network(card.blueprint)
    except Exception as error:  # a layer called with what a damaged file says may raise anything
        raise ValueError(f"{folder / CARD} is damaged or was written by something else: {error}") from error
    try:
        network.load_state_dict(load_file(held / WEIGHTS), strict=True)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}). Export the student again.") from error
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} holds the weights of another network than {CARD}: {_shortened(str(error))}"
        ) from error
    return network.eval(), card


def load_source(folder: str | Path) -> nn.Module:
    """The module that the folder's student.py makes of its weights, without kdnas within its reach.

    Raises:
        ValueError: it imports more than torch and the standard library, or does not run.
    """

    def only_torch(name: str, *rest: Any, **more: Any) -> Any:
        if not importable(name) and name.partition(".")[0] != "safetensors":
            raise ImportError(f"{SOURCE} imports {name!r}, which whoever uses the student may not have.")
        return builtins.__import__(name, *rest, **more)

    def length(held: Any) -> Any:
        return held.shape[0] if isinstance(held, Tensor) else len(held)

    # len is the batch size made a number, which the exporter would take for a constant of the graph.
    known = {**vars(builtins), "__import__": only_torch, "len": length}
    code = compile(Path(folder, SOURCE).read_text(encoding="utf-8"), SOURCE, "exec")
    names: dict[str, Any] = {"__name__": "student", "__builtins__": known}
    try:
        with torch.random.fork_rng(devices=[]):
            exec(code, names)
            return names["load"](Path(folder, WEIGHTS))
    except Exception as error:
        raise ValueError(f"{SOURCE} does not run alone ({type(error).__name__}: {_shortened(str(error))}).") from error


def check_place(folder: Path) -> None:
    """Raise a ValueError when the folder holds something that is no student."""
    for parent in folder.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{folder} cannot be made: {parent} is a file. Write elsewhere.")
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} - {"__pycache__"} if folder.is_dir() else {folder.name}
    foreign = sorted(names - {CARD, WEIGHTS, SOURCE, GRAPH, INTEGERS}) if CARD in names else sorted(names)
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which is no part of a student. Remove it, or write elsewhere."
        )


def _json(card: Card) -> dict[str, Any]:
    content = card.to_json()
    try:
        revived = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"a student's card holds plain JSON only ({error}).") from error
    if revived != content:
        raise ValueError("a student's card holds plain JSON only: text keys, lists, finite numbers.")
    return content


def graph_of(student: nn.Module, preprocessing: Preprocessing) -> bytes:
    """A module that takes images `[batch, channels, height, width]` in [0, 1] and gives logits, as an ONNX graph.

    Raises:
        ValueError: it cannot be expressed, or for one batch size only.
    """
    import onnx  # slow to import, and reading a student does without

    # A batch of one would be taken for a constant.
    example = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; the graph is compared below
            program = torch.onnx.export(
                student,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=_OPSET,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"the network cannot be written as an ONNX graph: {_shortened(str(error))} Use operations that ONNX has."
        ) from error
    if model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ValueError(
            f"{GRAPH} would take one batch size only: some layer makes a number of it. Write x.shape[0] or -1 there, "
            "not int(x.shape[0])."
        )
    _strip(model)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _strip(message: Any) -> None:
    """Remove, at every depth, what the exporter notes about where the code was: paths of this machine."""
    for descriptor, value in message.ListFields():
        if descriptor.name in ("doc_string", "metadata_props"):
            message.ClearField(descriptor.name)
        elif descriptor.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _runtime(graph: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot run {GRAPH} ({_shortened(str(error))}).") from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@final
class _Parity:
    """What the network computes, against which its other forms are held.

    Raises:
        ValueError: the network is not what its card promises, or computes nothing that could be compared.
    """

    def __init__(self, network: Network, card: Card) -> None:
        p = card.preprocessing
        _check_promises(network, card)
        rng = torch_rng("parity")
        # Brightness and contrast of their own, or pooling would make all images one.
        low, high = torch.rand(2, _NUM_INPUTS, 1, 1, 1, generator=rng)
        self._images = low + (high - low) * torch.rand(_NUM_INPUTS, len(p.mean), p.height, p.width, generator=rng)
        with torch.inference_mode():
            self._logits = network(normalise(self._images, p)).logits
        if not self._logits.isfinite().all():
            raise ValueError("the student gives logits that are not finite. Train it again with a lower learning rate.")
        sizes = self._logits.abs().flatten(1).amax(1)
        largest = float(sizes.amax())
        if largest == 0:
            raise ValueError("every logit of the student is zero, so that nothing can be compared. Train it first.")
        # A logit is a sum: it is rounded like its largest terms, which the largest logit of the image stands for.
        self._scale = sizes.clamp(min=1) if largest >= 0.1 else torch.full_like(sizes, largest)
        self.found = {"largest_logit": largest}

    def compare(self, name: str, form: Callable[[Tensor], Tensor]) -> None:
        """Refuse a form that gives other logits at some batch size."""
        difference = 0.0
        for size in _BATCH_SIZES:
            try:
                with torch.inference_mode():
                    logits = torch.cat([form(batch) for batch in self._images.split(size)])
            except Exception as error:
                raise ValueError(f"{name} cannot be run on {size} images ({_shortened(str(error))}).") from error
            if logits.shape != self._logits.shape:
                raise ValueError(
                    f"{name} gives logits of shape {tuple(logits.shape)}, not {tuple(self._logits.shape)}."
                )
            apart = (logits - self._logits).abs().flatten(1).amax(1) / self._scale
            difference = max(difference, float(apart.nan_to_num(math.inf).amax()))
        if difference > TOLERANCE:
            raise ValueError(
                f"{name} gives other logits than the network: {difference:.2g} apart, {TOLERANCE:g} is allowed. "
                "Look for a layer that depends on the batch, on the mode or on the device."
            )
        self.found[name] = difference


def _check_promises(network: Network, card: Card) -> None:
    # On tensors without storage, as costs are measured everywhere: devices differ in the operations they count.
    bare = copy.deepcopy(network).to("meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        logits = bare(torch.empty(1, *network.blueprint.image, device="meta")).logits
    measured = Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)
    if measured != card.cost:
        raise ValueError(
            f"the student has {measured.params:,} params and {measured.macs:,} macs, and its card promises "
            f"{card.cost.params:,} and {card.cost.macs:,}. Take the cost from kdnas.costs.count.cost(blueprint)."
        )
    if logits.shape[1] != len(card.class_names):
        raise ValueError(
            f"the network has {logits.shape[1]} logits, and its card names {len(card.class_names)} classes."
        )


def _shortened(message: str) -> str:
    return " ".join(message.split())[:400]
