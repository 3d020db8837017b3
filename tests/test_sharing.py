import random
from dataclasses import replace

import pytest
import torch

from kdnas.sharing import KernelTransform, sort_channels
from kdnas.supernet import corner
from kdnas.tables import load_space
from tests.distillers.spaces import ELASTIC, OPERATIONS, supernet

RESNET = load_space("elastic_resnet").fitted(classes=3, image_channels=3)


def images(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def shaken(space, **more):
    """A supernet whose batch norms are no longer alike in every channel."""
    model = supernet(space, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if "running_var" in name or "weight" in name else noise - 0.5)
    return model.eval()


@pytest.mark.parametrize("space", [ELASTIC, RESNET], ids=["mbconv", "resnet"])
def test_sorting_leaves_the_largest_networks_output_unchanged_and_changes_the_bank(space):
    model = shaken(space)
    largest, smallest = model(images(), space.largest).logits, model(images(), space.smallest).logits
    bank = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sort_channels(model)
    torch.testing.assert_close(model(images(), space.largest).logits, largest, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images(), space.smallest).logits, smallest, atol=1e-3)
    assert any(not torch.equal(tensor, bank[name]) for name, tensor in model.state_dict().items())


def test_the_leading_channels_are_the_ones_that_the_last_convolution_reads_most():
    model = shaken(ELASTIC)
    sort_channels(model)
    block = model.bank["stages_1_1:shared"]
    for weight in (block.reduce[0].weight, block.squeeze.expand.weight):
        importance = weight.abs().sum((0, 2, 3))
        assert (importance[:-1] >= importance[1:] - 1e-6).all()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sort_channels(model)  # sorted already: nothing moves
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_subnets_that_are_trained_already_keep_their_channels():
    model = shaken(ELASTIC)
    middle = ELASTIC.decide(lambda c: 3 if c.name.endswith("expansion") else c.options[-1])
    small = ELASTIC.decide(lambda c: 2 if c.name.endswith("expansion") else c.options[-1])
    before = {one: model(images(), one).logits for one in (middle, ELASTIC.largest, small)}
    sort_channels(model, [middle])
    for one in (middle, ELASTIC.largest):
        torch.testing.assert_close(model(images(), one).logits, before[one], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(images(), small).logits, before[small], atol=1e-3)


def test_identity_matrices_are_the_centre_crop_exactly():
    plain, transformed = supernet(ELASTIC).eval(), supernet(ELASTIC, share=KernelTransform()).eval()
    transformed.bank.load_state_dict(plain.bank.state_dict())
    for seed in range(5):
        one = ELASTIC.sample(random.Random(seed))
        assert torch.equal(transformed(images(), one).logits, plain(images(), one).logits)
    kernel = torch.randn(6, 1, 7, 7)
    rule = transformed.share
    cut = rule("stages.0.0.depthwise.0.weight", kernel, torch.Size((4, 1, 3, 3)))
    assert torch.equal(cut, corner("", kernel, torch.Size((4, 1, 3, 3))))


def test_smaller_kernels_are_mapped_step_by_step_by_matrices_of_their_layer():
    rule = supernet(ELASTIC, share=KernelTransform()).share
    shapes = {name: tuple(matrix.shape) for name, matrix in rule.matrices.items()}
    assert shapes == {
        f"stages_{i}_{j}_depthwise_0_weight:{size}": ((size - 2) ** 2,) * 2
        for i, largest in ((0, 7), (1, 5))
        for j in (0, 1)
        for size in range(largest, 3, -2)
    }
    name = "stages.0.1.depthwise.0.weight"
    first, second = torch.randn(25, 25), torch.randn(9, 9)
    with torch.no_grad():
        rule.matrices["stages_0_1_depthwise_0_weight:7"].copy_(first)
        rule.matrices["stages_0_1_depthwise_0_weight:5"].copy_(second)
    kernel = torch.randn(6, 1, 7, 7)
    five = rule(name, kernel, torch.Size((4, 1, 5, 5)))
    three = rule(name, kernel, torch.Size((4, 1, 3, 3)))
    for channel in range(4):
        expected = (first @ kernel[channel, 0, 1:6, 1:6].reshape(25)).view(5, 5)
        torch.testing.assert_close(five[channel, 0], expected, rtol=1e-4, atol=1e-5)
        expected = (second @ expected[1:4, 1:4].reshape(9)).view(3, 3)
        torch.testing.assert_close(three[channel, 0], expected, rtol=1e-4, atol=1e-4)
    assert rule(name, kernel, torch.Size((4, 1, 7, 7))).shape == (4, 1, 7, 7)


def test_matrices_are_trained_where_a_kernel_was_cut_and_travel_into_the_student():
    model = supernet(ELASTIC, share=KernelTransform())
    one = ELASTIC.decide(lambda c: c.options[0] if c.name.endswith("kernel") else c.options[-1])
    with torch.no_grad():
        for matrix in model.share.matrices.values():
            matrix.add_(0.1)
    model(images(), one).logits.square().sum().backward()
    assert all(matrix.grad.abs().sum() > 0 for matrix in model.share.matrices.values())
    model.eval()
    student = model.extract(one)
    assert torch.equal(student(images()).logits, model(images(), one).logits)
    model.zero_grad()
    model.train()(images(), ELASTIC.largest).logits.square().sum().backward()
    assert all(matrix.grad is None for matrix in model.share.matrices.values())


def test_operations_with_kernels_of_their_own_are_refused():
    wider = tuple(replace(stage, kernel=(5, 7)) for stage in OPERATIONS.stages)
    with pytest.raises(ValueError, match=r"two banks at stages_0_0.*KernelTransform"):
        supernet(replace(OPERATIONS, stages=wider), share=KernelTransform())


def test_a_depth_is_a_prefix_of_the_next():
    for stage in (0, 1):
        deep = ELASTIC.largest
        shallow = ELASTIC.decide(lambda c, stage=stage: 1 if c.name == f"stage{stage}.depth" else c.options[-1])
        layers = ELASTIC.blueprint(deep).stages[stage]
        assert ELASTIC.blueprint(shallow).stages[stage] == layers[:1]
        assert len(layers) == 2
