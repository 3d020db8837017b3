import numpy as np
import pytest
import torch

from kdnas.scorers.cka import Cka
from tests.scorers.scene import Shows, evidence, network, reordered


@pytest.fixture(scope="module")
def held():
    return evidence()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student():
    return Shows(normal(20, 3), normal(20, 4, 3, 3, seed=1), normal(20, 5, 2, 2, seed=2))


def alignment(x, y):
    """Kornblith's formula with covariances, an other way than the scorer's Gram matrices."""
    x, y = (f.flatten(1).double().numpy() for f in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def test_it_is_the_mean_over_teacher_stages_of_the_best_alignment(held):
    shown = student().outputs
    mine = (*shown.features, shown.logits)
    best = [max(alignment(x, y) for x in mine) for y in (*held.teacher.features, held.teacher.logits)]
    found = Cka().score(student(), held)
    assert found.value == pytest.approx(np.mean(best), abs=1e-5)
    assert [found.parts[f"teacher_stage_{i}"] for i in range(3)] == pytest.approx(best, abs=1e-5)


def test_the_teacher_itself_has_similarity_one(held):
    assert Cka().score(network(), held).value == pytest.approx(1, abs=1e-5)


def test_rotated_shifted_and_scaled_features_and_the_order_of_images_change_nothing(held):
    plain = Cka().score(student(), held).value
    logits, first, second = student().outputs.logits, *student().outputs.features
    turn = torch.linalg.qr(normal(36, 36, seed=4))[0]
    turned = (first.flatten(1) @ turn) * 1e3 + normal(1, 36, seed=5)
    assert Cka().score(Shows(logits, turned, second), held).value == pytest.approx(plain, abs=1e-5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    shuffled = Shows(*(t[order] for t in (logits, first, second)))
    assert Cka().score(shuffled, reordered(held, order)).value == pytest.approx(plain, abs=1e-5)


def test_one_more_stage_never_lowers_it_and_a_constant_one_adds_nothing(held):
    logits, first, second = student().outputs.logits, *student().outputs.features
    fewer = Cka().score(Shows(logits, first), held).value
    assert Cka().score(Shows(logits, first, second), held).value >= fewer - 1e-7
    assert Cka().score(Shows(logits, first, torch.full((20, 6), 0.1)), held).value == pytest.approx(fewer, abs=1e-7)
    assert Cka().score(Shows(torch.ones(20, 3), torch.zeros(20, 4)), held).value == 0
