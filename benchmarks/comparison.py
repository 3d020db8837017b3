"""The table of same_work.py: contestants by cell, paired differences to the best peer, and their intervals."""

import base64
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import numpy as np
from common import Row

from kdnas.statistics import percentiles

RESAMPLES = 1000
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
        """Where contestants are compared."""
        return self.teacher, self.budget, self.share, self.steps

    @property
    def name(self) -> str:
        """Of the folder of its network, which short and long training share."""
        return f"{self.teacher}-{self.budget}-{self.share}-{self.contestant}-{self.seed}"


def hits_of(row: Row) -> np.ndarray:
    """1 for each test image that is classified correctly, else 0."""
    return np.unpackbits(np.frombuffer(base64.b64decode(row["test_hits"]), np.uint8)).astype(np.float32)


@final
class Comparison:
    """Rows by cell and contestant, and bootstrap intervals of their differences.

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
        images = max(
            (len(h) for cell in self.hits.values() for seeds in cell.values() for h in seeds.values()), default=1
        )
        rng = np.random.default_rng(0)
        draws = rng.integers(images, size=(RESAMPLES, images))
        self.counts = np.stack([np.bincount(draw, minlength=images) for draw in draws]).astype(np.float32) / images

    def mean(self, cell: Cell, name: str) -> float:
        """Test accuracy, a mean over seeds."""
        return float(np.mean([hits.mean() for hits in self.hits[cell][name].values()]))

    def best_peer(self, cell: Cell) -> str | None:
        """The peer of the highest mean test accuracy."""
        known = [name for name in self.peers if name in self.hits[cell]]
        return max(known, key=lambda name: self.mean(cell, name), default=None)

    def difference(self, cell: Cell, name: str) -> tuple[float, np.ndarray] | None:
        """A contestant's mean less the best peer's over the seeds that both have, and its resamples."""
        best = self.best_peer(cell)
        first, second = self.hits[cell][name], self.hits[cell].get(best or "", {})
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            return None
        differences = np.stack([first[seed] - second[seed] for seed in seeds])
        values = self.counts @ differences.T
        picks = np.random.default_rng(1).integers(len(seeds), size=values.shape)
        return float(differences.mean()), np.take_along_axis(values, picks, 1).mean(1)


def _interval(value: float, resamples: np.ndarray) -> str:
    low, high = percentiles(resamples)
    return f"{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def tables(rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """The comparison as lines of markdown; see `Comparison`."""
    comparison = Comparison(rows, peers)
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


def _entry(comparison: Comparison, cell: Cell, name: str) -> str:
    if name not in comparison.hits[cell]:
        return ""
    accuracy_text = f"{100 * comparison.mean(cell, name):.2f}"
    if name == comparison.best_peer(cell):
        return f"**{accuracy_text}**"
    difference = comparison.difference(cell, name)
    return accuracy_text if difference is None else f"{accuracy_text}, {_interval(*difference)}"


def _summary(comparison: Comparison, name: str) -> str:
    differences = [comparison.difference(cell, name) for cell, those in comparison.hits.items() if name in those]
    known = [difference for difference in differences if difference is not None]
    signs = [(low > 0) - (high < 0) for low, high in (percentiles(resamples) for _, resamples in known)]
    mean = ""
    if known:
        mean = _interval(float(np.mean([v for v, _ in known])), np.mean([resamples for _, resamples in known], 0))
    own = [row for row in comparison.rows if row["contestant"] == name]
    searched = {Task.of(row).name: row for row in own}.values()  # short and long training share a search
    search = sum(float(row["search_cpu_seconds"]) + float(row["choice_cpu_seconds"]) for row in searched)
    training = sum(float(row["retrain_cpu_seconds"]) + float(row["teacher_cpu_seconds"]) for row in own)
    images = sum(int(row["search_images"]) + int(row["choice_images"]) for row in searched)
    images += sum(int(row["retrain_images"]) for row in own)
    balance = ", ".join(str(signs.count(sign)) for sign in (1, 0, -1))
    return f"| {name} | {mean} | {balance} | {search:.0f} | {training:.0f} | {images / 1e6:.2f} M |"
