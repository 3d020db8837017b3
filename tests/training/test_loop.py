import dataclasses
import itertools
import math

import pytest
import torch

from kdnas.data.base import Data, TensorImages
from kdnas.distillers.base import Distiller
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.single_path import SinglePath
from kdnas.jobs.train import train
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.spaces.mbconv import MBConvSpace, Stage, Stem
from kdnas.specs import algorithms, find_spec, resolve, spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.toy import data, experiment

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()
RECIPE = Recipe(steps=6, batch_size=16, learning_rate=0.05)


def network(seed=0):
    return initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), seed)


def teacher():
    return Frozen(network(9), preprocessing=DATA.preprocessing)


def training(recipe=RECIPE, distiller=None):
    return Training(network(), distiller or FromLabels(), DATA, None, recipe)


def test_resumed_training_equals_uninterrupted_training_bit_for_bit():
    whole = training()
    while not whole.done:
        whole.step()
    first = training()
    for _ in range(3):
        first.step()
    resumed = training()
    resumed.load(first.state())
    while not resumed.done:
        resumed.step()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        made = training(Recipe(steps=2, batch_size=16, learning_rate=0.05, seed=seed))
        made.step()
        return made.model.head.linear.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_step_leaves_the_global_generator_as_it_was():
    made = training()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made.step()
    assert torch.equal(torch.rand(1), expected)


def test_the_teacher_is_unchanged_stays_in_evaluation_mode_and_out_of_the_checkpoint():
    taught = teacher()
    before = {name: tensor.clone() for name, tensor in taught.state_dict().items()}
    made = Training(network(), FromTeacher(), DATA, taught, RECIPE)
    while not made.done:
        made.step()
    assert not taught.training
    assert not any(p.requires_grad for p in taught.parameters())
    for name, tensor in taught.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert set(made.state()["model"]) == set(network().state_dict())
    assert made.state()["distiller"] == {}


class Exploding(Distiller):
    def losses(self, model, batch, step):
        yield "student", model(batch.images).logits.sum() * math.inf


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    made = Training(network(), Exploding(), DATA, None, RECIPE)
    before = made.model.head.linear.weight.clone()
    with pytest.raises(FloatingPointError, match=r"step 0.*learning rate"):
        made.step()
    assert torch.equal(made.model.head.linear.weight, before)


class Recording(Distiller):
    def __init__(self):
        super().__init__()
        self.seen = []

    def losses(self, model, batch, step):
        self.seen.append((batch.pixels, batch.images, batch.teacher))
        yield "student", model(batch.images).logits.square().mean()


def test_student_and_teacher_see_the_same_augmented_pixels():
    taught, distiller = teacher(), Recording()
    Training(network(), distiller, DATA, taught, RECIPE).step()
    pixels, images, outputs = distiller.seen[-1]
    assert torch.equal(images, DATA.normalise(pixels))
    assert torch.equal(outputs.logits, taught(pixels).logits)


def test_the_rate_warms_up_and_ends_at_its_floor():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=0.1, floor=0.05)
    rates = [recipe.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == 1.0
    assert min(rates[10:]) >= 0.05
    assert recipe.rate(99) == pytest.approx(0.05, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_weight_decay_spares_biases_and_normalisation():
    groups = training().optimizer.param_groups
    assert {p.dim() > 1 for p in groups[0]["params"]} == {True}
    assert {p.dim() > 1 for p in groups[1]["params"]} == {False}
    assert groups[1]["weight_decay"] == 0


def test_a_new_stage_forgets_the_momentum():
    hint = spec("kdnas.losses.feature.hint:Hint", staged=True)
    terms = ((1.0, spec("kdnas.losses.response.cross_entropy:CrossEntropy")), (1.0, hint))
    made = Training(network(), FromTeacher(terms=terms), DATA, teacher(), RECIPE)
    (boundary,) = made.distiller.schedule(RECIPE.steps).restarts
    before = made.optimizer
    for _ in range(boundary):
        made.step()
    assert made.optimizer is before
    made.step()
    assert made.optimizer is not before


def test_a_checkpoint_of_another_space_is_refused():
    other = Training(initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0), FromLabels(), DATA, None, RECIPE)
    with pytest.raises(ValueError, match="another search space"):
        training().load(other.state())


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"optimizer": "adm"}, {"precision": "half"}])
def test_a_recipe_refuses_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="must be"):
        Recipe(**wrong)


@pytest.mark.parametrize("name", sorted(algorithms("kdnas.distillers")))
def test_a_distiller_for_another_kind_of_model_is_refused_before_anything_is_trained(name, tmp_path):
    made = find_spec("kdnas.distillers", name)
    kind = resolve(made.make).model_type
    assert kind in (Supernet, Network)
    phase, field = ("retrain", "a single network") if kind is Supernet else ("train", "a supernet")
    job = experiment()
    wrong = dataclasses.replace(job, **{phase: dataclasses.replace(getattr(job, phase), distiller=made)})
    with pytest.raises(ValueError, match=f"trains .*the model is {field}. Use "):
        train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    model = network() if kind is Supernet else initialised(lambda: Supernet(SPACE), 0)
    with pytest.raises(ValueError, match=f"the model is {field}"):
        Training(model, made.build(Distiller), DATA, None, Recipe())


class Watching(Distiller):
    """Trains with plain cross-entropy and keeps the images' strides."""

    def losses(self, model, batch, step):
        self.strides = batch.images.stride()
        yield "labels", torch.nn.functional.cross_entropy(model(batch.images).logits, batch.labels)


def test_on_a_cpu_images_come_channels_last_and_train_alike():
    last, plain = training(distiller=Watching()), training(distiller=Watching())
    plain._memory_format = torch.contiguous_format
    for _ in range(2):
        last.step()
        plain.step()
    assert last.distiller.strides == (3 * 64, 1, 8 * 3, 3)
    assert plain.distiller.strides == (3 * 64, 64, 8, 1)
    for name, tensor in plain.model.state_dict().items():
        assert torch.allclose(tensor, last.model.state_dict()[name], rtol=1e-5, atol=1e-5), name


def test_a_strided_point_convolution_keeps_images_as_they_are():
    # Its weights' gradient on channels-last maps of few channels writes past its memory in oneDNN.
    model = network()
    model.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1, 2), model.stem)
    made = Training(model, Watching(), DATA, None, RECIPE)
    made.step()
    assert made.distiller.strides == (3 * 64, 64, 8, 1)


def test_gray_images_are_not_channels_last_before_a_strided_point_convolution():
    # Shifted images of one channel have strides that count as channels-last: layers would hand that format on.
    gray = [
        TensorImages(part.take(torch.arange(len(part)))[:, :1].clone(), part.labels)
        for part in (DATA.train, DATA.search, DATA.test)
    ]
    held = Data(*gray, class_names=DATA.class_names, augmentation="shift")
    assert held.pixels(torch.arange(4), 0, 0).stride() == (64, 1, 8, 1)

    def images(kernel):
        model = network()
        model.stem = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, 1, 1), torch.nn.Conv2d(3, 3, kernel, 2), model.stem)
        made = Training(model, Watching(), held, None, RECIPE)
        made.step()
        return made.distiller.strides, made.model.stem[0](made._batch(1).images).stride()

    assert images(1) == ((64, 64, 8, 1), (3 * 64, 64, 8, 1))
    assert images(2) == ((64, 1, 8, 1), (3 * 64, 1, 8 * 3, 3))


def test_the_smallest_subnet_s_kernels_count_too():
    space = MBConvSpace(
        name="points",
        classes=3,
        resolutions=(8,),
        stem=Stem(width=(4,), stride=1),
        stages=(Stage(width=(4,), depth=(1,), kernel=(1, 3), expansion=(1,), stride=2),),
    )
    made = Training(initialised(lambda: Supernet(space), 0), SinglePath(), DATA, None, RECIPE)
    assert made._memory_format is torch.contiguous_format
