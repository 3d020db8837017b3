"""Networks that teach: frozen, always in evaluation mode, and owners of their own preprocessing."""

import abc
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.blocks.basic import resize
from kdnas.data import normalise
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import seed_of
from kdnas.space import Blueprint, layer
from kdnas.spec import Spec, nearest, resolve, spec

Mean = Literal["probabilities", "logits", "random", "reliable"]


class Teacher(nn.Module, abc.ABC):
    """Takes pixels in [0, 1] and gives Outputs, without a graph.

    Its parameters are frozen, `train()` leaves it in evaluation mode, and its weights are no part of a checkpoint.

    Attributes:
        progress: the share of the student's training that is done, for teachers that change with it; the training
            loop assigns it before each step. 1 outside of training.
        class_names: one per logit, where they are known.
    """

    progress: float = 1.0
    class_names: tuple[str, ...] | None = None

    @final
    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        del mode
        return super().train(False)

    @final
    def freeze(self) -> Self:
        """Evaluation mode, no gradients; called once a teacher is built."""
        return self.requires_grad_(False).train(False)

    @final
    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Outputs:
        """Logits `[batch, classes]` and one feature map per stage."""
        with torch.no_grad():
            return self.teach(pixels, labels)

    @abc.abstractmethod
    def teach(self, pixels: Tensor, labels: Tensor | None) -> Outputs:
        """What the teacher shows; labels are for teachers that pick who is right."""


@final
class Frozen(Teacher):
    """Any network as a teacher.

    Args:
        module: gives logits, or Outputs.
        preprocessing: the network's own; pixels are resized and normalised here, so that teacher and student see the
            same augmented pixels, each in its own way.
        stages: names of submodules whose outputs are the features. By default a Network's stages, else the last map at
            each resolution, or four transformer blocks evenly spread, found by one pass.

    Raises:
        ValueError: a stage that does not exist; the nearest name is offered.
    """

    def __init__(self, module: nn.Module, *, preprocessing: Preprocessing, stages: Sequence[str] | None = None) -> None:
        super().__init__()
        self.module, self.preprocessing = module, preprocessing
        self.freeze()
        if stages is None:
            stages = () if isinstance(module, Network) else find_stages(module, self._probe())
        known = dict(module.named_modules())
        for name in stages:
            if name not in known:
                raise ValueError(f"the teacher has no submodule {name!r}.{nearest(name, known)}")
        self.stages = tuple(stages)

    def teach(self, pixels: Tensor, labels: Tensor | None) -> Outputs:
        """Logits and the named stages' maps."""
        images = normalise(resize(pixels, self.preprocessing.height, self.preprocessing.width), self.preprocessing)
        if isinstance(self.module, Network) and not self.stages:
            return self.module(images)
        with recorded(self.module, self.stages) as seen:
            found = self.module(images)
        if isinstance(found, Outputs):
            named = isinstance(self.module, Network)
            return found._replace(features=tuple(seen[name] for name in self.stages)) if named else found
        return Outputs(found, tuple(seen[name] for name in self.stages), images=images)

    def _probe(self) -> Tensor:
        p = self.preprocessing
        return torch.zeros(2, len(p.mean), p.height, p.width)


@final
class Ensemble(Teacher):
    r"""Several teachers as one; each of them is in `members`, and the features are the first one's.

    How their logits $z_m$ become one, per sample:

    - `probabilities`: $\log \sum_m w_m\,\mathrm{softmax}(z_m)$, the arithmetic mean of the distributions.
    - `logits`: $\sum_m w_m z_m$, their geometric mean.
    - `random`: those of one member, drawn anew for each batch from the training's progress; its features and logits.
    - `reliable`: as `probabilities` with $w_m = (1 - \mathrm{softmax}_m(\mathrm{CE}_m)) / (M - 1)$ for each sample,
      where $\mathrm{CE}_m$ is the member's cross-entropy with the label: who is wrong counts less. Without labels as
      `probabilities`.

    Args:
        teachers: at least two, of the same classes.
        mean: which of them.
        weights: $w$, one per teacher, not negative; equal by default. Not for `random` and `reliable`.

    Raises:
        ValueError: fewer than two teachers, another mean, wrong weights, or teachers of different classes.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2 (arithmetic or
        geometric mean); Shen, He, Xue, MEAL, AAAI 2019 (one at random); Zhang, Chen, Wang, Confidence-Aware
        Multi-Teacher Knowledge Distillation, ICASSP 2022, equations 2 and 3 (reliable).
    Differs: the last weighs losses, here the distributions are weighed. A loss's temperature softens the joint logits,
        after the averaging. By `logits` that is the same; by `probabilities` it is not the mean of what each teacher
        says at that temperature, except at 1.
    """

    def __init__(
        self, teachers: Sequence[Teacher], *, mean: Mean = "probabilities", weights: Sequence[float] = ()
    ) -> None:
        super().__init__()
        if len(teachers) < 2:
            raise ValueError(f"an ensemble has at least two teachers, got {len(teachers)}.")
        if mean not in get_args(Mean):
            raise ValueError(f"mean must be one of {', '.join(get_args(Mean))}, got {mean!r}.")
        if weights and (mean in ("random", "reliable") or len(weights) != len(teachers)):
            raise ValueError(
                f"weights are one per teacher for probabilities or logits, got {tuple(weights)} for {mean}."
            )
        if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise ValueError(f"weights must not be negative nor all zero, got {tuple(weights)}.")
        self.teachers, self.mean = nn.ModuleList(teachers), mean
        total = sum(weights) or len(teachers)
        self.weights = tuple(w / total for w in (weights or (1.0,) * len(teachers)))
        self.freeze()

    def teach(self, pixels: Tensor, labels: Tensor | None) -> Outputs:
        """The joint logits, the first teacher's features, and every teacher's own outputs."""
        for teacher in self.teachers:
            assert isinstance(teacher, Teacher)
            teacher.progress = self.progress
        if self.mean == "random":
            place = seed_of("member", repr(self.progress)) % len(self.teachers)
            return self.teachers[place](pixels, labels)
        members = tuple(teacher(pixels, labels) for teacher in self.teachers)
        shapes = [tuple(member.logits.shape[1:]) for member in members]
        if len(set(shapes)) > 1:
            raise ValueError(f"teachers of an ensemble know the same classes, got logits of shapes {shapes}.")
        logits = torch.stack([member.logits.float() for member in members])
        shares = logits.new_tensor(self.weights)[:, None]
        if self.mean == "reliable" and labels is not None:
            wrong = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
            shares = (1 - wrong.softmax(0)) / (len(members) - 1)
        if self.mean == "logits":
            return members[0]._replace(logits=(shares[:, :, None] * logits).sum(0), members=members)
        # In logarithms: a mean of probabilities that underflowed would be 0. A share of 0 is minus infinity there.
        joint = (logits.log_softmax(2) + shares.log()[:, :, None]).logsumexp(0)
        return members[0]._replace(logits=joint, members=members)


@final
class Streamed(Teacher):
    """A teacher that is in memory only while it is asked: several large ones then need not fit there together.

    It is built from its files for every batch, which costs time; with `teacher_views` it is asked once per view.

    Args:
        make: builds the teacher.
    """

    def __init__(self, make: Callable[[], Teacher]) -> None:
        super().__init__()
        self.make = make

    def teach(self, pixels: Tensor, labels: Tensor | None) -> Outputs:
        """What the teacher shows, which is then let go."""
        teacher = self.make().to(pixels.device)
        teacher.progress = self.progress
        return teacher(pixels, labels)


@final
class Route(Teacher):
    """One teacher at several times of its own training: the student's progress picks the snapshot.

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
            raise ValueError("a route has at least one snapshot, got none.")
        self.snapshots = nn.ModuleList(snapshots)
        self.freeze()

    def teach(self, pixels: Tensor, labels: Tensor | None) -> Outputs:
        """What the snapshot of now shows."""
        count = len(self.snapshots)
        # The step at which a part begins belongs to it, whatever the product of the shares is rounded to.
        snapshot = self.snapshots[min(int(self.progress * count + 1e-9), count - 1)]
        assert isinstance(snapshot, Teacher)
        snapshot.progress = self.progress
        return snapshot(pixels, labels)


@contextmanager
def recorded(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of submodules during one call: registered, filled and removed here."""
    seen: dict[str, Tensor] = {}
    handles = []
    known = dict(module.named_modules())
    for name in names:

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        handles.append(known[name].register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_stages(module: nn.Module, images: Tensor, most: int = 6) -> tuple[str, ...]:
    """The submodules whose outputs are the last at their resolution; for a transformer four blocks, evenly spread.

    Raises:
        ValueError: no submodule gives maps or tokens.
    """
    names = [name for name, _ in module.named_modules() if name]
    order: list[str] = []
    with recorded(module, names) as seen, torch.no_grad():
        try:
            module(images)
        except RuntimeError as error:
            _, *image = images.shape
            raise ValueError(
                f"the teacher cannot be run on images of {' x '.join(map(str, image))} ({str(error).splitlines()[0]}). "
                "Give one that takes this data's images."
            ) from error
        order = list(seen)
    maps = [n for n in order if seen[n].dim() == 4 and seen[n].shape[2] * seen[n].shape[3] > 1]
    by_size: dict[tuple[int, ...], str] = {}
    for name in maps:
        by_size[tuple(seen[name].shape[2:])] = name
    if len(by_size) >= 2:
        return tuple(by_size.values())[-most:]
    tokens = [n for n in order if seen[n].dim() == 3]
    depths = {n.count(".") for n in tokens}
    for depth in sorted(depths):
        level = [n for n in tokens if n.count(".") == depth]
        if len(level) >= 4:
            return tuple(level[(i + 1) * len(level) // 4 - 1] for i in range(4))
    if maps or tokens:
        return tuple((maps or tokens)[-1:])
    raise ValueError(
        "no submodule of the teacher gives a map or tokens. Name its stages, or use losses on logits only."
    )


def every_layer(teacher: Teacher) -> Teacher:
    """The same teacher, showing the output of every layer (block) in place of one map per stage.

    A Network shows each layer of its stages. Of another network the layers are the outermost modules inside an
    `nn.Sequential` that have parts of their own and give maps or tokens, in order of execution: the blocks of
    torchvision's and timm's networks. Where there are fewer than two, its stages are shown as ever.

    Raises:
        ValueError: the teacher is made of several, whose layers are no one network's.
    """
    if not isinstance(teacher, Frozen):
        raise ValueError(
            f"every layer is shown by a teacher of one network, got a {type(teacher).__name__}. Name one by --teacher, "
            "such as checkpoint:RUN/teacher."
        )
    module = teacher.module
    if isinstance(module, Network):
        names = [f"stages.{i}.{j}" for i, stage in enumerate(module.stages) for j in range(len(stage))]  # type: ignore[arg-type]
    else:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        names = _blocks(module, teacher._probe().to(device))
    shown = names if len(names) >= 2 else None
    return Frozen(module, preprocessing=teacher.preprocessing, stages=shown)


def _blocks(module: nn.Module, images: Tensor) -> list[str]:
    candidates: list[str] = []
    for owner, held in module.named_modules():
        if isinstance(held, nn.Sequential) and not any(owner.startswith(f"{name}.") for name in candidates):
            prefix = f"{owner}." if owner else ""
            candidates += [prefix + name for name, child in held.named_children() if any(child.children())]
    with recorded(module, candidates) as seen, torch.no_grad():
        module(images)
    return [n for n in seen if seen[n].dim() == 3 or (seen[n].dim() == 4 and seen[n][0, 0].numel() > 1)]


def fitted_teacher(image: tuple[int, int, int], classes: int, blocks: int = 0) -> Blueprint:
    """The network that `--teacher fit` trains: a ResNet of three stages for small images, four for larger ones.

    Args:
        image: channels, height and width.
        classes: number of classes.
        blocks: per stage; 0 for one on images of up to 16 x 16 and two on larger ones.
    """
    channels, height, _ = image
    widths = (32, 64, 128) if height <= 16 else (64, 128, 256) if height <= 64 else (64, 128, 256, 512)
    stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=channels, outputs=widths[0], stride=1 if height <= 64 else 4)
    inputs, stages = widths[0], []
    for index, width in enumerate(widths):
        stage = []
        for place in range(blocks or (1 if height <= 16 else 2)):
            stride = 2 if index > 0 and place == 0 else 1
            stage.append(layer("kdnas.blocks.resnet:BasicBlock", inputs=inputs, outputs=width, stride=stride))
            inputs = width
        stages.append(tuple(stage))
    head = layer("kdnas.blocks.basic:PoolLinear", inputs=inputs, classes=classes)
    return Blueprint(stem, tuple(stages), head, image)


FIT = "fit"


def load_teacher(text: str) -> Spec | None:
    """The Spec of a teacher from what a person types; None for `fit`, which trains one in the run.

    Args:
        text: `fit`, `torchvision:NAME`, `timm:NAME` (either may end in `@weights.safetensors`), `checkpoint:FOLDER`
            (a student folder), or `package.module:function` that returns a Teacher or a module; and of several such,
            `ensemble:SPEC,SPEC` (or `ensemble+logits:`, `ensemble+random:`, `ensemble+reliable:`; the first two also
            weighted, `ensemble:SPEC=2,SPEC=1`) and `route:SPEC,SPEC` (snapshots of one teacher, in the order of its
            training). `streamed:SPEC` is a teacher that is in memory only while it is asked.

    Raises:
        ValueError: another form.
    """
    if text == FIT:
        return None
    kind, _, rest = text.partition(":")
    if kind in ("torchvision", "timm") and rest:
        name, _, weights = rest.partition("@")
        return spec(zoo_teacher, zoo=kind, name=name, weights=str(Path(weights).resolve()) if weights else "")
    if kind == "streamed" and rest:
        member = load_teacher(rest)
        if member is None:
            raise ValueError("fit trains a teacher, and a streamed one is read from its files. Give a finished one.")
        return spec(streamed_teacher, member=member)
    if kind in ("route", "ensemble", *(f"ensemble+{mean}" for mean in get_args(Mean))) and rest:
        parts, weights = _weighed(rest.split(","))
        members = [load_teacher(part) for part in parts]
        if None in members:
            raise ValueError(f"fit trains one teacher, and {text!r} names several. Give finished ones.")
        told = {"weights": weights} if weights else {}
        return spec(several_teachers, kind=kind, members=tuple(m for m in members if m is not None), **told)
    if kind == "checkpoint" and rest:
        return spec(student_teacher, path=str(Path(rest).resolve()))
    if rest.isidentifier():
        resolve(text)
        return spec(own_teacher, function=text)
    raise ValueError(
        f"a teacher is fit, torchvision:NAME, timm:NAME, checkpoint:FOLDER, package.module:function, "
        f"ensemble:SPEC,SPEC or route:SPEC,SPEC, got {text!r}."
    )


def _weighed(parts: Sequence[str]) -> tuple[list[str], tuple[float, ...]]:
    """Teachers' texts without their weights, and the weights where all have one."""
    cut = [part.rpartition("=") for part in parts]
    try:
        weights = [float(number) for _, equals, number in cut if equals]
    except ValueError:
        return list(parts), ()  # the sign is part of a path
    if weights and len(weights) < len(parts):
        raise ValueError(f"weights are given to all teachers or to none, got {','.join(parts)!r}.")
    return ([text for text, _, _ in cut] if weights else list(parts)), tuple(weights)


def several_teachers(
    kind: str,
    members: tuple[Spec, ...],
    classes: int,
    preprocessing: Preprocessing,
    weights: tuple[float, ...] = (),
) -> Teacher:
    """Several teachers as an `Ensemble` (`ensemble`, `ensemble+MEAN`), or one's snapshots as a `Route` (`route`)."""
    if kind == "route" and weights:
        raise ValueError(f"a route's snapshots come one after the other and have no weights, got {weights}.")
    made: list[Teacher] = [m.build(Teacher, classes=classes, preprocessing=preprocessing) for m in members]
    if kind == "route":
        return Route(made)
    mean: Any = kind.partition("+")[2] or "probabilities"
    return Ensemble(made, mean=mean, weights=weights)


def streamed_teacher(member: Spec, classes: int, preprocessing: Preprocessing) -> Teacher:
    """A teacher that is built whenever it is asked; once now, so that what is wrong with it is said at once."""
    make = partial(member.build, Teacher, classes=classes, preprocessing=preprocessing)
    made: Teacher = make()
    streamed = Streamed(make)
    streamed.class_names = made.class_names
    return streamed


def student_teacher(path: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """A student folder, or the teacher that a run trained, as a teacher."""
    from kdnas.student import read_student  # student knows teachers' floor, not the other way round

    del preprocessing
    network, card = read_student(Path(path))
    teacher = _checked(Frozen(network, preprocessing=card.preprocessing), classes, path)
    teacher.class_names = card.class_names
    return teacher


def zoo_teacher(
    zoo: str, name: str, weights: str, classes: int, preprocessing: Preprocessing, stages: tuple[str, ...] = ()
) -> Teacher:
    """A network of torchvision or timm, showing the submodules named, or those that `Frozen` finds.

    With a weights file it is built for the data's classes and filled from it; without, the zoo's own pretrained
    weights are used (downloaded by the zoo when they are not in its cache) with their own preprocessing.

    Raises:
        ValueError: no such network, weights that cannot be had or do not fit, other classes.
    """
    if zoo == "torchvision":
        from torchvision import models

        if name not in models.list_models():
            raise ValueError(f"torchvision has no {name!r}.{nearest(name, models.list_models())}")
        if weights:
            module = models.get_model(name, weights=None, num_classes=classes)
        else:
            chosen: Any = next(iter(models.get_model_weights(name)))
            chosen = type(chosen).DEFAULT
            module = _downloaded(lambda: models.get_model(name, weights=chosen), f"torchvision:{name}")
            ready = chosen.transforms()
            side = ready.crop_size[0]
            preprocessing = Preprocessing(height=side, width=side, mean=tuple(ready.mean), std=tuple(ready.std))
    else:
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError:
            raise ValueError("timm is not installed. Run: pip install 'kdnas[timm]'") from None
        if name not in timm.list_models():
            raise ValueError(f"timm has no {name!r}.{nearest(name, timm.list_models())}")
        if weights:
            module = timm.create_model(name, pretrained=False, num_classes=classes)
        else:
            module = _downloaded(lambda: timm.create_model(name, pretrained=True), f"timm:{name}")
            own: Any = module.pretrained_cfg
            _, height, width = own["input_size"]
            preprocessing = Preprocessing(height=height, width=width, mean=own["mean"], std=own["std"])
    if weights:
        load_weights(module, Path(weights))
    return _checked(Frozen(module, preprocessing=preprocessing, stages=stages or None), classes, f"{zoo}:{name}")


def own_teacher(function: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """What a user's function without arguments returns: a Teacher, or a module that takes the student's images."""
    made = Spec(function).build()
    if not isinstance(made, Teacher):
        if not isinstance(made, nn.Module):
            raise ValueError(f"{function} must return a torch module, it returned a {type(made).__name__}.")
        made = Frozen(made, preprocessing=preprocessing)
    return _checked(made.freeze(), classes, function)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, strictly.

    Raises:
        ValueError: no such file, another format, or weights of another network.
    """
    import safetensors
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"weights are read from safetensors files only, which hold no code, got {path.name}.")
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}.")
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the network: {str(error).splitlines()[0]}") from error


def _downloaded(make: Any, what: str) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {what} are not in the local cache and cannot be downloaded ({error}). "
            f"Give a weights file: {what}@weights.safetensors."
        ) from error


def _checked(teacher: Teacher, classes: int, what: str) -> Teacher:
    preprocessing = getattr(teacher, "preprocessing", None)
    if preprocessing is not None:
        probe = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width)
        found = teacher(probe).logits.shape[1]
        if found != classes:
            raise ValueError(
                f"the teacher {what} knows {found} classes, the data has {classes}. Fine-tune it on this data first, "
                "or use --teacher fit."
            )
    return teacher
