"""Mistakes that people make before a training, each of which the doctor must name with its cause and a fix."""

import dataclasses
import functools
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kdnas
from kdnas.cli.commands import main
from kdnas.data.base import Data, TensorImages
from kdnas.data.datasets import from_dataset
from kdnas.jobs import doctor as job
from kdnas.jobs._preflight import machine
from kdnas.jobs._preflight.findings import Finding
from kdnas.runs import lock
from kdnas.runs.folder import RunFolder
from kdnas.teachers.base import Frozen
from tests.data.test_base import write_images
from tests.jobs.test_preflight import Knowing
from tests.toy import part

NAMES = ("a", "b", "c")


def parts(change=lambda images, labels: (images, labels), only=("train", "search", "test"), counts=(48, 30, 30)):
    """The toy data with a mistake in some of its parts."""
    made = {}
    for name, count in zip(("train", "search", "test"), counts, strict=True):
        images = part(count, name)
        pair = images.images, images.labels
        made[name] = TensorImages(*(change(*pair) if name in only else pair))
    return Data(**made, class_names=NAMES)


def scaled():
    return parts(lambda images, labels: (images * 255, labels))


def bytes_of_ones():
    return parts(lambda images, labels: (images.round().to(torch.uint8), labels))


def from_one():
    return parts(lambda images, labels: (images, labels + 1))


def train_again():
    images = part(48, "train")
    return parts(lambda *_: (images.images[:30], images.labels[:30]), only=("test",))


def frames():
    images = part(48, "train")
    near = (images.images[:30] + 0.002 * torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )
    return parts(lambda *_: (near, images.labels[:30]), only=("test",))


def without_a_class():
    return parts(lambda images, labels: (images[labels != 2], labels[labels != 2]), only=("test",))


def uneven():
    def change(images, labels):
        keep = torch.cat([torch.arange(len(labels))[labels != 2], (labels == 2).nonzero()[:2, 0]])
        return images[keep], labels[keep]

    return parts(change, only=("train",), counts=(90, 30, 30))


def shuffled():
    return parts(
        lambda images, labels: (images, labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))])
    )


def black():
    return parts(lambda images, labels: (images * (torch.arange(len(images)) % 4 > 0)[:, None, None, None], labels))


def large():
    return parts(lambda images, labels: (images.repeat(1, 1, 3, 3), labels))


def integers():
    return parts(lambda images, labels: ((images * 255).long(), labels))


def of_two_sizes():
    return from_dataset([(torch.rand(3, 8 + i % 2, 8), i % 2) for i in range(20)])


def of_nothing():
    raise KeyError("image")


def gray():
    return parts(lambda images, labels: (images.mean(1, keepdim=True).expand(-1, 3, -1, -1), labels))


def gray_in_part():
    return parts(lambda images, labels: (images.mean(1, keepdim=True).expand(-1, 3, -1, -1), labels), only=("test",))


def without_a_channel():
    return parts(lambda images, labels: (images * torch.tensor([1.0, 1.0, 0.0])[:, None, None], labels))


def inverted():
    return parts(lambda images, labels: (1 - images, labels), only=("test",))


def displaced():
    return parts(lambda images, labels: (images, (labels + 1) % 3), only=("test",))


def mirrored():
    images = part(48, "train")
    return parts(lambda *_: (images.images[:30].flip(3), images.labels[:30]), only=("test",))


def in_two_classes():
    return parts(
        lambda images, labels: (torch.cat([images, images[:12]]), torch.cat([labels, (labels[:12] + 1) % 3])),
        only=("train",),
    )


def copied():
    return parts(lambda images, labels: (images.repeat(2, 1, 1, 1), labels.repeat(2)), only=("train",))


def chosen_by_test():
    images = part(30, "test")
    return parts(lambda *_: (images.images, images.labels), only=("search", "test"))


def of_like_names():
    whole = parts()
    return Data(whole.train, whole.search, whole.test, class_names=("cat", "dog", "Cat "))


class Changed(Knowing):
    """The teacher that knows the classes, with a change of its input and one of its logits."""

    def __init__(self, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(super().forward(self.before(x)))


class Ranged(Knowing):
    """Right on pixels from 0 to a number only."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def forward(self, x):
        is_right = x.min() >= 0 and self.most / 2 < x.max() <= self.most
        return super().forward(x / self.most) * (1 if is_right else -1)


def with_nan():
    module = Knowing()
    module.conv.weight.data[0, 0] = float("nan")
    return module


def sized():
    module = Knowing()
    module.pretrained_cfg = {"input_size": (3, 16, 16)}
    return module


def renamed():
    """In the data's order, but says another one."""
    module = Changed(after=lambda logits: logits)
    module.config = SimpleNamespace(id2label={0: "C", 1: "A", 2: "B"})
    return nn.Sequential(module)


def dropping():
    return Changed(after=lambda logits: nn.functional.dropout(logits, 0.5, training=True))


def normalised():
    return Ranged(1.0)


def of_bytes():
    return Ranged(255.0)


def blue_first():
    return Changed(before=lambda x: x.flip(1))


def swapped():
    return Changed(after=lambda logits: logits[:, [0, 2, 1]])


def dead():
    return Changed(after=lambda logits: 0 * logits + torch.tensor([0.0, 2.0, 1.0], device=logits.device))


def softmax():
    return Changed(after=lambda logits: logits.softmax(1))


def sigmoid():
    return Changed(after=lambda logits: logits.sigmoid())


def log_softmax():
    return Changed(after=lambda logits: logits.log_softmax(1))


def by_the_batch():
    return Changed(after=lambda logits: logits - logits.mean(0))


def percentages():
    return Changed(after=lambda logits: 100 * logits.softmax(1))


def flat():
    return Changed(after=lambda logits: 1e-4 * logits)


def steep():
    return Changed(after=lambda logits: 1e6 * logits)


def never_the_last():
    return Changed(after=lambda logits: torch.cat([logits[:, :2], logits[:, 2:] - 100], 1))


def exchanged():
    own = parts().preprocessing
    return Frozen(Knowing(), preprocessing=dataclasses.replace(own, mean=own.std, std=own.mean))


def _here(function):
    return f"tests.jobs.test_doctor:{function.__name__}"


GOOD = {"data": "tests.toy:data", "teacher": "tests.jobs.test_preflight:knowing"}


def of_data(function):
    return {**GOOD, "data": _here(function)}


def of_teacher(function):
    return {**GOOD, "teacher": _here(function)}


SPACE = {"space": "toy", "steps": 4, "batch_size": 16, "deploy": False}
# Name, arguments, the cause, and what to do, as patterns.
MISTAKES = {
    "floats to 255": (of_data(scaled), "must be in \\[0, 1\\], got", "Divide by 255"),
    "bytes to 1": (of_data(bytes_of_ones), "brightest pixel of 8 images has 0.4%", "check its bits"),
    "labels from 1": (of_data(from_one), "labels must be 0 to 2, the train part has 3", "Subtract 1"),
    "another dtype": (of_data(integers), "got int64 from", "Convert them to uint8"),
    "images of two sizes": (of_data(of_two_sizes), "images must have one shape, image 1 has", "Resize them"),
    "a function that fails": (of_data(of_nothing), "KeyError: 'image'", ""),
    "test images in train": (of_data(train_again), "30 of 30 test images are training images too", "Remove them"),
    "neighbouring frames": (of_data(frames), "30 of 30 test images are nearly equal", "Split by what they come from"),
    "a class missing": (of_data(without_a_class), "the test part has no image of c", ""),
    "imbalance": (of_data(uneven), "class 'a' has 15 times the training images of 'c'", "add images"),
    "labels shuffled": (
        of_data(shuffled),
        "nearest training image has the label of a search image .* \\(chance 33.3%\\)",
        "Look at some",
    ),
    "black images": (
        of_data(black),
        "12 of 48 train, 8 of 30 .* have one colour throughout \\(28 are black\\)",
        "remove",
    ),
    "the teacher's size": (of_teacher(sized), "gets images of 8 x 8, but .* made for 16 x 16", "Return Frozen"),
    "the teacher's scale": (of_teacher(of_bytes), "for 30 with mean 0/0/0 and std 0.00392", "Return Frozen"),
    "the teacher's mean": (of_teacher(normalised), "for 30 with mean 0/0/0 and std 1/1/1", "Return Frozen"),
    "BGR": (of_teacher(blue_first), "for 30 with the channels in reverse order", "Reverse them"),
    "wrong class names": (of_teacher(renamed), "seem to be in another order", "Check its weights, the order"),
    "classes in another order": (of_teacher(swapped), "calls most images of b c", "Check its weights, the order"),
    "other classes": (
        {**GOOD, "teacher": "tests.toy:other_classes"},
        "has 7 classes, the data 3",
        "Fine-tune it on this data: kdnas fit",
    ),
    "a dead teacher": (of_teacher(dead), "the same logits for all 30 search images", "Load its weights"),
    "softmax": (of_teacher(softmax), "probabilities \\(that sum to 1\\)", "Return what is before its softmax"),
    "sigmoid": (of_teacher(sigmoid), "probabilities \\(in \\[0, 1\\]\\)", "Return what is before"),
    "log-softmax": (of_teacher(log_softmax), "gives log-probabilities", "Return what is before its log-softmax"),
    "NaN weights": (of_teacher(with_nan), "for 30 of 30 .*conv.weight among its weights", "Check its weights"),
    "dropout": (of_teacher(dropping), "other logits for an image in another batch", "Switch that off"),
    "statistics of the batch": (of_teacher(by_the_batch), "uses statistics of the batch", "Switch that off"),
    "gray as colours": (of_data(gray), "all images are gray, in 3 equal channels", "check how they are read"),
    "gray in one part": (of_data(gray_in_part), "all test images are gray, the others are not", "Read all parts alike"),
    "a lost channel": (of_data(without_a_channel), "channel 3 of 3 is the same in all", "Check how they are read"),
    "an inverted part": (of_data(inverted), "the test images have the means 0.6.*, the training images 0.3", "alike"),
    "another order of classes in a part": (of_data(displaced), "label of a test image for 0.0%", "in another order"),
    "mirrored test images": (
        of_data(mirrored),
        "30 of 30 test .* or to its mirror image",
        "Split by",
    ),
    "an image in two classes": (of_data(in_two_classes), "12 training images are in several classes, such as", "Keep"),
    "copies": (of_data(copied), "48 of 96 training images are there before", "Remove the copies"),
    "test as search": (of_data(chosen_by_test), "30 of 30 test images are search images too", "Remove them"),
    "a class folder twice": (of_data(of_like_names), "classes 'cat' and 'Cat ' differ in case or signs", "Merge them"),
    "percentages": (of_teacher(percentages), "probabilities \\(that sum to 100\\)", "Return what is before"),
    "flat logits": (of_teacher(flat), "nearly equally probable", "scale them"),
    "steep logits": (of_teacher(steep), "one class has all probability", "scale them"),
    "a class that it does not know": (of_teacher(never_the_last), "calls no image c", "trained on that class"),
    "mean and std exchanged": (of_teacher(exchanged), "they seem to be exchanged", "Return Frozen"),
    "the student's size": (
        {**of_data(large), **SPACE},
        "would compute on images of 8 x 8, the data's are 24",
        "--size",
    ),
    "below the stride": (
        {**GOOD, **SPACE, "size": 1},
        "images of 1 x 1 are one pixel after stage 1 of 2",
        "larger --size",
    ),
    "a large batch": ({**GOOD, **SPACE, "batch_size": 512}, "512, but there are 48 training images", "Lower it"),
    "a learning rate of thousands": ({**GOOD, **SPACE, "learning_rate": 3e3}, "3000 is far from", "Try 0.1"),
    "a learning rate of nothing": ({**GOOD, **SPACE, "learning_rate": 1e-8}, "1e-08 is far from", "Try 0.1"),
    "an infeasible budget": ({**GOOD, **SPACE, "budget": "macs=10"}, "no network .* with macs <= 10", ""),
    "a misspelt space": ({**GOOD, **SPACE, "space": "toyy"}, "no space is named|toyy", "Did you mean 'toy'"),
    "a misspelt teacher": ({**GOOD, "teacher": "fitt"}, "a teacher is fit", ""),
}


@pytest.fixture(autouse=True)
def no_rehearsal(monkeypatch):
    """Steps of every phase take seconds; they are taken where a test says so."""
    monkeypatch.setattr(job, "_rehearse", lambda *_, **__: None)


def complaints(**options):
    return [finding for finding in kdnas.doctor(**options) if finding.kind != "fact"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_cause_and_what_to_do(tmp_path, name):
    options, cause, fix = MISTAKES[name]
    found = complaints(**{"out": tmp_path / "run", **options})
    (text,) = [finding.text for finding in found if re.search(cause, finding.text)]
    assert re.search(fix, text), text
    assert len(found) <= 3, found
    assert not (tmp_path / "run").exists()


def test_at_least_25_mistakes_are_known():
    assert len(MISTAKES) >= 25


def test_where_nothing_is_wrong_nothing_is_said(tmp_path):
    assert complaints(**GOOD, **SPACE, out=tmp_path / "run", budget="macs=60k") == []


def test_a_file_that_is_cut_short_is_named(tmp_path):
    write_images(tmp_path / "images", {"a": 9, "b": 9})
    broken = sorted((tmp_path / "images").rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:30])
    (found,) = complaints(data=f"folder:{tmp_path / 'images'}")
    assert broken.name in found.text and "Repair or remove" in found.text


def test_a_missing_device_is_a_sentence():
    with pytest.raises(ValueError, match="`device` must be one of this machine, such as cpu, got 'cuda:99'"):
        kdnas.doctor(data="digits", device="cuda:99")


def test_a_full_disk_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    (found,) = complaints(**GOOD, **SPACE, out=tmp_path / "run")
    assert found.subject == "disk" and "only 0 MB are free" in found.text and "another --out" in found.text


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    (found,) = complaints(out=tmp_path / "run")
    assert found.kind == "fault" and "cannot be written to. Change its permissions" in found.text


def test_a_run_that_another_process_writes_is_a_fault(tmp_path, monkeypatch):
    RunFolder.create(tmp_path, {"job": {}}, 0)
    (tmp_path / ".lock").unlink(missing_ok=True)
    monkeypatch.setattr(machine, "hold", lambda _: (_ for _ in ()).throw(lock.Busy("kdnas train writes there; wait")))
    (found,) = complaints(out=tmp_path)
    assert found == Finding("folder", "kdnas train writes there; wait", "fault")


def test_packages_that_do_not_fit_each_other_are_a_fault(monkeypatch):
    versions = {"torch": "2.4.0"}
    known = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: versions.get(name) or known(name))
    found = complaints()
    assert any("torchvision" in f.text and "but 2.4.0 is installed. Install both together" in f.text for f in found)
    versions |= {"torch": known("torch"), "optuna": "0"}
    (found,) = complaints()
    assert re.search(r"kdnas .* needs optuna.*, but 0 is installed", found.text)
    monkeypatch.setattr(machine, "_version", lambda name: "" if name == "cattrs" else known(name))
    (found,) = complaints()
    assert "needs cattrs" in found.text and "it is not installed" in found.text


def test_more_threads_than_cores_are_a_note(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 0)
    assert any("Set OMP_NUM_THREADS" in finding.text for finding in complaints())


@pytest.fixture
def rehearsed(monkeypatch, no_rehearsal):
    monkeypatch.undo()
    return functools.partial(kdnas.doctor, **GOOD, **SPACE)


def test_a_few_steps_of_every_phase_are_taken_and_nothing_stays(rehearsed, tmp_path):
    found = rehearsed(out=tmp_path / "run", budget="macs=60k")
    assert "3 steps of every phase, up to the student folder, went well" in [finding.text for finding in found]
    assert not [finding for finding in found if finding.kind != "fact"] and not any(tmp_path.iterdir())


def test_a_loss_that_rises_and_a_phase_that_fails_are_told(rehearsed, monkeypatch):
    lines = [{"phase": "train", "step": i, "losses": {"largest": 2.0 * 10**i}} for i in range(3)]
    (note,) = job._rising([*lines, {"phase": "search 1", "step": 0, "losses": {}}])
    assert (note.subject, note.kind) == ("train", "note") and "rose from 2 to 200" in note.text

    def fails(*_, **__):
        raise FloatingPointError("the loss became nan. Lower the learning rate.")

    monkeypatch.setattr("kdnas.jobs._rehearsal.search", fails)
    assert (
        Finding("search", "FloatingPointError: the loss became nan. Lower the learning rate.", "fault") in rehearsed()
    )


def test_the_command_prints_a_line_for_each_and_ends_with_1_at_a_fault(capsys):
    main(["doctor", "--data", "tests.toy:data", "--teacher", GOOD["teacher"]])
    text = capsys.readouterr().out
    assert re.search(r"^ok +data +train 48, search 30", text, re.MULTILINE) and text.endswith("0 faults, 0 notes\n")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--data", "tests.toy:data", "--teacher", _here(softmax)])
    assert stopped.value.code == 1
    assert re.search(r"^FAULT +teacher +The teacher gives probabilities", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit):
        main(["doctor", "--experiment", "demoo"])
    assert "Did you mean 'demo'" in capsys.readouterr().out


def test_an_experiment_may_be_named_by_an_option_or_by_its_place(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(job, "doctor", lambda options, settings: asked.append(options) or [Finding("a", "b")])
    for arguments in (["demo"], ["--experiment", "demo"], []):
        main(["doctor", *arguments])
    capsys.readouterr()
    assert [options["experiment"] for options in asked] == ["demo", "demo", None]
