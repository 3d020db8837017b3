"""Features measured by neighbours, a linear probe, and their similarity to a teacher's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdnas.tasks.features import (
    NEIGHBOURS,
    RIDGE,
    TEMPERATURE,
    Features,
    Neighbours,
    Similarity,
    neighbour_hits,
    probe_hits,
)


def clouds(count=60, dims=5, classes=3, noise=1.5):
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = 2 * torch.randn(classes, dims, generator=rng)
    return centres[labels] + noise * torch.randn(count, dims, generator=rng), labels


def test_neighbours_vote_with_weights_by_cosine():
    features, labels = clouds()
    k = min(NEIGHBOURS, 60 // 6)
    expected = []
    for i, own in enumerate(features):
        cosines = [(float(F.cosine_similarity(own, x, 0)), int(labels[j])) for j, x in enumerate(features) if j != i]
        votes = [0.0] * 3
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] += math.exp(cosine / TEMPERATURE)
        expected.append(votes.index(max(votes)) == int(labels[i]))
    hits = neighbour_hits(features, labels)
    assert hits.tolist() == expected
    assert 0 < sum(expected) < 60


def test_the_probe_is_fitted_anew_without_each_image():
    features, labels = clouds()
    x, y = features.double() - features.double().mean(0), F.one_hot(labels, 3).double()
    design = torch.cat([torch.ones(60, 1).double(), x], 1)
    penalty = RIDGE * x.square().sum() / 5 * torch.eye(6).double()
    penalty[0, 0] = 0
    expected = []
    for i in range(60):
        others = torch.arange(60) != i
        rows = design[others]
        weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ y[others])
        expected.append(int((design[i] @ weights).argmax()) == int(labels[i]))
    hits = probe_hits(features, labels)
    assert hits.tolist() == expected
    assert 0 < sum(expected) < 60


@pytest.mark.parametrize("hits", [neighbour_hits, probe_hits])
def test_class_numbers_and_scale_change_nothing(hits):
    features, labels = clouds()
    assert torch.equal(hits(features, labels), hits(7 * features, 10 - 3 * labels))


@pytest.mark.parametrize("hits", [neighbour_hits, probe_hits])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_images_and_equal_vectors_are_no_error(hits, count):
    assert hits(torch.ones(count, 4), torch.arange(count)).shape == (count,)


def test_a_class_is_not_outvoted_for_lack_of_images():
    """With all others as neighbours, an image's own class has one image fewer than each other one."""
    features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    assert neighbour_hits(features, torch.tensor([0, 0, 1, 1])).all()


def test_neighbours_are_the_measure_and_the_probe_stands_beside_it():
    task = Neighbours((5,))
    features, labels = clouds()
    grades = task.grades(features, labels)
    assert grades.shape == (60, 2)
    means = grades.double().mean(0).numpy()
    assert task.quality(means) == grades[:, 0].double().mean()
    assert task.details(means, ()) == {"linear probe accuracy": float(grades[:, 1].double().mean())}
    several = np.stack([means, means])
    assert task.quality(several).shape == (2,)


def test_similarity_is_a_mean_over_teachers():
    task = Similarity((1, 2))
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[-1.0, 5.0, 0.0]])
    assert task.grades(student, teacher).tolist() == [0.0]
    assert task.loss(student, teacher) == 1.0


@pytest.mark.parametrize("task", [Neighbours((3,)), Similarity((3,))])
def test_nothing_is_learnt_from_labels(task):
    with pytest.raises(ValueError, match="with --unlabelled"):
        task.loss(torch.rand(4, 3), torch.arange(4))
    assert {"cross_entropy", "soft_targets"} <= set(task.losses)
    assert isinstance(task, Features)
