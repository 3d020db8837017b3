import itertools
import random
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from kdnas.architecture import Architecture
from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.ranking import loop
from kdnas.ranking.loop import SearchLimits, Uninformative, entry_of, run_search
from kdnas.ranking.order import ranked
from kdnas.runs.entry import Entry
from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.base import (
    CombinedScorer,
    Evidence,
    LayerCount,
    OutputScorer,
    Score,
    Scorer,
    score_all,
    score_by_all,
)
from kdnas.scorers.loss import Loss
from kdnas.scorers.params import Params
from kdnas.scorers.rdm import Rdm
from kdnas.searchers.base import Searcher
from kdnas.searchers.evolution import Evolution
from kdnas.searchers.exhaustive import Exhaustive
from kdnas.searchers.random_search import RandomSearch
from kdnas.specs import spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from tests.counting import counted
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()
SEARCHERS = [Evolution, Exhaustive, RandomSearch]


@pytest.fixture(scope="module")
def supernet():
    return initialised(lambda: Supernet(SPACE), 0).eval()


@pytest.fixture(scope="module")
def evidence():
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 5)
    pixels = DATA.search.take(torch.arange(20))
    taught = Frozen(network, preprocessing=DATA.preprocessing)
    return Evidence(pixels, DATA.normalise(pixels), DATA.search.labels[:20], taught(pixels))


@pytest.mark.parametrize("scorer", [Rdm(), Rdm(compare="spearman", premature=1.0), Accuracy(), Loss()])
def test_shared_prefixes_give_the_numbers_of_one_by_one_scoring(supernet, evidence, scorer):
    architectures = list(SPACE.all())
    layer_count = LayerCount()
    together = score_all(supernet, architectures, scorer, evidence, layer_count)
    for architecture, found in zip(architectures, together, strict=True):
        alone = scorer.score(supernet.extract(architecture), evidence)
        assert found.value == pytest.approx(alone.value, abs=1e-6)
        assert found.parts == pytest.approx(alone.parts, abs=1e-5)
    assert layer_count.one_by_one == sum(2 + sum(map(len, SPACE.blueprint(a).stages)) for a in architectures)
    assert layer_count.evaluated < layer_count.one_by_one / 2


def test_several_scorers_share_one_walk_and_each_has_its_own_numbers(supernet, evidence):
    architectures, scorers = list(SPACE.all())[::3], [Rdm(), Params(), Accuracy(), Loss(loss="dist")]
    alone, together = LayerCount(), LayerCount()
    expected = [score_all(supernet, architectures, scorer, evidence) for scorer in scorers]
    assert score_by_all(supernet, architectures, scorers, evidence, together) == expected
    score_by_all(supernet, architectures, [Rdm(), Params()], evidence, alone)
    assert together == alone


def test_memory_is_one_path_of_activations(supernet, evidence, monkeypatch):
    alive, most, run_layer = [], [], supernet.run

    def watched(*arguments, **options):
        made = run_layer(*arguments, **options)
        alive.append(weakref.ref(made))
        alive[:] = [held for held in alive if held() is not None]
        most.append(sum(held().numel() for held in alive))
        return made

    monkeypatch.setattr(supernet, "run", watched)

    class Constant(OutputScorer):
        def digest(self, stage, feature, evidence):
            return None

        def judge(self, logits, digests, evidence):
            return Score(0.0, {})

    def peak(architectures):
        most.clear()
        score_all(supernet, architectures, Constant(), evidence)
        return max(most)

    networks = list(SPACE.all())
    assert peak(networks) <= max(peak([one]) for one in networks)


def test_members_of_members_keep_their_places(supernet, evidence):
    class Left(CombinedScorer):
        def combine(self, scores, evidence):
            return Score(2 * scores[0].value - scores[1].value, {})

    inner = spec("tests.ranking.test_loop:Sum")
    made = [Left([inner, "accuracy"]), Rdm()]
    architectures = list(SPACE.all())[::5]
    found = score_by_all(supernet, architectures, made, evidence)
    rdm, params, accuracy = score_by_all(supernet, architectures, [Rdm(), Params(), Accuracy()], evidence)
    assert found[1] == rdm
    for i, score in enumerate(found[0]):
        assert score.value == 2 * (rdm[i].value + params[i].value) - accuracy[i].value


class Sum(CombinedScorer):
    def __init__(self):
        super().__init__("rdm+params")

    def combine(self, scores, evidence):
        return Score(sum(score.value for score in scores), {})


def test_all_of_nas_bench_macro_needs_a_fifth_of_the_layer_evaluations():
    space = load_space("nas_bench_macro")

    class Counted(torch.nn.Module):
        """Runs nothing: what is counted does not depend on numbers."""

        def run(self, name, layer, x, batch_statistics):
            return x

    supernet = Counted()
    supernet.space = space

    class Constant(OutputScorer):
        def digest(self, stage, feature, evidence):
            return None

        def judge(self, logits, digests, evidence):
            return Score(0.0, {})

    choices = space.choices
    networks = [
        Architecture(dict(zip((c.name for c in choices), options, strict=True)))
        for options in itertools.product(*(c.options for c in choices))
    ]
    images = torch.zeros(1, 1, 1, 1)
    layer_count = LayerCount()
    score_all(supernet, networks, Constant(), Evidence(images, images, None, None), layer_count)
    # With an identity counted as a layer: 3 + 9 + ... + 3^8 prefixes instead of 8 layers of each, and stem and heads.
    prefixes, layers = sum(3**length for length in range(1, 9)), 8 * len(networks)
    assert (prefixes, layers) == (9840, 52_488)
    # Identities that change no shape are left out of a network here, and cost nothing either way.
    assert layer_count.one_by_one == sum(2 + sum(map(len, space.blueprint(n).stages)) for n in networks)
    assert layer_count.evaluated <= prefixes + 1 + len(set(map(space.canonical, networks)))
    assert layer_count.one_by_one / layer_count.evaluated > 5


def test_a_score_that_is_not_a_number_stops_the_search_and_names_the_network(supernet, evidence):
    class Broken(Scorer):
        def score(self, student, evidence):
            return Score(float("nan"), {})

    with pytest.raises(ValueError, match=r"must be finite, got nan for \S+"):
        run(supernet, evidence, RandomSearch, SearchLimits(5), scorer=Broken())


def test_a_score_does_not_depend_on_what_was_scored_before(supernet, evidence):
    rng = random.Random(0)
    candidates = [SPACE.sample(rng) for _ in range(50)]
    first = dict(zip(candidates, score_all(supernet, candidates, Rdm(), evidence), strict=True))
    rng.shuffle(candidates)
    assert dict(zip(candidates, score_all(supernet, candidates, Rdm(), evidence), strict=True)) == first


def test_scoring_changes_neither_weights_nor_statistics(supernet, evidence):
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    score_all(supernet, list(SPACE.all()), Rdm(), evidence)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


def test_batch_statistics_are_re_estimated_inside_a_score(supernet, evidence):
    plain = Accuracy().score(supernet.extract(SPACE.largest), evidence)
    spoiled = supernet.extract(SPACE.largest)
    for module in spoiled.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.fill_(7.0)
    assert Accuracy().score(spoiled, evidence) == plain


def run(supernet, evidence, searcher, limits, budget=None, scorer=None, seed=0, known=None):
    budget = budget or Budget()
    made = searcher(space=SPACE, admits=lambda a: budget.admits(cost(SPACE.blueprint(a))), rng=random.Random(seed))
    found = list(run_search(supernet, scorer or Rdm(), made, evidence, limits, known=known))
    return found[:-1], found[-1]


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("macs", [30_000, 50_000, 1e9])
def test_no_network_over_budget_is_ever_scored(supernet, evidence, searcher, macs):
    entries, _ = run(supernet, evidence, searcher, SearchLimits(15), Budget(macs=macs, params=1500))
    assert entries
    assert all(e.macs <= macs and e.params <= 1500 for e in entries)


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_unique_architectures_are_counted_and_the_end_is_explained(supernet, evidence, searcher):
    entries, why = run(supernet, evidence, searcher, SearchLimits(20))
    assert len({e.architecture for e in entries}) == len(entries) == 20
    assert "20 unique" in why
    entries, why = run(supernet, evidence, searcher, SearchLimits(1000))
    assert len(entries) == 36
    assert "36 unique" in why


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_the_same_seed_asks_the_same_and_replayed_scores_resume_a_search(supernet, evidence, searcher):
    whole, _ = run(supernet, evidence, searcher, SearchLimits(24))
    half, _ = run(supernet, evidence, searcher, SearchLimits(11))
    known = {e.architecture: Score(e.score, e.parts) for e in half}
    resumed, _ = run(supernet, evidence, searcher, SearchLimits(24), known=known)
    assert [(e.code, e.score) for e in resumed] == [(e.code, e.score) for e in whole]


class Slow(Scorer):
    seconds = 0.0

    def score(self, student, evidence):
        Slow.seconds += 0.4
        return Score(random.random(), {})


def test_the_time_limit_is_met_within_a_second(supernet, evidence, monkeypatch):
    monkeypatch.setattr(Slow, "seconds", 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: Slow.seconds)
    entries, why = run(supernet, evidence, Exhaustive, SearchLimits(1000, 3.0), scorer=Slow())
    assert 3.0 <= Slow.seconds <= 4.0
    assert len(entries) == round(Slow.seconds / 0.4) < 36
    assert "time" in why


class Constant(OutputScorer):
    def judge(self, logits, digests, evidence):
        return Score(1.0, {})


def test_a_score_that_tells_nothing_apart_stops_the_search(supernet, evidence):
    with pytest.raises(Uninformative, match="at least 3 distinct"):
        run(supernet, evidence, RandomSearch, SearchLimits(36), scorer=Constant())


def test_evolution_finds_the_optimum_of_the_toy_space(supernet, evidence):
    best = ranked(run(supernet, evidence, Exhaustive, SearchLimits(36))[0])[0]
    found = ranked(run(supernet, evidence, Evolution, SearchLimits(36))[0])[0]
    assert found.score == best.score


def test_a_budget_below_the_smallest_network_names_the_nearest():
    with pytest.raises(Infeasible, match=rf"infeasible.*{SPACE.code(SPACE.smallest)}"):
        check_feasible(BudgetCheck(SPACE, Budget(macs=10)), random.Random(0), attempts=20)
    check_feasible(BudgetCheck(SPACE, Budget(macs=1e9)), random.Random(0))


def test_ties_go_to_the_network_that_uses_more_of_the_budget():
    def entry(code, score, macs):
        return Entry(SPACE.smallest, code, score, {}, 1, macs, 1, 0.0)

    order = ranked([entry("a", 0.5, 10), entry("b", 0.5, 20), entry("c", 0.6, 5)])
    assert [e.code for e in order] == ["c", "b", "a"]


def test_an_entry_survives_json(supernet, evidence):
    entry = run(supernet, evidence, RandomSearch, SearchLimits(1))[0][0]
    assert Entry.from_json(entry.to_json()) == entry


def test_a_loss_with_untrained_parts_is_no_scorer():
    with pytest.raises(ValueError, match="learnable parts"):
        Loss(loss="hint")


def test_a_network_scored_against_itself_has_similarity_one(supernet, evidence):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 5)
    taught = Frozen(network, preprocessing=DATA.preprocessing)
    from kdnas.network import batch_statistics

    with batch_statistics(taught.module):
        own = Evidence(evidence.pixels, evidence.images, evidence.labels, taught(evidence.pixels))
    assert Rdm().score(network, own).value == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("searcher", [Evolution, RandomSearch])
def test_a_budget_that_only_the_smallest_networks_meet_is_searched_at_once(supernet, evidence, searcher):
    macs = cost(SPACE.blueprint(SPACE.smallest)).macs
    (entries, why), calls = counted(
        lambda: run(supernet, evidence, searcher, SearchLimits(20), Budget(macs=macs * 1.001))
    )
    assert [e.macs for e in entries] == [macs]
    assert "not" in why
    assert calls < 6_000_000


class Script(Searcher):
    """Asks for these batches, and notes what it is told."""

    stopped = "the script ends"

    def __init__(self, *batches):
        self.batches, self.limits, self.began, self.told = list(batches), [], [], []

    def ask(self, limit):
        self.limits.append(limit)
        return self.batches.pop(0)[:limit] if self.batches else []

    def begin(self, scored):
        self.began.append(list(scored))

    def tell(self, scored):
        self.told.append(list(scored))


class Ticks(Scorer):
    """Takes seconds for each network; scores are its parameters, or from a list."""

    resources = (1, 2)

    def __init__(self, now, seconds=1.0, values=None):
        self.now, self.seconds, self.values, self.count = now, seconds, values, 0

    def score(self, student, evidence):
        self.now["seconds"] += self.seconds
        self.count += 1
        params = float(sum(p.numel() for p in student.parameters()))
        return Score(params if self.values is None else self.values[self.count - 1], {"params": params})

    def rungs(self, student, evidence):
        yield Score(0.0, {})
        yield self.score(student, evidence)


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still but for what is added to it."""
    now = {"seconds": 50.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["seconds"])
    return now


ALL = list(SPACE.all())


def searched(supernet, evidence, searcher, limits, scorer, **options):
    found = list(run_search(supernet, scorer, searcher, evidence, limits, **options))
    return found[:-1], found[-1]


def test_an_entry_holds_score_costs_and_labels(supernet, evidence, now):
    architecture = SPACE.largest
    labels = ("the scorer", "the searcher", 3)
    (entry,), why = searched(
        supernet, evidence, Script([architecture]), SearchLimits(), Ticks(now, 1.23456789), labels=labels
    )
    spent = cost(SPACE.blueprint(architecture))
    assert entry == Entry(
        architecture=architecture,
        code=SPACE.code(architecture),
        score=spent.params,
        parts={"params": spent.params},
        params=spent.params,
        macs=spent.macs,
        layers=4,
        seconds=1.234568,
        scorer="the scorer",
        searcher="the searcher",
        search=3,
        share=1.0,
    )
    assert why == "the script ends after 1 unique architectures"


def test_a_share_below_one_is_the_entrys():
    assert entry_of(SPACE, SPACE.smallest, Score(1.0, {}, 0.25), 0.0, ("", "", 0)).share == 0.25


def test_the_searcher_is_asked_for_what_is_left_and_told_its_whole_batch(supernet, evidence, now):
    script = Script(ALL[:4], [ALL[2], ALL[4], ALL[4], ALL[5]], ALL[6:20])
    entries, why = searched(supernet, evidence, script, SearchLimits(8), Ticks(now))
    assert [e.architecture for e in entries] == ALL[:8]
    assert script.limits == [8, 4, 2]
    assert [[e.architecture for e in told] for told in script.told] == [
        ALL[:4],
        [ALL[2], ALL[4], ALL[4], ALL[5]],
        ALL[6:8],
    ]
    assert why == "8 unique architectures were evaluated"
    assert not script.began


def test_architectures_are_scored_in_their_canonical_form(supernet, evidence, now):
    class Alike:
        """The toy space, whose second architecture is said to be another spelling of the first."""

        def canonical(self, architecture):
            return ALL[0] if architecture == ALL[1] else architecture

        def __getattr__(self, name):
            return getattr(SPACE, name)

    alike, script = SimpleNamespace(space=Alike(), extract=supernet.extract), Script(ALL[1:3], ALL[:2])
    entries, _ = searched(alike, evidence, script, SearchLimits(), Ticks(now))
    assert [e.architecture for e in entries] == [ALL[0], ALL[2]]
    assert [[e.architecture for e in told] for told in script.told] == [[ALL[0], ALL[2]], [ALL[0], ALL[0]]]


@pytest.mark.parametrize("evaluations", [3, 5])
def test_a_warm_start_is_scored_first_and_is_no_answer(supernet, evidence, now, evaluations):
    script, after = Script(ALL[10:12], ALL[12:13]), []
    entries, _ = searched(
        supernet,
        evidence,
        script,
        SearchLimits(evaluations),
        Ticks(now),
        first=ALL[:4],
        after_tell=lambda told: after.append(list(told)),
    )
    first = ALL[: min(4, evaluations)]
    assert [[e.architecture for e in began] for began in script.began] == [first]
    assert [e.architecture for e in entries] == (ALL[:4] + ALL[10:11])[:evaluations]
    assert script.told == after and len(after) == (evaluations > 4)
    assert script.limits == [1][: evaluations - 4 if evaluations > 4 else 0]


def sizes_of_chunks(monkeypatch, supernet, evidence, now, limits, seconds, count=36):
    sizes = []

    def noted(supernet, architectures, *rest):
        sizes.append(len(architectures))
        return score_all(supernet, architectures, *rest)

    monkeypatch.setattr(loop, "score_all", noted)
    entries, why = searched(supernet, evidence, Script(ALL[:count]), limits, Ticks(now, seconds))
    return sizes, entries, why


@pytest.mark.parametrize(
    ("seconds", "sizes"), [(0.25, [1, 4, 4, 2]), (3.0, [1] * 11), (0.6, [1] * 11), (1e-5, [1, 10]), (0.0, [1, 10])]
)
def test_with_a_time_limit_a_chunk_takes_about_a_second(monkeypatch, supernet, evidence, now, seconds, sizes):
    limits = SearchLimits(11, 1000.0)
    assert sizes_of_chunks(monkeypatch, supernet, evidence, now, limits, seconds)[0] == sizes


def test_without_a_time_limit_chunks_are_as_large_as_they_may_be(monkeypatch, supernet, evidence, now):
    assert sizes_of_chunks(monkeypatch, supernet, evidence, now, SearchLimits(), 3.0)[0] == [1, 35]


def test_the_time_is_looked_at_between_chunks(monkeypatch, supernet, evidence, now):
    _, entries, why = sizes_of_chunks(monkeypatch, supernet, evidence, now, SearchLimits(36, 6.0), 2.0)
    assert len(entries) == 3 and why == "the time of 6 s is over after 3 unique architectures"
    assert entries[0].seconds == 2.0


@pytest.mark.parametrize(("seconds", "asked"), [(3.0, 1), (3.01, 2)])
def test_the_time_is_looked_at_before_the_searcher_is_asked(supernet, evidence, now, seconds, asked):
    script = Script(ALL[:3], ALL[3:4], ALL[4:5])
    entries, why = searched(supernet, evidence, script, SearchLimits(36, seconds), Ticks(now))
    assert len(script.limits) == asked and len(entries) == 2 + asked
    assert why == f"the time of {seconds:g} s is over after {2 + asked} unique architectures"


def test_no_time_at_all_scores_nothing(supernet, evidence, now):
    entries, why = searched(supernet, evidence, Script(ALL), SearchLimits(36, 0.0), Ticks(now))
    assert entries == [] and why == "the time of 0 s is over after 0 unique architectures"


def test_known_scores_cost_no_time_and_are_not_computed_again(supernet, evidence, now):
    known = {ALL[1]: Score(7.0, {"known": 1.0}, 0.5), ALL[0]: Score(6.0, {})}
    scorer = Ticks(now)
    entries, _ = searched(supernet, evidence, Script(ALL[:4]), SearchLimits(), scorer, known=known)
    assert [e.architecture for e in entries] == ALL[:4]
    assert [e.seconds for e in entries] == [0.0, 0.0, 1.0, 1.0] and scorer.count == 2
    assert {(e.scorer, e.searcher, e.search) for e in entries} == {("", "", 0)}
    assert (entries[1].score, entries[1].parts, entries[1].share) == (7.0, {"known": 1.0}, 0.5)


class Stopping:
    """Notes what a pruner would get, and ends every second evaluation."""

    def __init__(self):
        self.calls = []

    def judge(self, rungs):
        value = next(rungs) if len(self.calls) % 2 else list(rungs)[-1]
        self.calls.append(("judge", value.value))
        return value._replace(share=0.5 if value.value == 0 else 1.0)

    def replay(self, score):
        self.calls.append(("replay", score.value))


def test_with_a_pruner_networks_are_scored_by_themselves_in_order(supernet, evidence, now):
    stopping, known = Stopping(), {ALL[1]: Score(7.0, {})}
    params = [float(cost(SPACE.blueprint(a)).params) for a in ALL[:4]]
    entries, _ = searched(
        supernet, evidence, Script(ALL[:4]), SearchLimits(), Ticks(now), known=known, stopping=stopping
    )
    assert stopping.calls == [("judge", params[0]), ("replay", 7.0), ("judge", params[2]), ("judge", 0.0)]
    assert [e.share for e in entries] == [1.0, 1.0, 1.0, 0.5]
    assert [e.seconds for e in entries] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "fine"),
    [
        ([1, 2] * 10, False),
        ([1, 2, 3] * 7, True),
        ([1] * 19, True),
        ([1, 2] * 9 + [1, 3], True),
        ([1, 2] * 10 + [3], False),
    ],
)
def test_three_distinct_scores_among_the_first_twenty_are_enough(supernet, evidence, now, values, fine):
    script, scorer = Script(ALL[: len(values)]), Ticks(now, values=[float(v) for v in values])
    if fine:
        assert len(searched(supernet, evidence, script, SearchLimits(), scorer)[0]) == len(values)
    else:
        with pytest.raises(Uninformative):
            searched(supernet, evidence, script, SearchLimits(), scorer)


def test_only_the_first_twenty_scores_must_differ(supernet, evidence, now):
    script = Script(ALL[:18], ALL[18:36])
    values = [1.0, 2.0] * 10 + [float(v) for v in range(16)]
    with pytest.raises(Uninformative):
        searched(supernet, evidence, script, SearchLimits(), Ticks(now, values=values))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_every_score_of_a_chunk_must_be_finite(supernet, evidence, now, value):
    scorer = Ticks(now, values=[1.0, 2.0, value])
    with pytest.raises(ValueError, match=r"score rdm must be finite, got .* for " + SPACE.code(ALL[2])):
        searched(supernet, evidence, Script(ALL[:3]), SearchLimits(), scorer, labels=("rdm", "", 0))


def test_layer_evaluations_are_counted(supernet, evidence):
    layer_count = LayerCount()
    searched(supernet, evidence, Script(ALL[:3]), SearchLimits(), Accuracy(), layer_count=layer_count)
    assert layer_count.one_by_one == sum(len(list(SPACE.blueprint(a).named_layers())) for a in ALL[:3])


@pytest.mark.parametrize("limits", [SearchLimits(2000), SearchLimits(2000, 9.0)])
def test_a_chunk_has_at_most_512_architectures(monkeypatch, now, limits):
    sizes = []

    def new_scores(supernet, chunk, *_):
        sizes.append(len(chunk))
        return {number: Score(float(number), {}) for number in chunk}

    monkeypatch.setattr(loop, "_new_scores", new_scores)
    monkeypatch.setattr(loop, "entry_of", lambda space, number, score, *_: SimpleNamespace(score=score.value))
    numbers = SimpleNamespace(space=SimpleNamespace(canonical=lambda number: number))
    assert len(searched(numbers, None, Script(range(1100)), limits, None)[0]) == 1100
    assert sizes == [1, 512, 512, 75]
