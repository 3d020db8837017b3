"""Scores made of other scores, and the largest subnet in the teacher's place."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from kdnas.scorers._predictor import fit
from kdnas.scorers.base import LayerCount, Score, score_all
from kdnas.scorers.in_place import InPlace
from kdnas.scorers.params import Params
from kdnas.scorers.predicted import Predicted
from kdnas.scorers.rank_ensemble import RankEnsemble, rank_among
from kdnas.scorers.rdm import Rdm
from kdnas.specs import parse_spec, spec
from tests.scorers.scene import SPACE, Slow, evidence, network, supernet

NETWORKS = list(SPACE.all())[::5]


def values(scorer, held, networks=NETWORKS):
    return [s.value for s in score_all(supernet(), networks, scorer, held)]


def test_the_largest_subnet_is_most_similar_to_itself_and_the_teacher_does_not_matter():
    held = evidence()
    found = values(InPlace(), held, [SPACE.largest, *NETWORKS])
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert max(found[1:]) <= found[0] + 1e-6
    assert values(InPlace(), evidence(taught=network(99)), [SPACE.largest, *NETWORKS]) == found
    assert values(Rdm(), evidence(taught=network(99))) != values(Rdm(), held)


def test_the_inner_scorer_is_chosen_by_name_and_must_look_at_outputs_alone():
    held = evidence()
    assert values(InPlace(scorer="loss"), held, [SPACE.largest])[0] == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="outputs alone"):
        InPlace(scorer="synflow")


def test_without_a_supernet_the_reason_is_said():
    held = dataclasses.replace(evidence(), supernet=None)
    for scorer in (InPlace(), RankEnsemble(), Predicted()):
        with pytest.raises(ValueError, match="no supernet"):
            scorer.score(network(), held)


@pytest.mark.parametrize("known", [[1.0, 2.0, 2.0, 5.0], [0.0, 1.0], [3.0, 3.0, 3.0, 4.0, 9.0]])
def test_a_rank_is_scipys_at_the_known_values_and_increases_strictly_everywhere(known):
    known = np.sort(known)
    expected = (rankdata(known) - 1) / (len(known) - 1)
    assert [rank_among(v, known) for v in known] == pytest.approx(expected)
    grid = np.linspace(-10, 20, 301)
    assert (np.diff([rank_among(v, known) for v in grid]) > 0).all()


def test_a_reference_of_equal_values_ranks_by_sign():
    assert [rank_among(v, np.ones(3)) for v in (0.5, 1.0, 2.0)] == [0.0, 0.5, 1.0]


def ensemble(table, **arguments):
    """The scores of networks that are themselves the reference, from `[members, networks]`."""
    scorer = RankEnsemble(members=("params",) * len(table), **arguments)
    reference = SimpleNamespace(once=lambda key, make: [np.sort(np.asarray(row, float)) for row in table])
    return [scorer.combine([Score(v, {}) for v in column], reference).value for column in zip(*table, strict=True)]


TABLES = st.integers(1, 4).flatmap(
    lambda members: st.integers(2, 7).flatmap(
        lambda networks: st.lists(
            st.lists(st.integers(-3, 3), min_size=networks, max_size=networks), min_size=members, max_size=members
        )
    )
)


def test_an_ensemble_by_hand():
    # Ranks of three networks: (0, 1/2, 1), and with a tie (1, 1/4, 1/4).
    assert ensemble([[1, 2, 3], [9, 4, 4]]) == pytest.approx([0.5, 0.375, 0.625])
    assert ensemble([[1, 2, 3], [9, 4, 4]], weights=(1, 3)) == pytest.approx([0.75, 0.3125, 0.4375])
    assert ensemble([[5, 5, 5]]) == pytest.approx([0.5, 0.5, 0.5])


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_a_network_that_all_members_place_above_another_stays_above_it(table):
    found, array = ensemble(table), np.asarray(table)
    assert min(found) >= 0 and max(found) <= 1
    for i in range(array.shape[1]):
        for j in range(array.shape[1]):
            if (array[:, i] > array[:, j]).all():
                assert found[i] > found[j]


@settings(max_examples=60, deadline=None)
@given(TABLES, st.data())
def test_an_ensemble_is_monotone_in_every_members_score(table, data):
    member = data.draw(st.integers(0, len(table) - 1))
    network = data.draw(st.integers(0, len(table[0]) - 1))
    before = ensemble(table)
    table[member][network] += data.draw(st.integers(0, 5))
    assert ensemble(table)[network] >= before[network] - 1e-12


def test_an_ensembles_members_may_have_any_units():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    assert ensemble([np.exp(scores[0]), scores[1] * 7 - 2, scores[2] ** 3]) == pytest.approx(ensemble(scores))


def test_members_of_one_class_have_parts_of_their_own():
    scorer = parse_spec("kdnas.scorers", "rank_ensemble,members=in_place,scorer=loss+in_place,scorer=cka+params")
    (score,) = score_all(supernet(), NETWORKS[:1], scorer.build(RankEnsemble), evidence())
    assert list(score.parts) == ["InPlace", "InPlace 2", "Params"]
    assert score.value == pytest.approx(np.mean(list(score.parts.values())), abs=1e-6)


def test_an_ensemble_of_one_orders_as_its_member_and_of_two_as_borda_on_the_whole_space():
    held, networks = evidence(), list(SPACE.all())
    one = values(RankEnsemble(members=("rdm",)), held, networks)
    rdm, params = values(Rdm(), held, networks), values(Params(), held, networks)
    assert (np.argsort(one) == np.argsort(rdm)).all()
    both = values(RankEnsemble(members="rdm+params", num_reference=4000), held, networks)
    # The reference then is nearly the whole space.
    assert np.corrcoef(both, rankdata([rdm, params], axis=1).mean(0))[0, 1] > 0.999


def test_a_weight_of_zero_leaves_a_member_out():
    held = evidence()
    weighted = values(RankEnsemble(members="rdm+params", weights=(1.0, 0.0)), held)
    assert weighted == values(RankEnsemble(members="rdm"), held)
    for wrong in ((1.0,), (1.0, -1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="`weights` must be 2 non-negative numbers"):
            RankEnsemble(members="rdm+params", weights=wrong)


def test_members_share_prefixes():
    layer_count = LayerCount()
    score_all(supernet(), NETWORKS, RankEnsemble(members="rdm+cka"), evidence(), layer_count)
    assert layer_count.evaluated < layer_count.one_by_one


def test_a_prediction_is_the_fit_to_drawn_networks_and_asks_the_target_no_more_often():
    held = evidence()
    target = spec("tests.scorers.scene:Slow")
    scorer = Predicted(members=("params",), target=target, num_fitted=6, kind="linear")
    Slow.asked = 0
    scores = score_all(supernet(), NETWORKS, scorer, held)
    drawn, _ = scorer.reference(held, 6)
    assert Slow.asked == len(drawn) < len(NETWORKS)
    x = np.array(values(Params(), held, drawn))
    again = fit(np.stack([x, x], 1), x**0.5, "linear")
    expected = again.predict(np.stack([values(Params(), held)] * 2, 1))
    assert [s.value for s in scores] == pytest.approx(expected)
    assert scores[0].parts == {"left_out_error": again.error, "left_out_tau": again.tau}


def test_an_unknown_member_is_named():
    with pytest.raises(ValueError, match="Did you mean 'params'"):
        RankEnsemble(members="parms")
