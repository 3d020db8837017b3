"""The searchers' contract finds what it is there to find: each fault breaks its own demand and no other."""

import itertools
import random
from typing import final

import numpy as np
import pytest
import torch

from kdnas.architecture import Architecture
from kdnas.searchers.base import Searcher
from kdnas.testing.searchers import SearcherContract


class Plain(Searcher):
    """Asks every admitted network once, in an order of its own.

    Reference: none.
    """

    def __init__(self, *, space, admits, rng):
        super().__init__(space=space, admits=admits, rng=rng)
        self.left = [a for a in space.all() if admits(a)]
        rng.shuffle(self.left)

    def ask(self, limit):
        batch, self.left = self.left[:limit], self.left[limit:]
        return batch

    def tell(self, scored):
        pass


Sound = final(type("Sound", (Plain,), {"__doc__": Plain.__doc__}))


def variant(**members):
    """A searcher like Sound with something changed."""
    return final(type("Variant", (Plain,), {"__doc__": Plain.__doc__, **members}))


def at_first(change):
    """A searcher that does something more when it is made."""

    def begin(self, *, space, admits, rng):
        Plain.__init__(self, space=space, admits=admits, rng=rng)
        change(self)

    return variant(__init__=begin)


def greedy(self, limit):
    return Plain.ask(self, limit + 1)


def misspell(self):
    shallow = [a for a in self.left if a["stage0.depth"] == 1]
    if len(shallow) > 3:
        self.left.remove(shallow[0])
        self.left.append(Architecture({**shallow[0], "stage0.layer1.width": 4}))


def overspend(self):
    if self.left and not self.admits(self.space.largest):
        self.left.append(self.space.largest)


def repeat(self):
    self.left += self.left[:1]


def give_up(self):
    del self.left[len(self.left) // 2 :]


def go_on(self, limit):
    self.left = self.left or list(filter(self.admits, self.space.all()))
    return Plain.ask(self, limit)


def never_mind_the_budget(self):
    self.left = self.left or [self.space.smallest]


def listen_to_the_world(self):
    state = random.getstate()
    random.shuffle(self.left)
    random.setstate(state)


def ignore_the_seed(self):
    self.left.sort(key=self.space.code)


def count_seconds(self, scored):
    if not any(entry.seconds for entry in scored):
        self.left.reverse()


def begin_with_the_largest(self, scored):
    self.left.insert(0, self.space.largest)


def write_down(self, scored):
    for entry in scored:
        entry.parts["place"] = 1.0


class Open(Plain):
    """Anyone may derive from it.

    Reference: none.
    """


FINAL = "test_it_is_final_with_plain_keyword_only_arguments_that_have_defaults"
BUDGET = "test_every_architecture_is_within_the_budget"
TWICE = "test_no_architecture_is_asked_for_twice_unless_repetitions_are_declared"
QUIET = "test_the_global_generators_are_left_alone"
FAULTS = [
    (FINAL, Open),
    ("test_its_docstring_names_its_reference", final(type("Variant", (Plain,), {"__doc__": "No sentence"}))),
    ("test_it_asks_for_at_most_as_many_as_the_limit", variant(ask=greedy)),
    ("test_every_architecture_is_valid_and_canonical", at_first(misspell)),
    (BUDGET, at_first(overspend)),
    (TWICE, at_first(repeat)),
    ("test_a_small_space_is_covered", at_first(give_up)),
    ("test_it_ends_by_itself_and_says_why", variant(ask=go_on)),
    ("test_a_budget_that_admits_nothing_ends_it_at_once", at_first(never_mind_the_budget)),
    (
        "test_the_same_seed_asks_for_the_same_whatever_the_states_of_the_global_generators",
        at_first(listen_to_the_world),
    ),
    ("test_another_seed_asks_for_others", at_first(ignore_the_seed)),
    (QUIET, at_first(lambda self: random.random())),
    (QUIET, at_first(lambda self: np.random.rand())),
    (QUIET, at_first(lambda self: torch.rand(()))),
    (QUIET, at_first(lambda self: torch.manual_seed(4))),
    ("test_a_search_is_resumed_by_telling_the_scores_again", variant(tell=count_seconds)),
    ("test_a_search_may_begin_with_scores_of_other_networks", variant(begin=begin_with_the_largest)),
    ("test_entries_are_not_written_to", variant(tell=write_down)),
]
DEMANDS = [name for name in dir(SearcherContract) if name.startswith("test_")]


def broken(searcher, **members):
    """The demands that a searcher does not keep."""
    contract = type("Contract", (SearcherContract,), {"make": searcher, **members})
    missed = set()
    for demand in DEMANDS:
        try:
            getattr(contract(), demand)()
        except (AssertionError, ValueError):
            missed.add(demand)
    return missed


def test_a_sound_searcher_keeps_every_demand():
    assert broken(Sound) == set()
    assert broken(Sound, coverage=1.0, repeats=True) == set()


@pytest.mark.parametrize(("demand", "searcher"), [pytest.param(d, s, id=f"{d}-{i}") for i, (d, s) in enumerate(FAULTS)])
def test_a_fault_breaks_its_demand_and_no_other(demand, searcher):
    # Only one that repeats itself can go on for ever.
    members = {"repeats": True} if "ends_by_itself" in demand else {}
    assert broken(searcher, **members) == {demand}


def test_every_demand_is_broken_by_some_fault():
    assert {demand for demand, _ in FAULTS} == set(DEMANDS)


def test_a_careless_searcher_breaks_all_that_it_neglects():
    class Careless(Searcher):
        """Draws what it likes, from Python's own generator."""

        def ask(self, limit):
            self.rounds = getattr(self, "rounds", itertools.count())
            return [self.space.sample(random) for _ in range(limit)] if next(self.rounds) < 20 else []

        def tell(self, scored):
            pass

    same = "test_the_same_seed_asks_for_the_same_whatever_the_states_of_the_global_generators"
    assert broken(Careless) >= {FINAL, BUDGET, TWICE, QUIET, same}


def test_a_searcher_that_may_repeat_itself_may():
    assert broken(at_first(repeat), repeats=True) == set()
