"""The order of a ranking and its front, by hand."""

import itertools

import pytest

from kdnas.architecture import Architecture
from kdnas.ranking.order import front_of, order_key, ranked
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
