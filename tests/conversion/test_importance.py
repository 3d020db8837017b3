import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdnas.conversion.channels import channel_groups, operations
from kdnas.conversion.convert import convert
from kdnas.conversion.importance import channel_importance, sort_by_importance
from kdnas.conversion.removal import Removal, units
from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible
from kdnas.costs.count import cost, peak_memory
from tests.conversion.test_trace import Residual, Small, conv, lived, small

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 4])
METHODS = {
    "norm": channel_importance,
    "gradient": partial(channel_importance, method="gradient", images=IMAGES, labels=LABELS),
    "activation": partial(channel_importance, method="activation", images=IMAGES),
    "reconstruction": partial(channel_importance, method="reconstruction", images=IMAGES),
}


def unsorted(network, groups):
    """The source's own order."""
    return [torch.zeros(group.size) for group in groups]


def elastic_groups(space):
    groups = channel_groups(operations(space), 3, space.resolutions[0])
    return [group for group in groups if not group.fixed and group.readers]


@pytest.mark.parametrize("method", METHODS)
def test_the_leading_channels_are_the_most_important_and_the_whole_network_is_the_source(method):
    module = small()
    conversion = convert(module, image=(3, 16, 16), importance=METHODS[method])
    network, groups = conversion.supernet.extract(conversion.space.largest), elastic_groups(conversion.space)
    for values in METHODS[method](network, groups):
        assert (values[1:] <= values[:-1] * (1 + 1e-4) + 1e-12).all() and values[0] > values[-1]
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES).logits, module(IMAGES), rtol=1e-5, atol=1e-5)


def test_every_layer_of_a_group_has_the_source_s_channels_in_one_order():
    module = small()
    supernet = convert(module, image=(3, 16, 16), importance=unsorted).supernet
    source = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    assert torch.equal(source["bank.stem:shared.parts.0.weight"], module.stem[0].weight)
    orders = sort_by_importance(supernet)
    stream = next(order for key, order in orders.items() if key.endswith(":stream"))
    state = supernet.state_dict()
    assert not torch.equal(stream, torch.arange(16)) and torch.equal(stream.sort().values, torch.arange(16))
    for name, dim in (
        ("stem:shared.parts.0.weight", 0),
        ("stem:shared.parts.1.running_var", 0),
        ("stages_0_0:shared.parts.6.bias", 0),
        ("head:shared.parts.2.weight", 1),
    ):
        assert torch.equal(state[f"bank.{name}"], source[f"bank.{name}"].index_select(dim, stream)), name
    assert all(torch.equal(o, torch.arange(len(o))) for o in sort_by_importance(supernet).values())


def test_a_narrower_subnet_is_what_removal_of_the_less_important_channels_leaves():
    conversion = convert(small(), image=(3, 16, 16), importance=unsorted)
    space, supernet = conversion.space, conversion.supernet
    values = dict(
        zip(
            (g.key for g in elastic_groups(space)),
            channel_importance(supernet.extract(space.largest), elastic_groups(space)),
            strict=True,
        )
    )
    architecture = space.architecture({**space.largest, "stream0.width": 12, "stage0.block0.width1": 8})
    counts = {"stem:0:stream": 12, "stages_0_0:3": 8}
    removal = Removal(space, units(space))
    masks = {unit.key: torch.ones(unit.size, dtype=torch.bool) for unit in removal.units}
    for key, count in counts.items():
        masks[key] = torch.zeros(len(masks[key]), dtype=torch.bool)
        masks[key][values[key].topk(count).indices] = True
    removed = removal.network(supernet.extract(space.largest).state_dict(), masks).eval()
    sort_by_importance(supernet)
    with torch.no_grad():
        torch.testing.assert_close(supernet(IMAGES, architecture).logits, removed(IMAGES).logits)


def test_importances_are_those_of_a_calculation_by_hand():
    torch.manual_seed(0)
    module = lived(Small(Residual(16, 32)))
    space = convert(module, image=(3, 16, 16), importance=unsorted).space
    network = convert(module, image=(3, 16, 16), importance=unsorted).supernet.extract(space.largest)
    group = next(g for g in elastic_groups(space) if g.key == "stages_0_0:0")
    one, two = module.blocks[0].one, module.blocks[0].two
    written, read = one[0].weight.pow(2).sum((1, 2, 3)), two[0].weight.pow(2).sum((0, 2, 3))
    expected = written / written.mean() + read / read.mean()
    torch.testing.assert_close(channel_importance(network, [group])[0], expected.detach())
    with torch.no_grad():
        feature = one(module.stem(IMAGES))
    (activation,) = channel_importance(network, [group], "activation", IMAGES)
    torch.testing.assert_close(activation, feature.abs().mean((0, 2, 3)))
    squares = torch.zeros(32)
    for image, label in zip(IMAGES, LABELS, strict=True):  # image by image
        factor = torch.ones(32, requires_grad=True)
        x = module.stem(image[None])
        y = module.blocks[0].three(two(one(x) * factor[:, None, None]))
        F.cross_entropy(module.head(F.relu(x + y)), label[None]).backward()
        squares += factor.grad**2 / len(IMAGES)
    macs = 256 * 9 * (16 + 32)  # 256 positions; 16 inputs computed it, 32 outputs read it
    (gradient,) = channel_importance(network, [group], "gradient", IMAGES, LABELS)
    torch.testing.assert_close(gradient, squares / macs)


def test_channels_in_front_of_a_grouped_convolution_move_by_whole_groups():
    module = lived(Small(Residual(16, 64, groups=4)))
    supernet = convert(module, image=(3, 16, 16), importance=unsorted).supernet
    order = sort_by_importance(supernet)["stages_0_0:0"]
    starts = order[::16]
    assert torch.equal(order, (starts[:, None] + torch.arange(16)).flatten()) and set(starts.tolist()) == {
        0,
        16,
        32,
        48,
    }
    with torch.no_grad():
        torch.testing.assert_close(supernet(IMAGES, supernet.space.largest).logits, module(IMAGES))


def test_an_importance_that_needs_images_is_refused_without():
    with pytest.raises(ValueError, match="activation needs images, got none"):
        convert(small(), image=(3, 16, 16), importance=partial(channel_importance, method="activation"))
    with pytest.raises(ValueError, match="activation or reconstruction, got 'taylor'"):
        convert(small(), image=(3, 16, 16), importance=partial(channel_importance, method="taylor"))


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(16, 32, stride=2), nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))

    def forward(self, x):
        return F.relu(self.two(self.one(x)) + self.down(x))


def test_a_block_with_a_projection_may_lose_its_branch():
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    module = lived(Small(Residual(16, 32), Projected(), head=head))
    conversion = convert(module, image=(3, 16, 16))
    space = conversion.space
    inner = {c.name: c.needs for c in space.choices if c.name.startswith("stage1.block0.width")}
    assert inner == {"stage1.block0.width0": "stage1.block0.branch"}
    values = {name: value for name, value in space.largest.items() if name not in inner}
    shallow = space.architecture({**values, "stage1.block0.branch": 0})
    with torch.no_grad():
        expected = module.head(F.relu(module.blocks[1].down(module.blocks[0](module.stem(IMAGES)))))
        torch.testing.assert_close(conversion.supernet(IMAGES, shallow).logits, expected)
        values = {n: v for n, v in values.items() if not n.startswith("stage0.block0.")}
        shallowest = space.architecture({**values, "stage0.block0.branch": 0, "stage1.block0.branch": 0})
        expected = module.head(F.relu(module.blocks[1].down(module.stem(IMAGES))))
        student = conversion.supernet.extract(shallowest)
        torch.testing.assert_close(student(IMAGES).logits, expected)


def test_every_option_of_every_width_runs():
    conversion = convert(lived(Small(*small().blocks)), image=(3, 16, 16))
    space, rng = conversion.space, random.Random(0)
    for choice in space.choices:
        for option in choice.options:
            wanted = {choice.name: option, choice.needs: max(choice.at_least, 1)}
            architecture = space.decide(lambda c, wanted=wanted: wanted.get(c.name, rng.choice(c.options)))
            assert architecture[choice.name] == option
            outputs = conversion.supernet(IMAGES, architecture)
            assert outputs.logits.shape == (5, 5)
            assert [f.shape[1] for f in outputs.features] == [architecture["stream0.width"]]


def test_the_smallest_of_a_converted_space_is_the_cheapest_so_that_nothing_is_drawn_beyond_it():
    space = convert(lived(Small(*small().blocks)), image=(3, 16, 16)).space
    smallest, rng = space.blueprint(space.smallest), random.Random(0)
    for blueprint in (space.blueprint(space.sample(rng)) for _ in range(20)):
        assert all(least <= other for least, other in zip(cost(smallest), cost(blueprint), strict=True))
        assert peak_memory(smallest) <= peak_memory(blueprint)
    before = rng.getstate()
    with pytest.raises(Infeasible, match="infeasible"):
        check_feasible(BudgetCheck(space, Budget(macs=cost(smallest).macs - 1)), rng)
    check_feasible(BudgetCheck(space, Budget(macs=cost(smallest).macs)), rng)
    assert rng.getstate() == before
