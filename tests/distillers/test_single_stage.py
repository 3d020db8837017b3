"""BigNAS's rules that concern more than the sandwich's losses."""

import random
from dataclasses import replace

import torch

from kdnas.costs.count import cost
from kdnas.distillers.base import Step
from kdnas.distillers.single_path import SinglePath
from kdnas.settings import Recipe
from kdnas.tables import load_space
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, ELASTIC, batch, supernet


def without(space, stage):
    return space.decide(lambda c: 1 if c.name == f"stage{stage}.depth" else c.options[-1])


def test_with_zero_gamma_removing_a_shortcut_block_leaves_the_output_unchanged():
    model = supernet(replace(ELASTIC, zero_gamma=True))
    for training in (True, False):
        model.train(training)
        whole = model(batch().images, ELASTIC.largest).logits
        for stage in (0, 1):
            one = without(ELASTIC, stage)
            assert len(ELASTIC.blueprint(one).stages[stage]) == 1
            assert torch.equal(model(batch().images, one).logits, whole)
    plain = supernet(ELASTIC).eval()
    assert not torch.allclose(
        plain(batch().images, without(ELASTIC, 0)).logits, plain(batch().images, ELASTIC.largest).logits, atol=1e-4
    )


def test_only_blocks_with_a_shortcut_start_at_zero():
    model = supernet(replace(ELASTIC, zero_gamma=True))
    zero = {key for key, block in model.bank.items() if hasattr(block, "reduce") and not block.reduce[1].weight.any()}
    kept = {key for key, block in model.bank.items() if hasattr(block, "reduce")} - zero
    assert zero == {"stages_0_0:shared", "stages_0_1:shared", "stages_1_1:shared"}
    assert kept == {"stages_1_0:shared"}  # stride 2


def test_smallest_random_and_largest_are_ordered_by_cost():
    for name in ("digits", "toy"):
        space = load_space(name)
        low, high = (cost(space.blueprint(one)) for one in (space.smallest, space.largest))
        for seed in range(30):
            found = cost(space.blueprint(space.sample(random.Random(seed))))
            assert low.macs <= found.macs <= high.macs
            assert low.params <= found.params <= high.params


def test_inside_a_shared_tensor_decay_and_momentum_move_what_a_step_did_not_use():
    # What the supernet's docstring says: the gradient there is zero, the weight moves all the same.
    recipe = Recipe(steps=30, batch_size=12, learning_rate=0.05, weight_decay=0.1)
    made = Training(supernet(ELASTIC), SinglePath(), DATA, None, recipe)
    block = made.model.bank["stages_0_0:shared"]
    moved = 0
    for index in range(12):
        path = ELASTIC.sample(Step(index, 30, 0).rng("architectures"))
        used = 8 * path.integer("stage0.block0.expansion")
        before = block.reduce[0].weight.detach().clone()
        made.step()
        gradient, after = block.reduce[0].weight.grad, block.reduce[0].weight.detach()
        if used < 32:
            assert not gradient[:, used:].any()
            assert gradient[:, :used].any()
            moved += not torch.equal(after[:, used:], before[:, used:])
    assert moved > 3
