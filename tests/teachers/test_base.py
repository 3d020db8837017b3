import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdnas.blocks.basic import resize
from kdnas.jobs._run import build_teacher
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.settings import FitTeacher
from kdnas.teachers.base import Frozen, Teacher, every_layer, find_stages
from kdnas.teachers.combined import Ensemble, Route, Streamed
from kdnas.teachers.fitted import fitted_teacher
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import load_weights
from tests.toy import data

GREY = Preprocessing(height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.two(self.one(x)))).mean((2, 3)))


def small():
    return Small()


def tokens():
    class Block(nn.Module):
        def forward(self, x):
            return x + 1

    return nn.Sequential(nn.Flatten(2), *(Block() for _ in range(8)), nn.Flatten(), nn.Linear(3 * 256, 3))


def test_a_teacher_stays_in_evaluation_mode_without_gradients_whatever_is_asked():
    taught = Frozen(small(), preprocessing=GREY)
    taught.train()
    taught.train(True)
    assert not any(m.training for m in taught.modules())
    pixels = torch.rand(4, 3, 16, 16)
    before = taught.module.norm.running_mean.clone()
    assert torch.equal(taught(pixels).logits, taught(pixels).logits)
    assert torch.equal(taught.module.norm.running_mean, before)
    assert not taught(pixels).logits.requires_grad
    assert not taught(pixels.clone().requires_grad_()).logits.requires_grad
    assert not any(p.requires_grad for p in taught.parameters())


def test_a_teacher_resizes_and_normalises_for_itself():
    module = small()
    taught = Frozen(module, preprocessing=GREY)
    pixels = torch.rand(2, 3, 8, 8)
    expected = module((resize(pixels, 16, 16) - 0.5) / 0.25)
    torch.testing.assert_close(taught(pixels).logits, expected.detach())


def test_the_last_map_of_every_resolution_is_a_stage():
    assert find_stages(small(), torch.rand(2, 3, 16, 16)) == ("one", "norm")
    taught = Frozen(small(), preprocessing=GREY)
    assert [tuple(f.shape) for f in taught(torch.rand(2, 3, 16, 16)).features] == [(2, 4, 16, 16), (2, 6, 8, 8)]


def test_a_transformer_shows_four_blocks_evenly_spread():
    assert find_stages(tokens(), torch.rand(2, 3, 16, 16)) == ("2", "4", "6", "8")


def test_named_stages_are_taken_and_misspelt_ones_refused():
    assert Frozen(small(), preprocessing=GREY, stages=("two.0",)).stages == ("two.0",)
    with pytest.raises(ValueError, match="Did you mean 'two'"):
        Frozen(small(), preprocessing=GREY, stages=("twoo",))


def test_no_hook_is_left_behind():
    taught = Frozen(small(), preprocessing=GREY)
    taught(torch.rand(2, 3, 16, 16))
    assert not any(m._forward_hooks for m in taught.modules())


def test_the_fitted_teacher_has_a_stage_per_resolution():
    network = Network(fitted_teacher((1, 8, 8), 10)).eval()
    outputs = network(torch.rand(2, 1, 8, 8))
    assert [f.shape[2] for f in outputs.features] == [8, 4, 2]
    assert outputs.logits.shape == (2, 10)


def test_a_users_own_function_is_a_teacher_and_other_classes_are_refused():
    made = load_teacher("tests.teachers.test_base:small")
    taught = made.build(Teacher, classes=3, preprocessing=GREY)
    assert taught(torch.rand(2, 3, 16, 16)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="has 3 classes, the data 10"):
        made.build(Teacher, classes=10, preprocessing=GREY)


def test_torchvision_networks_are_filled_from_a_weights_file(tmp_path):
    from torchvision import models

    module = models.get_model("resnet18", num_classes=3)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    made = load_teacher(f"torchvision:resnet18@{tmp_path / 'w.safetensors'},size=64,normalise=data")
    taught = made.build(
        Teacher, classes=3, preprocessing=Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(1,) * 3)
    )
    pixels = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(taught(pixels).logits, module.eval()(pixels - 0.5).detach())
    assert len(taught(pixels).features) >= 4


def test_weights_of_another_network_or_another_format_are_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(small(), tmp_path / "w.safetensors")
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_weights(small(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no weights file"):
        load_weights(small(), tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["streamed:", "ensemble:", "route:", "ensemble:streamed:"])
def test_teachers_are_nested_to_an_end(kind):
    with pytest.raises(ValueError, match="a teacher must name at most 100 others"):
        load_teacher(kind * 2000 + "timm:resnet18")


@pytest.mark.parametrize(
    ("text", "message"),
    [("torchvision:resnt18@w.safetensors", "Did you mean"), ("fitt", "a teacher is fit"), ("a.b:c", "cannot import")],
)
def test_what_cannot_be_a_teacher_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(text).build(Teacher, classes=3, preprocessing=GREY)


def gray():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def wanting(path):
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gray", r"must accept images of 3 x 8 x 8, but it fails on them \(.*1 channel"),
        ("wanting", "wanting needs the argument 'path'"),
    ],
)
def test_a_function_that_makes_no_teacher_of_these_images_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(load_teacher(f"tests.teachers.test_base:{name}"), data())


def test_several_teachers_do_not_show_every_layer():
    members = [Frozen(small(), preprocessing=GREY) for _ in range(2)]
    with pytest.raises(ValueError, match=r"one network, got a Ensemble. Name one by --teacher"):
        every_layer(Ensemble(members))


def test_fit_means_a_teacher_trained_in_the_run():
    assert load_teacher("fit") == FitTeacher()


def test_an_ensemble_is_the_mean_of_its_members_and_shows_them_all():
    one, two = (Frozen(small(), preprocessing=GREY) for _ in range(2))
    pixels = torch.rand(3, 3, 16, 16)
    outputs = Ensemble([one, two])(pixels)
    expected = (one(pixels).logits.softmax(1) + two(pixels).logits.softmax(1)) / 2
    torch.testing.assert_close(outputs.logits.softmax(1), expected)
    assert [torch.equal(m.logits, t(pixels).logits) for m, t in zip(outputs.members, (one, two), strict=True)] == [
        True
    ] * 2
    assert torch.equal(outputs.features[-1], one(pixels).features[-1])
    mean = Ensemble([one, two], mean="logits")(pixels).logits
    torch.testing.assert_close(mean, (one(pixels).logits + two(pixels).logits) / 2)


def test_an_ensemble_of_certain_teachers_stays_finite():
    class Certain(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return Outputs(1e4 * nn.functional.one_hot(torch.full((len(x),), self.label), 3).float())

    made = Ensemble([Frozen(Certain(i), preprocessing=GREY, stages=()) for i in (0, 1)])
    logits = made(torch.rand(2, 3, 16, 16)).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.softmax(1)[0], torch.tensor([0.5, 0.5, 0.0]))


def test_a_route_shows_the_snapshot_of_now_and_the_last_outside_of_training():
    snapshots = [Frozen(small(), preprocessing=GREY) for _ in range(4)]
    route, pixels = Route(snapshots), torch.rand(2, 3, 16, 16)

    def shown(**options):
        return [torch.equal(route(pixels, **options).logits, s(pixels).logits) for s in snapshots].index(True)

    assert shown() == 3
    for progress, expected in ((0.0, 0), (0.2499, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 3)):
        assert shown(at=Moment(progress)) == expected


class Saying(Teacher):
    """Gives a number as logits."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def teach(self, pixels, labels, at):
        return Outputs(torch.full((len(pixels), 2), float(self.number)))


def test_the_step_at_which_a_part_of_a_route_begins_belongs_to_it():
    pixels = torch.zeros(1, 3, 2, 2)
    for count in (1, 3, 4, 7, 49):  # 49 times a 49th is less than 1
        route = Route([Saying(k) for k in range(count)])
        for steps in (count, 3 * count):
            for k in range(count):
                at = Moment((k * steps // count) / steps)
                assert route(pixels, at=at).logits[0, 0] == k, (count, steps, k)


def test_teachers_made_of_others_pass_on_how_far_the_training_is():
    def route():
        return Route([Saying(0), Saying(1)])

    def drawn():
        return Ensemble([Saying(0), Saying(1)], mean="random")

    pixels = torch.zeros(1, 3, 2, 2)
    for made in (Streamed(route), Ensemble([route(), route()], mean="logits"), Route([Streamed(route)])):
        for progress, expected in ((0.0, 0), (0.6, 1), (0.2, 0)):
            assert made(pixels, at=Moment(progress)).logits[0, 0] == expected
    for made in (Route([drawn()]), Ensemble([drawn(), Streamed(drawn)], mean="logits")):
        found = set()
        for step in range(12):
            found.add(made(pixels, at=Moment(step / 12)).logits[0, 0].item())
        assert found == {0, 1}


def test_several_teachers_are_named_on_one_line():
    name = "tests.teachers.test_base:small"
    for kind, made in (("ensemble", Ensemble), ("route", Route)):
        taught = load_teacher(f"{kind}:{name},{name}").build(Teacher, classes=3, preprocessing=GREY)
        assert isinstance(taught, made)
        assert not any(p.requires_grad for p in taught.parameters())
    with pytest.raises(ValueError, match="must be a trained one"):
        load_teacher(f"ensemble:{name},fit")
    with pytest.raises(ValueError, match="at least two"):
        load_teacher(f"ensemble:{name}").build(Teacher, classes=3, preprocessing=GREY)
    with pytest.raises(ValueError, match="at least one snapshot"):
        Route([])
    with pytest.raises(ValueError, match="`mean` must be one of probabilities"):
        Ensemble([Frozen(small(), preprocessing=GREY)] * 2, mean="median")
