import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdnas.distillers.base import Step
from kdnas.distillers.fair_paths import FairPaths, num_paths, paths
from kdnas.settings import Recipe
from kdnas.tables import load_space
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, OPERATIONS, TOY, batch, gradients, supernet, watched


def test_after_every_update_each_option_was_trained_equally_often():
    model = supernet(OPERATIONS)
    made = Training(model, FairPaths(), DATA, None, Recipe(steps=5, batch_size=12))
    for update in range(1, 6):
        made.step()
        for choice in OPERATIONS.choices:
            counts = {model.uses[choice.name, option] for option in choice.options}
            assert counts == {update * 4 // len(choice.options)}, choice.name


def test_an_update_is_m_backward_passes_and_one_optimiser_step():
    model = supernet(OPERATIONS)
    made = Training(model, FairPaths(), DATA, None, Recipe(steps=1, batch_size=12))
    seen, calls = watched(model), []
    step = made.optimizer.step
    made.optimizer.step = lambda *a, **k: (calls.append(1), step(*a, **k))[1]
    made.step()
    assert len(seen) == 4  # the least common multiple of 4 and 2 options
    assert len(calls) == 1


def test_the_gradient_is_the_sum_over_the_paths():
    model, one, step = supernet(OPERATIONS), batch(), Step(2, 10, 0)
    for _, loss in FairPaths().losses(model, one, step):
        loss.backward()
    found = gradients(model)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for path in paths(OPERATIONS, step.rng("architectures"), 12):
        model.zero_grad()
        F.cross_entropy(model(one.images, path).logits, one.labels).backward()
        for name, gradient in gradients(model).items():
            if gradient is not None:
                total[name] += gradient
    for name, gradient in found.items():
        assert gradient is not None, name  # every operation is in some path
        torch.testing.assert_close(gradient, total[name], rtol=1e-5, atol=1e-7)


def test_paths_are_permutations_drawn_from_the_generator():
    first, again, other = (paths(OPERATIONS, random.Random(seed), 12) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    for choice in OPERATIONS.choices:
        counted = Counter(path[choice.name] for path in first)
        assert set(counted.values()) == {4 // len(choice.options)}


def test_spaces_in_which_fairness_cannot_be_strict_are_refused():
    with pytest.raises(ValueError, match="exists only with some"):
        FairPaths().prepare(supernet(TOY), batch())
    with pytest.raises(ValueError, match="moves to another layer"):
        FairPaths().prepare(supernet(replace(load_space("nas_bench_macro"), width_multiplier=0.05)), batch())
    with pytest.raises(ValueError, match="needs 4 paths"):
        num_paths(OPERATIONS, 3)
