import pytest
import torch
from torch import nn

from kdnas.distillers.base import Step
from kdnas.distillers.conflict_free import ConflictFree, project
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.sandwich import Sandwich
from kdnas.network import Network
from kdnas.settings import Recipe
from kdnas.specs import spec
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, TOY, batch, gradients, supernet

INNER = spec(Sandwich, terms=())


class Two(nn.Module):
    def __init__(self, children):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
        self.a.grad, self.b.grad = (None if c is None else torch.tensor([c]) for c in children)


def projected(largest, children):
    model = Two(children)
    project({p: torch.tensor([g]) for p, g in zip(model.parameters(), largest, strict=True) if g is not None}, model)
    return [p.grad.item() for p in model.parameters()]


def test_by_hand():
    # g = (1, -2), c = (1, 1): the product is -1, |c|^2 = 2, so g becomes (1.5, -1.5), and the step takes (2.5, -0.5).
    assert projected((1.0, -2.0), (1.0, 1.0)) == [2.5, -0.5]
    assert projected((1.0, 2.0), (1.0, 1.0)) == [2.0, 3.0]  # they agree: the plain sum
    assert projected((1.0, -2.0), (0.0, 0.0)) == [1.0, -2.0]  # no children's gradient, nothing to project on
    # A weight that only one side has counts in the norm of the children's, and the others' gradients stay.
    assert projected((-2.0, None), (1.0, 1.0)) == [0.0, 2.0]
    assert projected((1.0, 3.0), (None, 1.0)) == [1.0, 4.0]


def test_the_projected_gradient_no_longer_points_against_the_childrens():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    children = [torch.randn_like(p) for p in model.parameters()]
    largest = [-c + 0.5 * torch.randn_like(c) for c in children]
    for parameter, child in zip(model.parameters(), children, strict=True):
        parameter.grad = child.clone()
    project(dict(zip(model.parameters(), [g.clone() for g in largest], strict=True)), model)
    kept = [p.grad - c for p, c in zip(model.parameters(), children, strict=True)]
    dot = sum((k * c).sum() for k, c in zip(kept, children, strict=True))
    before = sum((g * c).sum() for g, c in zip(largest, children, strict=True))
    assert before < -1
    assert abs(dot) < 1e-4


def test_a_sandwich_that_agrees_is_unchanged_and_one_that_does_not_is_projected():
    step = Step(0, 10, 0)

    def run(distiller, signs):
        model = supernet()
        for name, loss in distiller.losses(model, batch(), step):
            (signs * loss if name == "largest" else loss).backward()
        return gradients(model)

    def flat(found):
        return torch.cat([g.flatten() for g in found.values() if g is not None])

    plain = Sandwich(terms=(), num_random=0)
    agrees = {s: flat(run(plain, s)) for s in (1, -1)}
    ours = {s: flat(run(ConflictFree(inner=spec(Sandwich, terms=(), num_random=0)), s)) for s in (1, -1)}
    children = (agrees[1] + agrees[-1]) / 2
    largest = agrees[1] - children
    sign = 1 if largest @ children > 0 else -1
    torch.testing.assert_close(ours[sign], agrees[sign], rtol=1e-4, atol=1e-6)
    against = -sign * largest
    expected = against - (against @ children) / (children @ children) * children + children
    torch.testing.assert_close(ours[-sign], expected, rtol=1e-4, atol=1e-6)


def test_any_training_can_switch_it_on():
    made = Training(supernet(), ConflictFree(inner=INNER), DATA, None, Recipe(steps=2, batch_size=12))
    assert set(made.step(watch=True)) == {"largest", "smallest", "random"}
    assert -1 <= made.conflict <= 1


def test_a_distiller_without_children_is_refused():
    made = ConflictFree(inner=spec(FromLabels))
    with pytest.raises(ValueError, match=r"smallest or random.*sandwich"):
        list(made.losses(Network(TOY.blueprint(TOY.largest)), batch(), Step(0, 1, 0)))
