"""The order of a ranking and its front, by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdnas.architecture import Architecture
from kdnas.ranking.order import difference, finalists, front_of, order_key, ranked
from kdnas.runs.entry import Entry


def entry(code, score=0.5, macs=10, params=10, share=1.0):
    return Entry(Architecture({"a": code}), code, score, {}, params, macs, 1, 0.0, share=share)


@pytest.mark.parametrize("order", list(itertools.permutations(range(6)))[::37])
def test_what_went_further_then_scores_then_costs_then_codes(order):
    places = [
        entry("f", score=-1.0),
        entry("e", score=-2.0, macs=20),
        entry("b", score=-2.0, macs=5),
        entry("c", score=-2.0, macs=5),
        entry("d", score=9.0, share=0.5),
        entry("a", score=99.0, share=0.25),
    ]
    assert ranked([places[i] for i in order]) == places


def test_an_entry_without_a_score_comes_last_and_what_is_missing_counts_as_nothing():
    keys = [
        order_key("a", 0.5, 1.0, 10),
        order_key("b", 0.5, 1.0, 0.5),
        order_key("c", 0.5, 1.0, None),
        order_key("d", -0.25, 1.0, 9),
        order_key("e", 0.5, 0.25, 9),
        order_key("f", 0.5, None, 9),
        order_key("a", None, 1.0, 99),
    ]
    assert sorted(keys[::-1]) == keys
    assert order_key("c", 0.5, 1.0, None) == order_key("c", 0.5, 1.0, 0)


def test_the_front_is_cheapest_first_and_of_equal_entries_the_first_code():
    entries = [
        entry("cheap", score=0.1, macs=1, params=9),
        entry("small", score=0.1, macs=2, params=3),
        entry("z", score=0.5, macs=5, params=5),
        entry("b", score=0.5, macs=5, params=5),
        entry("dominated", score=0.4, macs=5, params=5),
        entry("large", score=0.4, macs=6, params=6),
        entry("best", score=0.9, macs=7, params=20),
        entry("fewer", score=0.8, macs=7, params=19),
    ]
    for part in (entries, entries[::-1]):
        assert [e.code for e in front_of(part)] == ["cheap", "small", "b", "fewer", "best"]
    assert front_of([]) == []


def numbered(number):
    """Four choices by the digits of a number to the base of 4; 3 is a choice that does not exist."""
    digits = {name: number // 4**place % 4 for place, name in enumerate("abcd")}
    return Architecture({name: digit for name, digit in digits.items() if digit < 3})


ARCHITECTURES = st.integers(0, 255).map(numbered)


def of(architecture):
    return Entry(architecture, str(architecture), 0.5, {}, 1, 1, 1, 0.0)


def test_finalists_by_hand():
    rows = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 0}, {"a": 0}]
    entries = [of(Architecture(row)) for row in rows]
    assert finalists(entries, 5, 0.5) == entries
    assert finalists(entries, 5, 0.51) == [entries[0], entries[2]]
    assert finalists(entries, 1, 0.0) == entries[:1]


@given(st.lists(ARCHITECTURES, max_size=12), st.integers(1, 5), st.floats(0, 1))
def test_finalists_are_apart_and_whoever_is_left_out_is_near_a_better_one(architectures, count, least):
    entries = [of(architecture) for architecture in architectures]
    chosen = finalists(entries, count, least)
    for i, entry in enumerate(chosen):
        assert all(difference(entry.architecture, better.architecture) >= least for better in chosen[:i])
    more = finalists(entries, count + 1, least)
    assert more[: len(chosen)] == chosen  # more finalists are the same and further ones
    if len(chosen) < count:
        for entry in entries:
            assert entry in chosen or any(difference(entry.architecture, c.architecture) < least for c in chosen)


@given(ARCHITECTURES, ARCHITECTURES)
def test_a_difference_is_a_share_that_is_0_for_equal_networks_alone(first, second):
    assert 0 <= difference(first, second) == difference(second, first) <= 1
    assert (difference(first, second) == 0) == (first == second)
