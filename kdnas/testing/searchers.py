"""What must hold for every searcher, as a class that anyone's tests can inherit."""

import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from kdnas.architecture import Architecture
from kdnas.randomness import python_rng
from kdnas.ranking.loop import entry_of
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Score
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.tables import load_space
from kdnas.testing._algorithm import AlgorithmContract
from kdnas.testing._generators import generator_states, generators_seeded

Admits = Callable[[Architecture], bool]


class Trajectory(NamedTuple):
    """One search to its end.

    Attributes:
        batches: the return values of `ask`, in order.
        stopped: why the search ended; None if the contract ended it.
        leaves_generators: whether the global generators have the states they had before the search.
    """

    batches: tuple[tuple[Architecture, ...], ...]
    stopped: str | None
    leaves_generators: bool

    @property
    def architectures(self) -> list[Architecture]:
        """Everything that was asked for, in order."""
        return [architecture for batch in self.batches for architecture in batch]


class SearcherContract(AlgorithmContract):
    """What must hold for every searcher. Set `make` to the class.

        class TestMine(SearcherContract):
            make = Mine

    The searches are over a space of a few dozen networks with an invented score for each.

    Attributes:
        make: the searcher's class.
        arguments: its arguments beside space, budget and generator.
        repeats: whether it may ask again for what it was told, which costs nothing; it then has to end by itself.
        draws: whether it asks for other architectures with another seed.
        coverage: the least share of a small space's admitted networks that it asks for before it ends.
    """

    make: type[Searcher]
    repeats = False
    draws = True
    coverage = 0.9
    _base = Searcher
    _without_default: ClassVar[frozenset[str]] = frozenset({"space", "admits", "rng"})
    _trajectories: ClassVar[dict[Any, Trajectory]] = {}

    def __init_subclass__(cls) -> None:
        """A search is run once per class."""
        cls._trajectories = {}

    def test_it_asks_for_at_most_as_many_as_the_limit(self) -> None:
        for limit in (1, 2, 7, 1000):
            searcher = self._searcher()
            for _ in range(3):
                batch = searcher.ask(limit)
                assert len(batch) <= limit, f"ask({limit}) returned {len(batch)} architectures"
                if not batch:
                    break
                searcher.tell(self._scored(batch))

    def test_every_architecture_is_valid_and_canonical(self) -> None:
        space = self._space()
        for architecture in self._trajectory().architectures:
            assert isinstance(architecture, Architecture), type(architecture)
            space.validate(architecture)
            assert space.canonical(architecture) == architecture, f"{dict(architecture)} is not canonical"

    def test_every_architecture_is_within_the_budget(self) -> None:
        for count in (3, self._half()):
            admits, architectures = self._smallest(count), self._trajectory(count).architectures
            assert architectures, f"nothing was asked for, and the budget admits {count} networks"
            assert all(map(admits, architectures)), "an architecture is over the budget"

    def test_no_architecture_is_asked_for_twice_unless_repetitions_are_declared(self) -> None:
        architectures = self._trajectory().architectures
        if not self.repeats:
            assert len(set(architectures)) == len(architectures), "an architecture was asked for twice"

    def test_a_small_space_is_covered(self) -> None:
        for count in (self._space().count(), self._half()):
            admits = self._smallest(count)
            admitted = {a for a in self._space().all() if admits(a)}
            covered = admitted.intersection(self._trajectory(count).architectures)
            assert len(covered) >= self.coverage * len(admitted), f"{len(covered)} of {len(admitted)} networks"

    def test_it_ends_by_itself_and_says_why(self) -> None:
        assert self._trajectory().stopped, "it does not end after the whole space, or `stopped` is empty"

    def test_a_budget_that_admits_nothing_ends_it_at_once(self) -> None:
        searcher = self._searcher(admits=lambda _: False)
        assert list(searcher.ask(10)) == []
        assert isinstance(searcher.stopped, str) and searcher.stopped

    def test_the_same_seed_asks_for_the_same_whatever_the_states_of_the_global_generators(self) -> None:
        first, second = (self._trajectory(self._half(), seed=3, generators=seed).batches for seed in (0, 1))
        assert first == second, "the architectures depend on something else than `rng` and the scores"

    def test_another_seed_asks_for_others(self) -> None:
        if self.draws:
            first, second = (self._trajectory(self._half(), seed=seed).batches for seed in (0, 3))
            assert first != second, "the architectures do not depend on `rng`"

    def test_the_global_generators_are_left_alone(self) -> None:
        assert self._trajectory().leaves_generators, "a global generator was drawn from or seeded"

    def test_a_search_is_resumed_by_telling_the_scores_again(self) -> None:
        """As after a kill: entries are read from the ranking's lines, and took no time."""
        first, second = self._searcher(seed=5), self._searcher(seed=5)
        for _ in range(4):
            batch = first.ask(7)
            assert list(second.ask(7)) == list(batch), "after equal scores it asks for something else"
            if not batch:
                return
            entries = self._scored(batch)
            first.tell(entries)
            second.tell([replace(_read_again(entry), seconds=0.0) for entry in entries])

    def test_a_search_may_begin_with_scores_of_other_networks(self) -> None:
        admits = self._smallest(self._half())
        searcher = self._searcher(admits=admits)
        searcher.begin(self._scored([a for a in self._space().all() if admits(a)][::4]))
        for batch in self._batches(searcher, rounds=2):
            assert all(map(admits, batch)), "an architecture is over the budget"

    def test_entries_are_not_written_to(self) -> None:
        searcher = self._searcher()
        for _ in range(4):
            batch = searcher.ask(7)
            if not batch:
                break
            entries = self._scored(batch)
            before = json.dumps([entry.to_json() for entry in entries])
            searcher.tell(entries)
            assert json.dumps([entry.to_json() for entry in entries]) == before, "an entry was changed"

    def _space(self) -> SearchSpace:
        """A space small enough to be covered."""
        return _toy()

    def _searcher(self, *, seed: int = 0, admits: Admits = lambda _: True) -> Searcher:
        return self.make(space=self._space(), admits=admits, rng=random.Random(seed), **self.arguments)

    def _trajectory(self, count: int | None = None, seed: int = 0, generators: int = 0) -> Trajectory:
        """A whole search over the smallest `count` networks, with global generators seeded by `generators`."""
        count = self._space().count() if count is None else count
        key = self.make, count, seed, generators
        if key not in self._trajectories:
            with generators_seeded(generators):
                before = generator_states()
                searcher = self._searcher(seed=seed, admits=self._smallest(count))
                batches = tuple(map(tuple, self._batches(searcher)))
                stopped = searcher.stopped if len(batches) < self._most_rounds() else None
                self._trajectories[key] = Trajectory(batches, stopped, generator_states() == before)
        return self._trajectories[key]

    def _scored(self, architectures: Sequence[Architecture]) -> list[Entry]:
        space = self._space()
        return [
            entry_of(space, a, Score(self._value(a), {"part": 1.0}), 0.25 + i, ("score", "searcher", 1))
            for i, a in enumerate(architectures)
        ]

    def _value(self, architecture: Architecture) -> float:
        """A score to which every choice adds, and a little of the network's own."""
        choices = sum(python_rng(name, str(value)).random() for name, value in architecture.items())
        return choices + 0.2 * python_rng("network", self._space().code(architecture)).random()

    def _batches(self, searcher: Searcher, rounds: int | None = None) -> Iterator[list[Architecture]]:
        """What is asked for, batch by batch, each told before the next."""
        for _ in range(self._most_rounds() if rounds is None else rounds):
            batch = list(searcher.ask(7))
            if not batch:
                return
            yield batch
            searcher.tell(self._scored(batch))

    def _most_rounds(self) -> int:
        return 3 * self._space().count()

    def _half(self) -> int:
        return self._space().count() // 2

    def _smallest(self, count: int) -> Admits:
        """A budget that admits about the `count` smallest networks."""
        sizes = sorted(map(self._size, self._space().all()))
        return lambda a: self._size(a) <= sizes[min(count, len(sizes)) - 1]

    def _size(self, architecture: Architecture) -> int:
        return sum(c.options.index(architecture[c.name]) for c in self._space().choices if c.name in architecture)


@functools.cache
def _toy() -> SearchSpace:
    return load_space("toy")


def _read_again(entry: Entry) -> Entry:
    return Entry.from_json(json.loads(json.dumps(entry.to_json())))
