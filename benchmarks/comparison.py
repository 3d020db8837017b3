"""The table of same_work.py: contestants by cell, paired differences to the best peer, and their intervals."""

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
from common import Row

Cell = tuple[str, str, float, int]
"""Teacher, kind of budget, share, steps: where contestants are compared."""


class Task(NamedTuple):
    """What makes a row."""

    teacher: str
    budget: str
    share: float
    contestant: str
    seed: int
    steps: int

    @classmethod
    def of(cls, row: Row) -> "Task":
        """The task of a row that was read."""
        share, seed, steps = float(row["share"]), int(row["seed"]), int(row["steps"])
        return cls(row["teacher"], row["budget"], share, row["contestant"], seed, steps)

    @property
    def cell(self) -> Cell:
        """Where contestants are compared; another training of a teacher, "resnet-2", has other seeds of its cells."""
        return self.teacher.partition("-")[0], self.budget, self.share, self.steps

    @property
    def name(self) -> str:
        """Of the folder of its network, which short and long training share."""
        return f"{self.teacher}-{self.budget}-{self.share}-{self.contestant}-{self.seed}"


def hits_of(row: Row) -> np.ndarray:
    """1 for each test image that is classified correctly, else 0."""
    return np.unpackbits(np.frombuffer(base64.b64decode(row["test_hits"]), np.uint8)).astype(np.float32)


class Difference(NamedTuple):
    """A mean difference of two contestants' test accuracies.

    Attributes:
        images: by image, a mean over seeds, `[images]`.
        seed_variance: of the mean, for the seeds' part alone.
    """

    images: np.ndarray
    seed_variance: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, normal: over images, and over the seeds' part beyond that of the images."""
        half = 1.96 * float(np.sqrt(self.images.var() / len(self.images) + self.seed_variance))
        return float(self.images.mean()) - half, float(self.images.mean()) + half

    @classmethod
    def mean(cls, several: "Sequence[Difference]") -> "Difference":
        """The mean over cells, whose images are the same."""
        variance = sum(each.seed_variance for each in several) / len(several) ** 2
        return cls(np.mean([each.images for each in several], 0), variance)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.images.mean():+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def seed_variance(differences: np.ndarray) -> float:
    """The variance between seeds of a difference `[seeds, images]` beyond that of its images: two-way, unbiased."""
    seeds, images = differences.shape
    centred = differences - differences.mean(0) - differences.mean(1, keepdims=True) + differences.mean()
    residual = float((centred**2).sum()) / ((seeds - 1) * (images - 1))
    return float(differences.mean(1).var(ddof=1)) - residual / images


@final
class Comparison:
    """Rows by cell and contestant, and the differences to the best peer.

    Args:
        rows: of which those with a note are left out.
        peers: names of the contestants to whose best the others are compared.
    """

    def __init__(self, rows: Sequence[Row], peers: Sequence[str]) -> None:
        self.peers = peers
        self.rows = [row for row in rows if not row["note"]]
        self.hits: dict[Cell, dict[str, dict[int, np.ndarray]]] = {}
        for row in self.rows:
            task = Task.of(row)
            self.hits.setdefault(task.cell, {}).setdefault(task.contestant, {})[task.seed] = hits_of(row)
        variances: dict[tuple[int, str], list[float]] = {}
        for cell, contestants in self.hits.items():
            for name in contestants:
                differences = self._differences(cell, name)
                if name != self.best_peer(cell) and differences is not None and len(differences) > 1:
                    variances.setdefault((cell[3], name), []).append(seed_variance(differences))
        # Three seeds alone say little of it: pooled over a contestant's cells of a length of training.
        self.variances = {key: max(0.0, float(np.mean(values))) for key, values in variances.items()}
        # One seed says nothing: the mean over the contestants with several.
        for steps in {steps for steps, _ in variances}:
            self.variances[steps, ""] = float(np.mean([v for (s, _), v in self.variances.items() if s == steps]))

    def mean(self, cell: Cell, name: str) -> float:
        """Test accuracy, a mean over seeds."""
        return float(np.mean([hits.mean() for hits in self.hits[cell][name].values()]))

    def best_peer(self, cell: Cell) -> str | None:
        """The peer of the highest mean test accuracy."""
        known = [name for name in self.peers if name in self.hits[cell]]
        return max(known, key=lambda name: self.mean(cell, name), default=None)

    def _differences(self, cell: Cell, name: str) -> np.ndarray | None:
        """By seed and image, over the seeds that the contestant and the best peer both have."""
        first, second = self.hits[cell][name], self.hits[cell].get(self.best_peer(cell) or "", {})
        seeds = sorted(first.keys() & second.keys())
        return np.stack([first[seed] - second[seed] for seed in seeds]) if seeds else None

    def difference(self, cell: Cell, name: str) -> Difference | None:
        """A contestant's test accuracy less the best peer's; None where they have no seed in common."""
        differences = self._differences(cell, name)
        if differences is None:
            return None
        known = self.variances.get((cell[3], name), self.variances.get((cell[3], ""), 0.0))
        variance = 0.0 if name == self.best_peer(cell) else known / len(differences)
        return Difference(differences.mean(0), variance)


_SUMS = (
    *("search_cpu_seconds", "search_images", "choice_cpu_seconds", "choice_images"),
    *("retrain_cpu_seconds", "teacher_cpu_seconds", "retrain_images"),
)


def returned(rows: Sequence[Row]) -> list[Row]:
    """What `kdnas run` hands over, as rows of the contestant `kdnas`: the better of search and equal shares.

    `kdnas run` retrains equal shares whole beside the searched removal, and the better of both on the search part is
    the student; so costs are the sum of both. (Random removal, which it retrains as well, was never the better one.)
    """
    known = {Task.of(row): row for row in rows if not row["note"]}
    both = [(row, known.get(task._replace(contestant="kdnas-equal"))) for task, row in known.items()]
    pairs = [(run, equal) for run, equal in both if run["contestant"] == "kdnas-run" and equal is not None]
    return [
        max(pair, key=lambda row: float(row["search_accuracy"]))
        | {"contestant": "kdnas", **{name: sum(float(row[name]) for row in pair) for name in _SUMS}}
        for pair in pairs
    ]


def tables(rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """The comparison as lines of markdown; see `Comparison`."""
    comparison = Comparison([*rows, *returned(rows)], peers)
    names = list(dict.fromkeys(row["contestant"] for row in comparison.rows))
    for teacher, budget, steps in dict.fromkeys((c[0], c[1], c[3]) for c in comparison.hits):
        cells = sorted(c for c in comparison.hits if (c[0], c[1], c[3]) == (teacher, budget, steps))
        unit = "MACs" if budget == "macs" else budget
        yield f"**{teacher}, {steps} steps; test accuracy in %, difference to the best peer (bold)**\n"
        yield "| contestant | " + " | ".join(f"{100 * cell[2]:g} % of the {unit}" for cell in cells) + " |"
        yield "| --- |" + " --- |" * len(cells)
        for name in names:
            yield f"| {name} | " + " | ".join(_entry(comparison, cell, name) for cell in cells) + " |"
        yield ""
    yield "| contestant | mean over cells | above, level, below | search, CPU s | retraining, CPU s | images seen |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in names:
        yield _summary(comparison, name)
    for row in rows:
        if row["note"]:
            yield f"\n{Task.of(row).name}, {row['steps']} steps: {row['note']}"


NAMES = {
    "kdnas": "**`kdnas run`** (three finalists, or equal shares)",
    "kdnas-run": "`kdnas run`, its three finalists alone",
    "kdnas-prune": "`kdnas prune`, its search alone",
    "tp-group-norm": "Torch-Pruning, group norm, 400 steps",
    "tp-global": "Torch-Pruning, magnitude, global",
    "tp-local": "Torch-Pruning, magnitude, local",
    "fastnas": "FastNAS (Model-Optimizer)",
    "kdnas-factors": "scale factors (Gu and Tresp), in four rounds",
    "random": "random removal, inherited weights",
    "uniform": "uniform widths, fresh weights",
    "resnet": "ResNet",
    "mobilenet": "MobileNetV2",
    "mobilenet32": "MobileNetV2 at 32x32",
}


def summary(rows: Sequence[Row], peers: Sequence[str], budget: str, steps: int) -> str:
    """The short table of README and docs: test accuracies in %, means over seeds, and the mean difference to the peers.

    A cell where kdnas or all peers are missing is left out.

    Args:
        rows: all rows.
        peers: see `Comparison`.
        budget: `macs` or `latency`.
        steps: of the retraining.
    """
    own = {"kdnas-run", "kdnas-prune"} if budget == "latency" else {"kdnas-run"}
    comparison = Comparison([*rows, *returned(rows)], peers)  # the variance between seeds is that of all cells
    cells = [c for c in comparison.hits if (c[1], c[3]) == (budget, steps)]
    cells = [c for c in cells if comparison.best_peer(c) and own & comparison.hits[c].keys()]
    cells.sort(key=lambda cell: (list(NAMES).index(cell[0]), cell[2]))
    heads = [f"{NAMES[cell[0]]}, {100 * cell[2]:g} %" for cell in cells]
    kind = "latency, " if budget == "latency" else ""
    lines = [
        f"| {kind}retrained {steps:,} steps | {' | '.join(heads)} | against the best peer |",
        "| --- " * (len(cells) + 2) + "|",
    ]
    for name, words in NAMES.items():
        known = [cell for cell in cells if name in comparison.hits[cell]]
        if known:
            entries = [f"{100 * comparison.mean(c, name):.1f}" if c in known else "" for c in cells]
            differences = [d for cell in known if (d := comparison.difference(cell, name)) is not None]
            lines.append(f"| {words} | {' | '.join(entries)} | {Difference.mean(differences) if differences else ''} |")
    return "\n".join(lines)


def _entry(comparison: Comparison, cell: Cell, name: str) -> str:
    if name not in comparison.hits[cell]:
        return ""
    accuracy_text = f"{100 * comparison.mean(cell, name):.2f}"
    if name == comparison.best_peer(cell):
        return f"**{accuracy_text}**"
    difference = comparison.difference(cell, name)
    return accuracy_text if difference is None else f"{accuracy_text}, {difference}"


def _summary(comparison: Comparison, name: str) -> str:
    differences = [comparison.difference(cell, name) for cell, those in comparison.hits.items() if name in those]
    known = [difference for difference in differences if difference is not None]
    signs = [(low > 0) - (high < 0) for low, high in (difference.interval for difference in known)]
    mean = Difference.mean(known) if known else ""
    own = [row for row in comparison.rows if row["contestant"] == name]
    searched = {Task.of(row).name: row for row in own}.values()  # short and long training share a search
    search = sum(float(row["search_cpu_seconds"]) + float(row["choice_cpu_seconds"]) for row in searched)
    training = sum(float(row["retrain_cpu_seconds"]) + float(row["teacher_cpu_seconds"]) for row in own)
    images = sum(float(row["search_images"]) + float(row["choice_images"]) for row in searched)
    images += sum(float(row["retrain_images"]) for row in own)
    balance = ", ".join(str(signs.count(sign)) for sign in (1, 0, -1))
    return f"| {name} | {mean} | {balance} | {search:.0f} | {training:.0f} | {images / 1e6:.2f} M |"
