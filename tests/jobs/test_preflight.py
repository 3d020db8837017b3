"""What is shown and refused before a training."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdnas.costs.budget import Budget
from kdnas.data.base import Data, TensorImages
from kdnas.data.roads import roads
from kdnas.distillers.from_labels import FromLabels
from kdnas.jobs._preflight import preflight
from kdnas.jobs._preflight.data import data_findings
from kdnas.jobs._retrain import retrain_with
from kdnas.jobs._run import Run, insisting
from kdnas.jobs.chain import chain
from kdnas.jobs.compare import compare
from kdnas.jobs.fit import fit
from kdnas.jobs.grow import grow
from kdnas.jobs.prune import prune
from kdnas.jobs.train import train
from kdnas.network import Network, default_device
from kdnas.runs.lock import command
from kdnas.settings import Compare, Fit, FitTeacher, Grow, Recipe, Retrain
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.tables import load_space
from kdnas.teachers.load import load_teacher
from tests.toy import alone, data, pruned


class Knowing(nn.Module):
    """Knows the classes of the toy data: where an image is bright."""

    def __init__(self, kind="logits"):
        super().__init__()
        self.conv, self.kind = nn.Conv2d(3, 3, 1), kind

    def forward(self, x):
        maps = self.conv(x)
        rows = torch.stack([x[:, k % 3, k : k + 3].mean((1, 2)) for k in range(3)], 1)
        logits = 5 * rows + 0 * maps.mean((2, 3))
        if self.kind == "nan":
            logits[0, 0] = float("nan")
        return {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "permuted": logits.roll(1, 1)}.get(
            self.kind, logits
        )


def knowing():
    return Knowing()


def softmax():
    return Knowing("softmax")


def sigmoid():
    return Knowing("sigmoid")


def broken():
    return Knowing("nan")


def permuted():
    return Knowing("permuted")


def renamed(*names):
    module = Knowing("logits" if names == ("A", "b", "c") else "permuted")
    module.config = SimpleNamespace(id2label={str(k): name for k, name in enumerate(names)})
    return module


def in_order():
    return renamed("A", "b", "c")


def in_another_order():
    return nn.Sequential(renamed("C", "A", "B"))


def numbered():
    return renamed("LABEL_0", "LABEL_1", "LABEL_2")


def swapped():
    """Right for the first class, and calls the other two by each other's names."""
    return _Then(lambda logits: logits[:, [0, 2, 1]])


def guessing():
    return _Then(lambda logits: torch.tensor([0.0, 9.0, 0.0]).expand_as(logits))


def random():
    return _Then(lambda logits: logits + torch.rand_like(logits))


def by_the_batch():
    return _Then(lambda logits: logits - logits.mean(0))


class _Then(Knowing):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Range(Knowing):
    """Right on pixels from 0 to a number, wrong on all others."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        is_right = x.min() >= 0 and self.most / 2 < x.max() <= self.most
        return super().forward(x / self.most) * (1 if is_right else -1)


def plain():
    return Range(1.0)


def bytes_():
    return Range(255.0)


def large():
    module = Knowing()
    module.pretrained_cfg = {"input_size": (3, 16, 16)}
    return module


def gray():
    from kdnas.preprocessing import Preprocessing
    from kdnas.teachers.base import Frozen

    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Frozen(module, preprocessing=Preprocessing(height=8, width=8, mean=(0.5,), std=(1.0,)))


def teacher(name):
    return load_teacher(f"tests.jobs.test_preflight:{name}")


def space():
    return load_space("toy").fitted(classes=3, image_channels=3)


def test_the_block_shows_data_student_teacher_device_and_time(tmp_path, log):
    preflight(data(), folder=tmp_path / "run", teacher=teacher("knowing"), space=space(), recipe=Recipe(steps=20))
    (record,) = log.records
    text = record.message
    for words in (
        "before the training",
        "train 48, search 30, test 30 images of 3 x 8 x 8; 3 classes (a, b, c)",
        "16 to 16 training images each",
        "images of 8 x 8, as the data's",
        "class names unknown; 100.0% of 30 search images",
        f"device    {default_device().type} (",
        "20 steps of 128 images, roughly",
        "MB on disk",
    ):
        assert words in text, text
    assert "balanced" not in text


def test_answers_for_the_whole_image_are_no_classes():
    text = data_findings(roads(10, height=16, width=32, lanes=2))[0].text
    assert text.endswith("3 classes (background, lane 1, lane 2) and 2 answers for the whole image")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guessing", "gives the same logits for all 30 search images, so it teaches nothing"),
        ("permuted", "another order than the data's: it calls most images of a b"),
        ("softmax", r"probabilities \(that sum to 1\) instead of logits"),
        ("sigmoid", r"probabilities \(in \[0, 1\]\) instead of logits"),
        ("broken", "NaN or infinity for 1 of 30 search images"),
        ("swapped", "calls most images of b c, it calls most images of c b"),
        ("random", "in another batch: it is random"),
        ("by_the_batch", "in another batch: it is random, or uses statistics of the batch"),
        ("plain", r"but for 30 with mean 0/0/0 and std 1/1/1\. Return Frozen"),
        ("bytes_", r"but for 30 with mean 0/0/0 and std 0.00392"),
        ("large", "gets images of 8 x 8, but says that it was made for 16 x 16"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_unless_one_insists(tmp_path, log, name, message):
    with pytest.raises(ValueError, match=f"{message}.*--insist"):
        preflight(data(), folder=tmp_path, teacher=teacher(name))
    with insisting(True):
        preflight(data(), folder=tmp_path, teacher=teacher(name))
    assert [r.levelname for r in log.records] == ["INFO", "INFO", "WARNING"]


@pytest.mark.parametrize("of", ["student", "finalists", "teacher"])
def test_layers_cannot_be_compiled_without_a_compiler(tmp_path, monkeypatch, of):
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("CC", "no-compiler")
    recipe = Recipe(steps=20, execution="compiled")
    trained = {
        "student": {"recipe": recipe},
        "finalists": {"space": space(), "finals": (1.0, recipe)},
        "teacher": {"teacher": FitTeacher(recipe=recipe)},
    }[of]
    with pytest.raises(ValueError, match="`execution` must be eager on this machine, got compiled"):
        preflight(data(), folder=tmp_path, **trained)


@pytest.mark.parametrize("name", ["in_order", "knowing"])
def test_a_teacher_of_these_classes_passes(tmp_path, name):
    preflight(data(), folder=tmp_path, teacher=teacher(name))


def test_a_teacher_that_names_its_classes_gives_them_in_the_datas_order(tmp_path, log):
    preflight(data(), folder=tmp_path, teacher=teacher("in_another_order"))
    assert "its classes in the data's order, by their names; class names match; 100.0% of" in log.records[0].message


def test_a_teacher_that_fails_on_these_images_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"the teacher fails on the data's images of 3 x 8 x 8"):
        preflight(data(), folder=tmp_path, teacher=teacher("gray"))


@pytest.mark.parametrize(("side", "message"), [(24, "--size 24 or --size 8"), (3, "--size 3 or --size 8")])
def test_the_students_size_must_be_chosen_where_it_is_far_from_the_datas(tmp_path, side, message):
    images = [TensorImages(torch.rand(12, 3, side, side), torch.arange(12) % 3) for _ in range(3)]
    other = Data(*images, class_names=("a", "b", "c"))
    with pytest.raises(ValueError, match=message):
        preflight(other, folder=tmp_path, space=space())
    preflight(other, folder=tmp_path, space=space(), size_chosen=True)
    preflight(other, folder=tmp_path, space=dataclasses.replace(space(), resolutions=(side,)))


def test_a_student_takes_images_of_the_size_that_it_computes_on():
    small = dataclasses.replace(space(), resolutions=(4,))
    card = Card.of(Network(small.blueprint(small.smallest)), data(), {})
    assert card.to_json()["input"]["shape"] == ["batch", 3, 4, 4]
    assert card.preprocessing.mean == data().preprocessing.mean


def uneven() -> Data:
    """The toy data with few images of the third class, in the train and in the test part."""

    def thinned(images: TensorImages) -> TensorImages:
        keep = torch.cat([torch.arange(len(images))[images.labels != 2], torch.tensor([2, 5])])
        return TensorImages(images.images[keep], images.labels[keep])

    whole = data()
    return dataclasses.replace(whole, train=thinned(whole.train), test=thinned(whole.test))  # type: ignore[arg-type]


def test_imbalance_is_named_and_the_balanced_accuracy_shown(tmp_path, log):
    preflight(uneven(), folder=tmp_path, teacher=teacher("knowing"))
    text = log.records[0].message
    assert "2 to 16 training images each: c has the fewest" in text and "balanced 100.0%" in text


def test_the_closing_table_the_results_and_the_report_have_balanced_accuracies_of_imbalanced_classes(tmp_path):
    made = alone()
    train_settings = dataclasses.replace(
        made.train, data=spec("tests.jobs.test_preflight:uneven"), teacher=teacher("knowing")
    )
    run = chain(dataclasses.replace(made, train=train_settings), tmp_path / "run", deploy=False)
    rows = {row["name"]: row for row in run.storage.results()["rows"]}
    assert rows["teacher"]["accuracy"] == rows["teacher"]["balanced_accuracy"] == 1
    network, _ = read_student(tmp_path / "run" / "students" / "student")
    logits = network(uneven().normalise(uneven().test.images)).logits
    shares = [float((logits.argmax(1) == k)[uneven().test.labels == k].float().mean()) for k in range(3)]
    assert rows["student"]["balanced_accuracy"] == pytest.approx(sum(shares) / 3)
    assert all("balanced_accuracy" in row for row in rows.values())
    header, first, *_ = str(run).splitlines()
    assert header.split()[:2] == ["accuracy", "balanced"] and first.split()[1:3] == ["100.00%", "100.00%"]
    assert "Balanced over classes" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("steps", "trial"), [(10, False), (9, True)])
def test_a_teacher_trained_here_is_judged_after_its_training(tmp_path, log, steps, trial):
    made = alone()
    unteachable = FitTeacher(width=4, recipe=Recipe(steps=steps, batch_size=16, learning_rate=1e-9))
    train_settings = dataclasses.replace(made.train, teacher=unteachable)
    made = dataclasses.replace(made, train=train_settings)
    if trial:  # of the command
        train(made, tmp_path)
    else:
        for _ in range(2):  # resumed, it is refused again
            with pytest.raises(ValueError, match=r"near chance .* Train it for more steps.*--insist"):
                train(made, tmp_path)
        with insisting(True):
            train(made, tmp_path)
        train(made, tmp_path)
    assert "near chance" in log.text


def test_a_teacher_fitted_for_itself_is_written_with_a_warning(tmp_path, log):
    unteachable = FitTeacher(recipe=Recipe(steps=3, batch_size=16, learning_rate=1e-9))
    result = fit(Fit(data=spec("tests.jobs.test_preflight:uneven"), teacher=unteachable), tmp_path / "teacher")
    assert result["balanced_accuracy"] < 0.6 and "near chance" in log.text


def test_a_refused_run_writes_nothing_and_one_that_is_insisted_on_stays_open(tmp_path):
    made = alone()
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, teacher=teacher("permuted")))
    with pytest.raises(ValueError, match="another order"):
        train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with insisting(True):
        train(made, tmp_path / "run")
    assert Run(tmp_path / "run").storage.manifest["insists"] is True


class Shown(Exception):
    """Raised in place of a preflight."""


def _retrained(folder):
    blueprint = space().blueprint(space().smallest)
    origin = {"data": spec("tests.toy:data").to_json()}
    write_student(folder / "student", Network(blueprint), Card.of(Network(blueprint), data(), origin), deploy=False)
    options = {"greedy_anchors": None, "assistants": None, "data": spec("tests.toy:data"), "teacher": None}
    retrain_with(folder / "student", Retrain(distiller=spec(FromLabels)), folder / "out", **options)


COMMANDS = {
    "train": lambda folder: train(alone(), folder / "out"),
    "fit": lambda folder: fit(Fit(data=spec("tests.toy:data")), folder / "out"),
    "prune": lambda folder: prune(pruned(), folder / "out"),
    "grow": lambda folder: grow(Grow(space=load_space("toy"), data=spec("tests.toy:data")), folder / "out"),
    "compare": lambda folder: compare(
        Compare(space=load_space("toy"), data=spec("tests.toy:data"), budget=Budget(macs=70_000)), folder / "out"
    ),
    "_retrain": _retrained,
}


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_that_trains_begins_with_it(tmp_path, monkeypatch, module):
    def preflight(*_, **__):
        raise Shown

    monkeypatch.setattr(f"kdnas.jobs.{module}.preflight", preflight)
    monkeypatch.setattr("kdnas.training.loop.Training.step", lambda *_, **__: pytest.fail("trained before"))
    with pytest.raises(Shown), command():  # which locks what it writes
        COMMANDS[module](tmp_path)


def test_a_preflight_leaves_the_global_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    preflight(data(), folder=tmp_path, teacher=teacher("knowing"), space=space(), recipe=Recipe(steps=2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_fitted_teacher_is_announced_with_its_size(tmp_path, log):
    preflight(data(), folder=tmp_path, teacher=FitTeacher(width=8, members=2))
    assert "trained here on images of 8 x 8: 2 of them, " in log.records[0].message
