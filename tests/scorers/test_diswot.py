import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdnas.network import batch_statistics
from kdnas.scorers.diswot import Diswot, _relations, _semantic
from kdnas.teachers.base import Frozen
from tests.scorers.scene import DATA, SPACE, Flat, Shows, evidence, network


@pytest.fixture(scope="module")
def held():
    return evidence()


def rows_of_norm_one(matrix):
    norms = np.linalg.norm(matrix, axis=-1, keepdims=True)
    return np.divide(matrix, norms, out=np.zeros_like(matrix), where=norms > 0)


def test_both_terms_are_the_papers_definition_with_whole_matrices(held):
    student, images, labels = network(3), held.images, held.labels
    relations, gradients = [], []
    for one in (student, held.teacher_module.module):
        weight = one.head.linear.weight.requires_grad_(True)
        with batch_statistics(one):
            outputs = one(images)
        F.cross_entropy(outputs.logits, labels).backward()
        gradients.append(weight.grad.double().numpy())
        rows = outputs.features[-1].detach().flatten(1).double().numpy()
        relations.append(rows_of_norm_one(rows @ rows.T))
        one.zero_grad()
    relation = ((relations[0] - relations[1]) ** 2).sum() / len(images) ** 2
    edges = [[rows_of_norm_one(np.outer(w, w)) for w in gradient] for gradient in gradients]
    semantic = sum(((s - t) ** 2).sum() for s, t in zip(*edges, strict=True)) / gradients[0].size
    found = Diswot(weights="inherited").score(student, held)
    assert found.parts == pytest.approx({"relation": relation, "semantic": semantic}, rel=1e-4)
    assert found.value == pytest.approx(-relation - semantic, rel=1e-4)
    weighted = Diswot(weights="inherited", relation=2.0, semantic=0.5).score(student, held)
    assert weighted.value == pytest.approx(-2 * relation - 0.5 * semantic, rel=1e-4)


def test_dead_channels_and_classes_count_as_zero_rows():
    gradient, other = np.array([[1.0, 0, -2], [0, 0, 0]]), np.array([[0.5, 3, 1], [1, 1, 0]])
    expected = 0.0
    for s, t in zip(gradient, other, strict=True):
        expected += ((rows_of_norm_one(np.outer(s, s)) - rows_of_norm_one(np.outer(t, t))) ** 2).sum() / 6
    assert _semantic(torch.tensor(gradient), torch.tensor(other)) == pytest.approx(expected)


def test_the_teacher_itself_is_at_distance_zero_and_nothing_is_nearer(held):
    own = Diswot(weights="inherited").score(network(), held)
    assert own.value == pytest.approx(0, abs=1e-6)
    assert Diswot(weights="inherited").score(network(2), held).value < -1e-3


def test_the_distance_is_symmetric_and_blind_to_the_order_of_features(held):
    other = evidence(taught=network(3))
    there = Diswot(weights="inherited").score(network(3), held).parts
    back = Diswot(weights="inherited").score(network(), other).parts
    assert there == pytest.approx(back, rel=1e-5)
    shown = network(3)(held.images)
    turned = shown.features[-1].detach().flip(1, 2)
    plain, flipped = (
        _relations(Shows(shown.logits, f), held.images, held.labels, "student").relations
        for f in (shown.features[-1], turned)
    )
    assert torch.allclose(plain, flipped, atol=1e-5)


def test_fresh_weights_depend_on_the_seed_and_not_on_the_networks(held):
    scorer = Diswot()
    first = scorer.score(network(1), held).value
    assert scorer.score(network(2), held).value == first
    again = dataclasses.replace(held, seed=1)
    assert scorer.score(network(1), again).value != first
    # Drawn from seeds of their own: the same architecture is not the same network.
    assert scorer.score(network(5), held).value < -1e-3


def test_what_the_paper_does_not_define_is_refused_with_the_fix(held):
    small = network(0, SPACE.smallest)
    with pytest.raises(ValueError, match=r"got \[3, 4\] \(student\) and \[3, 8\] \(teacher\)"):
        Diswot().score(small, held)
    assert Diswot(semantic=0.0).score(small, held).value < 0
    with pytest.raises(ValueError, match="no teacher module"):
        Diswot().score(small, dataclasses.replace(held, teacher_module=None))
    with pytest.raises(ValueError, match="the teacher has none"):
        flat = Frozen(Flat(), preprocessing=DATA.preprocessing, stages=())
        Diswot().score(small, dataclasses.replace(held, teacher_module=flat))
    shown = held.teacher
    with pytest.raises(ValueError, match="linear classifier at the end, and the student has none"):
        Diswot().score(Shows(shown.logits, *shown.features), held)
    with pytest.raises(ValueError, match="`weights` must be one of fresh, inherited"):
        Diswot(weights="trained")
    with pytest.raises(ValueError, match="at least 2"):
        Diswot(num_images=1)
