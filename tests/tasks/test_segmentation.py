"""Segmentation as a task: measures by hand, void, masks that follow their images, and a whole run."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdnas.blocks.basic import enlarge
from kdnas.costs.count import cost
from kdnas.data.base import Data, TensorImages
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._run import Run, insisting
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.randomness import initialised, torch_rng
from kdnas.report import write_report
from kdnas.runtimes import onnx_function, pt2_function
from kdnas.settings import Experiment, Finals, FitTeacher, Recipe, Retrain, Search, Train
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from kdnas.specs import find_spec, spec
from kdnas.students.folder import add_forms, read_student
from kdnas.students.forms import Interface
from kdnas.students.source import load_source
from kdnas.tables import load_space
from kdnas.tasks.segmentation import VOID, Segmentation
from kdnas.teachers.base import Frozen
from kdnas.testing import TaskContract
from kdnas.training.loop import Training
from tests import toy

SIZE = (12, 20)


def part(count: int, name: str) -> TensorImages:
    """Bright rectangles (class 1) on dark ground (class 0), with a column of void."""
    rng = torch_rng("segmentation", name)
    masks = torch.zeros(count, *SIZE, dtype=torch.long)
    for mask, (top, left) in zip(masks, torch.randint(0, 8, (count, 2), generator=rng).tolist(), strict=True):
        mask[top : top + 5, left : left + 9] = 1
    images = torch.rand(count, 3, *SIZE, generator=rng) * 0.4 + 0.5 * masks[:, None]
    masks[:, :, -1] = VOID
    return TensorImages(images, masks, Segmentation())


def shapes() -> Data:
    parts = part(24, "train"), part(12, "search"), part(12, "test")
    return Data(*parts, ("ground", "thing"), "crop_flip", task=Segmentation())


def space() -> Segmenter:
    stages = (ResNetStage(widths=(4, 8), depths=(1, 2)), ResNetStage(widths=(8,), depths=(1,), stride=2))
    return Segmenter(stem_widths=(4,), stages=stages, heads=("lraspp",), head_widths=(4, 8), head_depths=(0, 1))


class TestSegmentation(TaskContract):
    positions = SIZE

    def data(self) -> Data:
        return shapes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, recipe = tmp_path_factory.mktemp("runs") / "shapes", Recipe(steps=4, batch_size=8, learning_rate=0.05)
    experiment = Experiment(
        train=Train(
            space=space(),
            data=spec("tests.tasks.test_segmentation:shapes"),
            recipe=recipe,
            teacher=FitTeacher(recipe=recipe, width=4, blocks=1),
        ),
        search=Search(num_evaluations=4, num_images=8),
        retrain=Retrain(recipe=recipe),
        finals=Finals(finalists=2, controls=("labels",)),
    )
    with insisting(True):
        run = train(experiment, path)
        search(run, run.experiment.search)
        finals(run, run.experiment.finals, run.experiment.retrain)
    write_report(path)
    return path


def test_a_run_measures_students_by_miou_with_its_classes(folder):
    rows = {row["name"]: row for row in Run(folder).storage.results()["rows"]}
    for name in ("teacher", "student"):
        assert set(rows[name]["measures"]) >= {"pixel accuracy", "IoU ground"} and 0 <= rows[name]["accuracy"] <= 1
    own = [value for name, value in rows["student"]["measures"].items() if name.startswith("IoU")]
    assert rows["student"]["accuracy"] == pytest.approx(np.mean(own))
    assert "test mIoU" in Run(folder).storage.results()["controls"]["distillation"]["sentence"]
    page = (folder / "report.html").read_text()
    assert "Test mIoU" in page and "IoU thing" in page and "pixel accuracy" in page
    low, high = rows["student"]["interval"]
    assert low <= rows["student"]["accuracy"] <= high


def test_the_page_shows_images_labels_and_both_answers(folder):
    shown = json.loads((folder / "pictures.json").read_text())
    assert [name for name, _ in shown["classes"]] == ["ground", "thing"]
    qualities = [row["quality"] for row in shown["images"]]
    assert len(qualities) == 6 and qualities == sorted(qualities, reverse=True)
    data, row = shapes(), shown["images"][0]
    pictures = {
        side: np.array(Image.open(io.BytesIO(base64.b64decode(row[side])))) for side in ("image", "truth", "student")
    }
    assert all(picture.shape == (*SIZE, 3) for picture in pictures.values())
    expected = (data.test.images[row["number"]] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pictures["image"], expected)
    mask = data.test.truths(torch.tensor([row["number"]]))[0]
    assert (pictures["truth"][:, -1] == 128).all()  # void
    assert len(np.unique(pictures["truth"][(mask == 1).numpy()], axis=0)) == 1
    network, _ = read_student(folder / "students" / "student")
    with torch.no_grad():
        answer = network(data.normalise(data.test.images[row["number"]][None])).logits.argmax(1)[0]
    colours = {tuple(int(name[i : i + 2], 16) for i in (1, 3, 5)) for _, name in shown["classes"]}
    for k, (_, name) in enumerate(shown["classes"]):
        colour = [int(name[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.array_equal((pictures["student"] == colour).all(2), (answer == k).numpy())
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 24 and 'class="gallery"' in page and len(colours) == 2
    assert not (folder / "pictures.json").read_text().count("/work")


def test_pictures_that_are_none_are_left_out(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    shown = json.loads((folder / "pictures.json").read_text())
    shown["images"][0]["student"] = '" onerror="alert(1)'
    shown["images"][1]["truth"] = 3
    shown["classes"] = [["ground", "red;background:url(//x)"], ["<b>", "#00ff00"], 5]
    del shown["checksum"]  # as whoever plants it would
    (tmp_path / "run" / "pictures.json").write_text(json.dumps(shown | {"format": 1}))
    page = write_report(tmp_path / "run").read_text()
    assert page.count("data:image/png;base64,") == 16 and "onerror" not in page and "url(//" not in page
    assert "&lt;b&gt;" in page


def test_its_student_takes_any_size_in_every_form(folder):
    student = folder / "students" / "student"
    card = json.loads((student / "student.json").read_text())
    assert card["input"]["shape"] == ["batch", 3, "height", "width"]
    assert card["output"]["shape"] == ["batch", 2, "height", "width"] and card["measure"] == "mIoU"
    text = (student / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: kdnas\npipeline_tag: image-segmentation\n")
    assert "| mIoU on the search part |" in text
    config = json.loads((student / "config.json").read_text())
    assert config["pipeline_tag"] == "image-segmentation" and config["pretrained_cfg"]["fixed_input_size"] is False
    network, own = read_student(student)
    module, graph = load_source(student), onnx_function(student / "student.onnx", 1)
    for size in ((12, 20), (17, 9), (33, 40)):
        images = torch.rand(2, 3, *size, generator=torch_rng("sizes"))
        with torch.inference_mode():
            logits = module(images)
            mean, std = module.mean, module.std
            assert torch.equal(logits, network((images - mean) / std).logits)
            torch.testing.assert_close(graph(images), logits, atol=1e-4, rtol=1e-4)
        assert logits.shape == (2, 2, *size)
    assert own.cost == cost(own.blueprint) and own.blueprint.image == (3, *SIZE)


def test_forms_may_return_the_logits_at_the_network_s_stride(folder, tmp_path):
    student = folder / "students" / "student"
    records = add_forms(student, tmp_path / "more", ("onnx", "pt2"), Interface(output="coarse_logits"))
    assert all(record["output"] == "coarse_logits" for name, record in records.items() if name != "python")
    network, _ = read_student(student)
    for size in (SIZE, (17, 9)):
        images = torch.rand(2, 3, *size, generator=torch_rng("coarse"))
        expected = network(shapes().normalise(images)).logits
        graph = onnx_function(tmp_path / "more" / "student.onnx", 1)
        for form in (graph, pt2_function(tmp_path / "more" / "student.pt2")):
            coarse = form(images)
            assert coarse.shape == (2, 2, -(-size[0] // 2), -(-size[1] // 2))
            torch.testing.assert_close(enlarge(coarse, images), expected, atol=1e-4, rtol=1e-4)


def test_measures_by_hand():
    task = Segmentation()
    labels = torch.tensor([[[0, 0, 1], [1, 2, VOID]]])
    predictions = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    logits = F.one_hot(predictions, 3).movedim(-1, 1).float()
    grades = task.grades(logits, labels)
    assert grades[0].tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    means = grades.double().mean(0)
    assert float(task.quality(means)) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    details = task.details(means.numpy(), ("a", "b", "c"))
    assert details == pytest.approx({"pixel accuracy": 3 / 5, "IoU a": 1 / 3, "IoU b": 2 / 3, "IoU c": 0})
    assert "IoU d" not in task.details(np.pad(means.numpy(), (0, 1)), ("a", "b", "c", "d"))


@given(st.integers(0, 2**32 - 1))
def test_the_miou_of_all_images_is_that_of_the_sum_of_their_matrices(seed):
    rng = torch_rng(seed)
    labels = torch.randint(-1, 3, (4, 5, 6), generator=rng)
    labels = torch.where(labels < 0, VOID, labels)
    logits = torch.randn(4, 3, 5, 6, generator=rng)
    task = Segmentation()
    whole = task.quality(task.grades(logits, labels).double().mean(0))
    one = task.grades(logits.movedim(1, 0).flatten(1, 2)[None], labels.flatten(0, 1)[None])
    assert float(task.quality(one.double().mean(0))) == pytest.approx(float(whole))


def test_void_pixels_and_classes_weigh_as_asked():
    logits, labels = torch.randn(2, 3, 4, 5, generator=torch_rng("void")), torch.randint(3, (2, 4, 5))
    labels[0, :2] = VOID
    plain = F.cross_entropy(logits, labels)
    assert float(Segmentation().loss(logits, labels)) == pytest.approx(float(plain))
    weighted = Segmentation(class_weights=(1.0, 2.0, 0.5))
    expected = F.cross_entropy(logits, labels, torch.tensor(weighted.class_weights))
    assert float(weighted.loss(logits, labels)) == pytest.approx(float(expected))
    (source,) = weighted.losses.values()
    assert float(source.build()(Outputs(logits), Outputs(logits), labels)) == pytest.approx(float(expected))
    assert float(Segmentation().loss(logits, torch.full_like(labels, VOID))) == 0


def test_outputs_diverge_by_the_mean_over_pixels_that_are_not_void():
    own, source = (torch.randn(2, 3, 2, 2, generator=torch_rng(seed)) for seed in (0, 1))
    labels = torch.tensor([[[0, 1], [2, VOID]], [[VOID, VOID], [1, VOID]]])
    p, q = source.softmax(1), own.softmax(1)
    values = (p * (p / q).log()).sum(1)
    expected = (values[0, 0].sum() + values[0, 1, 0]) / 3 + values[1, 1, 0]
    torch.testing.assert_close(Segmentation().divergence(own, source, labels), expected)
    void = torch.full_like(labels, VOID)
    assert Segmentation().divergence(own, source, void) == 0


def test_masks_follow_their_images():
    marked = torch.arange(1, 1 + 12 * 20).view(12, 20) / 255
    masks = torch.arange(12 * 20).view(12, 20)
    part = TensorImages(marked.expand(4, 3, 12, 20).clone(), masks.expand(4, 12, 20).clone(), Segmentation())
    names = tuple(map(str, range(240)))
    data = Data(part, part, part, names, "crop_flip", task=Segmentation())
    ids = torch.arange(4)
    for pixels, labels in (
        (data.pixels(ids, 3, 5), data.labels(ids, 3, 5)),
        (data.view(ids, 3, 1), data.view_labels(ids, 3, 1)),
        (data.pixels(ids, 3, 5, slice(2, 4)), data.labels(ids, 3, 5, slice(2, 4))),
    ):
        shown = (pixels[:, 0] * 255).round().long() - 1
        assert torch.equal(labels, torch.where(shown < 0, VOID, shown)) and bool((labels == VOID).any())
    halves = torch.cat([data.labels(ids, 3, 5, slice(0, 2)), data.labels(ids, 3, 5, slice(2, 4))])
    assert torch.equal(halves, data.labels(ids, 3, 5))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.arange(24 * 12 * 19).view(24, 12, 19) % 2, "the size of the images"),
        (torch.full((24, *SIZE), 7), "mask 0 of the train part has 7"),
        (torch.zeros(24, *SIZE, dtype=torch.long), "'thing' has none"),
        (torch.full((24, *SIZE), VOID), "void alone"),
        (torch.full((24, *SIZE), -3), "got -3"),
        (torch.zeros(24, *SIZE), "whole numbers"),
        (torch.zeros(24, dtype=torch.long), "one mask per image"),
    ],
)
def test_masks_that_are_none_are_refused(masks, message):
    data = shapes()
    with pytest.raises(ValueError, match=message):
        images = TensorImages(data.train.images, masks, Segmentation())
        Data(images, data.search, data.test, data.class_names, task=Segmentation())


def test_a_space_must_answer_what_the_task_asks():
    with pytest.raises(ValueError, match="whole images, the task segmentation needs answers for every pixel"):
        shapes().fitted(load_space("toy"))
    with pytest.raises(ValueError, match="answer for every pixel, the task classification needs"):
        toy.data().fitted(load_space("elastic_segmenter"))
    with pytest.raises(ValueError, match="must be one per class, 2, got 3"):
        weighted = Segmentation(class_weights=(1.0, 1.0, 1.0))
        data = shapes()
        Data(data.train, data.search, data.test, data.class_names, task=weighted)


def test_a_network_of_one_class_is_at_chance():
    task, labels = Segmentation(), shapes().test.truths(torch.arange(12))
    logits = torch.zeros(12, 2, *SIZE)
    logits[:, 0] = 1
    assert task.chance(task.grades(logits, labels), labels, "ab") is not None
    truth = F.one_hot(labels.clamp(min=0), 2).movedim(-1, 1).float()
    assert task.chance(task.grades(truth, labels), labels, "ab") is None


@pytest.mark.parametrize(
    "text", ["pixel_wise", "region_similarity", "holistic", "channel_wise", "self_attention", "attention_transfer"]
)
def test_losses_of_dense_prediction_train_a_student(text):
    data = shapes()
    fitted = data.fitted(space())
    networks = [initialised(lambda a=a: Network(fitted.blueprint(a)), 0) for a in (fitted.smallest, fitted.largest)]
    teacher = Frozen(networks[1], preprocessing=data.preprocessing)
    terms = ((1.0, spec("kdnas.losses.response.cross_entropy:CrossEntropy")), (1.0, find_spec("kdnas.losses", text)))
    training = Training(
        networks[0], FromTeacher(terms=terms), data, teacher, Recipe(steps=3, batch_size=8, learning_rate=0.05)
    )
    before = [p.clone() for p in networks[0].parameters()]
    for _ in range(3):
        assert all(np.isfinite(value) for value in training.step().values())
    assert any(not torch.equal(a, b) for a, b in zip(before, networks[0].parameters(), strict=True))
