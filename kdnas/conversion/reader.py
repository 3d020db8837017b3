"""Reads an exported program as a list of the graph block's operations."""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx, nn

from kdnas.conversion.axes import Axes, axis_size, shuffled_groups, significant, whole
from kdnas.conversion.channels import Operation, output_shape
from kdnas.conversion.export import BATCH, Windows, drop_rate

_SUPPORTED = (
    "Supported are convolutions from square maps to square maps, batch, group and layer norms over channels, linear "
    "layers, pooling, resizes by whole factors, sums and products, concatenation, splitting and shuffling of channels, "
    "dropout, stochastic depth and the usual activations."
)


class TracedOperation(NamedTuple):
    """One operation of the source network.

    Attributes:
        operation: with the numbers of its input tensors, which are the numbers of the operations that compute them.
        module: path of the source's module, or of the parameter.
        shape: of its output, batch first.
        weights: its tensors by the names of the graph block's module.
        note: what a report has to say about the weights, or empty.
        origins: the source's parameters and buffers that the weights come from, by their memory.
    """

    operation: Operation
    module: str
    shape: tuple[int, ...]
    weights: Mapping[str, Tensor] = {}
    note: str = ""
    origins: frozenset[int] = frozenset()


class UnknownOperation(ValueError):
    """An operation that is not known, but may be composed of known ones."""


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the images.

    Attributes:
        tensor: its value.
        origins: the parameters and buffers it is computed from, by their memory.
        learned: whether one of them is a parameter.
        name: of the parameter or buffer that it is; empty for a computed tensor.
    """

    tensor: Tensor
    origins: frozenset[int] = frozenset()
    learned: bool = False
    name: str = ""


class _Claim(NamedTuple):
    """Who uses a weight: path and call of the module, number of the operation, and which part of a norm it is."""

    path: str
    call: str
    number: int
    part: str


@dataclass(frozen=True)
class View:
    """The output of an operation, by its number, with its axes in another order or shape."""

    number: int
    axes: Axes

    @property
    def channels(self) -> int:
        """The number of channels in it."""
        return math.prod(f.size for axis in self.axes for f in axis if f.dim == "C")


@final
class Reader:
    """Reads an exported program node by node.

    Args:
        module: the network.
        program: the network as exported.
        image: channels, height and width.
        handlers: by the name of an operation of PyTorch, a function of this reader and the operation's arguments that
            returns the output: a view, or a list with views.
        dense: whether the logits are maps.
    """

    def __init__(
        self,
        module: nn.Module,
        program: torch.export.ExportedProgram,
        image: tuple[int, int, int],
        handlers: Mapping[str, Callable[..., Any]],
        *,
        dense: bool = False,
    ) -> None:
        self.program, self.image, self.handlers, self.dense = program, image, handlers, dense
        self.modules = dict(module.named_modules())
        self.traced = [TracedOperation(Operation("images", (), ()), "", (BATCH, *image))]
        self.values: dict[fx.Node, Any] = {}
        self.roots: dict[fx.Node, fx.Node] = {}  # whose memory a node's output may share
        self.node = next(iter(program.graph.nodes))
        self.owners: dict[int, _Claim] = {}
        self.materials: dict[tuple[str, int, Axes], int] = {}
        self.windows = Windows(module, image)

    def read(self) -> list[TracedOperation]:
        """See `trace`."""
        self._read_inputs()
        outputs: list[Any] = []
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "call_function":
                self.values[node] = self._call()
            elif node.op == "get_attr":
                self.values[node] = None  # the graph of an operation on graphs, which no handler takes
            elif node.op == "output":
                outputs = [value for value in fx.node.map_arg(node.args[0], lambda n: self.values[n])]
        if len(outputs) != 1 or not isinstance(outputs[0], View):
            raise ValueError("the network must return one tensor of logits that depends on the images.")
        return self._used(self.map(outputs[0]) if self.dense else self.vector(outputs[0]))

    def _read_inputs(self) -> None:
        """Parameters, buffers, constants and the images."""
        signature = self.program.graph_signature
        tensors = {**self.program.constants, **self.program.state_dict}
        parameters = signature.inputs_to_parameters
        constants = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                name = parameters.get(node.name) or constants.get(node.name)
                if name is None:
                    self.values[node] = View(0, whole(self.image[0], self.image[1], BATCH))
                    continue
                tensor = tensors[name].detach()
                origins = frozenset({tensor.data_ptr()} if tensor.numel() else ())
                self.values[node] = Constant(tensor, origins, node.name in parameters, name)

    def _call(self) -> Any:
        """The value of a call: a view of an operation's output, a constant, or a list of these."""
        node, target = self.node, self.node.target
        if target is operator.getitem:
            source, index = node.args
            if source in self.roots:
                self.roots[node] = self.roots[source]
            return self.values[source][index]
        name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else str(target)
        arguments = [fx.node.map_arg(a, lambda n: self.values[n]) for a in _arguments(node)]
        tensors = [value for value in _flat(arguments) if isinstance(value, View | Constant)]
        if name.startswith(("_assert", "sym_")):
            return None
        in_place = name.endswith("_") and not name.endswith("__") and name != "detach_"
        if not any(isinstance(value, View) for value in tensors):
            return self._constant(arguments, [t for t in tensors if isinstance(t, Constant)], in_place)
        handler = self.handlers.get(name.rstrip("_") if in_place else name)
        if handler is None or (in_place and not isinstance(arguments[0], View)):
            raise UnknownOperation(self._message(f"the operation {name}"))
        value = handler(self, *arguments)
        self._follow_memory(value, in_place)
        shape = tuple(self.output().shape) if isinstance(value, View) else ()
        if isinstance(value, View) and tuple(map(axis_size, value.axes)) != shape and "expand" not in name:
            raise self.refusal("a tensor that is expanded other than by a sum or product")
        return value

    def _constant(self, arguments: list[Any], tensors: list[Constant], in_place: bool) -> Any:
        """What a call computes from constants alone."""
        target: Any = self.node.target
        if in_place:
            raise self.refusal("it changes its own tensors in evaluation mode, which")
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise self.refusal("it draws random numbers in evaluation mode, which")
        values = [_map(a, lambda c: c.tensor if isinstance(c, Constant) else c) for a in arguments]
        schema = getattr(target, "_schema", _NO_SCHEMA).arguments
        keywords = {a.name: value for a, value in zip(schema, values, strict=bool(schema)) if a.kwarg_only}
        with torch.no_grad():
            result = target(*values[: len(values) - len(keywords)], **keywords)
        origins = frozenset[int]().union(*(constant.origins for constant in tensors))
        learned = any(constant.learned for constant in tensors)
        return _map(result, lambda t: Constant(t, origins, learned) if isinstance(t, Tensor) else t)

    def _follow_memory(self, value: Any, in_place: bool) -> None:
        """Note which outputs share memory; after a change in place, the changed tensor has the new value.

        Raises:
            ValueError: another view of the changed tensor is read later.
        """
        source = self.node.args[0]
        if not isinstance(source, fx.Node):
            return
        root = self.roots.get(source, source)
        returns = getattr(self.node.target, "_schema", _NO_SCHEMA).returns
        if in_place or any(r.alias_info for r in returns) or "dropout" in str(self.node.target):
            self.roots[self.node] = root
        if not in_place:
            return
        before = self.values[source]
        for other in [root, *(node for node, of in self.roots.items() if of is root)]:
            if other is self.node:
                continue
            if self.values[other] == before:
                self.values[other] = value
            elif any(user > self.node for user in other.users):
                raise UnknownOperation(
                    self._message("a change in place of a tensor of which another view is read later")
                )

    def _used(self, last: int) -> list[TracedOperation]:
        """The operations that the last one depends on, numbered anew."""
        needed = {last}
        for number in range(last, 0, -1):
            if number in needed:
                needed.update(self.traced[number].operation.inputs)
        if 0 not in needed or last == 0:
            raise ValueError("the network's logits do not depend on the images.")
        numbers = {old: new for new, old in enumerate(sorted(needed))}
        return [
            row._replace(
                operation=row.operation._replace(inputs=tuple(numbers[number] for number in row.operation.inputs))
            )
            for number, row in enumerate(self.traced)
            if number in numbers
        ]

    def _message(self, what: str) -> str:
        path, kind = self._module()
        place = f"{path} ({kind})" if path else f"the network's forward ({kind})"
        return f"{place}: {what} cannot be converted. {_SUPPORTED}"

    def refusal(self, what: str) -> ValueError:
        """The error for a call that cannot be converted, naming its module."""
        return ValueError(self._message(what))

    def _module(self) -> tuple[str, str]:
        """The path and the class of the innermost module of the current call."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        path, kind = stack[-1] if stack else ("", "")
        return path, (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]

    def emit(self, op: str, inputs: Sequence[int], values: Sequence[Any] = (), **weights: Constant) -> int:
        """Append an operation; its number.

        Raises:
            ValueError: weights that another operation has already.
        """
        operation = Operation(op, tuple(inputs), tuple(values))
        shapes = [self.traced[number].shape for number in inputs]
        channels, side = output_shape(operation, [(shape[1], shape[2] if len(shape) > 2 else 0) for shape in shapes])
        if side < 0 or channels < 1:
            raise self.refusal(f"the operation {op} without an output")
        path, _ = self._module()
        main = weights.get("weight")
        if main is not None and main.name:
            owner = main.name if op in ("scale", "shift") else main.name.rpartition(".")[0]
            path = owner if not path or owner.startswith(f"{path}.") else path
        computed = sorted(kind for kind, constant in weights.items() if constant.learned and not constant.name)
        note = f"its {' and '.join(computed)}, computed in the source, becomes a plain tensor" if computed else ""
        self._claim(op, path, weights)
        self.traced.append(
            TracedOperation(
                operation,
                path,
                (BATCH, channels, *(side,) * 2 * bool(side)),
                {kind: constant.tensor for kind, constant in weights.items()},
                note,
                frozenset[int]().union(*(constant.origins for constant in weights.values())),
            )
        )
        return len(self.traced) - 1

    def _claim(self, op: str, path: str, weights: Mapping[str, Constant]) -> None:
        for kind, constant in weights.items():
            if not (constant.learned or kind.startswith("running")):
                continue
            # A norm written out in one call computes its factor and its summand from the same weights.
            part = op if op in ("scale", "shift") and not constant.name else ""
            claim = _Claim(path, self._call_key(), len(self.traced), part)
            for origin in constant.origins:
                first = self.owners.setdefault(origin, claim)
                same, parts = first.call == claim.call, {first.part, claim.part}
                if first.number != claim.number and not (same and parts == {"scale", "shift"}):
                    again = "uses a weight more than once" if same else "is called more than once"
                    again = again if first.path == path else f"has the weights of {first.path}"
                    place = path or "the network's forward"
                    raise ValueError(
                        f"{place} {again}, so its places share weights, which a converted network cannot: "
                        "each place would get a copy. Give each place weights of its own, or convert another one."
                    )

    def _call_key(self) -> str:
        """The current call of a module; another one of the same module has another key."""
        return next(reversed(self.node.meta.get("nn_module_stack", {})), "")

    def whole(self, number: int) -> View:
        """An operation's output with its own axes."""
        shape = self.traced[number].shape
        return View(number, whole(shape[1], shape[2] if len(shape) > 2 else 0, BATCH))

    def map(self, view: Any) -> int:
        """The number of an operation whose output is this view, `[batch, channels, height, width]`."""
        if isinstance(view, View) and len(view.axes) == 4:
            own, axes = significant(self.whole(view.number).axes), significant(view.axes)
            if len(own) == 2 and axes == (*own, (), ()):
                return self._material("unflatten", view)
            if axes == own:
                return view.number
            groups = shuffled_groups(view.axes[1], view.channels)
            if groups and len(own) == 4 and (axes[0], *axes[2:]) == (own[0], *own[2:]):
                return self._material("shuffle", view, groups)
        raise self.refusal(
            "an operation on positions or channels in an order other than [batch, channels, height, width]"
        )

    def vector(self, view: View) -> int:
        """The number of an operation whose output is this view, `[batch, channels]`."""
        if len(view.axes) == 2:
            own, axes = significant(self.whole(view.number).axes), significant(view.axes)
            if len(own) == 2 and axes == own:
                return view.number
            if len(own) == 4 and axes == (own[0], (*own[1], *own[2], *own[3])):
                return self._material("flatten", view)
        raise self.refusal("a tensor other than [batch, channels], flattened in this order,")

    def _material(self, op: str, view: View, *values: int) -> int:
        key = (op, view.number, view.axes)
        if key not in self.materials:
            self.materials[key] = self.emit(op, (view.number,), values)
        return self.materials[key]

    def plain(self, view: View) -> int:
        """A map or a vector."""
        return self.vector(view) if len(view.axes) == 2 else self.map(view)

    def tensor(self, value: Any, what: str) -> Constant:
        """A weight, which must not depend on the images."""
        if not isinstance(value, Constant):
            raise self.refusal(f"a {what} that depends on the images")
        return value

    def is_map(self, view: View) -> bool:
        """Whether the operation behind a view has positions."""
        return len(self.traced[view.number].shape) == 4

    def expanded(self, view: View) -> View:
        """A view of a vector as the same view of a map of one position."""
        return View(self._material("unflatten", view), view.axes)

    def output(self) -> Tensor:
        """The current call's output, without storage."""
        return self.node.meta["val"]

    def accumulates(self) -> bool:
        """Whether the current module is a norm that averages over all batches it has seen."""
        return getattr(self.modules.get(self._module()[0]), "momentum", 0) is None

    def drops_paths(self) -> bool:
        """Whether the current module is stochastic depth."""
        module = self.modules.get(self._module()[0])
        return module is not None and drop_rate(module) > 0

    def is_whole_window(self, sides: Sequence[int | None], number: int) -> bool:
        """Whether a pooling window is all positions because its size follows the map's."""
        index = sum(_is_window(node) for node in self.program.graph.nodes if node < self.node)
        kernel, _, padding = sides
        return kernel == self.traced[number].shape[2] and padding == 0 and self.windows.follows(index)


def _is_window(node: fx.Node) -> bool:
    return str(node.target).startswith(("aten.avg_pool2d", "aten.max_pool2d"))


class _NoSchema(NamedTuple):
    arguments: tuple[Any, ...] = ()
    returns: tuple[Any, ...] = ()


_NO_SCHEMA = _NoSchema()


def _arguments(node: fx.Node) -> list[Any]:
    """A call's arguments in the order of the operation's schema, with its defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args)
    return [
        node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for index, argument in enumerate(node.target._schema.arguments)
    ]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every leaf of its lists and tuples changed."""
    return [_map(item, change) for item in value] if isinstance(value, list | tuple) else change(value)


def single(value: Any) -> int | None:
    """The number, where a pair has the same number twice."""
    listed = list(_flat([value]))
    return listed[0] if listed and isinstance(listed[0], int) and len(set(listed)) == 1 else None
