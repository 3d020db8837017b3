import dataclasses
import itertools
import math
import re

import pytest
import torch

from kdnas.data.base import Data, TensorImages
from kdnas.distillers.base import Distiller, Schedule
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.single_path import SinglePath
from kdnas.jobs.train import train
from kdnas.losses.base import Loss as LossBase
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.spaces.mbconv import MBConvSpace, Stage, Stem
from kdnas.specs import algorithms, find_spec, resolve, spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen, Teacher
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


def test_a_point_convolution_without_a_stride_takes_channels_last_images():
    model = network()
    model.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), model.stem)
    made = Training(model, Watching(), DATA, None, RECIPE)
    made.step()
    assert made.distiller.strides == (3 * 64, 1, 8 * 3, 3)


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


def test_an_epoch_is_what_whole_batches_fit_into_the_train_part():
    sizes = {16: 3, 17: 2, 48: 1, 100: 1}
    assert {size: training(Recipe(steps=2, batch_size=size)).epoch_steps for size in sizes} == sizes


class Judged(LossBase):
    """A loss whose discriminator may learn at 0.01 at most, and whose other part learns as the student does."""

    discriminator_rates = {"judge": 0.01}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.judge, self.own = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1, bias=False)

    def compute(self, student, teacher, labels, at):
        return (self.judge(student.logits) + self.own(student.logits)).square().mean()


class Judging(Distiller):
    def __init__(self, *losses):
        super().__init__()
        self.judged = torch.nn.ModuleList(losses)

    def losses(self, model, batch, step):
        for loss in self.judged:
            outputs = model(batch.images)
            yield "judged", loss(outputs, outputs, batch.labels)


@pytest.mark.parametrize(("rate", "share"), [(0.05, 0.2), (0.005, 1.0)])
def test_a_discriminator_learns_at_its_own_rate_at_most_by_the_same_schedule(rate, share):
    recipe = Recipe(steps=10, batch_size=16, learning_rate=rate, warmup=0.5, weight_decay=0.1)
    loss = Judged()
    made = training(recipe, Judging(loss))
    groups = made.optimizer.param_groups
    assert sum(len(g["params"]) for g in groups) == len([*made.model.parameters(), *loss.parameters()])
    assert [g["share"] for g in groups] == pytest.approx([1.0, 1.0, share, share] if share < 1 else [1.0, 1.0])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] * (len(groups) // 2)
    if share < 1:
        assert [id(p) for g in groups[2:] for p in g["params"]] == [id(loss.judge.weight), id(loss.judge.bias)]
    made.step()
    assert [g["lr"] for g in groups] == pytest.approx([g["share"] * rate / 5 for g in groups])
    assert made.rate(4) == pytest.approx(rate) and made.rate(0) == pytest.approx(rate / 5)


def test_parameters_that_need_no_gradient_are_not_optimised():
    model = network()
    model.stem.requires_grad_(False)
    made = Training(model, FromLabels(), DATA, None, RECIPE)
    assert sum(len(g["params"]) for g in made.optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad]
    )


def test_the_conflict_of_the_last_step_that_was_watched_is_kept():
    made = training(distiller=Judging(Judged(), Judged()))
    assert made.conflict is None
    made.step(watch=True)
    conflict = made.conflict
    assert -1 <= conflict <= 1
    made.step()
    assert made.conflict == conflict
    alone = training(distiller=Judging(Judged()))
    alone.conflict = 0.5
    alone.step(watch=True)
    assert alone.conflict is None


class Halves(Distiller):
    """Gradients of 0.01 on all of the head's weights, then `slope` times that on half of them, in two parts."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def losses(self, model, batch, step):
        weight = model.head.linear.weight
        yield "first", 0.01 * weight.sum()
        for _ in range(2):
            yield "other", 0.01 * self.slope * weight[:, ::2].sum()


@pytest.mark.parametrize(("slope", "cosine"), [(-3.0, -math.sqrt(0.5)), (0.25, math.sqrt(0.5)), (0.0, None)])
def test_the_conflict_is_the_cosine_between_the_first_gradient_and_the_sum_of_the_others(slope, cosine):
    made = training(distiller=Halves(slope))
    made.step(watch=True)
    assert made.conflict == (cosine if cosine is None else pytest.approx(cosine, abs=1e-6))


def test_watching_changes_nothing_else():
    watched, plain = training(distiller=Halves(-1.0)), training(distiller=Halves(-1.0))
    assert watched.step(watch=True) == plain.step()
    assert torch.equal(watched.model.head.linear.weight, plain.model.head.linear.weight)
    assert plain.conflict is None


class Twice(Distiller):
    """Two losses whose values are known."""

    def losses(self, model, batch, step):
        weight = model.head.linear.weight
        yield "same", (weight * 0).sum() + 1.5
        yield "other", (weight * 0).sum() + 4.0
        yield "same", (weight * 0).sum() + 0.25


def test_values_are_summed_by_name():
    assert training(distiller=Twice()).step() == {"same": 1.75, "other": 4.0}


class Steep(Distiller):
    """A finite loss with an infinite gradient."""

    def losses(self, model, batch, step):
        yield "steep", (model.head.linear.weight * 0).abs().sqrt().sum()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    made = training(distiller=Steep())
    before = made.model.head.linear.weight.clone()
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 0.*it was 0\.05"):
        made.step()
    assert torch.equal(made.model.head.linear.weight, before) and made.index == 0


def test_images_that_are_not_finite_are_named():
    images = DATA.train.take(torch.arange(48)).clone()
    broken = Data(TensorImages(images, DATA.train.labels), DATA.search, DATA.test, DATA.class_names)
    made = Training(network(), FromLabels(), broken, None, RECIPE)
    ids = broken.indices(RECIPE.seed, 0, 16).tolist()
    images[ids[3], 1, 2, 2] = math.nan
    images[ids[5], 0] = math.inf
    with pytest.raises(ValueError, match=re.escape(f"images {[ids[3], ids[5]]} contain NaN or infinity")):
        made.step()


class Part(Distiller):
    """A learnable part that is drawn in `prepare`, from one batch as the training has it."""

    def prepare(self, model, batch):
        assert not torch.is_grad_enabled()
        self.first = batch.images
        self.part = torch.nn.Linear(3, 3)

    def losses(self, model, batch, step):
        self.noise = torch.rand(2)
        assert self.part.training and model.training
        yield "part", self.part(model(batch.images).logits).square().mean()


def test_learnable_parts_and_noise_follow_the_recipes_seed_alone():
    def made(seed, globally):
        torch.manual_seed(globally)
        loop = Training(network().eval(), Part().eval(), DATA, None, dataclasses.replace(RECIPE, seed=seed))
        after = torch.rand(1)
        torch.manual_seed(globally)
        assert torch.equal(after, torch.rand(1))
        noises = [loop.step() and loop.distiller.noise for _ in range(2)]
        return loop.distiller.part.weight, *noises

    first, again, other = made(0, 1), made(0, 2), made(1, 1)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert not torch.equal(first[1], first[2])
    loop = Training(network(), Part(), DATA, None, RECIPE)
    assert torch.equal(loop.distiller.first, DATA.normalise(DATA.pixels(DATA.indices(0, 0, 16), 0, 0)))
    part = [*loop.distiller.part.parameters()]
    assert {id(p) for p in part} <= {id(p) for g in loop.optimizer.param_groups for p in g["params"]}


class Stored:
    """A cache of two views: what it is asked for."""

    views = 2

    def __init__(self):
        self.asked = []

    def outputs(self, ids, view, pixels):
        self.asked.append((ids.tolist(), view))
        assert torch.equal(pixels, SHIFTED.view(ids, 0, view))
        return Outputs(torch.zeros(len(ids), 3))


SHIFTED = Data(DATA.train, DATA.search, DATA.test, DATA.class_names, augmentation="shift")


def test_with_a_cache_the_teacher_does_not_run_and_views_alternate_by_epoch():
    class Never(Teacher):
        def teach(self, pixels, labels, at):
            raise AssertionError("the cache has the outputs")

    cache, distiller = Stored(), Recording()
    made = Training(network(), distiller, SHIFTED, Never(), Recipe(steps=9, batch_size=16), cache=cache)
    while not made.done:
        made.step()
    expected = [(SHIFTED.indices(0, i, 16).tolist(), (i // 3) % 2) for i in range(9)]
    assert cache.asked == expected
    for (ids, view), (pixels, images, _) in zip(expected, distiller.seen, strict=True):
        assert torch.equal(pixels, SHIFTED.view(torch.tensor(ids), 0, view))
        assert torch.allclose(images, SHIFTED.normalise(pixels))


class EveryLayer(Recording):
    every_layer = True


def test_a_distiller_of_every_layer_gets_them_and_takes_no_cache():
    distiller = EveryLayer()
    Training(network(), distiller, DATA, teacher(), RECIPE).step()
    assert len(distiller.seen[-1][2].features) == 4
    Training(network(), distiller, DATA, None, RECIPE)
    with pytest.raises(ValueError, match="teacher_views=0"):
        Training(network(), EveryLayer(), DATA, teacher(), RECIPE, cache=Stored())


def test_the_uses_of_options_are_part_of_the_state():
    def made():
        return Training(initialised(lambda: Supernet(SPACE), 0), SinglePath(), DATA, teacher(), RECIPE)

    first, second = made(), made()
    first.step()
    state = first.state()
    assert state["index"] == 1 and state["uses"] and training().state()["uses"] == {}
    second.load(state)
    assert second.model.uses == first.model.uses and second.index == 1
    second.model.uses["absent", 1] += 1  # still a counter
    assert set(state) == {"model", "distiller", "optimizer", "index", "uses"}


def test_a_state_without_shares_of_the_rate_has_the_whole_rate():
    state = training().state()
    for group in state["optimizer"]["param_groups"]:
        del group["share"]
    made = training()
    made.load(state)
    made.step()
    assert [g["lr"] for g in made.optimizer.param_groups] == [made.rate(0)] * 2


def test_a_state_of_another_distiller_or_without_a_part_is_refused():
    state = training(distiller=Judging(Judged())).state()
    with pytest.raises(ValueError, match="another search space or distiller"):
        training().load(state)
    for name in ("model", "distiller", "optimizer"):
        other = training().state()
        del other[name]
        with pytest.raises(ValueError, match="another search space or distiller"):
            training().load(other)


class Restarting(Watching):
    def schedule(self, total):
        return Schedule(total, restarts=frozenset((0, 2)), curves=frozenset((2,)))


def test_a_restart_at_the_first_step_is_none_and_rates_follow_the_curve_of_their_stage():
    recipe = dataclasses.replace(RECIPE, warmup=0.0)
    made = training(recipe, Restarting())
    optimizers = []
    for _ in range(4):
        before = made.optimizer
        made.step()
        optimizers.append(made.optimizer is before)
        assert made.optimizer.param_groups[0]["lr"] == made.rate(made.index - 1)
    assert optimizers == [True, True, False, True]
    assert [made.rate(i) for i in range(6)] == [recipe.rate(i, 2) for i in range(2)] + [
        recipe.rate(i, 4) for i in range(4)
    ]


def test_weighing_the_terms_changes_nothing_else():
    def taught():
        teacher = Frozen(network().eval(), preprocessing=DATA.preprocessing)
        return Training(network(), FromTeacher(), DATA, teacher, RECIPE)

    weighed, plain = taught(), taught()
    assert weighed.step(weigh=True) == plain.step()
    assert set(weighed.shares) and sum(share.gradient for share in weighed.shares.values()) == pytest.approx(1)
    assert plain.shares == {}
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weighed.model.state_dict()[name]), name
