import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.costs.budget import Budget
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.ranking import exact
from kdnas.ranking.exact import BlockTable, best, blocks_of, front
from kdnas.tables import load_space


def tables(draw, scores, costs):
    blocks = []
    for place in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 5))
        column = st.lists(costs, min_size=size, max_size=size).map(tuple)
        blocks.append(
            BlockTable(
                f"block{place}",
                tuple(range(size)),
                draw(st.lists(scores, min_size=size, max_size=size).map(tuple)),
                {"params": draw(column), "macs": draw(column)},
            )
        )
    return blocks


# Few distinct values make ties everywhere; halves add exactly, so that enumeration and search agree on every tie.
TIED = st.composite(lambda draw: tables(draw, st.integers(-4, 4).map(lambda i: i / 2), st.integers(0, 4)))()
FREE = st.composite(lambda draw: tables(draw, st.floats(-1e3, 1e3), st.integers(0, 10**9)))()


def enumerate_all(blocks, bounds):
    """Every admitted network as (options, score, costs), in the order that `best` promises."""
    found = []
    for options in itertools.product(*(range(len(b.options)) for b in blocks)):
        score = 0.0
        for block, i in zip(blocks, options, strict=True):
            score += block.scores[i]
        costs = {n: sum(b.costs[n][i] for b, i in zip(blocks, options, strict=True)) for n in ("params", "macs")}
        if all(costs[n] <= bound for n, bound in bounds.items()):
            found.append((options, score, costs))
    return sorted(found, key=lambda f: (-f[1], [f[2][n] for n in bounds], f[0]))


def bounds_for(draw, blocks):
    """No bound, loose and tight ones, on either cost or both; now and then exactly what some network costs."""
    every = enumerate_all(blocks, {})
    bounds = {}
    for name in draw(st.sampled_from([(), ("macs",), ("params",), ("params", "macs"), ("macs", "params")])):
        bounds[name] = draw(st.sampled_from([f[2][name] for f in every])) - draw(st.sampled_from([0, 0, 0, 1]))
    return bounds


@settings(max_examples=80, deadline=None)
@given(st.data(), st.one_of(TIED, FREE), st.integers(1, 12))
def test_the_best_networks_are_those_of_enumeration(data, blocks, num):
    bounds = bounds_for(data.draw, blocks)
    expected = enumerate_all(blocks, bounds)[:num]
    if not expected:
        with pytest.raises(Infeasible):
            best(blocks, bounds, num)
        return
    found = best(blocks, bounds, num)
    assert [f.score for f in found] == [score for _, score, _ in expected]
    assert all(f.costs[n] <= bound for f in found for n, bound in bounds.items())
    assert len({f.options for f in found}) == len(found)
    if all(float(2 * s).is_integer() and abs(s) <= 4 for b in blocks for s in b.scores):
        assert [f.options for f in found] == [options for options, _, _ in expected]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.one_of(TIED, FREE), st.sampled_from([("macs",), ("params",), ("params", "macs")]))
def test_the_front_is_that_of_enumeration(data, blocks, axes):
    bounds = bounds_for(data.draw, blocks)
    every = enumerate_all(blocks, bounds)
    if not every:
        with pytest.raises(Infeasible):
            front(blocks, bounds, axes)
        return
    values = {(score, *(costs[n] for n in axes)) for _, score, costs in every}
    expected = {
        v
        for v in values
        if not any(w != v and w[0] >= v[0] and all(a <= b for a, b in zip(w[1:], v[1:], strict=True)) for w in values)
    }
    found = [(f.score, *(f.costs[n] for n in axes)) for f in front(blocks, bounds, axes)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert found == sorted(found, key=lambda v: (v[1:], v[0]))


def random_blocks(sizes, seed=0):
    """Bigger options tend to be better, as in a real rating; scores are floats, costs whole numbers."""
    rng = random.Random(seed)
    blocks = []
    for place, size in enumerate(sizes):
        macs = [rng.randint(10**6, 3 * 10**7) for _ in range(size)]
        params = [int(m * rng.uniform(0.01, 0.1)) for m in macs]
        scores = tuple(-math.exp(-m / 1e7) + 0.1 * rng.gauss(0, 1) for m in macs)
        blocks.append(
            BlockTable(f"block{place}", tuple(range(size)), scores, {"params": tuple(params), "macs": tuple(macs)})
        )
    return blocks


@pytest.mark.parametrize("num", [1, 30])
def test_larger_tables_with_floating_scores_equal_enumeration(num):
    blocks = random_blocks([9, 8, 7, 6])
    middle = enumerate_all(blocks, {})[1500][2]
    for bounds in ({}, {"macs": middle["macs"]}, middle):
        expected = [(options, score) for options, score, _ in enumerate_all(blocks, bounds)[:num]]
        assert [(f.options, f.score) for f in best(blocks, bounds, num)] == expected


@pytest.mark.parametrize("sizes", [[6] * 20, [1100] * 5])
def test_of_ten_to_the_fifteen_networks_few_states_are_compared(sizes, monkeypatch):
    assert math.prod(sizes) > 1e15
    blocks = random_blocks(sizes)
    states, peeled = [], exact._peeled

    def compare(score, *given):
        states.append(len(score))
        assert sum(states) < 200_000
        return peeled(score, *given)

    monkeypatch.setattr(exact, "_peeled", compare)
    bound = len(sizes) * 1.2e7
    whole = front(blocks, {}, ("macs",))
    best_ones = best(blocks, {"macs": bound, "params": 0.05 * bound}, 5)
    assert all(f.costs["macs"] <= bound and f.costs["params"] <= 0.05 * bound for f in best_ones)
    under = best(blocks, {"macs": bound})[0]
    assert under.score == max(f.score for f in whole if f.costs["macs"] <= bound)
    assert best_ones[0].score <= under.score


def test_no_network_that_another_dominates_is_on_the_front_by_hand():
    first = BlockTable("first", ("a", "b", "c"), (1.0, 3.0, 2.0), {"macs": (1, 4, 4)})
    second = BlockTable("second", ("x", "y"), (0.0, 2.0), {"macs": (2, 3)})
    # a x: 1 at 3; a y: 3 at 4; b x: 3 at 6; b y: 5 at 7; those with c are beaten by those with b.
    assert [(f.options, f.score, f.costs["macs"]) for f in front([first, second])] == [
        (("a", "x"), 1.0, 3),
        (("a", "y"), 3.0, 4),
        (("b", "y"), 5.0, 7),
    ]
    assert best([first, second], {"macs": 6})[0].options == ("a", "y")
    assert [f.options for f in best([first, second], {"macs": 6}, 3)] == [("a", "y"), ("b", "x"), ("c", "x")]


def test_an_infeasible_budget_names_the_nearest_network():
    blocks = [
        BlockTable("first", ("small", "thin"), (0.0, 0.0), {"params": (10, 40), "macs": (40, 10)}),
        BlockTable("second", ("only",), (0.0,), {"params": (5,), "macs": (5,)}),
    ]
    with pytest.raises(
        Infeasible, match=r"no network with macs <= 14; the nearest has params 45, macs 15 \(first: thin"
    ):
        best(blocks, {"macs": 14})
    # Each bound alone can be met, both together cannot.
    with pytest.raises(Infeasible, match=r"nearest has params 15, macs 45"):
        best(blocks, {"params": 20, "macs": 42})
    with pytest.raises(Infeasible, match=r"nearest"):
        front(blocks, {"params": 20, "macs": 42}, ("macs",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockTable("b", (), (), {}), "at least one option"),
        (lambda: BlockTable("b", (1, 2), (0.0,), {}), "got 1 scores for 2 options"),
        (lambda: BlockTable("b", (1,), (math.nan,), {}), "finite"),
        (lambda: best([], {}), "at least one block"),
        (lambda: best([BlockTable("b", (1,), (0.0,), {"macs": (1,)})], {"mac": 3}), "'mac'"),
        (lambda: best([BlockTable("b", (1,), (0.0,), {"macs": (1,)})], {"macs": math.nan}), "number"),
        (lambda: best([BlockTable("b", (1,), (0.0,), {"macs": (1,)})], num=0), "at least 1"),
        (lambda: front([BlockTable("b", (1,), (0.0,), {"macs": (1,)})], costs=()), "must be among macs"),
        (
            lambda: best([BlockTable("b", (1,), (0.0,), {}), BlockTable("c", (1,), (0.0,), {"macs": (1,)})]),
            "every block",
        ),
    ],
)
def test_a_wrong_table_or_question_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SPACE = load_space("nas_bench_macro")


def rating(block, part):
    rng = random.Random(f"{block} {sorted(part.items())}")
    return sum({"identity": 0.0, "k3e3": 1.0, "k5e6": 1.6}[str(v)] + 0.3 * rng.random() for v in part.values())


def test_tables_of_a_space_hold_exact_costs_and_every_network():
    blocks = blocks_of(SPACE, rating)
    assert math.prod(len(b.options) for b in blocks) == 3969
    bounds = Budget(macs=50e6, params=1.2e6).bounds()
    found = best(blocks, bounds, 5)
    for one in found:
        assert cost(SPACE.blueprint(one.architecture)) == (one.costs["params"], one.costs["macs"])
        assert SPACE.canonical(one.architecture) == one.architecture
    scored = []
    for options in itertools.product(*(range(len(b.options)) for b in blocks)):
        costs = {n: sum(b.costs[n][i] for b, i in zip(blocks, options, strict=True)) for n in bounds}
        if all(costs[n] <= bounds[n] for n in bounds):
            scored.append(sum(b.scores[i] for b, i in zip(blocks, options, strict=True)))
    assert [f.score for f in found] == pytest.approx(sorted(scored, reverse=True)[:5], abs=1e-12)


def test_a_space_whose_blocks_depend_on_each_other_is_refused_until_they_are_merged():
    toy = load_space("toy")
    with pytest.raises(ValueError, match="must be sums over stage0, stage1"):
        blocks_of(toy, lambda block, part: 0.0)
    merged = blocks_of(toy, lambda block, part: len(part), {"all": [c.name for c in toy.choices]})
    assert len(merged[1].options) == 36
    with pytest.raises(ValueError, match="every choice"):
        blocks_of(toy, lambda block, part: 0.0, {"all": ["stage0.depth"]})


def test_fronts_of_hundreds_of_tied_options_equal_the_definition():
    rng = random.Random(0)
    rows = [(float(rng.randint(0, 30)), rng.randint(0, 30), rng.randint(0, 30)) for _ in range(400)]
    block = BlockTable(
        "one",
        tuple(range(400)),
        tuple(r[0] for r in rows),
        {n: tuple(r[i] for r in rows) for i, n in ((1, "params"), (2, "macs"))},
    )
    expected = {r for r in rows if not any(o != r and o[0] >= r[0] and o[1] <= r[1] and o[2] <= r[2] for o in rows)}
    found = front([block], costs=("params", "macs"))
    assert len(found) == len(expected)
    assert {(f.score, f.costs["params"], f.costs["macs"]) for f in found} == expected
