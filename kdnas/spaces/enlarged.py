"""KDAS: a fixed residual network, enlarged by layers after its stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import Depths, Layer, SearchSpace, Size, Sizes, layer

_IDENTITY = "identity"
_OPERATIONS = (_IDENTITY, "max_pool_3x3", "average_pool_3x3", "separable_3x3", "separable_5x5", "conv_3x3", "conv_5x5")

_Graph = tuple[tuple[str | int, ...], ...]


class _Node(NamedTuple):
    """An added layer: its number in the assignment, its operation, and the numbers of its sources, 0 for the stage."""

    number: int
    operation: str
    sources: frozenset[int]


@final
@dataclass(frozen=True, kw_only=True)
class Enlarged(SearchSpace):
    """A fixed residual network with added layers after its stages, each with an operation and two connections.

    Added layer `k` of a stage is node `k`, the stage's own output node 0. Its input is the sum of its connected
    sources: node `k - 1` (`previous`), node `k - 2` (`earlier`; for the first layer both are node 0). A layer without
    a source, or whose sources have none, is left out. The stage's output is node 0 plus every added node that no other
    node reads, so that without added layers the network is exactly the fixed one.

    With L added layers there are 2^2L 7^L assignments. The canonical one omits everything without effect: layers that
    are left out move to the end, connections to them are off, an identity is removed where the nodes that read it can
    reach its source. Two parallel layers in the other order remain two architectures. Positions, and with them the
    supernet's weights, are those of the canonical form; every operation has its own weights there.

    Attributes:
        stem_width: channels of the stem.
        widths: channels per stage; each but the first halves the resolution.
        depths: blocks of two 3x3 convolutions per stage.
        added: added layers per stage; their sum is L.
        operations: options of an added layer, in the order of the default.

    Raises:
        ValueError: counts that differ, no added layer, or an unknown operation.

    Reference: Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020,
    section 4; He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (the fixed network).
    Differs: the paper's figure of the graph was not available; that the two connections read the two nodes before,
    that unread nodes are summed, and the layers' positions are our choices. Shortcuts between widths project.
    """

    stem_width: Size = 16
    widths: Sizes = (16, 32, 64)
    depths: Sizes = (5, 5, 5)
    added: Depths = (2, 2, 2)
    operations: tuple[str, ...] = _OPERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.widths) == len(self.depths) == len(self.added):
            raise ValueError(
                "`widths`, `depths` and `added` must have one entry per stage, got "
                f"{self.widths}, {self.depths} and {self.added}."
            )
        if not sum(self.added):
            raise ValueError(f"`added` must have a layer in some stage, got {self.added}.")
        if not self.operations or list(self.operations) != [o for o in _OPERATIONS if o in self.operations]:
            raise ValueError(f"`operations` must be a subset of {_OPERATIONS} in this order, got {self.operations}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Two connections and an operation per added layer."""
        return tuple(
            choice
            for names in self._names()
            for name in names
            for choice in (
                Choice(f"{name}.previous", (0, 1)),
                Choice(f"{name}.earlier", (0, 1)),
                Choice(f"{name}.operation", self.operations),
            )
        )

    def canonical(self, architecture: Architecture) -> Architecture:
        """The assignment without layers and connections that have no effect."""
        values = dict(architecture)
        for names in self._names():
            nodes = _simplified(_nodes(values, names))
            for place, name in enumerate(names, 1):
                node = nodes[place - 1] if place <= len(nodes) else None
                sources = frozenset[int]() if node is None else node.sources
                values[f"{name}.previous"] = int(place - 1 in sources)
                values[f"{name}.earlier"] = int(place > 1 and place - 2 in sources)
                values[f"{name}.operation"] = self.operations[0] if node is None else node.operation
        return Architecture(values)

    def covering(self) -> tuple[Architecture, ...]:
        """Per operation a network whose added layers all have it, in a chain."""
        return tuple(
            self.decide(
                lambda choice, operation=operation: (
                    operation if choice.name.endswith(".operation") else int(choice.name.endswith(".previous"))
                )
            )
            for operation in self.operations
        )

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """The layers of a network with all operations in parallel everywhere, which no architecture is."""
        mixture = "+".join(self.operations)
        nodes: list[_Graph] = [tuple((mixture, place) for place in range(number)) for number in self.added]
        yield "stem", self._stem()
        for i, stage in enumerate(self._stages(nodes)):
            for j, stage_layer in enumerate(stage):
                yield f"stages.{i}.{j}", stage_layer
        yield "head", self._head()

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        nodes: list[_Graph] = []
        for names in self._names():
            live = _simplified(_nodes(architecture, names))
            nodes.append(tuple((node.operation, *sorted(node.sources)) for node in live))
        return self._stem(), self._stages(nodes), self._head()

    def _stem(self) -> Layer:
        return layer("kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=self.stem_width)

    def _head(self) -> Layer:
        return layer("kdnas.blocks.basic:PoolLinear", inputs=self.widths[-1], classes=self.classes)

    def _stages(self, nodes: list[_Graph]) -> tuple[tuple[Layer, ...], ...]:
        inputs, stages = self.stem_width, []
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            blocks = []
            for place in range(depth):
                stride = 2 if i > 0 and place == 0 else 1
                blocks.append(layer("kdnas.blocks.resnet:BasicBlock", inputs=inputs, outputs=width, stride=stride))
                inputs = width
            if nodes[i]:
                blocks.append(layer("kdnas.blocks.enlarged:AddedLayers", bank="added", width=width, nodes=nodes[i]))
            stages.append(tuple(blocks))
        return tuple(stages)

    def _names(self) -> list[list[str]]:
        return [[f"stage{stage}.added{place}" for place in range(number)] for stage, number in enumerate(self.added)]


def _nodes(values: Architecture | dict[str, Value], names: list[str]) -> list[_Node]:
    nodes = []
    for number, name in enumerate(names, 1):
        sources = {max(0, number - back) for back, end in ((1, "previous"), (2, "earlier")) if values[f"{name}.{end}"]}
        nodes.append(_Node(number, str(values[f"{name}.operation"]), frozenset(sources)))
    return nodes


def _simplified(nodes: list[_Node]) -> list[_Node]:
    """The nodes that have an effect; their sources are indices into this list, from 1."""
    indices: dict[int, int] = {0: 0}
    effective: list[_Node] = []
    for node in nodes:
        sources = frozenset(indices[source] for source in node.sources if source in indices)
        if sources:
            effective.append(node._replace(sources=sources))
            indices[node.number] = len(effective)
    index = 1
    while index <= len(effective):
        without = _without(effective, index)
        if without is None or _terms(without) != _terms(effective):
            index += 1
        else:
            effective, index = without, 1
    return effective


def _without(nodes: list[_Node], index: int) -> list[_Node] | None:
    """The nodes without an identity, its readers connected to its source; None where they cannot reach it."""
    identity = nodes[index - 1]
    if identity.operation != _IDENTITY or len(identity.sources) != 1:
        return None
    (source,) = identity.sources
    others = nodes[: index - 1]
    for later in nodes[index:]:
        sources = frozenset(source if s == index else s - (s > index) for s in later.sources)
        number = len(others) + 1
        if any(s < max(0, number - 2) for s in sources):
            return None
        others.append(later._replace(sources=sources))
    return others


def _terms(nodes: list[_Node]) -> tuple[str, ...]:
    """The sorted terms of the stage's output; nodes that compute something are distinguished by their numbers."""
    outputs: list[tuple[str, ...]] = [("0",)]
    for node in nodes:
        inputs = tuple(sorted(term for source in node.sources for term in outputs[source]))
        computed = (f"{node.operation}{node.number}({'+'.join(inputs)})",)
        outputs.append(inputs if node.operation == _IDENTITY else computed)
    read = {source for node in nodes for source in node.sources}
    return tuple(sorted(term for i, terms in enumerate(outputs) if i == 0 or i not in read for term in terms))
