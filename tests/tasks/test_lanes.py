"""Lanes as a task: the loss and both benchmarks' measures by second implementations, lanes that follow their images."""

import base64
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdnas.blocks.basic import enlarge
from kdnas.data.base import Data, TensorImages
from kdnas.data.roads import roads
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.jobs._pictures import write_pictures
from kdnas.losses.dense.pixel_wise import PixelWise
from kdnas.losses.of_task import OfMaps, OfTask
from kdnas.losses.response.logit_standardization import LogitStandardization
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised, torch_rng
from kdnas.runtimes import joined, onnx_function
from kdnas.settings import Recipe
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.students.forms import Interface
from kdnas.students.integers import calibration_images, quantize
from kdnas.students.parity import Parity
from kdnas.students.source import load_source
from kdnas.supernet import Supernet
from kdnas.tasks.lanes import Lanes, counts, exists, in_slots, overlaps, points
from kdnas.tasks.segmentation import Segmentation
from kdnas.teachers.base import Frozen, made_for
from kdnas.teachers.load import load_teacher
from kdnas.testing import TaskContract
from kdnas.training.loop import Training

SIZE = (24, 40)
SAD = spec("kdnas.losses.feature.self_attention:SelfAttention", start=0.5)
LABELS = spec("kdnas.losses.response.cross_entropy:CrossEntropy")


@functools.cache
def drawn() -> Data:
    return roads(40, *SIZE)


def data() -> Data:
    parts = (TensorImages(p.images, p.labels, Lanes()) for p in (drawn().train, drawn().search, drawn().test))
    return Data(*parts, Lanes().output_names, "crop_flip", task=Lanes())


def space() -> Segmenter:
    stages = (ResNetStage(widths=(4, 8), depths=(1, 2)), ResNetStage(widths=(8,), depths=(1,), stride=2))
    return Segmenter(stem_widths=(4,), stages=stages, head_widths=(4, 8), head_depths=(0, 1))


class TestLanes(TaskContract):
    positions = SIZE

    def data(self) -> Data:
        return data()


def straight(height: int, *ends: tuple[float, float]) -> torch.Tensor:
    """Lanes `[1, lanes, height]` from a place above to a place below; NaN for none."""
    lines = [torch.linspace(top, bottom, height) for top, bottom in ends]
    return torch.stack(lines)[None].nan_to_num(-1.0)


NO = (math.nan, math.nan)


def test_the_loss_is_the_sum_of_three_terms_by_hand():
    task, labels = Lanes(lanes=2), straight(3, (0.3, 0.6), NO)
    logits = torch.randn(1, 5, 3, 6, generator=torch_rng("lanes"), dtype=torch.float64)
    mask, values = task.mask(labels, (3, 6))[0].numpy(), logits[0].numpy()
    shares = np.exp(values[:3]) / np.exp(values[:3]).sum(0)
    entropy = weight = both = ours = 0.0
    for row, column in np.ndindex(3, 6):
        own = int(mask[row, column])
        w = 1.0 if own else 0.4
        entropy, weight = entropy - w * np.log(shares[own, row, column]), weight + w
        both += shares[own, row, column] if own else 0
        ours += shares[1:, row, column].sum()
    overlap = both / (ours + (mask > 0).sum() - both)
    there = 1 / (1 + np.exp(-values[3:].mean((1, 2))))
    existence = -(np.log(there[0]) + np.log(1 - there[1])) / 2
    expected = entropy / weight + 0.1 * (1 - overlap) + 0.1 * existence
    assert float(task.loss(logits, labels)) == pytest.approx(expected, rel=1e-9)
    assert 0 < (mask > 0).sum() < 18


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_and_finite_without_lanes():
    labels = torch.cat([straight(8, (0.3, 0.6), NO), straight(8, NO, NO), straight(8, (0.5, 0.2), (0.5, 0.9))])
    logits = (30 * torch.randn(3, 5, 8, 10, generator=torch_rng("mean"))).requires_grad_()
    task = Lanes(lanes=2)
    each = task.loss(logits, labels, reduction="none")
    assert torch.equal(each, torch.cat([task.loss(logits[i : i + 1], labels[i : i + 1], 0, "none") for i in range(3)]))
    task.loss(logits, labels).backward()
    assert each.isfinite().all() and logits.grad.isfinite().all()
    assert task.loss(torch.full_like(logits.detach(), torch.nan), labels).isnan()


def test_a_mask_holds_the_pixels_within_half_a_line_of_a_lane():
    height, width, line = 40, 60, 0.1
    labels = straight(height, (0.2, 0.7), (0.9, 0.8))
    mask = Lanes(lanes=2, line=line).mask(labels, (height, width))[0].numpy()
    xs, rows = labels[0].numpy() * width - 0.5, np.arange(height)
    slopes = (xs[:, -1] - xs[:, 0]) / (height - 1)
    distances = np.abs(np.arange(width) - xs[..., None]) / np.sqrt(1 + slopes**2)[:, None, None]
    expected = np.where(distances.min(0) <= line * width / 2, distances.argmin(0) + 1, 0)
    assert len(rows) == height and (mask != expected).mean() < 0.002 and (mask == 1).sum() > 200


def test_each_row_of_the_thinnest_line_has_a_pixel():
    mask = Lanes(lanes=2).mask(straight(20, (0.013, 0.98), NO), (20, 30))[0]
    assert ((mask == 1).sum(1) > 0).all()


@pytest.mark.parametrize("slope", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("apart", [0.0, 8.0, 29.0, 31.0])
def test_the_overlap_of_parallel_lines(slope, apart):
    """Lines of width w at a horizontal distance d: (w - d) / (w + d), w the horizontal extent of 30 pixels."""
    rows = torch.arange(590) - 295.0
    one = (820 + slope * rows * 0.5) / 1640
    lanes = torch.stack([one, one + apart / 1640])[None, :, None]
    extent = 30 * math.sqrt(1 + (slope * 0.5) ** 2)
    expected = max(0.0, (extent - apart) / (extent + apart))
    assert float(overlaps(lanes[:, 0], lanes[:, 1])) == pytest.approx(expected, abs=2e-3)


def test_the_overlap_is_that_of_drawn_lines():
    """Curved lanes beside a drawing of all pixels no further than 15 from a lane's points."""
    rows = torch.linspace(0, 1, 590)
    one, other = 0.5 + 0.3 * (rows - 0.5) ** 2, 0.503 + 0.31 * (rows - 0.5) ** 2
    x = np.arange(600, 1200)
    drawings = []
    for lane in (one, other):
        column = lane.double().numpy() * 1640 - 0.5
        slope = np.gradient(column)[:, None]
        drawings.append(np.abs(x - column[:, None]) <= 15 * np.sqrt(1 + slope**2))
    expected = (drawings[0] & drawings[1]).sum() / (drawings[0] | drawings[1]).sum()
    assert float(overlaps(one[None, None], other[None, None])) == pytest.approx(expected, abs=0.01)


def test_lanes_are_matched_for_the_largest_sum():
    """The first lane is nearest to the second truth, but only that one suits the second lane."""
    places = lambda *columns: straight(40, *((c / 1640, c / 1640) for c in columns))  # noqa: E731
    lanes, truth = places(806, 814, 1200), places(800, 808)
    assert counts(lanes, truth).tolist() == [[2, 1, 0]]
    assert counts(truth, lanes).tolist() == [[2, 0, 1]]
    nothing = straight(40, NO)
    assert counts(nothing, truth).tolist() == [[0, 0, 2]] and counts(nothing, nothing).tolist() == [[0, 0, 0]]
    quality = Lanes().quality(torch.tensor([[2.0, 1, 0], [0, 0, 0], [0, 1, 0]]))
    assert quality.tolist() == pytest.approx([0.8, 1, 0])


def public_points(lanes, truth, width=1280):
    """TuSimple's definition in loops, of columns in pixels; a negative number is none."""
    rows = np.arange(160, 711, 10)
    if len(lanes) > len(truth) + 2:
        return 0.0, 0.0, 1.0
    best = []
    for own in truth:
        on = own >= 0
        slope = np.polyfit(rows[on], own[on], 1)[0] if on.sum() > 1 else 0.0
        near = 20 / math.cos(math.atan(slope))
        shares = [np.mean(np.abs(np.where(x >= 0, x, -100) - np.where(own >= 0, own, -100)) < near) for x in lanes]
        best.append(max(shares, default=0.0))
    matched = sum(share >= 0.85 for share in best)
    missed, total = len(truth) - matched, sum(best)
    if len(truth) > 4:
        total, missed = total - min(best), missed - (missed > 0)
    divisor = max(min(4, len(truth)), 1)
    return total / divisor, (len(lanes) - matched) / len(lanes) if lanes else 0.0, missed / divisor


@given(st.integers(0, 2**32 - 1))
def test_point_accuracy_is_the_public_one(seed):
    rng = np.random.default_rng(seed)
    rows = np.arange(720)

    def some(count):
        lines = []
        for _ in range(count):
            first, last = sorted(rng.integers(160, 720, 2))
            line = rng.uniform(100, 1180) + rng.uniform(-1, 1) * (rows - 400)
            line = np.where((rows >= first) & (rows <= last + 30) & (line >= 0) & (line < 1279), line, -1)
            lines.append(line)
        return [line for line in lines if (line[160:711:10] >= 0).any()]

    truth = some(rng.integers(0, 7))
    lanes = [np.where(x >= 0, np.clip(x + rng.normal(0, 15), 0, 1279), -1) for x in truth if rng.random() < 0.7]
    lanes += some(rng.integers(0, 3))

    def tensor(lines):
        stacked = np.stack([*lines, np.full(720, -1280.0)])  # one that is not there
        return torch.from_numpy((stacked + 0.5 * (stacked >= 0)) / 1280)[None]

    expected = public_points([x[160:711:10] for x in lanes], [x[160:711:10] for x in truth])
    assert points(tensor(lanes), tensor(truth))[0].tolist() == pytest.approx(expected)


def test_three_lanes_too_many_are_worth_nothing():
    many = straight(72, *((place, place) for place in (0.5, 0.1, 0.2, 0.3)))
    assert points(many[:, :3], many[:, :1])[0].tolist() == pytest.approx([1, 2 / 3, 0])
    assert points(many, many[:, :1])[0].tolist() == [0, 0, 1]


def test_lanes_are_read_from_the_maps_they_were_drawn_in():
    part, task = drawn().test, Lanes()
    sure = task.outputs(part.labels, SIZE)
    read = task.lanes_of(sure)
    on = (read >= 0) & (part.labels >= 0)
    assert (on.sum() / (part.labels >= 0).sum()) > 0.9
    assert float((read - part.labels)[on].abs().max()) <= 1 / SIZE[1]
    assert torch.equal(task.pixel_classes(sure, part.labels) > 0, task.mask(read, SIZE) > 0)
    larger = F.interpolate(sure, (48, 80), mode="nearest")
    assert task.lanes_of(larger, SIZE[0]).shape == part.labels.shape


def test_a_lane_needs_existence_rows_and_points():
    task, labels = Lanes(lanes=2), straight(8, (0.2, 0.3), (0.8, 0.7))
    logits = task.outputs(labels, (8, 20))
    assert exists(task.lanes_of(logits)).tolist() == [[True, True]]
    absent = logits.clone()
    absent[:, 3] = -0.1
    assert exists(task.lanes_of(absent)).tolist() == [[False, True]]
    faint = logits.clone()
    faint[:, 1] = torch.where(faint[:, 1] > 0, 20 - 0.9, 0.0)  # beside background: 0.29 of the probability
    faint[:, 0] = 20.0
    assert exists(task.lanes_of(faint)).tolist() == [[False, True]]
    short = logits.clone()
    short[:, :2, 1:] = torch.tensor([20.0, 0.0])[:, None, None]
    assert exists(task.lanes_of(short)).tolist() == [[False, True]]


@given(st.integers(0, 2**32 - 1), st.integers(-5, 5), st.integers(-5, 5), st.booleans())
def test_lanes_follow_their_images_and_change_sides(seed, down, right, mirrored):
    rng, (height, width) = torch_rng(seed), (16, 31)
    ends = torch.rand(4, 2, generator=rng).tolist()
    task, labels = Lanes(), straight(height, *(tuple(pair) for pair in ends))
    rows, columns = torch.arange(height)[None] + down, torch.arange(width)[None] + right
    columns = columns.flip(1) if mirrored else columns
    moved = task.moved(labels, rows, columns)
    mask = Segmentation().moved(task.mask(labels, (height, width)), rows, columns).clamp(min=0)
    expected = torch.where((mask > 0) & mirrored, 5 - mask, mask)
    # Lines that cross tie, and where one leaves the image its half that is left has no place.
    place = moved[:, :, :, None] * width - 0.5
    edge = ((place < 1.5) | (place > width - 2.5)).any(1) | (labels[:, :, rows[0].clamp(0, height - 1)] < 0).any(1)[
        ..., None
    ]
    assert ((task.mask(moved, (height, width)) != expected) & ~edge).sum() <= 2
    assert torch.equal(task.moved(labels, torch.arange(height)[None], torch.arange(width)[None]), labels)


def test_mirroring_twice_changes_nothing():
    labels, columns = drawn().train.labels[:5], torch.arange(40).flip(0).expand(5, -1)
    rows = torch.arange(24).expand(5, -1)
    once = Lanes().moved(labels, rows, columns)
    torch.testing.assert_close(Lanes().moved(once, rows, columns), labels)
    assert torch.equal(exists(once), exists(labels).flip(1))


@given(st.lists(st.floats(-5, 5), max_size=6, unique=True))
def test_slots_keep_the_order_and_the_sides_where_there_is_room(slopes):
    slots = in_slots(slopes, 6)
    pairs = sorted(zip(slopes, slots, strict=True))
    assert all(a[1] + 1 == b[1] for a, b in itertools.pairwise(pairs)) and set(slots) <= set(range(6))
    if max((sum(s < 0 for s in slopes), sum(s >= 0 for s in slopes))) <= 3:
        assert all((slot < 3) == (slope < 0) for slope, slot in pairs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(40, 3, 24), r"4 lanes in each row of each image, \[40, 4, height\], got shape \(40, 3, 24\)"),
        (torch.full((40, 4, 24), torch.nan), "finite numbers"),
        (torch.full((40, 4, 24), 7.0), "at most 1, got 7"),
        (torch.full((40, 4, 24), -2.0), "the train part must have lanes, its 40 images have none"),
        (torch.zeros(40, 4, 23), "the height of the images, 24 rows, got 23"),
    ],
)
def test_labels_that_are_no_lanes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        part = TensorImages(torch.rand(40, 3, *SIZE), labels, Lanes())
        Data(part, part, part, Lanes().output_names, task=Lanes())


def test_other_settings_are_refused():
    for arguments, message in (
        ({"lanes": 3}, "even number from 2 to 32, got 3"),
        ({"lanes": 0}, "got 0"),
        ({"line": 0.0}, "above 0 and at most 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Lanes(**arguments)
    with pytest.raises(ValueError, match=r"9 `Lanes\.output_names`, got 2 names"):
        part = drawn().train
        Data(part, part, part, ("background", "lane"), task=Lanes())


def test_what_the_mean_lanes_reach_is_chance():
    task, labels = Lanes(lanes=2), straight(24, (0.4, 0.3), (0.6, 0.7)).expand(6, -1, -1)
    sure = task.outputs(labels, SIZE)
    near = task.chance(task.grades(sure, labels), labels, ())
    assert near is not None and near.value == near.guess == 1
    labels, names = drawn().test.labels, Lanes().output_names
    grades = Lanes().grades(Lanes().outputs(labels, SIZE), labels)
    assert Lanes().chance(grades, labels, names) is None
    nothing = Lanes().grades(-Lanes().outputs(labels, SIZE), labels)
    assert Lanes().chance(nothing, labels, names) is not None
    details = Lanes().details(nothing.double().mean(0).numpy(), names)
    assert details["recall"] == details["precision"] == 0 and details["false negatives"] == 1


def test_losses_of_logits_see_the_maps_alone():
    logits, teacher = torch.randn(2, 2, 9, 6, 8, generator=torch_rng("maps"))
    labels, plain = torch.zeros(2, 4, 6), PixelWise()
    distiller = FromTeacher(
        terms=((1.0, LABELS), (1.0, spec(PixelWise)), (1.0, SAD), (1.0, spec(LogitStandardization)))
    )
    for _ in range(2):  # a second training with the same distiller changes nothing
        distiller.suit(Lanes())
    losses = distiller.objective.losses
    assert isinstance(losses["cross_entropy"], OfTask) and not losses["cross_entropy"].uses_teacher
    assert isinstance(losses["pixel_wise"], OfMaps) and isinstance(losses["pixel_wise"].inner, PixelWise)
    assert type(losses["self_attention"]).__name__ == "SelfAttention"
    assert isinstance(losses["logit_standardization"].inner, LogitStandardization)
    expected = plain(Outputs(logits[:, :5]), Outputs(teacher[:, :5]), labels)
    assert torch.equal(losses["pixel_wise"](Outputs(logits), Outputs(teacher), labels), expected)
    untouched = FromTeacher(terms=((1.0, LABELS), (1.0, spec(PixelWise))))
    untouched.suit(Segmentation())
    assert not any(isinstance(part, OfMaps | OfTask) for part in untouched.modules())


def test_a_teacher_is_imitated_in_maps_and_existence():
    task = Lanes(lanes=2)
    teacher = torch.randn(2, 5, 4, 6, generator=torch_rng("teacher"), dtype=torch.float64)
    logits = teacher.clone().requires_grad_()
    loss = task.losses["soft_targets"].build()
    assert loss.uses_teacher
    value = loss(Outputs(logits), Outputs(teacher), None)
    there = teacher[:, 3:].mean((2, 3)).sigmoid()
    entropy = -(there * there.log() + (1 - there) * (1 - there).log()).mean()
    value.backward()
    assert float(value.detach()) == pytest.approx(0.1 * float(entropy))
    assert logits.grad.abs().max() < 1e-12
    other = logits.detach() + torch.randn(2, 5, 4, 6, generator=torch_rng("other"), dtype=torch.float64)
    assert float(loss(Outputs(other), Outputs(teacher), None)) > float(value.detach())
    sandwich = Sandwich()
    sandwich.suit(Lanes())
    assert any(isinstance(part, OfTask) and part.uses_teacher for part in sandwich.modules())


def test_self_attention_begins_after_the_warm_up():
    """Half of the steps are those of a training without it, bit for bit; the next one is not."""
    fitted = data().fitted(space())

    def weights(terms, steps):
        network = initialised(lambda: Network(fitted.blueprint(fitted.largest)), 0)
        training = Training(network, FromTeacher(terms=terms), data(), None, Recipe(steps=4, batch_size=4))
        for _ in range(steps):
            training.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    plain, sad = ((1.0, LABELS),), ((1.0, LABELS), (1e4, SAD))
    assert torch.equal(weights(plain, 2), weights(sad, 2))
    assert not torch.equal(weights(plain, 3), weights(sad, 3))


@pytest.fixture(scope="module")
def supernet():
    return Supernet(data().fitted(space())).eval()


@pytest.fixture(scope="module")
def folder(supernet, tmp_path_factory):
    """The student folder of a subnet that was never trained."""
    network = supernet.extract(supernet.space.smallest).eval()
    path = tmp_path_factory.mktemp("student") / "student"
    write_student(path, network, Card.of(network, data(), {}, supernet.space.smallest, supernet.space))
    return path


def test_a_student_gives_maps_and_existence_in_every_form(supernet, folder):
    network, card = read_student(folder)
    own = json.loads((folder / "student.json").read_text())
    assert "pipeline_tag: image-segmentation\n" in (folder / "README.md").read_text()
    assert card.image_outputs == own["image_outputs"] == 4
    shape = ["batch", 5, "height", "width"]
    assert own["output"] == {"name": "logits", "shape": shape, "image_logits": ["batch", 4]}
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    assert [entry.name for entry in session.get_outputs()] == ["logits", "image_logits"]
    module, probe = load_source(folder), onnx_function(folder / "student.onnx", 1)
    for size in (SIZE, (17, 9), (33, 40)):
        images = torch.rand(2, 3, *size, generator=torch_rng("sizes"))
        with torch.inference_mode():
            maps, existence = module(images)
            normalised = (images - module.mean) / module.std
            packed = supernet(normalised, supernet.space.smallest).logits
            assert torch.equal(network(normalised).logits, packed)
        assert torch.equal(maps, packed[:, :5]) and torch.equal(existence, packed[:, 5:].mean((2, 3)))
        graph = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(graph[0], maps.numpy(), atol=1e-4)
        np.testing.assert_allclose(graph[1], existence.numpy(), atol=1e-4)
        torch.testing.assert_close(probe(images), joined((maps, existence)), atol=1e-4, rtol=1e-4)
        assert torch.equal(Lanes().lanes_of(joined((maps, existence))), Lanes().lanes_of(packed))


def test_a_student_s_graph_teaches_maps_and_existence(folder):
    text, own = f"onnx:{folder / 'student.onnx'},normalise=none", data().preprocessing
    teacher = made_for(load_teacher(text), 9, own, Lanes().output_names, dense=True)
    images = torch.rand(2, 3, *SIZE, generator=torch_rng("graph"))
    network, _ = read_student(folder)
    outputs, expected = teacher(images), network(data().normalise(images))
    torch.testing.assert_close(outputs.logits[:, :5], expected.logits[:, :5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        outputs.logits[..., 0, 0][:, 5:], expected.logits[:, 5:].mean((2, 3)), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(outputs.classified, expected.classified, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output", ["probabilities", "coarse_logits"])
def test_other_forms_give_existence_too(folder, output):
    (network, card), student = read_student(folder), load_source(folder)
    form = Interface(output=output).module(student, card)
    assert Parity(network, card).compare("form", form, output=output) < 1e-5
    images = torch.rand(2, 3, *SIZE, generator=torch_rng("forms"))
    with torch.no_grad():
        (maps, existence), own = form(images), student(images)
    if output == "probabilities":
        assert torch.equal(existence, own[1].sigmoid()) and torch.equal(maps, own[0].softmax(1))
    else:
        torch.testing.assert_close(enlarge(maps, images), own[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(existence, own[1]) and maps.shape[2] < SIZE[0]
    wrong = lambda x: (form(x)[0], form(x)[1] + 1)  # noqa: E731
    with pytest.raises(ValueError, match=f"wrong gives other {output} than the network"):
        Parity(network, card).compare("wrong", wrong, output=output)


def test_the_report_shows_the_lanes_of_image_teacher_and_student(folder, tmp_path):
    network, _ = read_student(folder)
    teacher = Frozen(network, preprocessing=data().preprocessing)
    labels = data().test.labels
    write_pictures(tmp_path, data(), folder, teacher, Lanes().grades(Lanes().outputs(labels, SIZE), labels).numpy())
    shown = json.loads((tmp_path / "pictures.json").read_text())
    assert {"background", "lane 2"} <= {name for name, _ in shown["classes"]} <= {*Lanes().output_names[:5]}
    row, colours = shown["images"][0], dict(shown["classes"])
    truth = np.array(Image.open(io.BytesIO(base64.b64decode(row["truth"]))))
    mask = Lanes().mask(labels[row["number"]][None], SIZE)[0].numpy()
    for number, name in enumerate(Lanes().output_names[:5]):
        if name in colours:
            colour = [int(colours[name][i : i + 2], 16) for i in (1, 3, 5)]
            assert np.array_equal((truth == colour).all(2), mask == number)


def test_a_teacher_may_give_maps_and_existence_apart(folder):
    (network, _), module = read_student(folder), load_source(folder)
    images = torch.rand(2, 3, *SIZE, generator=torch_rng("apart"))
    own = Preprocessing(height=SIZE[0], width=SIZE[1], mean=(0.0,) * 3, std=(1.0,) * 3)
    teacher = Frozen(module, preprocessing=own, stages=(), classes=9, dense=True)
    packed = network((images - module.mean) / module.std).logits.detach()
    assert torch.equal(Lanes().lanes_of(teacher(images).logits), Lanes().lanes_of(packed))
    torch.testing.assert_close(teacher(images).logits[:, 5:].mean((2, 3)), packed[:, 5:].mean((2, 3)))
    with pytest.raises(ValueError, match="must return logits"):
        Frozen(module, preprocessing=own, stages=(), classes=8, dense=True)(images)


def test_the_code_of_a_student_says_what_it_shows(folder, tmp_path):
    torch.save(torch.rand(2, 3, *SIZE, generator=torch_rng("shown")), tmp_path / "images.pt")
    names = {"__name__": "student", "__file__": str(folder / "student.py")}
    exec((folder / "student.py").read_text(), names)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        names["main"]([str(tmp_path / "images.pt")])
    lines = text.getvalue().splitlines()
    assert len(lines) == 2 and all("lane 4 exists 0." in line for line in lines)
    assert "logits, image_logits = student(images)" in (folder / "README.md").read_text()
    assert "logits, image_logits = student(images)" in (folder / "student.py").read_text()


def test_a_card_with_too_many_image_outputs_is_refused(folder):
    card = read_student(folder)[1]
    for number in (-1, 9):
        with pytest.raises(ValueError, match="`image_outputs` must be fewer than the 9 logits"):
            dataclasses.replace(card, image_outputs=number)


def test_a_student_of_any_size_is_quantised(folder, tmp_path):
    test = drawn().test
    part = TensorImages(test.images[:4], test.labels[:4], Lanes())
    result = quantize(folder, tmp_path / "int8.onnx", calibration_images(drawn().search, 4), part, 1.0, Lanes())
    assert result["bytes"] > 0 and 0 < result["error"] < 0.3 and 0 <= result["accuracy"] <= 1
