import pytest
import torch
import torch.nn.functional as F

from kdnas.costs.count import cost
from kdnas.distillers.base import Step
from kdnas.distillers.ranked import Ranked
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.specs import spec
from tests.distillers.spaces import TOY, batch, gradients, supernet

INNER = spec(SinglePath)


def drawn(step):
    rng = step.rng("ranked")
    pair = [TOY.sample(rng) for _ in range(2)]
    return sorted(pair, key=lambda one: cost(TOY.blueprint(one)).macs)


def test_the_dearer_subnet_is_to_have_the_lower_loss_and_only_it_is_taught():
    seen = set()
    for index in range(6, 20):
        model, one, step = supernet(), batch(), Step(index, 20, 0)
        cheap, dear = drawn(step)
        *_, (name, loss) = Ranked(inner=INNER, weight=2.0, ramp=0.2).losses(model, one, step)
        if cost(TOY.blueprint(cheap)).macs == cost(TOY.blueprint(dear)).macs:
            assert name == "path"
            continue
        assert name == "rank"
        low, high = (
            F.cross_entropy(model(one.images, a, batch_statistics=True).logits, one.labels) for a in (cheap, dear)
        )
        assert loss.item() == pytest.approx(2 * max(0.0, (high - low).item()), abs=1e-5)
        seen.add(loss.item() > 0)
        model.zero_grad()
        loss.backward()
        ours = gradients(model)
        model.zero_grad()
        (2.0 * high if high > low else 0 * high).backward()
        for key, gradient in gradients(model).items():
            assert gradient is None or torch.allclose(gradient, ours[key], atol=1e-5), key
    assert seen == {True, False}


def test_the_weight_rises_over_the_ramp():
    # The same index, so the same draws; another total, so another progress.
    def value(index, ramp):
        return dict(Ranked(inner=INNER, weight=2.0, ramp=ramp).losses(supernet(), batch(), Step(index, 100, 0)))["rank"]

    index = next(i for i in range(10, 40) if cost_differs(i) and value(i, 0.1) > 0)
    full = value(index, index / 100).item()
    assert value(index, 0.1).item() == pytest.approx(full)
    assert value(index, index / 50).item() == pytest.approx(full / 2)


def cost_differs(index):
    cheap, dear = drawn(Step(index, 100, 0))
    return cost(TOY.blueprint(cheap)).macs < cost(TOY.blueprint(dear)).macs


def test_the_inner_losses_come_first_unchanged():
    step = Step(3, 10, 0)
    inner = [n for n, _ in Sandwich(terms=()).losses(supernet(), batch(), step)]
    ours = [n for n, _ in Ranked(inner=spec(Sandwich, terms=())).losses(supernet(), batch(), step)]
    assert ours[: len(inner)] == inner


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"ramp": 0.0}, {"ramp": 1.5}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"weight|ramp"):
        Ranked(**wrong)
