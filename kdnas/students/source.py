"""A student's network as one file of plain PyTorch code."""

import builtins
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.preprocessing import Preprocessing
from kdnas.runs.checkpoint import load_tensors
from kdnas.runs.folder import SOURCE, WEIGHTS
from kdnas.space import Blueprint
from kdnas.specs import Spec, resolve
from kdnas.students.card import form_of
from kdnas.students.definitions import Definitions, Import, bracketed
from kdnas.students.modules import importable
from kdnas.tasks.base import Answers

_HEADER = '''"""{kind} as plain PyTorch code, written by kdnas; it needs torch alone.

    from student import load

    student = load("weights.safetensors")
    {logits} = student(images)

Images are `[batch, {channels}, {size}]` with values in [0, 1]; they are normalised inside. The
names in the file are those of `Student().state_dict()`.
"""
'''

_STUDENT = '''class Student(nn.Module):
    """Images `[batch, {channels}, {size}]` with values in [0, 1] to logits `[batch, {classes}{positions}]`{more}."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
{layers}

    def forward(self, images: Tensor) -> {returned}:
        """{forward}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: the length of its header in eight bytes, the header in JSON, the numbers."""
    content = bytearray(Path(path).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        entries = {{k: v for k, v in json.loads(content[8:end]).items() if k != "__metadata__"}}
        tensors = {{}}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype = {{"F32": torch.float32, "I64": torch.int64}}[entry["dtype"]]
            numbers = bytearray(content[end + first : end + last]) or bytearray(8)
            tensors[name] = torch.frombuffer(numbers, dtype=dtype)[: math.prod(entry["shape"])].reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{{path}} is damaged or no safetensors file of this student.") from error
    return tensors


def load(path: str | Path) -> Student:
    """The student with the weights of a safetensors file, in eval mode."""
    student = Student()
    student.load_state_dict(read_weights(path), strict=True)
    return student.eval()


def main(arguments: list[str]) -> None:
    """Print the network, or {printed} for each image of a tensor that torch.save wrote."""
    student = load(Path(__file__).with_name("weights.safetensors"))
    if not arguments:
        print(student)
        print(f"{{sum(p.numel() for p in student.parameters()):,}} parameters, {{len(CLASS_NAMES)}} {answers}")
        return
    with torch.inference_mode():
{answer}


if __name__ == "__main__":
    main(sys.argv[1:])
'''

_CLASS = """        best = student(torch.load(arguments[0], weights_only=True)).softmax(1).max(1)
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{CLASS_NAMES[index]} {probability:.3f}")"""
_SHARES = """        classes = student(torch.load(arguments[0], weights_only=True)).argmax(1).flatten(1)
    for row in classes:
        shares = (row.bincount(minlength=len(CLASS_NAMES)) / len(row)).tolist()
        print(", ".join(f"{name} {share:.3f}" for name, share in zip(CLASS_NAMES, shares, strict=True) if share))"""
_VALUES = """        values = student(torch.load(arguments[0], weights_only=True))
    for row in values.flatten(2).mean(2).tolist() if values.dim() > 2 else values.tolist():
        print(", ".join(f"{name} {value:.4g}" for name, value in zip(CLASS_NAMES, row, strict=True)))"""
_OF_IMAGES = """        maps, images = student(torch.load(arguments[0], weights_only=True))
    for row, logits in zip(maps.argmax(1).flatten(1), images, strict=True):
        shares = [*(row.bincount(minlength=maps.shape[1]) / len(row)).tolist(), *logits.sigmoid().tolist()]
        print(", ".join(f"{name} {share:.3f}" for name, share in zip(CLASS_NAMES, shares, strict=True) if share))"""
_ANSWERS = {
    ("classes", False): ("An image classifier", "the class and its probability", _CLASS),
    ("classes", True): ("A classifier of pixels", "the share of its pixels of each class", _SHARES),
    ("values", False): ("A network", "its values", _VALUES),
    ("values", True): ("A network", "the means of its values over its pixels", _VALUES),
}

_IMPORTS = (
    Import("json"),
    Import("math"),
    Import("sys"),
    Import("pathlib", "Path"),
    Import("torch"),
    Import("torch", "nn"),
    Import("torch", "Tensor"),
)


def student_source(
    blueprint: Blueprint,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    answers: Answers = "classes",
    image_outputs: int = 0,
) -> str:
    """The network as readable Python code that imports torch and the standard library only.

    Copied are the classes of the layers and all they use: functions, base classes and constants, from kdnas and from
    the modules the layers come from. `Student` takes images as `preprocessing` does, and normalises inside with
    constants that are no part of its state dict, which has the names of `Network(blueprint)`. Where some of the last
    logits are of the whole image, it returns these beside the others, `[batch, image_outputs]`.

    Raises:
        ValueError: a layer is no class derived from nn.Module, its code cannot be found, or it needs a package
            other than torch.
    """
    check_modules(blueprint)
    makes = [module.make for _, layer in blueprint.named_layers() for module in nested_specs(layer.make)]
    own = {make.partition(":")[0].partition(".")[0] for make in makes}
    definitions = Definitions({"kdnas", *own}, reserved=("CLASS_NAMES", "Student", "load", "main", "read_weights"))
    for statement in _IMPORTS:
        definitions.name_import(statement)
    channels, height, width = len(preprocessing.mean), preprocessing.height, preprocessing.width
    size = "height, width" if blueprint.dense else f"{height}, {width}"
    kind, printed, answer = _ANSWERS[answers, blueprint.dense]
    if image_outputs:
        printed, answer = f"{printed}, and the probabilities of the whole image,", _OF_IMAGES
    student = _STUDENT.format(
        channels=channels,
        size=size,
        positions=", height, width" if blueprint.dense else "",
        forward=_forward(blueprint, height, width, definitions, image_outputs),
        returned="tuple[Tensor, Tensor]" if image_outputs else "Tensor",
        more=f" and `[batch, {image_outputs}]`" if image_outputs else "",
        classes=len(class_names) - image_outputs,
        answers=answers,
        answer=answer,
        printed=printed,
        layers="\n".join(_layer_lines(blueprint, preprocessing, definitions)),
    )
    names = [_literal(name) for name in class_names]
    parts = [
        *definitions.import_lines(),
        "",
        *bracketed("CLASS_NAMES = [", names, "]", 0),
        *(f"\n\n{text}" for text in definitions.texts()),
        "\n",
        student,
    ]
    logits = "logits, image_logits" if image_outputs else "logits"
    return _HEADER.format(channels=channels, size=size, kind=kind, logits=logits) + "\n" + "\n".join(parts)


def _forward(blueprint: Blueprint, height: int, width: int, definitions: Definitions, image_outputs: int) -> str:
    """The body of `Student.forward` after its quotation marks, for images of this size."""
    if blueprint.dense:
        enlarge = definitions.name("kdnas.blocks.basic", "enlarge")
        logits, more = f"{enlarge}({_call(blueprint, 'x', definitions)}, images)", ""
        if image_outputs:
            split = definitions.name("kdnas.blocks.basic", "split_logits")
            logits, more = f"{split}({logits}, {image_outputs})", ", and those of the whole image"
        return f'''Logits of every pixel{more}."""
        x = (images - self.mean) / self.std
        return {logits}'''
    resize = definitions.name("kdnas.blocks.basic", "resize")
    own = blueprint.image[1:]
    inner = "x" if own == (height, width) else f"{resize}(x, {own[0]}, {own[1]})"
    return f'''Logits; images of another size are resized."""
        x = ({resize}(images, {height}, {width}) - self.mean) / self.std
        return {_call(blueprint, inner, definitions)}'''


def _call(blueprint: Blueprint, x: str, definitions: Definitions) -> str:
    """The expression of what the head returns."""
    reads = blueprint.head.reads
    if not reads:
        return f"self.head(self.stages(self.stem({x})))"
    chained = definitions.name("kdnas.blocks.basic", "chained")
    return f"{chained}([*self.stages, self.head], {_literal(reads)}, self.stem({x}))"


def check_modules(blueprint: Blueprint) -> None:
    """Raise a ValueError unless every layer is a class derived from nn.Module with plain values as arguments.

    Arguments may be specs of such classes, whose modules the layer takes. A blueprint may come from a file; after this
    check, building its network calls nothing else.
    """
    for position, layer in blueprint.named_layers():
        for module in nested_specs(layer.make):
            target = resolve(module.make)
            if not (inspect.isclass(target) and issubclass(target, nn.Module)):
                raise ValueError(f"{module.make} at {position} must be a class derived from torch.nn.Module.")


def nested_specs(make: Spec) -> Iterator[Spec]:
    """The spec, and every spec among its arguments."""
    yield make
    for value in _flat(value for _, value in make.arguments):
        if isinstance(value, Spec):
            yield from nested_specs(value)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


def _layer_lines(blueprint: Blueprint, preprocessing: Preprocessing, definitions: Definitions) -> list[str]:
    def call(before: str, make: Spec, after: str, indent: int) -> list[str]:
        return layer_code(before, make, after, indent, definitions)

    lines = []
    for name in ("mean", "std"):
        values = [_literal(float(value)) for value in getattr(preprocessing, name)]
        before, after = f'self.register_buffer("{name}", torch.tensor([', "]).view(-1, 1, 1), persistent=False)"
        lines += bracketed(before, values, after, 8)
    lines += call("self.stem = ", blueprint.stem.make, "", 8)
    lines.append(" " * 8 + "self.stages = nn.Sequential(" + ("" if blueprint.stages else ")"))
    for stage in blueprint.stages:
        lines.append(" " * 12 + "nn.Sequential(" + ("" if stage else "),"))
        for layer in stage:
            lines += call("", layer.make, ",", 16)
        lines += [" " * 12 + "),"] if stage else []
    lines += [" " * 8 + ")"] if blueprint.stages else []
    return lines + call("self.head = ", blueprint.head.make, "", 8)


def layer_code(before: str, make: Spec, after: str, indent: int, definitions: Definitions) -> list[str]:
    """The lines of a call that makes a layer, between two texts."""
    order = list(inspect.signature(resolve(make.make)).parameters)
    arguments = sorted(make.arguments, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    start = f"{before}{_class(make, definitions)}("
    if not any(isinstance(value, Spec) for value in _flat(value for _, value in arguments)):
        return bracketed(start, [f"{name}={_literal(value)}" for name, value in arguments], f"){after}", indent)
    space = " " * indent
    lines = [space + start]
    for name, value in arguments:
        lines += _nested(f"{name}=", value, indent + 4, definitions)
    return [*lines, f"{space}){after}"]


def _nested(before: str, value: Any, indent: int, definitions: Definitions) -> list[str]:
    """An argument, or an entry of one, that may hold modules; one a line."""
    space = " " * indent
    if isinstance(value, Spec):
        return layer_code(before, value, ",", indent, definitions)
    if not any(isinstance(leaf, Spec) for leaf in _flat((value,))):
        return [f"{space}{before}{_literal(value)},"]
    inner = [line for entry in value for line in _nested("", entry, indent + 4, definitions)]
    return [f"{space}{before}(", *inner, f"{space}),"]


def _class(make: Spec, definitions: Definitions) -> str:
    module, _, qualified = make.make.partition(":")
    root, *inner = qualified.split(".")
    target = resolve(make.make)
    if getattr(nn, target.__name__, None) is target:
        return f"nn.{target.__name__}"
    name = definitions.name_import(Import(module, root)) if importable(module) else definitions.name(module, root)
    return ".".join([name, *inner])


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, str) and '"' not in value:
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def load_source(folder: str | Path) -> nn.Module:
    """The module that the folder's student.py builds from its weights, while it cannot import kdnas.

    Raises:
        ValueError: it imports more than torch and the standard library, does not run, or is damaged.
    """

    def import_torch_only(name: str, *rest: Any, **more: Any) -> Any:
        if not importable(name) and name.partition(".")[0] != "safetensors":  # older files load with it
            raise ImportError(f"{SOURCE} imports {name!r}, which users of the student may not have.")
        return builtins.__import__(name, *rest, **more)

    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) else len(value)

    # len is the batch size made a number, which the exporter would take for a constant of the graph.
    known = {**vars(builtins), "__import__": import_torch_only, "len": length}
    load_tensors(Path(folder, WEIGHTS), "Export the student again.")  # compares the checksum; the code does not
    code = compile(form_of(Path(folder), SOURCE).read_text(encoding="utf-8"), SOURCE, "exec")
    names: dict[str, Any] = {"__name__": "student", "__builtins__": known}
    try:
        with torch.random.fork_rng(devices=[]):
            exec(code, names)
            return names["load"](Path(folder, WEIGHTS))
    except Exception as error:
        raise ValueError(f"{SOURCE} does not run alone ({type(error).__name__}: {shortened(error)}).") from error


def shortened(error: Exception) -> str:
    """The first 400 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:400]
