"""What controls say of a search: values, intervals and sentences against those by hand."""

import dataclasses
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.costs.target import Target
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.ranking import controls
from kdnas.ranking.loop import entry_of
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Score, Scorer
from kdnas.scorers.depth import Depth
from kdnas.scorers.nwot import Nwot
from kdnas.scorers.synflow import Synflow
from kdnas.scorers.zen import Zen
from kdnas.spaces.toy import Toy
from kdnas.statistics import kendall, resampled_kendall
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from tests.scorers import scene


def entries(*scores):
    return [Entry(Architecture({"a": i}), str(i), score, {}, 1, 1, 1, 0.0) for i, score in enumerate(scores)]


WORDS = "The search is not distinguishable from random search at this cost."


@pytest.mark.parametrize(("best", "unclear"), [(0.8, False), (0.7001, False), (0.7, True), (0.5, True), (-1.0, True)])
def test_a_search_is_told_from_random_search_by_its_best_score_alone(best, unclear):
    control = controls.random_search(entries(best - 1, best, best - 0.5), entries(0.1, 0.7, 0.3, 0.2), 4)
    assert control["value"] == 0.7
    expected = f"The search's best score is {best:.4f}, that of 4 random subnets 0.7000."
    assert control["sentence"] == (f"{expected} {WORDS}" if unclear else expected)


def test_the_interval_of_the_best_random_score_by_hand():
    # The best of four draws from four is the k-th smallest or below with probability (k / 4)^4: 0.0039, 0.0625, 0.32.
    control = controls.random_search(entries(1.0), entries(0.1, 0.7, 0.3, 0.2), 4)
    assert control["interval"] == [0.2, 0.7]
    assert controls.random_search(entries(1.0), entries(0.4), 1)["interval"] == [0.4, 0.4]


def test_random_search_that_drew_nothing_is_no_comparison():
    control = controls.random_search(entries(1.0), [], 3)
    assert set(control) == {"sentence"}
    assert "drew no network" in control["sentence"] and WORDS not in control["sentence"]


def sized(scores, **columns):
    """Entries of these scores, with columns of other values."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [dataclasses.replace(e, **row) for e, row in zip(entries(*scores), rows, strict=True)]


def test_agreement_with_size_is_the_tau_of_each_size_and_only_a_high_one_is_a_warning():
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    backwards, mixed = [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 6, 5]
    found = controls.sizes(sized(scores, params=[10, 20, 30, 40, 50, 60], macs=backwards, layers=mixed))
    assert list(found) == ["tau params", "tau macs", "tau layers"]
    assert [c["value"] for c in found.values()] == pytest.approx([1, -1, 13 / 15])
    assert found["tau params"]["interval"] == pytest.approx([1, 1])
    warning = " The score says little more than size does."
    expected = "Kendall's tau between the score and parameters: 1.00 [1.00, 1.00]." + warning
    assert found["tau params"]["sentence"] == expected
    assert found["tau macs"]["sentence"].endswith("multiply-accumulates: -1.00 [-1.00, -1.00].")
    low, high = found["tau layers"]["interval"]
    assert low < 13 / 15 < high
    expected = f"Kendall's tau between the score and the number of layers: 0.87 [{low:.2f}, {high:.2f}].{warning}"
    assert found["tau layers"]["sentence"] == expected
    rows = np.random.default_rng(0).integers(6, size=(200, 6))
    taus = resampled_kendall(np.array(scores), np.array(mixed, float), rows)
    assert [low, high] == pytest.approx(list(np.percentile(taus, [2.5, 97.5])))


def test_the_interval_of_a_tau_is_that_of_two_hundred_resamples():
    rng = np.random.default_rng(1)
    scores, params = rng.normal(size=40), rng.normal(size=40)
    rows = np.random.default_rng(0).integers(40, size=(200, 40))
    expected = np.percentile(resampled_kendall(scores, params, rows), [2.5, 97.5])
    control = controls.sizes(sized(scores, params=params, macs=params, layers=params))["tau params"]
    assert control["interval"] == pytest.approx(list(expected), abs=1e-9)


def test_a_tau_of_four_fifths_is_no_warning():
    # Of ten pairs one is discordant: (9 - 1) / 10.
    found = controls.sizes(sized([1, 2, 3, 4, 5], params=[1, 2, 3, 5, 4], macs=[1] * 5, layers=[2] * 5))
    assert found["tau params"]["value"] == pytest.approx(0.8, abs=1e-9)
    assert found["tau params"]["sentence"].endswith("].")
    assert found["tau macs"]["value"] == 0


@pytest.mark.parametrize(("count", "ranked"), [(2, False), (3, True)])
def test_three_networks_are_enough_to_be_ranked(count, ranked):
    found = controls.sizes(sized(range(count), params=range(count), macs=range(count), layers=range(count)))
    assert all(("value" in c) == ranked for c in found.values())
    if not ranked:
        expected = "Agreement with parameters is left out: 2 networks are too few to be ranked."
        assert found["tau params"] == {"sentence": expected}


def test_evaluations_stopped_early_are_counted_and_their_cost_added():
    control = controls.early_stopping(sized(range(5), share=[1.0, 0.25, 0.5, 1.0, 0.5]))
    expected = "3 of 5 evaluations were stopped early; all of them cost 3.2 whole ones."
    assert control == {"value": 3.25, "stopped": 3, "sentence": expected}


class Ticks(Scorer):
    """Scores networks by their parameters; each takes a second."""

    def __init__(self, now, seconds=1.0):
        self.now, self.seconds, self.scored = now, seconds, 0

    def score(self, student, evidence):
        self.now["seconds"] += self.seconds
        self.scored += 1
        return Score(float(sum(p.numel() for p in student.parameters())), {})


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still but for what is added to it."""
    now = {"seconds": 100.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["seconds"])
    return now


LINEAR = [nn.Linear(i, 1, bias=False) for i in range(1, 21)]


def test_all_networks_are_scored_or_the_time_is_over(now):
    assert controls._scores_until(200.0, LINEAR, Ticks(now), None) == list(range(1, 21))
    with pytest.raises(ValueError, match="the time is over"):
        controls._scores_until(now["seconds"] + 19, LINEAR, Ticks(now), None)


SPACE = load_space("toy").fitted(classes=3, image_channels=3)
WIDE = Toy(widths=(4, 6, 8), classes=3, image_channels=3)


@pytest.fixture(scope="module")
def evidence():
    return scene.evidence()


def of_space(score=lambda blueprint: cost(blueprint).macs / 1e4, space=SPACE):
    return [entry_of(space, a, Score(score(space.blueprint(a)), {}), 0.0, ("", "", 1)) for a in space.all()]


def test_a_random_search_that_ended_early_says_how_many_would_cost_as_much():
    sentence = controls.random_search(entries(1.0), entries(0.4, 0.2), 5)["sentence"]
    assert "that of 2 random subnets (5 would cost as much) 0.4000" in sentence


def test_training_free_scores_are_compared_on_the_same_networks(evidence):
    ranking = of_space()[::3]
    found = controls.training_free(ranking, SPACE, evidence, 1000.0)
    assert list(found) == ["tau depth", "tau nwot", "tau synflow", "tau zen"]
    sample = python_rng(evidence.seed, "training-free").sample(ranking, min(50, len(ranking)))
    assert len(sample) == len(ranking) < 50
    networks = [Network(SPACE.blueprint(e.architecture)) for e in sample]
    for name, scorer in {"depth": Depth(), "nwot": Nwot(), "synflow": Synflow(), "zen": Zen()}.items():
        scores = [scorer.score(network, evidence).value for network in networks]
        control = found[f"tau {name}"]
        assert control["value"] == pytest.approx(kendall([e.score for e in sample], scores), abs=1e-9)
        assert f"and {name}, of {len(sample)} untrained networks: " in control["sentence"]


def test_at_most_fifty_networks_are_compared(evidence, monkeypatch):
    monkeypatch.setattr(controls, "_scores_until", lambda until, networks, *_: [1.0 * i for i in range(len(networks))])
    found = controls.training_free(of_space() * 3, SPACE, evidence, 1.0)
    assert all("of 50 untrained networks" in control["sentence"] for control in found.values())


def test_the_number_of_untrained_networks_follows_from_their_cost(evidence, monkeypatch):
    ranking = of_space()
    sample = python_rng(evidence.seed, "training-free").sample(ranking, len(ranking))
    for count, left_out in ((12, False), (9, True)):
        affordable = len(evidence.images) * sum(e.macs for e in sample[:count])
        monkeypatch.setattr(controls, "_TRAINING_FREE_MACS", affordable)
        found = controls.training_free(ranking, SPACE, evidence, float("inf"))
        assert f"of {len(sample)} untrained" in found["tau depth"]["sentence"]  # counted, not run
        for name in ("tau nwot", "tau synflow", "tau zen"):
            words = "10 networks cost more than" if left_out else f"of {count} untrained networks"
            assert words in found[name]["sentence"] and ("value" in found[name]) != left_out


def test_the_load_of_the_machine_changes_no_control(evidence, monkeypatch):
    quick = controls.training_free(of_space(), SPACE, evidence, 1e6)
    now = iter(range(10**6))
    monkeypatch.setattr(controls, "time", SimpleNamespace(perf_counter=lambda: 1000.0 * next(now)))
    assert controls.training_free(of_space(), SPACE, evidence, 1e6) == quick


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_without_time_nothing_is_scored(evidence, seconds):
    found = controls.training_free(of_space(), SPACE, evidence, seconds)
    for name, control in found.items():
        name = name.removeprefix("tau ")
        assert control == {"sentence": f"Agreement with {name} is left out: the time is over."}


class ByTable(Scorer):
    """A score from a table by the number of parameters, and how often each network was scored."""

    def __init__(self, sign):
        self.sign, self.scored = sign, []

    def score(self, student, evidence):
        params = sum(p.numel() for p in student.parameters())
        self.scored.append(params)
        return Score(self.sign * params / 100, {})


def by_params(sign):
    """One entry for each number of parameters, best first."""
    ranking = of_space(lambda blueprint: sign * cost(blueprint).params / 100, WIDE)
    return sorted({e.params: e for e in ranking}.values(), key=lambda e: -e.score)


@pytest.fixture(scope="module")
def supernet():
    return initialised(lambda: Supernet(WIDE), 0).eval()


def contrasted(ranking, others, supernet, seconds=1000.0):
    scorers = ByTable(1), ByTable(-1)
    return controls.contrast(ranking, others, scorers, "other", supernet, None, seconds), scorers


def test_the_best_ten_of_each_search_are_scored_by_both(supernet):
    largest, smallest = by_params(1)[:12], by_params(-1)[:12]
    assert {e.params for e in largest}.isdisjoint(e.params for e in smallest)
    control, scorers = contrasted(largest[::-1], smallest, supernet)
    assert scorers[1].scored == [e.params for e in largest[:10]]
    assert scorers[0].scored == [e.params for e in smallest[:10]]
    assert control["networks"] == 20
    assert control["value"] == pytest.approx(-1) and control["interval"] == pytest.approx([-1, -1])
    assert control["code"] == smallest[0].code
    first = largest[0]
    differing = [n for n in first.architecture if first.architecture[n] != smallest[0].architecture.get(n)]
    assert control["differing"] == sorted(differing) and differing
    assert control["sentence"] == (
        "The same search under other: Kendall's tau between the two scores of 20 networks is -1.00 [-1.00, -1.00]; it "
        f"finds {smallest[0].code} ({smallest[0].macs:,} MACs), the search itself {first.code} ({first.macs:,} MACs): "
        f"other in {len(differing)} of {len(WIDE.choices)} choices."
    )


def test_networks_that_both_searches_scored_are_not_scored_again(supernet):
    ranking = by_params(1)[:8]
    control, scorers = contrasted(ranking, ranking, supernet)
    assert not scorers[0].scored and not scorers[1].scored
    assert control["networks"] == 8 and control["value"] == pytest.approx(1) and control["differing"] == []
    assert control["sentence"].endswith(" MACs): the same network.")


def test_evaluations_that_were_stopped_early_are_not_compared(supernet):
    ranking = by_params(1)[:5]
    early = [dataclasses.replace(ranking[0], share=0.5), *ranking[1:]]
    control, _ = contrasted(early, early, supernet)
    assert control["networks"] == 4


def test_a_contrast_needs_three_networks_in_common_and_time(supernet, now):
    ranking = by_params(1)
    assert contrasted(ranking[:3], ranking[:3], supernet)[0]["networks"] == 3
    control, scorers = contrasted(ranking[:2], ranking[:2], supernet)
    expected = "The two scores are not compared: the time was over with 2 networks in common."
    assert control == {"sentence": expected}
    control, scorers = contrasted(ranking[:4], ranking[2:8], supernet, seconds=0.0)
    assert control == {"sentence": expected} and not scorers[0].scored and not scorers[1].scored
    control, _ = contrasted(ranking, [], supernet)
    assert control == {"sentence": "The contrast found no network within the budget and the time."}


class Measured:
    """A latency table whose whole networks and drift are given."""

    target, threads = Target(), 1

    def __init__(self, seconds, drift):
        self._seconds, self._drift = itertools.cycle(seconds), drift

    def whole(self, blueprint):
        return next(self._seconds)

    def drift(self):
        return self._drift


def latencies(seconds, predicted, drift=0.0, bound=0.02):
    ranking = [dataclasses.replace(e, spent={"latency": p}) for e, p in zip(of_space(), predicted, strict=False)]
    return controls.measured_latency(ranking, Measured(seconds, drift), SPACE, bound)


def test_measured_latencies_tell_the_tables_largest_error_and_who_is_over_the_bound():
    control = latencies([0.02, 0.0201, 0.03], [0.02, 0.03, 0.025])
    assert control["value"] == pytest.approx(-0.33) and control["seconds"] == [0.02, 0.0201, 0.03]
    assert control["sentence"] == (
        "Latency of places 1 to 3 measured whole on eager with 1 thread, batch 1: 20, 20.1, 30 ms (medians of 3, "
        "spread up to ± 0%), for 20 ms allowed; the table of layers is off by at most 33%. Over the bound as measured: "
        "place 2, 3."
    )
    assert latencies([0.013, 0.008], [0.01, 0.01])["value"] == pytest.approx(0.3)
    control = latencies([0.012], [0.01])
    assert control["value"] == pytest.approx(0.2)
    assert control["sentence"].endswith(
        "batch 1: 12 ms (medians of 3, spread up to ± 0%), for 20 ms allowed; the table of layers is off by at most "
        "20%."
    )


@pytest.mark.parametrize(("drift", "words"), [(0.125, "+12% slower"), (-0.25, "-25% slower"), (0.1, ""), (-0.05, "")])
def test_a_machine_that_became_slower_or_faster_by_a_tenth_is_told(drift, words):
    sentence = latencies([0.01], [0.01], drift)["sentence"]
    assert (f" The machine runs {words} than when the table was begun" in sentence) == bool(words)
    assert ("The machine" in sentence) == bool(words)
