import pytest
import torch
import torch.nn.functional as F

from kdnas.distillers.base import Batch, Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.losses.response.alpha_divergence import AlphaDivergence
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()


def supernet():
    return initialised(lambda: Supernet(SPACE), 0)


def teacher():
    return Frozen(initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 5), preprocessing=DATA.preprocessing)


def batch(taught=None):
    ids = torch.arange(12)
    return Batch(DATA.train.take(ids), DATA.train.labels[ids], ids, DATA, taught)


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_the_gradient_is_the_sum_of_the_four_separately_computed_ones():
    model, one, step = supernet(), batch(teacher()), Step(3, 10, 0)
    for _, loss in Sandwich().losses(model, one, step):
        loss.backward()
    found = gradients(model)

    rng = step.rng("architectures")
    children = [SPACE.smallest, SPACE.sample(rng), SPACE.sample(rng)]
    largest = model(one.images, SPACE.largest)
    target = Outputs(largest.logits.detach(), ())
    separate = [
        F.cross_entropy(largest.logits, one.labels) + SoftTargets(temperature=1.0)(largest, one.teacher, one.labels)
    ]
    separate += [AlphaDivergence()(model(one.images, child), target, one.labels) for child in children]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for loss in separate:
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad
    for name, gradient in found.items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, total[name], rtol=1e-5, atol=1e-7)


def test_soft_labels_carry_no_gradient():
    model, one = supernet(), batch()
    losses = Sandwich(terms=(), num_random=0).losses(model, one, Step(0, 10, 0))
    next(losses)
    model.zero_grad()
    _, soft = next(losses)
    soft.backward()
    # The smallest subnet uses only the leading channels; a gradient elsewhere came through the soft labels.
    weight = model.bank["stages_0_0:shared"][0].weight
    assert weight.grad[:4, :4].abs().sum() > 0
    assert weight.grad[4:].abs().sum() == 0


def test_one_optimiser_step_is_taken_for_all_four():
    made = Training(supernet(), Sandwich(), DATA, teacher(), Recipe(steps=2, batch_size=12))
    calls = []
    step = made.optimizer.step
    made.optimizer.step = lambda *a, **k: (calls.append(1), step(*a, **k))[1]
    values = made.step()
    assert len(calls) == 1
    assert set(values) == {"largest", "smallest", "random"}


def test_regularisers_act_on_the_largest_only(monkeypatch):
    seen = []
    forward = Supernet.forward

    def watched(self, images, architecture, *, regularise=True, batch_statistics=False):
        seen.append((architecture == SPACE.largest, regularise))
        return forward(self, images, architecture, regularise=regularise, batch_statistics=batch_statistics)

    monkeypatch.setattr(Supernet, "forward", watched)
    list(Sandwich(terms=()).losses(supernet(), batch(), Step(0, 10, 0)))
    assert seen[0] == (True, True)
    assert all(not regularise for _, regularise in seen[1:])
    assert len(seen) == 4


def test_the_children_of_a_step_are_drawn_from_seed_and_step():
    def drawn(seed, index):
        rng = Step(index, 10, seed).rng("architectures")
        return [SPACE.sample(rng) for _ in range(4)]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)


def test_teacher_weights_and_buffers_are_unchanged_after_an_epoch():
    taught = teacher()
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    made = Training(supernet(), Sandwich(), DATA, taught, Recipe(steps=4, batch_size=12))
    while not made.done:
        made.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in taught.state_dict().items())


def test_a_negative_number_of_children_is_refused():
    with pytest.raises(ValueError, match="num_random"):
        Sandwich(num_random=-1)
