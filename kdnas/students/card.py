"""The card of a student, `student.json`: its network, cost, input, classes and origin."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, final

from kdnas.architecture import Architecture
from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.runs.files import CHECKSUM, FORMAT, Damaged, current_folder, read_json, signed
from kdnas.runs.folder import CARD, GRAPH, SOURCE
from kdnas.runs.schema import mismatch
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import nearest
from kdnas.tables import structure, table_of, unstructure
from kdnas.tasks.base import PIPELINES, Answers, Task
from kdnas.values import shown

FINGERPRINT = "fingerprint"  # of the data, in a card's origin
_FILES = "files"  # SHA-256 by name of the files beside the card
_AGAIN = "Export the student again."


def input_of(network: Network, data: Data) -> Preprocessing:
    """How a student takes images: of the size that it computes on, normalised as the data."""
    _, height, width = network.blueprint.image
    return replace(data.preprocessing, height=height, width=width)


@final
@dataclass(frozen=True, kw_only=True)
class Card:
    """The description of a student.

    Attributes:
        architecture: its choices, or None for a network that belongs to no space.
        space: the table of its space, or None.
        blueprint: its network.
        cost: params and macs, as ranked.
        preprocessing: how images become its input.
        class_names: one per logit.
        answers: what a logit is: of a class, or a value.
        measure: name of what the origin calls accuracy: the measure of the student's task.
        image_outputs: how many of the last logits are of the whole image, where the others are of pixels.
        pipeline: its purpose as hubs of models call it; empty for what follows from `answers` and the blueprint.
        origin: where it comes from (run, place, scorer, accuracy), plain JSON.
        forms: by name, what is recorded of each form that lies beside the card; see `kdnas.students.forms`. It is no
            part of what makes two cards equal.

    Raises:
        ValueError: the preprocessing is for another number of channels than the network, or there are no class names.
    """

    architecture: Architecture | None
    space: Mapping[str, Any] | None
    blueprint: Blueprint
    cost: Cost
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    answers: Answers = "classes"
    measure: str = Task.measure
    image_outputs: int = 0
    pipeline: str = ""
    origin: Mapping[str, Any] = field(default_factory=dict)
    forms: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        channels = self.blueprint.image[0]
        if channels != len(self.preprocessing.mean):
            raise ValueError(
                f"`preprocessing` must have a mean and a std for each of the network's {channels} channels, got "
                f"{len(self.preprocessing.mean)}."
            )
        if not self.class_names:
            raise ValueError("`class_names` must not be empty: a student has a name for each logit.")
        if not self.pipeline:
            object.__setattr__(self, "pipeline", self._usual_pipeline)
        if not 0 <= self.image_outputs < len(self.class_names) or (self.image_outputs and not self.blueprint.dense):
            raise ValueError(
                f"`image_outputs` must be fewer than the {len(self.class_names)} logits of a network for every pixel, "
                f"got {self.image_outputs}."
            )

    @property
    def _usual_pipeline(self) -> str:
        return PIPELINES[self.answers, self.blueprint.dense]

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
            data: gives preprocessing, class names, and the fingerprint that is added to the origin.
            origin: where the student comes from, plain JSON.
            architecture: its choices, for a subnet of a space.
            space: that space.
        """
        return cls(
            architecture=architecture,
            space=None if space is None else table_of(space),
            blueprint=network.blueprint,
            cost=cost(network.blueprint),
            preprocessing=input_of(network, data),
            class_names=data.class_names,
            answers=data.task.answers,
            measure=data.task.measure,
            image_outputs=data.task.image_outputs,
            pipeline=data.task.pipeline,
            origin={**origin, FINGERPRINT: data.fingerprint},
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Card.

        Its keys `format`, `input` and `output` describe how to use the files beside it; `to_text` adds their checksums.
        """
        p = self.preprocessing
        size: list[Any] = ["height", "width"] if self.blueprint.dense else [p.height, p.width]
        return {
            "format": FORMAT,
            "architecture": None if self.architecture is None else dict(self.architecture),
            "space": None if self.space is None else dict(self.space),
            "cost": self.cost._asdict(),
            "input": {
                "name": "images",
                "shape": ["batch", len(p.mean), *size],
                "dtype": "float32",
                "values": f"0 to 1, not normalised: {SOURCE} and {GRAPH} do that inside",
            },
            "output": {
                "name": "logits",
                "shape": [
                    "batch",
                    len(self.class_names) - self.image_outputs,
                    *(size if self.blueprint.dense else []),
                ],
                **({"image_logits": ["batch", self.image_outputs]} if self.image_outputs else {}),
            },
            "preprocessing": unstructure(p),
            "class_names": list(self.class_names),
            **({"answers": self.answers} if self.answers != "classes" else {}),
            **({"measure": self.measure} if self.measure != Task.measure else {}),
            **({"image_outputs": self.image_outputs} if self.image_outputs else {}),
            **({"pipeline": self.pipeline} if self.pipeline != self._usual_pipeline else {}),
            "origin": dict(self.origin),
            "forms": dict(self.forms),
            "blueprint": self.blueprint.to_json(),
        }

    @property
    def checksum(self) -> str:
        """Of what the student computes: its blueprint and preprocessing; kept beside its weights."""
        computed = [self.blueprint.to_json(), unstructure(self.preprocessing)]
        return hashlib.blake2b(json.dumps(computed, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_text(self, files: Mapping[str, Path] | None = None) -> str:
        """The text of `student.json`.

        Args:
            files: the files beside it, by name, whose SHA-256 it will hold.

        Raises:
            ValueError: the origin holds something that JSON cannot, or would change.
        """
        content = self.to_json()
        try:
            revived = json.loads(json.dumps(content, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"`Card.origin` must be plain JSON ({error}).") from error
        if revived != content:
            raise ValueError("`Card.origin` must be plain JSON: text keys, lists, finite numbers.")
        digests = {name: digest_of(path) for name, path in sorted((files or {}).items())}
        whole = signed(content | ({_FILES: digests} if digests else {}))
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, value: Any) -> "Card":
        """The Card that `to_json` wrote.

        Raises:
            ValueError: a key is missing or unknown, a value has another type, or the format is a later one.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"{CARD} must be a JSON object, got {type(value).__name__}.")
        if value.get("format") not in range(1, FORMAT + 1):
            raise ValueError(
                f"`format` must be 1 to {FORMAT}, got {value.get('format')!r}. Read it with the version of kdnas that "
                "wrote it."
            )
        known = ["format", "input", "output", _FILES, CHECKSUM, *cls.__dataclass_fields__]
        for key in value:
            if key not in known:
                raise ValueError(f"unknown key {shown(key)}.{nearest(key, known)}")
        for key in cls.__dataclass_fields__:
            if key not in value and key not in ("forms", "answers", "measure", "image_outputs", "pipeline"):
                raise ValueError(f"`{key}` is missing.")
        for key, kind in (("class_names", list), ("origin", dict), ("blueprint", dict), ("cost", dict)):
            if not isinstance(value[key], kind):
                raise ValueError(f"`{key}` must be a JSON {kind.__name__}, got {value[key]!r}.")
        forms = value.get("forms", {})
        if mismatch(forms, dict[str, _Form]):
            raise ValueError(f"`forms` must be a JSON dict of dicts, with texts for files, got {forms!r:.80}.")
        architecture, space = value["architecture"], value["space"]
        try:
            return cls(
                architecture=None if architecture is None else Architecture(architecture),
                space=None if space is None else dict(space),
                blueprint=Blueprint.from_json(value["blueprint"]),
                cost=Cost(**structure(value["cost"], dict[str, int])),
                preprocessing=structure(value["preprocessing"], Preprocessing),
                class_names=structure(value["class_names"], tuple[str, ...]),
                answers=structure(value.get("answers", "classes"), Answers),
                measure=structure(value.get("measure", Task.measure), str),
                image_outputs=structure(value.get("image_outputs", 0), int),
                pipeline=structure(value.get("pipeline", ""), str),
                origin=value["origin"],
                forms=forms,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a value has the wrong form ({type(error).__name__}: {error}).") from error


def form_of(student: Path, name: str) -> Path:
    """The path of a form of a student, such as `student.onnx`, whose checksum is the one in the card.

    Cards that were written before there were checksums have none, and nothing is compared.

    Raises:
        ValueError: there is no such form.
        Damaged: it has another checksum, or the card cannot be read.
    """
    folder = current_folder(student)
    path, card = folder / name, folder / CARD
    if not path.is_file():
        raise ValueError(f"{student} has no {name}. Export or retrain the student with every form.")
    files = read_json(card, _Files, _AGAIN).get(_FILES, {}) if card.exists() else {}
    if name in files and digest_of(path) != files[name]:
        raise Damaged(student / name, f"its checksum is another than the one in {CARD}", _AGAIN)
    return path


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class _Form(TypedDict, total=False):
    file: str


class _Files(TypedDict, total=False):
    files: dict[str, str]
