from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from kdnas.losses import AttentionMap, Guide, Outputs, Recorder
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


def timm_transformer(heads, fused=True):
    network = pytest.importorskip("timm").models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=heads, num_classes=5
    )
    for block in network.blocks:
        block.attn.fused_attn = fused
    return network, [f"blocks.{i}.attn" for i in range(2)]


def torchvision_transformer(heads):
    network = VisionTransformer(16, 8, 2, heads, hidden_dim=12, mlp_dim=8, num_classes=5)
    return network, [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]


def map_by_hand(weight, bias, tokens, heads):
    """The softmax of the scaled products of queries and keys, the first two thirds of one projection."""
    projected = torch.nn.functional.linear(tokens, weight, bias).unflatten(2, (3, heads, -1))
    queries, keys, _ = projected.permute(2, 0, 3, 1, 4)
    return (queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5).softmax(3)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fused", [True, False, None])
def test_attention_maps_of_timm_and_torchvision_are_recorded(fused, mode):
    torch.manual_seed(0)
    network, names = torchvision_transformer(3) if fused is None else timm_transformer(3, fused)
    network.train(mode)
    module, images, inputs = network.get_submodule(names[1]), torch.randn(2, 3, 16, 16), []
    outputs = Recorder(network, (), names)(images)
    assert [a.shape for a in outputs.attentions] == [(2, 3, 5, 5)] * 2
    torch.testing.assert_close(outputs.logits, network(images))
    module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(images)
    own = (module.in_proj_weight, module.in_proj_bias) if fused is None else (module.qkv.weight, module.qkv.bias)
    torch.testing.assert_close(outputs.attentions[1], map_by_hand(*own, inputs[0], 3))
    if fused is not None:
        assert module.fused_attn is fused and not module.attn_drop._forward_hooks
    assert len(module._forward_pre_hooks) == 1 and not module._forward_hooks


def test_attention_maps_are_distilled_from_timm_to_torchvision():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    teacher, student = Recorder(timm_transformer(3)[0], (), ["blocks.1.attn"]), torchvision_transformer(2)
    recorded = Recorder(student[0], (), student[1])(images)
    AttentionMap(layers="last")(recorded, teacher(images)).backward()
    slope = student[0].get_submodule(student[1][1]).in_proj_weight.grad
    assert slope.isfinite().all() and slope[:24].any() and not slope[24:].any()  # queries and keys, no values


def test_a_recorder_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"no submodule 'frst'\. Did you mean 'first'"):
        Recorder(Network(), ("frst",))
    with pytest.raises(ValueError, match="'unused' was not called"):
        Recorder(Network(), ("unused",))(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="'attention' returned a tuple"):
        Recorder(Network(), ("attention",))(torch.randn(2, 3, 8, 8))
    for wrong in ("first", (0,)):
        with pytest.raises(ValueError, match="`stages` must be a tuple of names of submodules, got"):
            Recorder(Network(), wrong)
    with pytest.raises(ValueError, match=r"`module` must be a torch\.nn\.Module, got function"):
        Recorder(lambda x: x, ("first",))
    with pytest.raises(ValueError, match="`labels` of the gradients must be class numbers from 0 to 4"):
        Recorder(Network(), ()).gradients(torch.randn(2, 3, 8, 8), torch.tensor([0, 9]))


class Returning(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.part, self.form = nn.Flatten(), form

    def forward(self, x):
        return self.form(self.part(x))


def test_a_recorder_takes_logits_alone_or_as_an_attribute():
    images = torch.randn(2, 3, 1, 1)
    for form in (lambda x: x, Outputs, lambda x: SimpleNamespace(logits=x)):
        assert torch.equal(Recorder(Returning(form), ())(images).logits, images.flatten(1))
    for form, name in ((lambda x: (x, x), "tuple"), (lambda x: {"logits": x}, "dict")):
        with pytest.raises(ValueError, match=f"the module must return logits, .* got {name}"):
            Recorder(Returning(form), ())(images)


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
