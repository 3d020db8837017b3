"""KDAS: a fixed residual network, enlarged by layers behind its stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import Layer, SearchSpace, layer

_IDENTITY = "identity"
_OPERATIONS = (
    _IDENTITY,
    "max_pool_3x3",
    "average_pool_3x3",
    "separable_3x3",
    "separable_5x5",
    "conv_3x3",
    "conv_5x5",
)

_Graph = tuple[tuple[str | int, ...], ...]


class _Node(NamedTuple):
    """An added layer: its place in the spelling, its operation, and the places of its sources, 0 for the stage."""

    place: int
    operation: str
    sources: frozenset[int]


@final
@dataclass(frozen=True, kw_only=True)
class Enlarged(SearchSpace):
    """A residual network that stays as it is; behind its stages layers of an operation and two connections each.

    Added layer `k` of a stage is node `k`, the stage's own output node 0. It takes the sum of what its connections
    say: node `k - 1` (`previous`), node `k - 2` (`earlier`; for the first layer both are node 0). A layer without a
    source, or whose sources have none, is left out. Node 0 stays in the stage's output, and every added node that no
    other takes is added to it, so that the network without added layers is the fixed one exactly.

    With L added layers there are 2^2L 7^L spellings. Canonical is the spelling without what changes nothing: layers
    that are left out move to the end, a connection to such a layer is off, an identity is taken out where its
    consumers can reach its source. Two layers side by side in the other order remain two values. Positions, and with
    them the supernet's weights, are those of the canonical form; every operation has its own weights there.

    Attributes:
        stem_width: channels of the stem.
        widths: channels per stage; each but the first halves the resolution.
        depths: blocks of two 3x3 convolutions per stage.
        added: added layers per stage; their sum is L.
        operations: what an added layer may be, in the order of the class's default.

    Raises:
        ValueError: counts that differ, no added layer, or an unknown operation.

    Reference: Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020,
    section 4; He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (the fixed network).
    Differs: the paper's figure of the graph is not available to us; that the two connections lead to the two nodes
    before, that loose nodes are added up, and where the layers stand are ours. Shortcuts between widths project.
    """

    stem_width: int = 16
    widths: tuple[int, ...] = (16, 32, 64)
    depths: tuple[int, ...] = (5, 5, 5)
    added: tuple[int, ...] = (2, 2, 2)
    operations: tuple[str, ...] = _OPERATIONS

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.depths) == len(self.added) or min(self.depths, default=0) < 1:
            raise ValueError(
                "widths, depths and added have one entry per stage, and a stage has a block; got "
                f"{self.widths}, {self.depths} and {self.added}."
            )
        if min(self.added) < 0 or not sum(self.added):
            raise ValueError(f"added needs a layer in some stage, got {self.added}.")
        if not self.operations or list(self.operations) != [o for o in _OPERATIONS if o in self.operations]:
            raise ValueError(f"operations must be some of {_OPERATIONS}, in that order, got {self.operations}.")

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
        """The spelling without what changes nothing."""
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
        """Per operation the network whose layers all have it, in a chain."""
        return tuple(
            self.decide(
                lambda choice, one=one: (
                    one if choice.name.endswith(".operation") else int(choice.name.endswith(".previous"))
                )
            )
            for one in self.operations
        )

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """The layers of a network with all operations side by side everywhere; no architecture has them all."""
        mixture = "+".join(self.operations)
        nodes: list[_Graph] = [tuple((mixture, place) for place in range(number)) for number in self.added]
        yield "stem", self._stem()
        for i, stage in enumerate(self._stages(nodes)):
            for j, one in enumerate(stage):
                yield f"stages.{i}.{j}", one
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
            made = []
            for place in range(depth):
                stride = 2 if i > 0 and place == 0 else 1
                made.append(layer("kdnas.blocks.resnet:BasicBlock", inputs=inputs, outputs=width, stride=stride))
                inputs = width
            if nodes[i]:
                made.append(layer("kdnas.blocks.enlarged:AddedLayers", bank="added", width=width, nodes=nodes[i]))
            stages.append(tuple(made))
        return tuple(stages)

    def _names(self) -> list[list[str]]:
        return [[f"stage{stage}.added{place}" for place in range(number)] for stage, number in enumerate(self.added)]


def _nodes(values: Architecture | dict[str, Value], names: list[str]) -> list[_Node]:
    nodes = []
    for place, name in enumerate(names, 1):
        reached = {max(0, place - back) for back, end in ((1, "previous"), (2, "earlier")) if values[f"{name}.{end}"]}
        nodes.append(_Node(place, str(values[f"{name}.operation"]), frozenset(reached)))
    return nodes


def _simplified(nodes: list[_Node]) -> list[_Node]:
    """The nodes that change something, numbered anew from 1; sources are new numbers."""
    alive: dict[int, int] = {0: 0}
    kept: list[_Node] = []
    for node in nodes:
        sources = frozenset(alive[s] for s in node.sources if s in alive)
        if sources:
            kept.append(node._replace(sources=sources))
            alive[node.place] = len(kept)
    place = 1
    while place <= len(kept):
        without = _without(kept, place)
        if without is None or _meaning(without) != _meaning(kept):
            place += 1
        else:
            kept, place = without, 1
    return kept


def _without(nodes: list[_Node], place: int) -> list[_Node] | None:
    """The nodes without an identity, its consumers led to its source; None where they cannot reach it."""
    removed = nodes[place - 1]
    if removed.operation != _IDENTITY or len(removed.sources) != 1:
        return None
    (source,) = removed.sources
    kept = nodes[: place - 1]
    for later in nodes[place:]:
        led = frozenset(source if s == place else s - (s > place) for s in later.sources)
        number = len(kept) + 1
        if any(s < max(0, number - 2) for s in led):
            return None
        kept.append(later._replace(sources=led))
    return kept


def _meaning(nodes: list[_Node]) -> tuple[str, ...]:
    """The sorted terms of what goes out; a node that computes is told apart by its place in the spelling."""
    said: list[tuple[str, ...]] = [("0",)]
    for node in nodes:
        given = tuple(sorted(term for source in node.sources for term in said[source]))
        said.append(given if node.operation == _IDENTITY else (f"{node.operation}{node.place}({'+'.join(given)})",))
    taken = {source for node in nodes for source in node.sources}
    return tuple(sorted(term for i, terms in enumerate(said) if i == 0 or i not in taken for term in terms))
