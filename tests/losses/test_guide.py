import pytest
import torch
from torch import nn

from kdnas.losses import Guide, Outputs, Recorder
from kdnas.losses.example import example

STUDENT, TEACHER, LABELS = example()
STUDENT, TEACHER = (o.map(torch.Tensor.float) for o in (STUDENT, TEACHER))


class Attending(nn.Module):
    def forward(self, x):
        return x, x.softmax(-1)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.attention, self.unused = Attending(), nn.Identity()

    def forward(self, x):
        x = self.second(self.first(x).relu())
        self.attention(x)
        return x.mean((2, 3))


def run(terms, steps=4):
    """A linear student of the example's outputs; the guide and every step's values."""
    torch.manual_seed(0)
    scale = nn.Linear(1, 1)
    guide = Guide(terms, student=scale, steps=steps)

    def outputs():
        return STUDENT.map(lambda x: scale(x[..., None])[..., 0])

    groups = guide.prepare(outputs(), TEACHER, learning_rate=0.01)
    optimizer = torch.optim.SGD([{"params": scale.parameters()}, *groups], lr=0.01)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        values.append(guide.backward(outputs(), TEACHER, LABELS, ids=torch.arange(4)))
        optimizer.step()
    return guide, values, groups


def test_a_recorder_shows_stages_and_attentions_of_any_module():
    network, images = Network(), torch.randn(2, 3, 8, 8)
    outputs = Recorder(network, ("first", "second"), ("attention",))(images)
    assert torch.equal(outputs.logits, network(images)) and torch.equal(outputs.features[0], network.first(images))
    assert outputs.attentions[0].shape == (2, 5, 4, 4) and outputs.images is images
    assert not network.first._forward_hooks


def test_a_recorder_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"no submodule 'frst'\. Did you mean 'first'"):
        Recorder(Network(), ("frst",))
    with pytest.raises(ValueError, match="'unused' was not called"):
        Recorder(Network(), ("unused",))(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="'attention' returned a tuple"):
        Recorder(Network(), ("attention",))(torch.randn(2, 3, 8, 8))


def test_preparation_stages_and_critics_run_by_themselves():
    guide, values, _ = run([(1.0, "cross_entropy"), (1.0, "factor_transfer")], steps=10)
    assert guide.objective.losses["factor_transfer"].is_trained
    assert all(set(step) == {"sum"} for step in values)
    guide, values, groups = run([(1.0, "conditional_adversarial")])
    assert set(values[0]) == {"sum", "conditional_adversarial_discriminator"}
    assert {group["lr"] for group in groups} == {1e-3}
    guide, _, _ = run([(1.0, "cross_entropy"), (1.0, "hint")], steps=3)
    assert guide.restarts == {1} and not guide.is_restart


def test_progress_ids_and_clipping_reach_the_losses():
    _, values, _ = run([(1.0, "information_flow,first_weight=1000")])
    assert values[0]["sum"] > 10 * values[-1]["sum"]
    guide, _, _ = run([(1.0, "contrastive")])
    assert guide.objective.losses["contrastive"].students.is_known.all()
    _, values, _ = run([(1.0, "cross_entropy"), (1.0, "singular_value")])
    assert set(values[0]) == {"sum", "singular_value"}


def test_a_checkpoint_holds_parts_and_step():
    guide, _, _ = run([(1.0, "hint,staged=false")])
    restored = Guide([(1.0, "hint,staged=false")], student=nn.Linear(1, 1), steps=4)
    restored.prepare(STUDENT, TEACHER, learning_rate=0.01)
    restored.load_state_dict(guide.state_dict())
    assert int(restored.taken) == 4
    assert torch.equal(*(g.objective.losses["hint"](STUDENT, TEACHER) for g in (guide, restored)))


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        Guide([(1.0, "soft_targets")], student=nn.Linear(1, 1), steps=0)
    assert isinstance(STUDENT, Outputs)
