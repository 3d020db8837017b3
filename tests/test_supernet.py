"""One bank of weights and one sharing rule: subnets are their students, nothing is ever set active."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from kdnas.space import SearchSpace, layer
from kdnas.spaces.toy import Toy
from kdnas.supernet import Supernet, corner
from kdnas.tables import space_from_table

SPACE = Toy(name="toy")
MOBILE = space_from_table(
    {
        "family": "mbconv",
        "resolutions": [8],
        "stem": {"width": [4, 8], "stride": 1},
        "stages": [
            {"width": [4, 8], "depth": [1, 2], "kernel": [3, 5], "expansion": [1, 2, 3], "se": True, "drop_path": 0.5}
        ],
        "head": {"kind": "mobilenet_v2", "width": [8, 16], "dropout": 0.5},
    }
)


def seeded(space, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Supernet(space)


def batch(number=4, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, channels, side, side, generator=generator)


LABELS = torch.tensor([0, 1, 2, 3])


def test_the_corner_is_the_leading_channels_and_the_centred_window():
    weight = torch.arange(2 * 3 * 5 * 5.0).reshape(2, 3, 5, 5)
    cut = corner("weight", weight, torch.Size((1, 2, 3, 3)))
    assert torch.equal(cut, weight[:1, :2, 1:4, 1:4])
    assert torch.equal(corner("bias", torch.arange(4.0), torch.Size((2,))), torch.tensor([0.0, 1.0]))
    assert corner("scalar", torch.tensor(3.0), torch.Size(())).item() == 3
    assert (
        cut.data_ptr() != weight.data_ptr() and cut.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    )


def test_the_corner_refuses_to_grow():
    with pytest.raises(ValueError, match=r"conv.weight has shape \(2,\) .* too small for a subnet's \(3,\).*covering"):
        corner("conv.weight", torch.zeros(2), torch.Size((3,)))


@pytest.mark.parametrize("space", [SPACE, MOBILE], ids=["toy", "mbconv"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_subnet_is_its_student_bit_for_bit_in_both_modes(space, training):
    supernet = seeded(space).train(training)
    for seed in range(5):
        architecture = space.sample(random.Random(seed))
        student = supernet.extract(architecture)
        assert student.training == training
        if training:
            for module in student.modules():
                if isinstance(module, nn.Dropout) or hasattr(module, "rate"):
                    module.eval()
        inside, outside = supernet(batch(), architecture, regularise=False), student(batch())
        assert torch.equal(inside.logits, outside.logits)
        assert all(torch.equal(a, b) for a, b in zip(inside.features, outside.features, strict=True))


def test_a_student_has_weights_of_its_own():
    supernet = seeded(SPACE)
    before = copy.deepcopy(supernet.state_dict())
    student = supernet.extract(SPACE.largest)
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student(batch())  # its batch norms move, the supernet's do not
    after = supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batch_norm_buffers_are_sliced_in_the_supernet_and_move_only_in_training():
    supernet = seeded(SPACE)
    mean = supernet.bank["stem:shared"][1].running_mean
    supernet.eval()(batch(), SPACE.smallest)
    assert torch.equal(mean, torch.zeros_like(mean))
    supernet.train()(batch(), SPACE.smallest)
    assert mean.abs().sum() > 0
    narrow = supernet.bank["stages_0_0:shared"][1].running_mean
    assert narrow[:4].abs().min() > 0 and torch.equal(narrow[4:], torch.zeros(4))


def test_the_regularise_flag_switches_dropout_and_drop_path_in_training_only():
    supernet = seeded(MOBILE)

    def runs(**how):
        return [supernet(batch(), MOBILE.largest, **how).logits.detach() for _ in range(4)]

    supernet.train()
    assert any(not torch.equal(runs()[0], logits) for logits in runs())
    quiet = runs(regularise=False)
    assert all(torch.equal(quiet[0], logits) for logits in quiet)
    supernet.eval()
    still = runs(regularise=True)
    assert all(torch.equal(still[0], logits) for logits in still)


def test_gradients_are_those_of_the_student_and_zero_outside_the_slice():
    supernet = seeded(SPACE)
    student = supernet.extract(SPACE.smallest)
    cross_entropy(supernet(batch(), SPACE.smallest).logits, LABELS).backward()
    cross_entropy(student(batch()).logits, LABELS).backward()
    gradient = supernet.bank["stages_0_0:shared"][0].weight.grad
    torch.testing.assert_close(gradient[:4, :4], student.stages[0][0][0].weight.grad)
    assert gradient[4:].abs().sum() == 0 and gradient[:, 4:].abs().sum() == 0
    assert supernet.bank["stages_0_1:shared"][0].weight.grad is None  # a layer the subnet does not have


def test_a_look_ahead_step_runs_on_the_stepped_weights():
    supernet = seeded(SPACE).eval()
    weights = dict(supernet.named_parameters())
    loss = cross_entropy(supernet(batch(), SPACE.largest).logits, LABELS)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    rate = torch.tensor(0.1, requires_grad=True)
    stepped = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=True)}

    ahead = functional_call(supernet, stepped, (batch(seed=1), SPACE.smallest)).logits

    moved = copy.deepcopy(supernet)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.copy_(stepped[name])
    assert torch.equal(ahead, moved(batch(seed=1), SPACE.smallest).logits)
    assert not torch.equal(ahead, supernet(batch(seed=1), SPACE.smallest).logits)

    def validation(rate):
        stepped = {name: w - rate * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
        return cross_entropy(functional_call(supernet, stepped, (batch(seed=1), SPACE.smallest)).logits, LABELS)

    (slope,) = torch.autograd.grad(validation(rate), rate)
    with torch.no_grad():
        numeric = (validation(rate + 0.01) - validation(rate - 0.01)) / 0.02
    torch.testing.assert_close(slope, numeric, rtol=2e-2, atol=1e-3)


def test_two_subnets_before_one_backward_are_exact_under_recomputation():
    plain, recomputed = seeded(SPACE).eval(), seeded(SPACE).eval()
    architectures = SPACE.smallest, SPACE.largest
    sum(cross_entropy(plain(batch(), a).logits, LABELS) for a in architectures).backward()
    sum(
        cross_entropy(checkpoint(lambda x, a=a: recomputed(x, a).logits, batch(), use_reentrant=False), LABELS)
        for a in architectures
    ).backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_one_bank_is_shared_and_others_are_not():
    space = space_from_table(
        {
            "family": "mbconv",
            "resolutions": [8],
            "per": "block",
            "shared": False,
            "stem": {"width": [4], "stride": 1},
            "stages": [{"width": [4], "kernel": [3, 5], "expansion": [2]}],
        }
    )
    supernet = seeded(space)
    assert set(supernet.bank) == {"stem:shared", "stages_0_0:k3e2", "stages_0_0:k5e2", "head:shared"}


def test_images_are_resized_to_the_subnets_resolution():
    space = Toy(resolutions=(8, 16))
    supernet = seeded(space).eval()
    assert supernet(batch(side=16), space.smallest).features[0].shape[-1] == 8
    assert supernet(batch(side=16), space.largest).features[0].shape[-1] == 16
    student = supernet.extract(space.smallest)
    assert torch.equal(student(batch(side=16)).logits, supernet(batch(side=16), space.smallest).logits)


def test_a_layer_nothing_covers_is_an_error_that_names_the_way_out():
    supernet = seeded(SPACE)
    with pytest.raises(ValueError, match=r"no weights for Identity\(\) at stem, bank 'own'.*covering"):
        supernet.run("stem", layer("torch.nn:Identity", bank="own"), batch())


def test_an_error_inside_a_layer_is_given_its_position():
    supernet = seeded(SPACE)
    one = SPACE.blueprint(SPACE.largest).stages[0][0]
    with pytest.raises(RuntimeError) as caught:
        supernet.run("stages.0.0", one, batch(channels=5))
    assert "in layer stages.0.0: ConvNormAct(" in caught.value.__notes__[0]
    assert "an input of shape (4, 5, 8, 8)" in caught.value.__notes__[0]


def test_a_sharing_rule_may_have_weights_of_its_own():
    class Scaled(nn.Module):
        def prepare(self, bank):
            self.scales = nn.ParameterDict({key: nn.Parameter(torch.tensor(2.0)) for key in bank})

        def forward(self, name, weight, shape):
            cut = corner(name, weight, shape)
            return cut * self.scales["stem:shared"] if name == "stem.0.weight" else cut

    supernet = Supernet(SPACE, Scaled()).eval()
    assert "share.scales.stem:shared" in supernet.state_dict()
    supernet(batch(), SPACE.smallest).logits.square().sum().backward()
    assert supernet.share.scales["stem:shared"].grad.abs() > 0
    student = supernet.extract(SPACE.smallest)
    assert torch.equal(student.stem[0].weight, 2 * supernet.bank["stem:shared"][0].weight[:4])


def test_a_state_dict_fills_another_supernet():
    first, second = seeded(SPACE, 0), seeded(SPACE, 1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(batch(), SPACE.largest).logits, second.eval()(batch(), SPACE.largest).logits)


def test_a_space_decides_what_is_held():
    class Wide(SearchSpace):
        @property
        def structure(self):
            return SPACE.structure

        def layers(self, architecture):
            return SPACE.layers(architecture)

        def bank_layers(self):
            for name, one in super().bank_layers():
                yield name, one
                if name == "stem":
                    yield name, layer(one.make.make, **{**dict(one.make.arguments), "outputs": 32})

    supernet = Supernet(Wide(resolutions=(8,)))
    assert supernet.bank["stem:shared"][0].weight.shape[0] == 32
    assert supernet(batch(), SPACE.largest).features[0].shape[1] == 8
