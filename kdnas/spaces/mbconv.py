"""Inverted residual spaces: MobileNetV3-like, EfficientNet-like, elastic or with a choice of operations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import (
    Blueprint,
    DepthOptions,
    Kernel,
    KernelOptions,
    Layer,
    Range,
    Rate,
    SearchSpace,
    Size,
    SizeOptions,
    layer,
    make_divisible,
)
from kdnas.specs import nearest
from kdnas.values import shown

_ACTIVATIONS = ("relu", "swish", "hswish", "gelu")


def _check_name(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {shown(value)}.{nearest(value, known)}")


@final
@dataclass(frozen=True, kw_only=True)
class Stem:
    """The first convolution.

    Attributes:
        width: options for its channels, ascending.
        kernel: its odd kernel size.
        stride: its stride; 1 for small images.
        activation: its activation; None for the space's.
    """

    width: SizeOptions
    kernel: Kernel = 3
    stride: Size = 2
    activation: str | None = None

    def __post_init__(self) -> None:
        _check_name("activation", self.activation, _ACTIVATIONS)


@final
@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of the table: blocks of one width.

    Attributes:
        width: options for the output channels of its blocks, ascending.
        depth: options for the number of blocks, ascending; a smaller depth has the first ones.
        kernel: options for the depthwise kernel.
        expansion: options for the channels inside a block, as a multiple of its input channels.
        stride: of its first block; the others have stride 1.
        se: whether its blocks have squeeze and excite.
        activation: its activation; None for the space's.
        drop_path: rate of stochastic depth in its blocks whose shortcut is the plain identity.
        joins_next: whether its blocks belong to the next row's stage, so that no loss sees this row's output; only for
            rows with one option for everything.
    """

    width: SizeOptions
    depth: DepthOptions = (1,)
    kernel: KernelOptions = (3,)
    expansion: SizeOptions = (6,)
    stride: Size = 1
    se: bool = False
    activation: str | None = None
    drop_path: Rate = 0.0
    joins_next: bool = False

    def __post_init__(self) -> None:
        _check_name("activation", self.activation, _ACTIVATIONS)
        if self.joins_next and any(
            len(options) > 1 for options in (self.width, self.depth, self.kernel, self.expansion)
        ):
            raise ValueError("a row with `joins_next` must have one option for everything.")


@final
@dataclass(frozen=True, kw_only=True)
class Head:
    """The layers after the last stage.

    Attributes:
        kind: `pool` (pool, linear); `mobilenet_v2` (1x1 convolution, pool, linear); or `mobilenet_v3` (1x1
            convolution, pool, 1x1 convolution, linear).
        width: options for the classifier's input channels, ascending; none for `pool`.
        expansion: channels of the convolution before pooling in `mobilenet_v3`, as a multiple of its input's.
        hidden: the same as a number, in place of `expansion`.
        activation: its activation; None for the space's.
        dropout: rate before the classifier.
    """

    kind: str = "pool"
    width: Annotated[tuple[int, ...], Range(least=1, ascending=True, empty=True)] = ()
    expansion: Size = 6
    hidden: Annotated[int | None, Range(least=1)] = None
    activation: str | None = None
    dropout: Rate = 0.0

    def __post_init__(self) -> None:
        _check_name("kind", self.kind, ("pool", "mobilenet_v2", "mobilenet_v3"))
        _check_name("activation", self.activation, _ACTIVATIONS)
        if bool(self.width) == (self.kind == "pool"):
            must = "be" if self.width else "not be"
            raise ValueError(f"`width` must {must} empty for a head of kind {self.kind}, got {list(self.width)}.")


@final
@dataclass(frozen=True, kw_only=True)
class MBConvSpace(SearchSpace):
    """A chain of inverted residual blocks, described row by row.

    Choices are the settings with more than one option: `stem.width`, `stage1.width`, `stage1.depth`,
    `stage1.kernel` and `stage1.expansion` (or `stage1.block0.kernel` and so on), `head.width`.

    Attributes:
        stem: the first convolution.
        stages: the rows.
        head: the layers after them.
        per: whether kernel and expansion are chosen per `stage` or per `block`.
        shared: whether the kernels and expansions of a block share weights (OFA, BigNAS); otherwise each pair is an
            operation such as `k5e6`, an option of one choice, with weights of its own (DNA, Cream).
        shortcut: `matching`, only where the stride is 1 and the widths are equal; or `always`, with average pooling by
            the stride and a 1x1 convolution where the widths differ (AttentiveNAS).
        activation: the default of stem, rows and head.
        se_kind: `mobilenet_v3` (a quarter of the expanded channels, rounded to 8, ReLU, hard sigmoid) or
            `efficientnet` (a quarter of the block's input channels, the stage's activation, sigmoid).
        zero_gamma: whether the last batch norm of every block with a shortcut starts at scale zero (BigNAS).

    Reference: Cai et al., Once-for-All, ICLR 2020; Yu et al., BigNAS, ECCV 2020; Wang et al., AttentiveNAS, CVPR
        2021; Li et al., DNA, CVPR 2020; Peng et al., Cream, NeurIPS 2020. The tables name the numbers' sources.
    Differs: one family for all of them, whose blocks do not depend on the sharing rule. By default a smaller kernel is
        the centre of the larger one, as in BigNAS; OFA's matrices between kernels are the rule `KernelTransform`.
    """

    stem: Stem
    stages: tuple[Stage, ...]
    head: Head = Head()
    per: str = "stage"
    shared: bool = True
    shortcut: str = "matching"
    activation: str = "relu"
    se_kind: str = "mobilenet_v3"
    zero_gamma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name("per", self.per, ("stage", "block"))
        _check_name("shortcut", self.shortcut, ("matching", "always"))
        _check_name("activation", self.activation, _ACTIVATIONS)
        _check_name("se_kind", self.se_kind, ("mobilenet_v3", "efficientnet"))
        if not self.stages or self.stages[-1].joins_next:
            raise ValueError("`stages` must end with a row without `joins_next`.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Stem width, then width, depth, kernel and expansion row by row, then the head's width."""
        choices: list[Choice] = []

        def choose(name: str, options: tuple[Value, ...], needs: str | None = None, at_least: int = 0) -> None:
            if len(options) > 1:
                choices.append(Choice(name, options, needs, at_least))

        choose("stem.width", self.stem.width)
        for name, row in self._rows():
            choose(f"{name}.width", row.width)
            choose(f"{name}.depth", row.depth)
            for place in range(max(row.depth) if self.per == "block" else 1):
                at = f"{name}.block{place}" if self.per == "block" else name
                needs = f"{name}.depth" if place >= min(row.depth) else None
                for kind, options in self._inside(row).items():
                    choose(f"{at}.{kind}", options, needs, place + 1 if needs else 0)
        choose("head.width", self.head.width)
        return tuple(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        return self._chain(architecture)

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """Position and layer of everything a supernet has weights for.

        Where the widths before and in a stage are equal in the largest network and not in others, this includes the
        shortcut's 1x1 convolution at full size, although the largest network has none.
        """
        for architecture in self.covering():
            yield from Blueprint(*self._chain(architecture, for_bank=True), (0, 0, 0)).named_layers()

    def _chain(
        self, architecture: Architecture, *, for_bank: bool = False
    ) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        def option(name: str, options: tuple[Value, ...]) -> Any:
            return architecture[name] if len(options) > 1 else options[0]

        width = option("stem.width", self.stem.width)
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct",
            inputs=self.image_channels,
            outputs=width,
            kernel=self.stem.kernel,
            stride=self.stem.stride,
            activation=self.stem.activation or self.activation,
        )
        before: tuple[int, ...] = self.stem.width
        stages: list[tuple[Layer, ...]] = []
        blocks: list[Layer] = []
        for name, row in self._rows():
            outputs = option(f"{name}.width", row.width)
            for place in range(option(f"{name}.depth", row.depth)):
                at = f"{name}.block{place}" if self.per == "block" else name
                inside = {kind: option(f"{at}.{kind}", options) for kind, options in self._inside(row).items()}
                projects = self.shortcut == "always" and (
                    width != outputs or (for_bank and place == 0 and len(before + row.width) > 2)
                )
                stride = row.stride if place == 0 else 1
                blocks.append(self._block(row, width, outputs, stride, inside, projects))
                width = outputs
            before = row.width
            if not row.joins_next:
                stages.append(tuple(blocks))
                blocks = []
        return stem, tuple(stages), self._head(width, option("head.width", self.head.width or (0,)))

    def covering(self) -> tuple[Architecture, ...]:
        """The largest; where operations have weights of their own, one architecture per operation."""
        if self.shared:
            return (self.largest,)
        return tuple(
            self.decide(
                lambda choice, i=i: (
                    choice.options[min(i, len(choice.options) - 1)]
                    if choice.name.endswith(".operation")
                    else choice.options[-1]
                )
            )
            for i in range(max(len(self._operations(row)) for row in self.stages))
        )

    def _rows(self) -> Iterator[tuple[str, Stage]]:
        """Each row and the name of its stage."""
        index = 0
        for row in self.stages:
            yield f"stage{index}", row
            index += not row.joins_next

    def _operations(self, row: Stage) -> tuple[str, ...]:
        return tuple(f"k{kernel}e{expansion}" for kernel in row.kernel for expansion in row.expansion)

    def _inside(self, row: Stage) -> dict[str, tuple[Value, ...]]:
        """Names and options of the choices inside a block."""
        if self.shared:
            return {"kernel": row.kernel, "expansion": row.expansion}
        return {"operation": self._operations(row)}

    def _block(
        self, row: Stage, inputs: int, outputs: int, stride: int, inside: dict[str, Any], projects: bool
    ) -> Layer:
        bank = "shared"
        if self.shared:
            kernel, expansion = inside["kernel"], inside["expansion"]
        else:
            bank = inside["operation"]
            kernel, expansion = map(int, bank[1:].split("e"))
        expanded = inputs * expansion
        activation = row.activation or self.activation
        squeeze: dict[str, Any] = {}
        if row.se and self.se_kind == "mobilenet_v3":
            squeeze = {"squeezed": make_divisible(expanded // 4), "squeeze_activation": "relu", "gate": "hardsigmoid"}
        elif row.se:
            squeeze = {"squeezed": max(1, inputs // 4), "squeeze_activation": activation, "gate": "sigmoid"}
        matches = stride == 1 and inputs == outputs
        shortcut = "identity" if matches or self.shortcut == "always" else "none"
        if projects:
            shortcut = "project"
        rest: dict[str, Any] = {"drop_path": row.drop_path} if row.drop_path and matches else {}
        if self.zero_gamma and shortcut != "none":
            rest["zero_gamma"] = True
        return layer(
            "kdnas.blocks.mbconv:MBConv",
            bank=bank,
            inputs=inputs,
            outputs=outputs,
            expanded=expanded,
            kernel=kernel,
            stride=stride,
            activation=activation,
            shortcut=shortcut,
            **squeeze,
            **rest,
        )

    def _head(self, inputs: int, width: int) -> Layer:
        head = self.head
        common: dict[str, Any] = {"inputs": inputs, "classes": self.classes, "dropout": head.dropout}
        if head.kind == "pool":
            return layer("kdnas.blocks.basic:PoolLinear", **common)
        common |= {"width": width, "activation": head.activation or self.activation}
        if head.kind == "mobilenet_v2":
            return layer("kdnas.blocks.mbconv:ConvPoolLinear", **common)
        hidden = head.hidden or head.expansion * inputs
        return layer("kdnas.blocks.mbconv:ConvPoolConvLinear", hidden=hidden, **common)
