"""Teachers made of teachers: ensembles, routes along a training, and teachers that are loaded per batch."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import seed_of
from kdnas.specs import Spec, check_literals
from kdnas.teachers.base import Teacher, made_for

Mean = Literal["probabilities", "logits", "random", "reliable"]


@final
class Ensemble(Teacher):
    r"""Several teachers as one; each one's outputs are in `members`, the features are those of the first.

    How their logits $z_m$ are combined, per sample:

    - `probabilities`: $\log \sum_m w_m\,\mathrm{softmax}(z_m)$, the arithmetic mean of the distributions.
    - `logits`: $\sum_m w_m z_m$, their geometric mean.
    - `random`: the outputs of one member, sampled anew for each batch from the training's progress.
    - `reliable`: as `probabilities` with $w_m = (1 - \mathrm{softmax}_m(\mathrm{CE}_m)) / (M - 1)$ for each sample,
      where $\mathrm{CE}_m$ is the member's cross-entropy with the label: members that are wrong weigh less. Without
      labels as `probabilities`.

    Args:
        teachers: at least two, of the same classes.
        mean: the rule above.
        weights: $w$, one per teacher, not negative; equal by default. Only for `probabilities` and `logits`.

    Raises:
        ValueError: fewer than two teachers, another mean, wrong weights, or teachers of different classes.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2 (arithmetic or
        geometric mean); Shen, He, Xue, MEAL, AAAI 2019 (one at random); Zhang, Chen, Wang, Confidence-Aware
        Multi-Teacher Knowledge Distillation, ICASSP 2022, equations 2 and 3 (reliable).
    Differs: the last weighs losses, here the distributions are weighed. A loss's temperature softens the joint logits,
        after the averaging. With `logits` that is the same; with `probabilities` it is not the mean of the teachers'
        distributions at that temperature, except at 1.
    """

    def __init__(
        self, teachers: Sequence[Teacher], *, mean: Mean = "probabilities", weights: Sequence[float] = ()
    ) -> None:
        super().__init__()
        if len(teachers) < 2:
            raise ValueError(f"an ensemble needs at least two teachers, got {len(teachers)}.")
        check_literals(type(self), locals())
        if weights and (mean in ("random", "reliable") or len(weights) != len(teachers)):
            raise ValueError(
                f"`weights` must be one per teacher, for probabilities or logits only, got {tuple(weights)} for {mean}."
            )
        if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise ValueError(f"`weights` must not be negative nor all zero, got {tuple(weights)}.")
        self.teachers, self.mean = nn.ModuleList(teachers), mean
        total = sum(weights) or len(teachers)
        self.weights = tuple(w / total for w in (weights or (1.0,) * len(teachers)))
        self.freeze()

    def with_attentions(self) -> Teacher:
        """The same ensemble of members that show their attention maps; its own are those of the first."""
        weights = self.weights if self.mean in ("probabilities", "logits") else ()
        return Ensemble([t.with_attentions() for t in _teachers(self.teachers)], mean=self.mean, weights=weights)

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The joint logits, the first teacher's features, and every teacher's own outputs."""
        if self.mean == "random":
            place = seed_of("member", repr(at.progress)) % len(self.teachers)
            return self.teachers[place](pixels, labels, at)
        members = tuple(teacher(pixels, labels, at) for teacher in self.teachers)
        shapes = [tuple(member.logits.shape[1:]) for member in members]
        if len(set(shapes)) > 1:
            raise ValueError(f"teachers of an ensemble must have the same classes, got logits of shapes {shapes}.")
        logits = torch.stack([member.logits.float() for member in members])
        shares = logits.new_tensor(self.weights).view(-1, *[1] * (logits.dim() - 1))
        if self.mean == "reliable" and labels is not None:
            wrong = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
            shares = ((1 - wrong.softmax(0)) / (len(members) - 1)).unsqueeze(2)
        if self.mean == "logits":
            return members[0]._replace(logits=(shares * logits).sum(0), members=members)
        # In logarithms: a mean of probabilities that underflowed would be 0. A share of 0 is minus infinity there.
        joint = (logits.log_softmax(2) + shares.log()).logsumexp(0)
        return members[0]._replace(logits=joint, members=members)


@final
class Joined(Teacher):
    """Several teachers of features as one: each one's vector of length 1, behind each other.

    Stages and attention maps are those of the first.

    Args:
        teachers: at least two; they need not have equal widths.

    Raises:
        ValueError: fewer than two teachers.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        super().__init__()
        if len(teachers) < 2:
            raise ValueError(f"an ensemble needs at least two teachers, got {len(teachers)}.")
        self.teachers = nn.ModuleList(teachers)
        self.freeze()

    def with_attentions(self) -> Teacher:
        """The same of members that show their attention maps; its own are those of the first."""
        return Joined([teacher.with_attentions() for teacher in _teachers(self.teachers)])

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The joined vectors `[batch, sum of the widths]`, and the first teacher's features."""
        outputs = [teacher(pixels, labels, at) for teacher in self.teachers]
        vectors = [safe_normalize(each.logits.float(), 1) for each in outputs]
        return outputs[0]._replace(logits=torch.cat(vectors, 1))


@final
class Streamed(Teacher):
    """A teacher that is in memory only while it runs, so that several large ones need not fit there together.

    It is built from its files for every batch, which costs time; with `teacher_views` it runs once per view.

    Args:
        make: builds the teacher.
    """

    def __init__(self, make: Callable[[], Teacher]) -> None:
        super().__init__()
        self.make = make

    def with_attentions(self) -> Teacher:
        """The same, whose teacher shows its attention maps."""
        return Streamed(lambda: self.make().with_attentions())

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The outputs of a teacher that is built for this call."""
        return self.make().to(pixels.device)(pixels, labels, at)


@final
class Route(Teacher):
    """One teacher at several times of its own training: the student's progress selects the snapshot.

    Snapshot `k` of `n` teaches in the `k`-th of `n` equal parts of the student's training, the last one also outside
    of training. With the loss `route_constrained`, whose `num_anchors` is then `n`, this is route-constrained
    optimisation; any other loss follows the route too.

    Args:
        snapshots: the teacher's snapshots, in the order of its training.

    Raises:
        ValueError: no snapshots.

    Reference: Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019, section 3.
    """

    def __init__(self, snapshots: Sequence[Teacher]) -> None:
        super().__init__()
        if not snapshots:
            raise ValueError("a route needs at least one snapshot, got none.")
        self.snapshots = nn.ModuleList(snapshots)
        self.freeze()

    def with_attentions(self) -> Teacher:
        """The same route of snapshots that show their attention maps."""
        return Route([snapshot.with_attentions() for snapshot in _teachers(self.snapshots)])

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The outputs of the snapshot that the progress selects."""
        count = len(self.snapshots)
        # The step at which a part begins belongs to it, whatever the product of the shares is rounded to.
        return self.snapshots[min(int(at.progress * count + 1e-9), count - 1)](pixels, labels, at)


def _teachers(modules: nn.ModuleList) -> list[Teacher]:
    return [module for module in modules if isinstance(module, Teacher)]


def several_teachers(
    kind: str,
    members: tuple[Spec, ...],
    classes: int,
    preprocessing: Preprocessing,
    weights: tuple[float, ...] = (),
    class_names: tuple[str, ...] = (),
    dense: bool = False,
) -> Teacher:
    """Several teachers as an `Ensemble` (`ensemble`, `ensemble+MEAN`), or one's snapshots as a `Route` (`route`)."""
    if kind == "route" and weights:
        raise ValueError(f"snapshots of a route have no weights, got {weights}.")
    teachers: list[Teacher] = [made_for(m, classes, preprocessing, class_names, dense=dense) for m in members]
    if kind == "route":
        return Route(teachers)
    if classes == 0:
        if weights or kind != "ensemble":
            how = f"the weights {weights}" if weights else kind
            raise ValueError(
                f"teachers of features must weigh alike and are not averaged, got {how}. Write "
                "ensemble:TEACHER,TEACHER."
            )
        return Joined(teachers)
    mean: Any = kind.partition("+")[2] or "probabilities"
    return Ensemble(teachers, mean=mean, weights=weights)


def streamed_teacher(
    member: Spec,
    classes: int,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] = (),
    dense: bool = False,
) -> Teacher:
    """A teacher that is built for every batch; once now too, so that errors come early."""
    make = partial(made_for, member, classes, preprocessing, class_names, dense=dense)
    teacher: Teacher = make()
    streamed = Streamed(make)
    streamed.class_names = teacher.class_names
    return streamed
