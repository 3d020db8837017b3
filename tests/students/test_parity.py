"""How other forms of a student are compared with its network, on forms whose difference is known."""

import re

import pytest
import torch

from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.data.base import normalise
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised
from kdnas.students.card import Card
from kdnas.students.parity import TOLERANCE, Parity, check_card
from kdnas.tables import load_space

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
BLUEPRINT = SPACE.blueprint(SPACE.largest)
PREPROCESSING = Preprocessing(height=10, width=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def card(**changes):
    fields = {"architecture": None, "space": None, "blueprint": BLUEPRINT, "cost": cost(BLUEPRINT)}
    fields |= {"preprocessing": PREPROCESSING, "class_names": ("a", "b", "c")}
    return Card(**(fields | changes))


def network(largest):
    """A network whose largest logit on the images of a Parity is this one."""
    network = initialised(lambda: Network(BLUEPRINT), 3).eval()
    with torch.no_grad():
        network.head.linear.weight.mul_(100)
        factor = largest / Parity(network, card()).differences["largest_logit"]
        for parameter in network.head.linear.parameters():
            parameter.mul_(factor)
    return network


class Form:
    """The network's logits plus a difference for one image, as batches of images come; it notes their sizes."""

    def __init__(self, parity, image=0, difference=0.0, size=None):
        self.parity, self.image, self.difference, self.size = parity, image, difference, size
        self.sizes, self.place = [], 0

    def __call__(self, batch):
        assert torch.is_inference_mode_enabled()
        begin = self.place % 64
        assert torch.equal(batch, self.parity._images[begin : begin + len(batch)])
        logits = self.parity._logits[begin : begin + len(batch)].clone()
        turn = 1 if self.place < 64 else 3
        if begin <= self.image < begin + len(batch) and self.size in (None, turn):
            logits[self.image - begin, 1] += self.difference
        self.place += len(batch)
        self.sizes.append(len(batch))
        return logits


def test_the_images_differ_in_brightness_and_contrast():
    images = Parity(network(3.0), card())._images
    assert images.shape == (64, 3, 10, 8) and 0 <= images.min() and images.max() <= 1
    assert images.mean((1, 2, 3)).std() > 0.1  # of noise alone: 0.02
    spans = images.amax((1, 2, 3)) - images.amin((1, 2, 3))
    assert spans.min() < 0.1 and spans.max() > 0.8
    assert torch.equal(images, Parity(network(1.0), card())._images)


def test_the_reference_is_the_network_on_normalised_images():
    own = network(3.0)
    parity = Parity(own, card())
    with torch.no_grad():
        expected = own(normalise(parity._images, PREPROCESSING)).logits
    assert torch.equal(parity._logits, expected)
    assert parity.differences == {"largest_logit": float(expected.abs().max())}
    assert parity.differences["largest_logit"] == pytest.approx(3.0)


def test_one_logit_that_is_not_finite_is_enough():
    own = network(3.0)
    with torch.no_grad():
        own.head.linear.bias[1] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        Parity(own, card())


def test_every_form_is_compared_at_batch_sizes_one_and_three():
    parity = Parity(network(3.0), card())
    form = Form(parity)
    parity.compare("student.py", form)
    assert form.sizes == [1] * 64 + [3] * 21 + [1]
    assert parity.differences["student.py"] == 0


@pytest.mark.parametrize("size", [1, 3])
def test_the_larger_difference_of_both_batch_sizes_counts(size):
    parity = Parity(network(3.0), card())
    image = int(parity._logits.abs().amax(1).argmin())
    assert parity._logits[image].abs().max() < 1
    parity.compare("student.onnx", Form(parity, image, 5e-6, size))
    assert parity.differences["student.onnx"] == pytest.approx(5e-6, rel=0.05)
    with pytest.raises(ValueError, match=r"student\.onnx gives other logits .* is 0\.01, the tolerance 1e-05"):
        parity.compare("student.onnx", Form(parity, image, -0.01, size))


def test_a_difference_is_in_units_of_an_images_largest_logit_or_of_one():
    parity = Parity(network(50.0), card())
    image = int(parity._logits.abs().amax(1).argmax())
    parity.compare("a", Form(parity, image, 50 * 8e-6))
    assert parity.differences["a"] == pytest.approx(8e-6, rel=0.05)
    with pytest.raises(ValueError, match="a gives other logits"):
        parity.compare("a", Form(parity, image, 50 * 1.2e-5))
    small = Parity(network(0.2), card())
    small.compare("a", Form(small, 5, 8e-6))
    assert small.differences["a"] == pytest.approx(8e-6, rel=0.05)


def test_where_no_logit_reaches_a_tenth_the_largest_of_all_is_the_unit():
    parity = Parity(network(0.09), card())
    image = int(parity._logits.abs().amax(1).argmin())
    parity.compare("a", Form(parity, image, 0.09 * 8e-6))
    assert parity.differences["a"] == pytest.approx(8e-6, rel=0.05)
    with pytest.raises(ValueError, match="a gives other logits"):
        parity.compare("a", Form(parity, image, 0.09 * 1.2e-5))


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_differs(difference):
    parity = Parity(network(3.0), card())
    with pytest.raises(ValueError, match="a gives other logits"):
        parity.compare("a", Form(parity, 2, difference))
    assert set(parity.differences) == {"largest_logit"}


def test_the_tolerance_is_allowed():
    parity = Parity(network(0.5), card())
    parity._logits = torch.zeros_like(parity._logits)
    parity.compare("a", Form(parity, 2, TOLERANCE))
    with pytest.raises(ValueError, match="b gives other logits"):
        parity.compare("b", Form(parity, 2, 1.01 * TOLERANCE))


def test_a_form_that_fails_or_has_another_shape_is_named():
    parity = Parity(network(3.0), card())
    with pytest.raises(ValueError, match=re.escape("a gives logits of shape (64, 2), not (64, 3)")):
        parity.compare("a", lambda batch: batch.mean((2, 3))[:, :2])

    def breaks(batch):
        assert len(batch) < 3, "three are too many"
        return parity._logits[:1]

    parity._logits = parity._logits[:1].expand(64, 3).clone()
    with pytest.raises(ValueError, match=r"a cannot be run on 3 images .*three are too many"):
        parity.compare("a", breaks)


@pytest.mark.parametrize("changes", [{"params": 1}, {"macs": 1}, {"params": -1}, {"macs": -1}])
def test_the_cards_cost_is_the_networks(changes):
    own, true = network(3.0), cost(BLUEPRINT)
    check_card(own, card())
    wrong = Cost(*(getattr(true, name) + changes.get(name, 0) for name in true._fields))
    message = f"the network has {true.params:,} params and {true.macs:,} macs, but `Card.cost` is {wrong.params:,} and"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_card(own, card(cost=wrong))
    assert all(p.device.type == "cpu" for p in own.parameters())


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d")])
def test_the_card_names_every_logit(names):
    with pytest.raises(ValueError, match=f"has 3 logits, but `Card.class_names` has {len(names)} names"):
        check_card(network(3.0), card(class_names=names))
