import itertools
import random
import time
import weakref

import pytest
import torch

from kdnas.architecture import Architecture
from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.ranking.loop import SearchLimits, Uninformative, run_search
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
from kdnas.searchers.evolution import Evolution
from kdnas.searchers.exhaustive import Exhaustive
from kdnas.searchers.random_search import RandomSearch
from kdnas.specs import spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
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
    def score(self, student, evidence):
        time.sleep(0.05)
        return Score(random.random(), {})


def test_the_time_limit_is_met_within_one_evaluation(supernet, evidence):
    began = time.perf_counter()
    entries, why = run(supernet, evidence, Exhaustive, SearchLimits(1000, 0.3), scorer=Slow())
    assert time.perf_counter() - began < 1.5
    assert 1 <= len(entries) < 36
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
    began = time.perf_counter()
    entries, why = run(supernet, evidence, searcher, SearchLimits(20), Budget(macs=macs * 1.001))
    assert [e.macs for e in entries] == [macs]
    assert "not" in why
    assert time.perf_counter() - began < 20
