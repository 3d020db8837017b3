"""What architectures spend of a budget, and budgets that nothing meets."""

import random
import re
import time

import pytest

from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible, largest_within
from kdnas.costs.count import cost, peak_memory
from kdnas.spaces.toy import Toy

SPACE = Toy()
SMALLEST = SPACE.blueprint(SPACE.smallest)


class Table:
    """A latency table that takes a second for each layer."""

    def __init__(self):
        self.calls = 0

    def seconds(self, blueprint):
        self.calls += 1
        return float(len(list(blueprint.named_layers())))


def test_the_excess_is_that_of_the_worst_bound():
    spent, memory = cost(SMALLEST), peak_memory(SMALLEST)
    check = BudgetCheck(SPACE, Budget(params=2 * spent.params, macs=spent.macs / 2, memory=memory))
    assert check.excess(SPACE.smallest) == pytest.approx(1.0)
    assert not check.admits(SPACE.smallest)
    exact = BudgetCheck(SPACE, Budget(params=spent.params, macs=spent.macs, memory=memory))
    assert exact.excess(SPACE.smallest) == 0 and exact.admits(SPACE.smallest)
    assert not exact.admits(SPACE.largest)


def test_latency_comes_from_the_table_and_every_architecture_is_measured_once():
    table = Table()
    check = BudgetCheck(SPACE, Budget(latency=4.0), lambda: table)
    for _ in range(2):
        assert check.measured(SPACE.smallest) == {"latency": 4.0}  # stem, two stages of one layer, head
        assert check.measured(SPACE.largest) == {"latency": 6.0}
    assert table.calls == 2
    assert check.admits(SPACE.smallest) and check.excess(SPACE.largest) == pytest.approx(0.5)


def test_without_a_bound_on_memory_or_latency_nothing_is_measured():
    assert BudgetCheck(SPACE, Budget(macs=1)).measured(SPACE.smallest) == {}


def test_what_an_architecture_spends_in_words():
    spent, memory = cost(SMALLEST), peak_memory(SMALLEST)
    sizes = f"{spent.params:,} params"
    plain = BudgetCheck(SPACE, Budget(macs=1))
    assert plain.describe(SPACE.smallest) == f"{sizes} and {spent.macs:,} macs"
    check = BudgetCheck(SPACE, Budget(memory=1e9, latency=9.0), Table)
    expected = f"{sizes}, {spent.macs:,} macs, memory {memory:,} bytes and latency 4 s"
    assert check.describe(SPACE.smallest) == expected


class Check:
    """A check with one excess per architecture, and the architectures that it was asked about."""

    def __init__(self, space, excess):
        self.space, self.budget, self.asked, self._excess = space, Budget(macs=1), [], excess

    def excess(self, architecture):
        self.asked.append(architecture)
        return self._excess(architecture)

    def describe(self, architecture):
        return f"excess {self._excess(architecture):g}"


def test_a_smallest_network_within_the_budget_ends_the_search_at_once():
    for value in (0.0, -0.5):
        check = Check(SPACE, lambda architecture, value=value: value)
        check_feasible(check, random.Random(0))
        assert check.asked == [SPACE.smallest]


def test_any_draw_within_the_budget_is_enough():
    for value in (0.0, -0.5):
        check = Check(SPACE, lambda a, value=value: value if a["stage1.depth"] == 2 else 1.0)
        check_feasible(check, random.Random(0))
        assert check.asked[-1]["stage1.depth"] == 2
        assert all(a["stage1.depth"] == 1 for a in check.asked[:-1])


def by_size(architecture):
    """Less is better, and nothing is good enough: the larger the network the nearer."""
    return 1 - cost(SPACE.blueprint(architecture)).macs / 1e9


def test_the_nearest_of_all_draws_is_named_with_what_it_spends():
    check = Check(SPACE, by_size)
    with pytest.raises(Infeasible) as error:
        check_feasible(check, random.Random(0))
    assert len(check.asked) == 1001
    code = re.escape(SPACE.code(SPACE.largest))
    assert re.search(f"no network found with macs <= 1; the nearest is {code} with excess", str(error.value))


def test_draws_change_the_nearest_so_far_or_begin_afresh():
    check, rng = Check(SPACE, by_size), random.Random(0)
    with pytest.raises(Infeasible):
        check_feasible(check, rng, attempts=60)
    expected, again = [SPACE.smallest], random.Random(0)
    nearest = SPACE.smallest
    for _ in range(60):
        fresh = again.random() >= 0.8
        expected.append(SPACE.sample(again) if fresh else SPACE.mutate(nearest, again))
        nearest = min(nearest, expected[-1], key=by_size)
    assert check.asked == expected
    assert rng.random() == again.random()


def test_no_draw_is_tested_after_the_time(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    check = Check(SPACE, lambda architecture: 1.0)
    with pytest.raises(Infeasible):
        check_feasible(check, random.Random(0), seconds=5.0)
    assert len(check.asked) == 1 + 4  # the smallest, and a draw per second


def test_the_first_of_equally_near_networks_is_named():
    check = Check(SPACE, lambda architecture: 1.0)
    with pytest.raises(Infeasible, match=re.escape(f"nearest is {SPACE.code(SPACE.smallest)} with excess 1")):
        check_feasible(check, random.Random(0), attempts=20)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4, 0.25])
def test_the_largest_within_a_budget_is_within_it_and_no_change_of_a_choice_is_larger(share):
    macs = {a: cost(SPACE.blueprint(a)).macs for a in SPACE.all()}
    bound = share * max(macs.values())
    best = largest_within(BudgetCheck(SPACE, Budget(macs=bound)), SPACE.smallest)
    assert macs[best] <= bound
    for other, own in macs.items():
        changed = [name for name in {*best, *other} if best.get(name) != other.get(name)]
        assert len(changed) > 1 or own <= macs[best] or own > bound
    if share == 1.0:
        assert best == SPACE.largest
