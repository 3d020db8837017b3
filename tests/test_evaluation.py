"""Accuracies against counts by hand, on networks whose logits follow from the pixels."""

import pytest
import torch
from torch import nn

from kdnas.data.base import Data, TensorImages
from kdnas.evaluation import accuracy, graded, health, student_grades, teacher_accuracy
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.randomness import initialised, torch_rng
from kdnas.spaces.toy import Toy
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Teacher
from tests.toy import data as toy

SPACE = load_space("toy").fitted(classes=3, image_channels=3)


def part(labels):
    """Images whose red, green or blue channel is bright: its place is the class that `Brightest` says."""
    brightest = torch.tensor([0, 1, 2] * len(labels))[: len(labels)]
    images = torch.full((len(labels), 3, 2, 2), 0.2)
    images[torch.arange(len(labels)), brightest] = 0.9
    return TensorImages(images, torch.tensor(labels))


class Brightest(nn.Module):
    """The mean of every channel as logits, after a batch norm that would change them in training mode."""

    def __init__(self, outputs=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.outputs = outputs
        self.sizes = []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(images))
        logits = self.norm(images).mean((2, 3))
        return Outputs(logits) if self.outputs else logits


DATA = Data(part([0, 0, 1, 1, 2, 2]), part([0, 1, 2]), part([0, 1, 0, 0, 2, 2, 0]), class_names=("a", "b", "c"))


@pytest.mark.parametrize("outputs", [False, True])
def test_an_accuracy_is_the_share_of_hits_and_the_network_keeps_its_mode(outputs):
    # The network says 0 1 2 0 1 2 0.
    network = Brightest(outputs).train()
    network.norm.eval()
    hits = graded(network, DATA.test, DATA)
    assert hits.tolist() == [True, True, False, True, False, True, True]
    assert accuracy(network, DATA.test, DATA) == pytest.approx(5 / 7)
    assert network.training and not network.norm.training
    assert network.norm.num_batches_tracked == 0


def test_every_image_of_a_part_of_several_batches_counts_once():
    labels = [0, 1, 2] * 400 + [0]
    network = Brightest()
    several = part([*labels[:-1], 1])
    assert graded(network, several, DATA).tolist() == [True] * 1200 + [False]
    assert accuracy(network, several, DATA) == pytest.approx(1200 / 1201)
    assert len(network.sizes) > 2


def test_images_are_normalised_for_a_student():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, images):
            assert torch.equal(images, DATA.normalise(DATA.search.images))
            return images.mean((2, 3))

    graded(Sees(), DATA.search, DATA)


class Says(Teacher):
    """A teacher that sees pixels as they are, and gets their labels."""

    def __init__(self):
        super().__init__()
        self.labels = []

    def teach(self, pixels, labels, at):
        self.labels.append(labels)
        assert pixels.min() >= 0.19  # not normalised
        return Outputs(pixels.mean((2, 3)))


def test_a_teachers_accuracy_is_its_share_of_hits_over_all_batches():
    teacher = Says()
    assert teacher_accuracy(teacher, DATA.test, DATA) == pytest.approx(5 / 7)
    assert torch.cat(teacher.labels).tolist() == DATA.test.labels.tolist()
    assert teacher_accuracy(teacher, part([0, 1, 2] * 200 + [1]), DATA) == pytest.approx(600 / 601)


def test_health_is_the_accuracy_of_three_subnets_by_batch_statistics():
    data, space = toy(), Toy(widths=(4, 6, 8), classes=3, image_channels=3)
    supernet = initialised(lambda: Supernet(space), 9).train()
    middle = space.decide(lambda choice: {3: 6, 2: 2}[len(choice.options)])  # of three options the second, of two too
    three = {"smallest": space.smallest, "middle": middle, "largest": space.largest}
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for most in (18, 1000):
        expected = {}
        pixels, labels = data.search.sample(most, torch_rng("health"))
        for name, architecture in three.items():
            logits = supernet.extract(architecture).train()(data.normalise(pixels)).logits
            expected[name] = float((logits.argmax(1) == labels).float().mean())
        accuracies = health(supernet, data, most=most)
        assert list(accuracies) == list(three) and accuracies == pytest.approx(expected)
        assert len(set(expected.values())) > 1
    assert health(supernet, data) == accuracies
    assert supernet.training
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_health_looks_at_a_thousand_images_unless_told_otherwise():
    class Counts(nn.Module):
        space = SPACE

        def __init__(self):
            super().__init__()
            self.weight, self.sizes = nn.Parameter(torch.zeros(())), []

        def forward(self, images, architecture, batch_statistics):
            self.sizes.append(len(images))
            return Outputs(images.mean((2, 3)))

    supernet, data = Counts(), Data(DATA.train, part([0, 1, 2] * 400), DATA.test, class_names=("a", "b", "c"))
    health(supernet, data)
    assert supernet.sizes == [1000] * 3


def test_the_hits_of_a_student_folder_are_zeros_and_ones_of_the_test_part(tmp_path):
    data = toy()
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 3).eval()
    write_student(tmp_path / "student", network, Card.of(network, data, {}), deploy=False)
    hits = student_grades(tmp_path / "student", data)
    assert hits.dtype == bool and hits.shape == (30,)
    assert hits.tolist() == graded(network, data.test, data).tolist()
    assert 0 < hits.mean() < 1
