import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.rdm import Rdm
from kdnas.similarity import dissimilarity
from tests.scorers.scene import Shows, evidence, network, reordered, with_teacher

COMPARE = pytest.mark.parametrize("compare", ["pearson", "spearman"])


@pytest.fixture(scope="module")
def held():
    return evidence()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(seed=0, stages=2):
    return Shows(normal(20, 3, seed=seed), *(normal(20, 4 + i, 3, 3, seed=seed + 1 + i) for i in range(stages)))


@COMPARE
def test_it_is_the_mean_over_teacher_stages_of_the_best_correlation(compare, held):
    shown = student()
    correlate = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}[compare]
    place = np.triu_indices(20, 1)

    def triangles(outputs):
        maps = [f.flatten(1).double().numpy() for f in (*outputs.features, outputs.logits)]
        return [(1 - np.corrcoef(m))[place] for m in maps]

    best = [
        max(correlate(mine, taught).statistic for mine in triangles(shown.outputs))
        for taught in triangles(held.teacher)
    ]
    found = Rdm(compare=compare).score(shown, held)
    assert found.value == pytest.approx(np.mean(best), abs=1e-5)
    assert [found.parts[f"teacher_stage_{i}"] for i in range(3)] == pytest.approx(best, abs=1e-5)


@COMPARE
def test_the_teacher_itself_has_similarity_one(compare, held):
    assert Rdm(compare=compare).score(network(), held).value == pytest.approx(1, abs=1e-5)


@COMPARE
def test_units_scales_shifts_and_the_order_of_images_do_not_matter(compare, held):
    scorer, shown = Rdm(compare=compare), student()
    plain = scorer.score(shown, held).value
    logits, first, second = shown.outputs.logits, *shown.outputs.features
    units = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    scale, shift = normal(20, 1, 1, 1).exp(), normal(20, 1, 1, 1, seed=2)
    assert scorer.score(Shows(logits, first[:, units] * scale + shift, second), held).value == pytest.approx(
        plain, abs=1e-5
    )
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    turned = Shows(*(t[order] for t in (logits, first, second)))
    assert scorer.score(turned, reordered(held, order)).value == pytest.approx(plain, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3))
def test_one_more_student_stage_never_lowers_it(seed, stages):
    shared = SHARED
    fewer, more = student(seed, stages), student(seed, stages + 1)
    assert Rdm().score(more, shared).value >= Rdm().score(fewer, shared).value - 1e-7


SHARED = evidence()


def test_premature_performance_is_added_with_its_weight(held):
    shown = student()
    accuracy = Accuracy().score(shown, held).parts["accuracy"]
    guided = Rdm().score(shown, held)
    assert guided.parts["accuracy"] == accuracy > 0
    assert guided.value == guided.parts["similarity"]
    assert Rdm(premature=1.0).score(shown, held).value == pytest.approx(guided.value + accuracy)
    assert Rdm(premature=0.3).score(shown, held).value == pytest.approx(guided.value + 0.3 * accuracy)


@COMPARE
def test_stages_that_tell_no_images_apart_add_nothing(compare, held):
    # Rows of one direction, whose correlations differ from 1, and from each other, by rounding.
    rows = normal(1, 1000, seed=3) * torch.rand(20, 1, generator=torch.Generator().manual_seed(1))
    blind = Shows(torch.ones(20, 3), rows, torch.full((20, 7, 2, 2), 0.1))
    assert Rdm(compare=compare).score(blind, held).value == 0
    blind_teacher = with_teacher(held, features=tuple(blind.outputs.features), logits=blind.outputs.logits)
    assert Rdm(compare=compare).score(student(), blind_teacher).value == 0


@COMPARE
@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_probe_of_any_size_will_do(compare, images):
    small = evidence(images)
    found = Rdm(compare=compare).score(network(), small).value
    assert found == pytest.approx(0 if images < 3 else 1, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 100))
def test_a_matrix_from_batches_is_that_of_one_shot(sizes, seed):
    maps = normal(sum(sizes), 4, 3, seed=seed).double()
    maps[0] = 7.0  # a constant sample
    found = dissimilarity(maps.split(sizes))
    assert torch.allclose(found, dissimilarity(maps), atol=1e-12)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(sum(sizes), dtype=torch.float64))


def test_another_comparison_is_refused():
    with pytest.raises(ValueError, match="`compare` must be one of pearson, spearman, got 'kendall'"):
        Rdm(compare="kendall")
