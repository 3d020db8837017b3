"""Lanes of a road: a line each, and whether it is there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.specs import Spec, spec
from kdnas.tasks.base import Chance, Numbers, Task
from kdnas.tasks.labels import as_tensor

NONE = -1.0
"""The place of a lane in a row that it does not cross; any negative number is read as this."""
MOST = 32  # lanes
BACKGROUND, IOU, EXISTENCE = 0.4, 0.1, 0.1  # weights in the loss
LINE = 16 / 1640  # width of a line in the masks of the training, a share of the image's width
EXISTS, SEEN = 0.5, 0.3  # probabilities from which a lane is there, and a row of it is used
_CULANE, _MEASURED, _EVERY = (590, 1640), 30, 20  # height and width; pixels of a line; rows from point to point
_TUSIMPLE, _NEAR, _MATCHED = (720, 1280), 20, 0.85  # height and width; pixels; share of a lane's points
_FIRST, _LAST, _BETWEEN = 160, 710, 10  # the rows of TuSimple's points
_OF_LABELS, _OF_TEACHER = ("cross_entropy",), ("soft_targets", "alpha_divergence")


@final
@dataclass(frozen=True)
class Lanes(Task):
    r"""Each image has up to so many lanes; networks are measured by CULane's F1.

    A label is `[lanes, height]`: the place of each lane in each row of the image, as a share of its width ($u = (x +
    1/2) / W$ of a pixel $x$), or -1 where there is none. Lanes have slots from left to right, as many for the left half
    of the road as for the right one, so that a mirrored image has mirrored slots; see `in_slots`.

    A network's outputs are `1 + 2 lanes` maps: background and lanes, of whose softmax a lane's probability map is one,
    then a map for each lane, whose mean over all positions is the logit of its existence.

    **Loss**, with $p$ the softmax at every pixel, $y$ the classes of the mask that `mask` draws, $w$ the class weights
    (0.4 for background, else 1), $e$ whether a lane is there and $z$ its logit:

    $L = \frac1B \sum_b [\, L_{seg} + 0.1\, L_{IoU} + 0.1\, L_{exist} \,]$ with

    - $L_{seg} = -\sum_x w_{y_x} \log p_{x, y_x} / \sum_x w_{y_x}$, over the pixels $x$ of an image;
    - $L_{IoU} = 1 - N_o / (N_p + N_g - N_o)$, where $N_g$ is the number of lane pixels of the mask, $N_p = \sum_x
      \sum_{l > 0} p_{x l}$ that of the network, and $N_o = \sum_{x: y_x > 0} p_{x, y_x}$ that of both;
    - $L_{exist}$: the binary cross-entropy of $z$ and $e$, a mean over lanes.

    The fourth term of the paper, 0.1 of SAD, is `--loss self_attention`.

    **Lanes of a network** (`lanes_of`): a lane is there if the probability of its existence is above 0.5; in every 20th
    row (of 590) the pixel of its largest probability gives a point, if that is at least 0.3, and points are joined by
    straight lines. The point is the mean place of the pixels no further from that one than a line's width, weighted by
    their probabilities. A lane of fewer than two points is none.

    **Measures**, of lanes as lines in images of CULane's and TuSimple's size, whatever the size is here:

    - F1: a lane is a line 30 pixels wide at 1640 x 590; lanes are matched so that the sum of the intersections over
      unions is largest, and a match above 0.5 is a true positive. $F1 = 2 TP / (2 TP + FP + FN)$ over all images; 1
      where there is no lane on either side.
    - TuSimple's point accuracy, false positives and false negatives: a point counts that is less than $20 / \cos
      \theta$ pixels from the label's at 1280 x 720, $\theta$ the lane's angle to the vertical by least squares; rows
      are 160 to 710 by 10, and a row that neither lane crosses counts too. A lane of the label is matched if 85 % of
      the points of its best lane count. Accuracy is the sum of the best shares by the number of lanes, at most 4; of
      more than 4 lanes the worst is left out, and one unmatched. False positives are a share of the network's lanes,
      false negatives one of the label's; with three lanes too many they are 0 and 1, and the accuracy 0.

    Attributes:
        lanes: number of slots, even.
        line: width of a line in the masks of the training, a share of the image's width, and at least a pixel.

    Raises:
        ValueError: an odd number of lanes, none, or too many, or a width that is no share.

    Reference: Hou, Ma, Liu, Loy, Learning Lightweight Lane Detection CNNs by Self Attention Distillation, ICCV 2019,
        section 3.3 (loss, existence, points); Pan et al., Spatial As Deep, AAAI 2018, section 4 (F1 of CULane, lines
        of 30 and, in its masks, of 16 pixels); the TuSimple lane detection benchmark, 2017 (accuracy, FP, FN).
    Differs: $L_{seg}$ is divided by the weights of an image, not of the batch, and $L_{IoU}$ counts the pixels of an
        image, so that losses of parts of a batch have that of the whole as their mean. Existence is a linear layer of
        pooled features, the head's own. The paper takes the pixel of the largest probability, and joins points by
        splines; the 0.3 is that of the authors' code. A line is as wide as its row shows it, without round ends.

    Example:
        >>> task, labels = Lanes(lanes=2), torch.full((1, 2, 4), -1.0)
        >>> labels[0, 0] = 0.25  # one lane, upright, between two pixels
        >>> task.mask(labels, (4, 8))[0, 0].tolist()
        [0, 1, 1, 0, 0, 0, 0, 0]
        >>> grades = task.grades(task.outputs(labels, (4, 8)), labels)
        >>> float(task.quality(grades.mean(0)))
        1.0
    """

    lanes: int = 4
    line: float = LINE

    name: ClassVar[str] = "lanes"
    measure: ClassVar[str] = "F1"
    dense: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    images_at_once: ClassVar[int] = 16

    def __post_init__(self) -> None:
        if self.lanes % 2 or not 2 <= self.lanes <= MOST:
            raise ValueError(f"`lanes` must be an even number from 2 to {MOST}, got {self.lanes}.")
        if not 0 < self.line <= 1:
            raise ValueError(f"`line` must be a share of the image's width, above 0 and at most 1, got {self.line}.")

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each of a network's outputs."""
        names = [f"lane {number}" for number in range(1, self.lanes + 1)]
        return ("background", *names, *(f"{name} exists" for name in names))

    @property
    def image_outputs(self) -> int:
        """The logits of existence."""
        return self.lanes

    @property
    def losses(self) -> Mapping[str, Spec]:
        """The loss of the labels, and that of a teacher's maps and existences, in place of those of classes."""
        task = spec(Lanes, lanes=self.lanes, line=self.line)
        return {
            name: spec("kdnas.losses.of_task:OfTask", task=task, of=side)
            for side, names in (("labels", _OF_LABELS), ("teacher", _OF_TEACHER))
            for name in names
        }

    def as_labels(self, labels: Any, count: int) -> Tensor:
        """Places as float32, `[count, lanes, height]`."""
        places = as_tensor(labels, "labels")
        if places.dim() != 3 or len(places) != count or places.shape[1] != self.lanes or 0 in places.shape:
            raise ValueError(
                f"`labels` must be the places of {self.lanes} lanes in each row of each image, [{count}, {self.lanes}, "
                f"height], got shape {tuple(places.shape)}."
            )
        if places.is_complex() or not bool(places.isfinite().all()):
            raise ValueError("`labels` must be finite numbers: shares of the image's width, and -1 for none.")
        if float(places.max()) > 1:
            raise ValueError(f"`labels` must be shares of the image's width, at most 1, got {float(places.max()):g}.")
        return torch.where(places < 0, NONE, places.float())

    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        """Raise a ValueError for other labels than `as_labels` gives, other outputs, or a part without any lane."""
        if labels.dim() != 3 or labels.shape[1] != self.lanes or not labels.is_floating_point():
            raise ValueError(
                f"labels of the {part} part must be {self.lanes} lanes per image, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        if len(names) != len(self.output_names):
            raise ValueError(
                f"`class_names` must be the {len(self.output_names)} `Lanes.output_names`, got {len(names)} names."
            )
        if not bool((labels >= 0).any()):
            raise ValueError(f"the {part} part must have lanes, its {len(labels)} images have none. Add some that do.")

    def fits(self, part: str, labels: Tensor, size: tuple[int, int]) -> None:
        """Raise a ValueError unless there is a place for each row."""
        if labels.shape[-1] != size[0]:
            raise ValueError(
                f"labels of the {part} part must have the height of the images, {size[0]} rows, got {labels.shape[-1]}."
            )

    def moved(self, labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Each lane as its image; in a mirrored image the slots change sides too."""
        height, width = labels.shape[-1], columns.shape[1]
        within = ((rows >= 0) & (rows < height))[:, None]
        places = labels.gather(2, rows.clamp(0, height - 1)[:, None].expand(-1, labels.shape[1], -1))
        first = columns[:, :1, None] / width
        mirrored = (columns[:, -1] < columns[:, 0])[:, None, None]
        shown = torch.where(mirrored, first + 1 / width - places, places - first)
        shown = torch.where(within & (places >= 0) & (shown >= 0) & (shown <= 1), shown, NONE)
        return torch.where(mirrored, shown.flip(1), shown)

    def mask(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask of the labels, `[batch, height, width]`: 0 for background, else a lane's number from 1.

        A pixel belongs to the nearest of the lanes whose line covers it.

        Args:
            labels: `[batch, lanes, height]`.
            size: height and width of the mask; the height is the labels'.
        """
        width = size[1]
        slopes = _slopes(labels, _step(size[0])) * width
        half = (self.line * width / 2 * (1 + slopes.square()).sqrt()).clamp_min(0.5)[..., None]
        columns = torch.arange(width, device=labels.device)
        distances = (columns - (labels * width - 0.5)[..., None]).abs()
        distances = torch.where((distances <= half) & (labels >= 0)[..., None], distances, torch.inf)
        nearest = distances.min(1)
        return torch.where(nearest.values < torch.inf, nearest.indices + 1, 0)

    def outputs(self, labels: Tensor, size: tuple[int, int], logit: float = 20.0) -> Tensor:
        """What a network gives that is sure of these labels, `[batch, 1 + 2 lanes, height, width]`.

        Args:
            labels: `[batch, lanes, height]`.
            size: height and width of the maps.
            logit: of each pixel's class and of each lane that is there; those of lanes that are not are its negative.
        """
        maps = F.one_hot(self.mask(labels, size), 1 + self.lanes).movedim(-1, 1) * logit
        existence = (2.0 * exists(labels) - 1)[..., None, None] * logit
        return torch.cat([maps, existence.expand(-1, -1, *size)], 1)

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """The sum above, a mean over images; with the reduction `none` a number per image."""
        maps, existence = self._parts(logits, labels.shape[-1])
        mask = self.mask(labels, (maps.shape[2], maps.shape[3]))
        weights = maps.new_tensor([BACKGROUND, *[1.0] * self.lanes])
        pixels = F.cross_entropy(maps, mask, weights, reduction="none", label_smoothing=label_smoothing)
        segmentation = pixels.sum((1, 2)) / weights[mask].sum((1, 2))
        is_lane, shares = mask > 0, maps.softmax(1)
        both = (shares.gather(1, mask[:, None])[:, 0] * is_lane).sum((1, 2))
        either = shares[:, 1:].sum((1, 2, 3)) + is_lane.sum((1, 2)) - both
        overlap = both / torch.where(either > 0, either, 1)
        there = F.binary_cross_entropy_with_logits(existence, exists(labels).to(existence), reduction="none").mean(1)
        values = segmentation + IOU * (1 - overlap) + EXISTENCE * there
        return values if reduction == "none" else values.mean()

    def imitation(self, logits: Tensor, teacher: Tensor) -> Tensor:
        r"""$\frac{1}{B H W} \sum \mathrm{KL}(q \,\|\, p)$ at every pixel, and 0.1 of the existences' cross-entropy.

        Args:
            logits: the student's.
            teacher: the teacher's, of the same shape.
        """
        (ours, existence), (theirs, target) = (self._parts(each, each.shape[2]) for each in (logits, teacher))
        log_p, log_q = ours.log_softmax(1), theirs.log_softmax(1)
        pixels = (log_q.exp() * (log_q - log_p)).sum(1).mean()
        return pixels + EXISTENCE * F.binary_cross_entropy_with_logits(existence, target.sigmoid())

    def divergence(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """The imitation less that of equal outputs, times the number of images."""
        del labels
        return (self.imitation(logits, target) - self.imitation(target, target)) * len(logits)

    def lanes_of(self, logits: Tensor, height: int = 0) -> Tensor:
        """The lanes that a network gives, in the form of labels, on the CPU; see above.

        Args:
            logits: `[batch, 1 + 2 lanes, ...]`.
            height: of the labels; 0 for that of the logits.
        """
        maps, existence = self._parts(logits, height or logits.shape[2])
        shares = maps.softmax(1)[:, 1:]
        seen = (shares.amax(3) >= SEEN) & (existence.sigmoid() > EXISTS)[..., None]
        rows = np.arange(maps.shape[2])
        chosen = seen.cpu().numpy() & ((len(rows) - 1 - rows) % _step(len(rows)) == 0)
        places = self._centres(shares).cpu().double().numpy()
        joined = np.full(places.shape, NONE)
        for image, lane in np.argwhere(chosen.sum(2) > 1):
            own = chosen[image, lane]
            joined[image, lane] = np.interp(rows, rows[own], places[image, lane, own], left=NONE, right=NONE)
        return torch.from_numpy(joined).float()

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of each image: TP, FP, FN of F1; TuSimple's accuracy, FP, FN; the share of right existences; `[batch, 7]`."""
        truth = labels.cpu()
        found = self.lanes_of(logits, truth.shape[-1])
        right = (exists(found) == exists(truth)).double().mean(1, keepdim=True)
        return torch.cat([counts(found, truth), points(found, truth), right], 1).float().to(logits.device)

    def quality(self, means: Numbers) -> Numbers:
        """F1."""
        twice = 2 * means[..., 0]
        total = twice + means[..., 1] + means[..., 2]
        nothing = total == 0
        ratio: Any = (twice + nothing) / (total + nothing)
        return ratio

    def details(self, means: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """Precision and recall of F1, TuSimple's three measures, and the share of right existences."""
        del names
        hits, more, fewer = (float(value) for value in means[:3])
        kinds = ("point accuracy", "false positives", "false negatives", "existence accuracy")
        return {
            "precision": hits / max(hits + more, 1e-12),
            "recall": hits / max(hits + fewer, 1e-12),
            **{kind: float(value) for kind, value in zip(kinds, means[3:], strict=True)},
        }

    def chance(self, grades: Tensor, labels: Tensor, names: Sequence[str]) -> Chance | None:
        """F1, where it is at most that of the same lanes for every image: of each slot the mean of these labels."""
        del names
        truth = labels.cpu()
        on = truth >= 0
        mean = (truth * on).sum(0) / on.sum(0).clamp_min(1)
        same = torch.where(on.double().mean(0) >= 0.5, mean, NONE).expand_as(truth)
        guess = float(self.quality(counts(same, truth).mean(0)))
        value = float(self.quality(grades.double().mean(0)))
        is_near = value <= guess * (1 + 1e-9)
        return Chance(value, guess, ", which the mean lanes of these images alone reach") if is_near else None

    def pixel_classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mask of the lanes that a network gives."""
        return self.mask(self.lanes_of(logits, labels.shape[-1]), (labels.shape[-1], logits.shape[3]))

    def label_classes(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask."""
        return self.mask(labels, size)

    def _centres(self, shares: Tensor) -> Tensor:
        """The place of each lane in each row by its probabilities `[batch, lanes, height, width]`."""
        width = shares.shape[3]
        reach = max(1, math.ceil(self.line * width))
        near = shares.argmax(3, keepdim=True) + torch.arange(-reach, reach + 1, device=shares.device)
        weights = shares.gather(3, near.clamp(0, width - 1)) * ((near >= 0) & (near < width))
        return ((weights * near).sum(3) / weights.sum(3) + 0.5) / width

    def _parts(self, logits: Tensor, height: int) -> tuple[Tensor, Tensor]:
        """Maps of background and lanes with so many rows, and the logits of existence, in float32."""
        logits = logits if logits.dtype is torch.float64 else logits.float()
        maps, existence = logits[:, : -self.lanes], logits[:, -self.lanes :].mean((2, 3))
        if maps.shape[2] != height:
            width = max(1, round(maps.shape[3] * height / maps.shape[2]))
            maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        return maps, existence


def exists(lanes: Tensor) -> Tensor:
    """Which lanes are there, `[batch, lanes]`."""
    return (lanes >= 0).any(2)


def counts(lanes: Tensor, truth: Tensor) -> Tensor:
    """True positives, false positives and false negatives of CULane's F1, `[batch, 3]`; see `Lanes`.

    Args:
        lanes: a network's, `[batch, lanes, height]`.
        truth: the label's, `[batch, lanes of it, height]`.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    shares = overlaps(lanes, truth).numpy()
    hits = [sum(own[linear_sum_assignment(own, maximize=True)] > 0.5) for own in shares]
    right = torch.tensor(hits, dtype=torch.float64)
    return torch.stack([right, exists(lanes).sum(1) - right, exists(truth).sum(1) - right], 1)


def overlaps(lanes: Tensor, others: Tensor) -> Tensor:
    """The intersection over union of lanes as lines 30 pixels wide at 1640 x 590, `[batch, lanes, other lanes]`.

    Args:
        lanes: `[batch, lanes, height]`.
        others: `[batch, other lanes, height]`.
    """
    (left, right), (other_left, other_right) = (_span(each.double()) for each in (lanes, others))
    both = torch.minimum(right[:, :, None], other_right[:, None]) - torch.maximum(left[:, :, None], other_left[:, None])
    common = both.clamp_min(0).sum(3)
    total = (right - left).sum(2)[:, :, None] + (other_right - other_left).sum(2)[:, None] - common
    return common / torch.where(total > 0, total, 1)


def _span(lanes: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place of each lane's line in each row; equal where there is none."""
    height, width = _CULANE
    slopes = _slopes(lanes, _step(lanes.shape[2])) * width * lanes.shape[2] / height
    half = _MEASURED / 2 * (1 + slopes.square()).sqrt()
    half = torch.where(lanes >= 0, half, 0)
    return (lanes * width - half).clamp(0, width), (lanes * width + half).clamp(0, width)


def points(lanes: Tensor, truth: Tensor) -> Tensor:
    """TuSimple's accuracy, false positives and false negatives, `[batch, 3]`; see `Lanes`.

    Args:
        lanes: a network's, `[batch, lanes, height]`.
        truth: the label's, `[batch, lanes of it, height]`.
    """
    (height, width), own = _TUSIMPLE, truth.shape[2]
    ys = torch.arange(_FIRST, _LAST + 1, _BETWEEN)
    rows = ((ys + 0.5) * own / height - 0.5).round().long().clamp(0, own - 1).unique()
    ours, theirs = (each[:, :, rows].double() * width for each in (lanes, truth))
    there, known = exists(lanes)[:, :, None], exists(truth)
    near = _NEAR * (1 + _lines(theirs, (rows + 0.5) * height / own).square()).sqrt()
    far = (torch.where(ours >= 0, ours, -100)[:, :, None] - torch.where(theirs >= 0, theirs, -100)[:, None]).abs()
    shares = (far < near[:, None, :, None]).double().mean(3)
    best = torch.where(there, shares, 0).amax(1) * known
    numbers, total = there[..., 0].sum(1), known.sum(1)
    matched = ((best >= _MATCHED) & known).sum(1)
    is_many = total > 4
    worst = torch.where(known, best, torch.inf).amin(1)
    accuracy = (best.sum(1) - torch.where(is_many, worst, 0)) / total.clamp(1, 4)
    missed = total - matched
    missed = (missed - (is_many & (missed > 0)).long()) / total.clamp(1, 4)
    extra = (numbers - matched) / numbers.clamp_min(1)
    result = torch.stack([accuracy, extra, missed], 1)
    too_many = (numbers > total + 2)[:, None]
    return torch.where(too_many, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), result)


def _lines(places: Tensor, rows: Tensor) -> Tensor:
    """The slope of each lane by least squares, `[batch, lanes]`; 0 for fewer than two points."""
    on = places >= 0
    count = on.sum(2, keepdim=True).clamp_min(1)
    y = torch.where(on, rows - (rows * on).sum(2, keepdim=True) / count, 0)
    x = torch.where(on, places - (places * on).sum(2, keepdim=True) / count, 0)
    spread = y.square().sum(2)
    return (x * y).sum(2) / torch.where(spread > 0, spread, 1)


def _slopes(lanes: Tensor, step: int) -> Tensor:
    """How far each lane moves from row to row, over so many rows above and below, fewer at its ends."""
    height = lanes.shape[2]
    rows, on = torch.arange(height, device=lanes.device).expand_as(lanes), lanes >= 0
    first = on.int().argmax(2, keepdim=True)
    last = height - 1 - on.flip(2).int().argmax(2, keepdim=True)
    above, below = torch.maximum(rows - step, first), torch.minimum(rows + step, last)
    above, below = (torch.where(on.gather(2, places), places, rows) for places in (above, below))
    change = lanes.gather(2, below) - lanes.gather(2, above)
    return torch.where(on, change / (below - above).clamp_min(1), 0)


def _step(height: int) -> int:
    """The number of rows from point to point."""
    return max(1, round(height * _EVERY / _CULANE[0]))


def in_slots(slopes: Sequence[float], lanes: int) -> list[int]:
    """The slots of an image's lanes, from their slopes: how far to the right a lane moves from a row to the next below.

    Lanes left of the camera come nearer to the left edge further down, and have negative slopes, the more so the
    further away they are; so slopes order lanes from left to right, and the sign tells the sides. The innermost lanes
    are next to the middle of the slots; where one side has too many, all move by as few slots as needed.

    Args:
        slopes: of each lane.
        lanes: number of slots, even.

    Raises:
        ValueError: more lanes than slots.

    Example:
        >>> in_slots([0.5, -2.0, -0.5], 4)
        [2, 0, 1]
        >>> in_slots([-0.5, -2.0, -1.0], 4)
        [2, 0, 1]
    """
    if len(slopes) > lanes:
        room = len(slopes) + len(slopes) % 2
        raise ValueError(f"it has {len(slopes)} lanes, and there are slots for {lanes}. Add lanes={room}")
    order = sorted(range(len(slopes)), key=lambda place: slopes[place])
    first = min(max(lanes // 2 - sum(slope < 0 for slope in slopes), 0), lanes - len(slopes))
    slots = [0] * len(slopes)
    for slot, place in enumerate(order, first):
        slots[place] = slot
    return slots
