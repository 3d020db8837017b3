"""The shared weights of a search space, and a pure function that runs any of its architectures with them."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.architecture import Architecture, Value
from kdnas.blocks.basic import AttentionMap, DropPath
from kdnas.compilation import compiled
from kdnas.depthwise import fast_depthwise
from kdnas.network import (
    BATCH_NORMS,
    Network,
    as_input,
    as_logits,
    attention_maps,
    build,
    called,
    classified_maps,
    is_repeated,
    outputs_until,
    without_weights,
)
from kdnas.outputs import Outputs
from kdnas.space import Layer, SearchSpace

Share = Callable[[str, Tensor, torch.Size], Tensor]
"""A sharing rule: (name of a weight, the bank's tensor, the subnet's shape) to the subnet's tensor."""


def corner(name: str, weight: Tensor, shape: torch.Size) -> Tensor:
    """Leading channels, centred window: the sharing rule of OFA, BigNAS, AlphaNet and AutoFormer.

    Raises:
        ValueError: the subnet's tensor is larger than the bank's.
    """
    for dim, (size, length) in enumerate(zip(weight.shape, shape, strict=True)):
        if size != length:
            if length > size:
                raise ValueError(
                    f"{name} has shape {tuple(weight.shape)} in the supernet, too small for a subnet's {tuple(shape)}. "
                    "covering() of the space must include an architecture that uses the larger one."
                )
            weight = weight.narrow(dim, (size - length) // 2 if dim >= 2 else 0, length)
    return weight


class _Plan(NamedTuple):
    """How to run a layer: its module without storage, and the source of each of its tensors in the bank."""

    module: nn.Module
    regularisers: tuple[nn.Module, ...]
    norms: tuple[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, ...]
    maps: tuple[nn.Module, ...]
    sources: tuple[tuple[str, nn.Module, str, torch.Size], ...]


@final
class Supernet(nn.Module):
    """A bank of shared weights and one sharing rule.

    No subnet is ever set active: the architecture is an argument, so that recomputation, a second backward pass
    and look-ahead weights all use the subnet they belong to. Not thread-safe: `functional_call` swaps a layer's
    tensors during the call.

    Args:
        space: the search space.
        share: the sharing rule. A module may have weights of its own (OFA's kernel transform); if it has a method
            `prepare(bank)`, that is called once with the bank.

    Shapes: the images of `supernet(images, architecture)` are `[batch, channels, height, width]`.

    Attributes:
        uses: number of forward passes for training (in training mode, with a graph) by choice and option.

    Differs: weights outside a step's subnets receive gradient zero inside a shared tensor and no gradient at all
    in a bank that no subnet used. Optimisers skip the latter, weights and momentum stay bit for bit; weight decay and
    momentum still move the former.

    Example:
        >>> import torch
        >>> from kdnas.tables import load_space
        >>> space = load_space("toy")
        >>> supernet = Supernet(space).eval()
        >>> images = torch.rand(2, 3, 8, 8)
        >>> supernet(images, space.smallest).logits.shape
        torch.Size([2, 10])
        >>> student = supernet.extract(space.smallest)  # an ordinary network with a copy of the weights
        >>> torch.equal(student(images).logits, supernet(images, space.smallest).logits)
        True
    """

    def __init__(self, space: SearchSpace, share: Share = corner) -> None:
        super().__init__()
        self.space, self.share = space, share
        sharing: dict[str, list[Layer]] = {}
        for name, layer in space.bank_layers():
            sharing.setdefault(_key(name, layer), []).append(layer)
        self.bank = nn.ModuleDict({key: build(_union(layers)) for key, layers in sharing.items()})
        if hasattr(share, "prepare"):
            share.prepare(self.bank)
        self.uses: Counter[tuple[str, Value]] = Counter()
        self._plans: dict[tuple[str, Layer], _Plan] = {}

    def forward(
        self, images: Tensor, architecture: Architecture, *, regularise: bool = True, batch_statistics: bool = False
    ) -> Outputs:
        """Logits and one feature map per stage of one subnet.

        Args:
            images: `[batch, channels, height, width]`; resized to the subnet's resolution.
            architecture: the subnet.
            regularise: whether dropout and drop-path are active in training mode.
            batch_statistics: see `run`.
        """
        if self.training and torch.is_grad_enabled():
            self.uses.update(architecture.items())
        blueprint = self.space.blueprint(architecture)
        modes = {"regularise": regularise, "batch_statistics": batch_statistics}
        run = lambda name, layer, *x: called(functools.partial(self.run, name, layer, **modes), *x)  # noqa: E731
        x = run("stem", blueprint.stem, as_input(images, blueprint))
        features: list[Tensor] = []
        attentions: list[Tensor] = []
        for i, stage in enumerate(blueprint.stages):
            for j, layer in enumerate(stage):
                name = f"stages.{i}.{j}"
                with attention_maps(self._plan(name, layer).maps) as maps:
                    x = run(name, layer, x)
                attentions += maps
            features.append(x)
        inputs = blueprint.head.inputs(x, features)
        with classified_maps(self._plan("head", blueprint.head).module) as classified:
            logits = as_logits(run("head", blueprint.head, *inputs), images, blueprint)
        last = classified[-1] if classified else None
        return Outputs(logits, tuple(features), tuple(attentions), images, classified=last)

    def remaining_layers(
        self, stage: int, feature: Tensor, architecture: Architecture, outputs: Sequence[Tensor] = ()
    ) -> Tensor:
        """The logits that a subnet's layers after a stage compute from this map instead of the stage's own output.

        Args:
            stage: index of the stage.
            feature: in place of its output.
            architecture: the subnet.
            outputs: of the stages; needed for a head that reads a stage before this one.

        Raises:
            ValueError: they are needed, and missing.
        """
        blueprint = self.space.blueprint(architecture)
        maps = outputs_until(stage, feature, outputs, blueprint)
        for i in range(stage + 1, len(blueprint.stages)):
            for j, layer in enumerate(blueprint.stages[i]):
                feature = self.run(f"stages.{i}.{j}", layer, feature, batch_statistics=True)
            maps.append(feature)
        return self.run("head", blueprint.head, *blueprint.head.inputs(feature, maps), batch_statistics=True)

    def run(
        self, name: str, layer: Layer, *inputs: Tensor, regularise: bool = True, batch_statistics: bool = False
    ) -> Tensor:
        """One layer of a subnet at position `name`, with the bank's weights.

        Args:
            name: the position, as in `Blueprint.named_layers`.
            layer: the layer.
            inputs: its input; of a head that reads several stages, their outputs.
            regularise: whether dropout and drop-path are active in training mode.
            batch_statistics: whether batch norm uses the statistics of its input and does not update the running ones,
                in either mode. A subnet's outputs then do not depend on earlier forward passes.
        """
        plan = self._plan(name, layer)
        if plan.module.training != self.training:
            plan.module.train(self.training)
        for module in plan.regularisers:
            module.training = self.training and regularise
        for norm in plan.norms:
            norm.training = self.training or batch_statistics
            norm.track_running_stats = not batch_statistics
        weights = self._weights(name, plan)
        if is_repeated():  # running statistics have seen this batch
            weights = {path: tensor if tensor.requires_grad else tensor.clone() for path, tensor in weights.items()}
        try:
            with compiled(plan.module), fast_depthwise(plan.module, inputs[0]):
                # Layers have no tied weights, which `extract` could not copy; to look for them is a tenth of a GPU's
                # step.
                return functional_call(plan.module, weights, inputs, tie_weights=False)
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(x.shape)) for x in inputs)
            error.add_note(f"in layer {name}: {layer}, with an input of shape {shapes}")
            raise

    def extract(self, architecture: Architecture) -> Network:
        """A subnet as an ordinary network with a copy of its weights, in this supernet's mode."""
        blueprint = self.space.blueprint(architecture)
        network = without_weights(blueprint)
        state = {
            f"{name}.{key}": tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, layer in blueprint.named_layers()
            for key, tensor in self._weights(name, self._plan(name, layer)).items()
        }
        network.load_state_dict(state, assign=True)
        return network.requires_grad_(True).train(self.training)

    def bank_module(self, name: str, layer: Layer) -> nn.Module:
        """The bank's module with the weights of a layer at a position.

        Raises:
            ValueError: the bank has none.
        """
        key = _key(name, layer)
        if key not in self.bank:
            raise ValueError(
                f"the supernet has no weights for {layer} at {name}, bank {layer.bank!r}. "
                "covering() of the space must include an architecture that uses it."
            )
        return self.bank[key]

    def _plan(self, name: str, layer: Layer) -> _Plan:
        if (name, layer) not in self._plans:
            module, bank = _skeleton(layer), self.bank_module(name, layer)
            sources = []
            for path, tensor in _tensors(module):
                owner, _, attribute = path.rpartition(".")
                sources.append((path, bank.get_submodule(owner), attribute, tensor.shape))
            regularisers = tuple(m for m in module.modules() if isinstance(m, nn.Dropout | nn.Dropout2d | DropPath))
            norms = tuple(m for m in module.modules() if isinstance(m, BATCH_NORMS))
            maps = tuple(m for m in module.modules() if isinstance(m, AttentionMap))
            self._plans[name, layer] = _Plan(module, regularisers, norms, maps, tuple(sources))
        return self._plans[name, layer]

    def _weights(self, name: str, plan: _Plan) -> dict[str, Tensor]:
        # getattr at every call: a look-ahead step may have swapped the bank's tensors by functional_call.
        return {
            path: self.share(f"{name}.{path}", getattr(owner, attribute), shape)
            for path, owner, attribute, shape in plan.sources
        }


def _union(layers: Sequence[Layer]) -> Layer:
    """The layer with the weights of all: the one of most parameters, with the largest value of each of its numbers."""
    largest = max(reversed(layers), key=_params)  # of equal ones the last
    numbers = [{n: v for n, v in layer.make.arguments if type(v) in (int, float)} for layer in layers]
    widest = {n: max(row.get(n, value) for row in numbers) for n, value in numbers[layers.index(largest)].items()}
    union = Layer(largest.make.replace(**widest), largest.bank)
    return union if union != largest and _params(union) > _params(largest) else largest


@functools.cache
def _params(layer: Layer) -> int:
    return sum(p.numel() for p in _skeleton(layer).parameters())


def _skeleton(layer: Layer) -> nn.Module:
    with torch.device("meta"):
        return build(layer)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _key(name: str, layer: Layer) -> str:
    return f"{name}:{layer.bank}".replace(".", "_")
