"""Block-wise supervision (DNA): each stage of the supernet imitates the corresponding stage of the teacher."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.count import feature_shapes
from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Schedule, Step
from kdnas.losses.stage_pairs import Adapter
from kdnas.network import Network, as_input
from kdnas.numerics import as_map, same_positions
from kdnas.outputs import Outputs
from kdnas.randomness import python_rng
from kdnas.ranks import team, tensors
from kdnas.similarity import relative_l1
from kdnas.space import Blueprint, SearchSpace
from kdnas.specs import check_literals
from kdnas.supernet import Supernet


@final
class _Entry(nn.Module):
    """A 1x1 convolution from a teacher's channels to a student's; a narrower student uses its leading channels."""

    def __init__(self, teacher_channels: int, student_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(student_channels, teacher_channels))
        if student_channels == teacher_channels:
            nn.init.eye_(self.weight)
        else:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        """`[batch, teacher channels, h, w]` to `[batch, channels, h, w]`."""
        return F.conv2d(x, self.weight[:channels, :, None, None].to(x.dtype))


@final
class BlockWise(Distiller):
    """Each stage of the supernet, a block, learns the teacher's next feature from the teacher's previous one.

    Block `i` of the supernet is paired with a stage of the teacher, whose feature is `Y_i`. For a path `a` through
    the block, drawn uniformly and independently for every block,
    `L_i = mean((exit_i(S_i(entry_i(Y_{i-1}); a)) - Y_i)^2)`, a mean over samples, channels and positions. The input of
    block 0 is the output of the student's stem. `entry_i` and `exit_i` are 1x1 convolutions without bias,
    from the teacher's channels to the student's and back; they start as the identity if the widths agree. No
    gradient leaves a block, so the blocks are independent of each other and may be trained in any order, or by several
    processes: with `per_process` blocks process r of n trains blocks r, r + n, ... on the whole batch, no gradient is
    exchanged, and weights only where all are needed, to be stored or measured.
    If the maps differ in size, `Y_{i-1}` is resized to the block's input in the student (pooled by averaging, or
    interpolated), and the larger of the two compared maps is pooled to the smaller.

    The head is not a block: neither it nor its running mean is trained; a student is retrained.

    Args:
        schedule: `together`: every step trains all blocks, each on a path of its own; `one_by_one`: block after
            block, an equal share of the steps for each, and the optimizer forgets its momentum in between. A step
            leaves blocks that it does not train unchanged, by decay and momentum too.
        pairs: `(student stage, teacher stage)` for each stage of the student, ascending. By default the ascending
            pairs of least `sum |log2(student's side / teacher's side)|`, deeper teacher stages where that is equal.

    Raises:
        ValueError: fewer teacher stages than student stages, pairs that do not ascend, a student of tokens.

    A recipe with `clip` above 0 clips the gradient of all blocks as one, which couples their step sizes: with 0 they
    are independent in training too.

    Reference: Li et al., Block-wisely Supervised Neural Architecture Search with Knowledge Distillation, CVPR 2020,
        section 3.2, equation 6, and section 3.3 for the rating.
    Differs: blocks have the student's own widths, in and out, with adapters between; the released supernet ends
        every block in the teacher's width, twice the student's, so that it trains and rates layers of shapes that
        no student has. The teacher is in evaluation mode; the released training leaves it in training mode,
        with batch statistics and drop-connect. One learning rate serves all blocks; the release has one per block,
        20 epochs each.
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self, *, schedule: Literal["together", "one_by_one"] = "together", pairs: tuple[tuple[int, int], ...] = ()
    ) -> None:
        super().__init__()
        check_literals(type(self), locals())
        if any(i >= k or j >= m for (i, j), (k, m) in itertools.pairwise(pairs)):
            raise ValueError(f"`pairs` must ascend in both stages, got {pairs}.")
        self.order, self.pairs = schedule, pairs
        self.stages: tuple[int, ...] = ()
        self.entries, self.exits = nn.ModuleList(), nn.ModuleList()
        self.touched: dict[str, frozenset[int]] = {}

    @property
    def num_blocks(self) -> int:
        """Number of blocks; known after `prepare`."""
        return len(self.stages)

    @property
    def is_separable(self) -> bool:
        """Whether every step trains all blocks."""
        return self.order == "together"

    @property
    def parts(self) -> tuple[str, ...]:
        """The blocks; known after `prepare`."""
        return tuple(f"block{block}" for block in range(self.num_blocks))

    def prepare(self, model: Model, batch: Batch) -> None:
        """Pair the stages and build the adapters, as wide as the largest subnet."""
        assert isinstance(model, Supernet)
        student, teacher = model(batch.images, model.space.largest, batch_statistics=True), batch.teacher
        if any(feature.dim() != 4 for feature in student.features):
            raise ValueError(
                "block-wise supervision needs stages that return [batch, channels, height, width], those of this space "
                f"return {tuple(student.features[0].shape)}. Use another distiller for transformers."
            )
        maps = [as_map(feature) for feature in teacher.features]
        self.stages = self._pair(student.features, maps)
        self.touched = stages_of(model.space)
        device = batch.images.device
        widths = [feature.shape[1] for feature in student.features]
        teacher_widths = [maps[stage].shape[1] for stage in self.stages]
        self.entries.extend(_Entry(t, s).to(device) for t, s in zip(teacher_widths[:-1], widths[:-1], strict=True))
        self.exits.extend(Adapter(s, t).to(device) for s, t in zip(widths, teacher_widths, strict=True))

    def schedule(self, total: int) -> Schedule:
        """The optimizer restarts where the next block begins; known after `prepare`."""
        if self.order == "together":
            return Schedule(total)
        begins = (math.ceil(block * total / self.num_blocks) for block in range(1, self.num_blocks))
        return Schedule(total, frozenset(begins))

    def blocks(self, step: Step) -> Sequence[int]:
        """The blocks that a step trains."""
        if self.order == "together":
            return range(self.num_blocks)
        return (step.index * self.num_blocks // step.total,)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss per block that is trained in this step, by this process."""
        assert isinstance(model, Supernet)
        for block in self.blocks(step):
            architecture = model.space.sample(step.rng(f"block {block}"))
            team.agree("architectures", model.space.code(architecture))
            # The supernet does not count layers that run one by one.
            model.uses.update((n, v) for n, v in architecture.items() if block in self.touched[n])
            if tensors.mine(block):
                yield f"block{block}", self.loss(model, block, architecture, batch.images, batch.teacher)

    def loss(self, model: Supernet, block: int, architecture: Architecture, images: Tensor, teacher: Outputs) -> Tensor:
        """The mean squared error of one block on one path.

        Args:
            model: the supernet.
            block: index of the block.
            architecture: the path; only the choices of this block matter.
            images: normalised for the student; the input of block 0 only.
            teacher: the teacher's outputs on the same images.
        """
        predicted = self._run(model, block, architecture, images, teacher)
        student, target = self._aligned(block, predicted, teacher)
        return (student.float() - target.float()).square().mean()

    def rate(self, student: Network, images: Tensor, teacher: Outputs) -> tuple[float, ...]:
        """The relative L1 of every block of a network with these adapters; see `similarity.relative_l1`.

        The network runs in the mode it is in.
        """
        ratings = []
        for block, stage in enumerate(student.stages):
            if block == 0:
                x = student.stem(as_input(images, student.blueprint))
            else:
                x = self.entry(block, teacher, student.blueprint)
            ratings.append(self.rating(block, stage(x), teacher))
        return tuple(ratings)

    def rating(self, block: int, predicted: Tensor, teacher: Outputs) -> float:
        """The relative L1 of a block's output, `[batch, student channels, height, width]`."""
        return float(relative_l1(*self._aligned(block, predicted, teacher)).detach())

    def entry(self, block: int, teacher: Outputs, blueprint: Blueprint) -> Tensor:
        """The input of a block after the first: the teacher's previous feature at the student's width and size."""
        last = len(blueprint.stages[block - 1]) - 1
        _, channels, height, width = feature_shapes(blueprint)[f"stages.{block - 1}.{last}"]
        previous = as_map(teacher.features[self.stages[block - 1]])
        if previous.shape[2] >= height and previous.shape[3] >= width:
            previous = F.adaptive_avg_pool2d(previous, (height, width))
        else:
            previous = F.interpolate(previous, (height, width), mode="bilinear", align_corners=False)
        return self.entries[block - 1](previous, channels)

    def _run(self, model: Supernet, block: int, architecture: Architecture, images: Tensor, teacher: Outputs) -> Tensor:
        blueprint = model.space.blueprint(architecture)
        if block == 0:
            x = model.run("stem", blueprint.stem, as_input(images, blueprint))
        else:
            x = self.entry(block, teacher, blueprint)
        for index, layer in enumerate(blueprint.stages[block]):
            x = model.run(f"stages.{block}.{index}", layer, x)
        return x

    def _aligned(self, block: int, predicted: Tensor, teacher: Outputs) -> tuple[Tensor, Tensor]:
        student, target = same_positions(predicted, as_map(teacher.features[self.stages[block]]))
        return self.exits[block](student), target

    def _pair(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[int, ...]:
        if self.pairs:
            stages = dict(self.pairs)
            if sorted(stages) != list(range(len(student))) or not all(0 <= t < len(teacher) for t in stages.values()):
                raise ValueError(
                    f"`pairs` must name each of the student's stages 0 to {len(student) - 1} and teacher stages 0 to "
                    f"{len(teacher) - 1}, got {self.pairs}."
                )
            return tuple(stages[i] for i in range(len(student)))
        if len(teacher) < len(student):
            raise ValueError(
                f"block-wise supervision needs a teacher stage for each of the student's {len(student)} stages, this "
                f"teacher has {len(teacher)}. Name more of the teacher's stages, or use a space with fewer."
            )
        misfit = [[abs(math.log2(_side(s) / _side(t))) for t in teacher] for s in student]
        candidates = itertools.combinations(range(len(teacher)), len(student))
        # Deeper stages where equal: ties are broken by the negated stages.
        return min(
            candidates,
            key=lambda js: (round(sum(misfit[i][j] for i, j in enumerate(js)), 9), [-j for j in reversed(js)]),
        )


def stages_of(space: SearchSpace, num_probes: int = 20) -> dict[str, frozenset[int]]:
    """The stages whose layers each choice changes; the stem counts as stage 0, the head as none.

    Each choice is varied alone, from the largest network and from random ones.
    """
    rng = python_rng("stages", space.name)
    stages: dict[str, set[int]] = {choice.name: set() for choice in space.choices}
    for base in (space.largest, *(space.sample(rng) for _ in range(num_probes))):
        before = space.blueprint(base)
        for choice in space.choices:
            if not choice.exists(base):
                continue
            for option in choice.options:
                # A choice that exists only with the new option gets its largest.
                def pick(c: Choice, option: Value = option, name: str = choice.name, base: Any = base) -> Value:
                    return option if c.name == name else base.get(c.name, c.options[-1])

                after = space.blueprint(space.decide(pick))
                if after.stem != before.stem or after.image != before.image:
                    stages[choice.name].add(0)
                if after.image != before.image:
                    stages[choice.name].update(range(len(after.stages)))
                stages[choice.name] |= {
                    i for i, (a, b) in enumerate(zip(after.stages, before.stages, strict=True)) if a != b
                }
    return {name: frozenset(indices) for name, indices in stages.items()}


def _side(feature: Tensor) -> float:
    return math.sqrt(feature.shape[2] * feature.shape[3])
