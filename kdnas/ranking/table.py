"""A ranking as people look at it."""

import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, final, overload

from kdnas.costs.budget import amount
from kdnas.ranking.order import front_of
from kdnas.runs.entry import Entry


@final
class Ranking(Sequence[Entry]):
    """Entries, best first; prints as a table, and a slice is a ranking.

    Predicted accuracies are printed with their 90 % intervals.

    Args:
        entries: in the order of `kdnas.ranking.order.ranked`.
        places: the 1-based place of each; 1, 2, 3, ... by default.

    Example:
        >>> from kdnas.architecture import Architecture
        >>> entry = Entry(Architecture({"depth": 2}), "2", 0.5, {}, params=10, macs=20, layers=3, seconds=0.1)
        >>> print(Ranking([entry]))
        place  code      score       params           MACs  layers
            1  2        0.5000           10             20       3
    """

    def __init__(self, entries: Sequence[Entry], places: Sequence[int] | None = None) -> None:
        self.entries = tuple(entries)
        self.places = tuple(range(1, len(self.entries) + 1) if places is None else places)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> "Ranking": ...
    def __getitem__(self, index: int | slice) -> "Entry | Ranking":
        if isinstance(index, slice):
            return Ranking(self.entries[index], self.places[index])
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def front(self) -> "Ranking":
        """The Pareto front of score, MACs and params; its entries are numbered anew."""
        return Ranking(front_of(list(self.entries)))

    def to_json(self) -> list[dict[str, Any]]:
        """One JSON object per entry, with its place."""
        return [{"place": place, **entry.to_json()} for place, entry in zip(self.places, self.entries, strict=True)]

    def to_pandas(self) -> Any:
        """A pandas DataFrame with one row per entry.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        rows = [{**row, "architecture": json.dumps(row["architecture"])} for row in self.to_json()]
        return importlib.import_module("pandas").DataFrame(rows).set_index("place")

    def __str__(self) -> str:
        width = max([4, *(len(entry.code) for entry in self.entries)])
        spent = list(self.entries[0].spent) if self.entries else []
        predicted = bool(self.entries) and {"low", "high"} <= set(self.entries[0].parts)
        header = f"  {'90 % interval':>16}" * predicted + "".join(f"  {name:>15}" for name in spent)
        lines = [f"{'place':>5}  {'code':<{width}}  {'score':>9}  {'params':>11}  {'MACs':>13}  {'layers':>6}{header}"]
        for place, e in zip(self.places, self.entries, strict=True):
            more = f"  [{e.parts['low']:.4f}, {e.parts['high']:.4f}]" if predicted else ""
            more += "".join(f"  {amount(name, e.spent[name]):>15}" for name in spent)
            lines.append(
                f"{place:>5}  {e.code:<{width}}  {e.score:>9.4f}  {e.params:>11,}  {e.macs:>13,}  {e.layers:>6}{more}"
            )
        return "\n".join(lines)

    __repr__ = __str__
