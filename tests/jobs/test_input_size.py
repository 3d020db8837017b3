"""The size of a student's images is one, wherever it is written or printed, whatever command makes the student."""

import dataclasses
import json
import re

import pytest
import torch

from kdnas.costs.budget import Budget
from kdnas.data.base import Data
from kdnas.jobs.chain import chain
from kdnas.jobs.export import export
from kdnas.jobs.grow import grow
from kdnas.jobs.prune import prune
from kdnas.jobs.retrain import retrain
from kdnas.network import Network
from kdnas.settings import FitTeacher, Grow, Recipe, Retrain
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.students.source import load_source
from kdnas.tables import load_space
from kdnas.teachers.load import load_teacher
from tests import toy
from tests.toy import alone, part, pruned

STEPS = Recipe(steps=1, batch_size=16)


def data() -> Data:
    """The toy data, enlarged to 12 x 12."""
    parts = [part(count, name) for count, name in ((48, "train"), (30, "search"), (30, "test"))]
    for each in parts:
        each.images = torch.nn.functional.interpolate(each.images, (12, 12))
    return Data(*parts, class_names=("a", "b", "c"))


DATA = spec("tests.jobs.test_input_size:data")


@pytest.fixture(autouse=True)
def no_graph(monkeypatch):
    """The ONNX graph takes seconds, and has a test of its own."""
    monkeypatch.setattr("kdnas.students.forms.graph_of", lambda *_: b"")
    monkeypatch.setattr("kdnas.students.forms.load_graph", lambda path: load_source(path.parent))


def sizes(student):
    """What a student's card says of its images, in all places, and whether its code resizes inside."""
    card = json.loads((student / "student.json").read_text())
    source = student / "student.py"
    resizes = source.exists() and "resize(x," in source.read_text()
    listed = {*card["input"]["shape"][2:], card["preprocessing"]["height"], card["preprocessing"]["width"]}
    return listed | {*card["blueprint"]["image"][1:]}, resizes


def test_a_searched_an_exported_and_a_retrained_student_have_the_size_of_the_space(tmp_path, log):
    made = alone()
    teacher = FitTeacher(width=4, recipe=STEPS)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, data=DATA, teacher=teacher))
    run = chain(made, tmp_path / "run", deploy=False)
    export(run, 2, tmp_path / "second")
    sources = {"data": DATA, "teacher": run.teacher_spec, "deploy": False}
    retrain(tmp_path / "second", Retrain(recipe=STEPS), tmp_path / "trained", **sources)
    assert re.search("student +images of 8 x 8, resized from 12 x 12", log.text)
    students = [*(tmp_path / "run" / "students").iterdir(), tmp_path / "second", tmp_path / "trained"]
    assert len(students) >= 5
    assert [sizes(student) for student in students] == [({8}, False)] * len(students)


def test_a_grown_student_has_the_size_of_the_space(tmp_path, log):
    settings = Grow(space=load_space("toy"), data=DATA, recipe=STEPS, controls=False, num_members=1)
    grow(settings, tmp_path / "run")
    assert re.search("student +images of 8 x 8, resized from 12 x 12", log.text)
    assert sizes(tmp_path / "run" / "student") == ({8}, False)


def test_a_pruned_student_has_the_size_of_the_data(tmp_path, log):
    settings = dataclasses.replace(
        pruned(),
        data=DATA,
        budget=Budget(macs=100_000),
        teacher=FitTeacher(width=8, recipe=STEPS),
        retrain=STEPS,
        controls=False,
        num_candidates=2,
        distiller=spec("kdnas.distillers.from_labels:FromLabels"),
        weights="inherited",
    )
    prune(settings, tmp_path / "run")
    assert re.search("student +images of 12 x 12, as the data", log.text)
    assert "trained here on images of 12 x 12" in log.text
    assert sizes(tmp_path / "run" / "students" / "student") == ({12}, False)


def test_a_teacher_of_another_size_is_refused_before_it_is_asked_about_images(tmp_path, monkeypatch):
    space = load_space("toy").fitted(classes=3, image_channels=3)
    network = Network(space.blueprint(space.largest))
    write_student(tmp_path / "teacher", network, Card.of(network, toy.data(), {}), deploy=False)
    monkeypatch.setattr("kdnas.jobs.prune.preflight", lambda *_, **__: pytest.fail("the teacher was asked"))
    settings = dataclasses.replace(pruned(), data=DATA, teacher=load_teacher(str(tmp_path / "teacher")))
    with pytest.raises(ValueError, match=r"trained on images of 3 x 8 x 8 .*, the data has 3 x 12 x 12"):
        prune(settings, tmp_path / "run")


def test_the_graph_and_the_code_take_the_size_of_the_card(tmp_path, monkeypatch):
    monkeypatch.undo()
    space = load_space("toy").fitted(classes=3, image_channels=3)
    network = Network(space.blueprint(space.largest))
    write_student(tmp_path / "student", network, Card.of(network, data(), {}))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "student" / "student.onnx")
    assert [i.shape[1:] for i in session.get_inputs()] == [[3, 8, 8]]
    assert sizes(tmp_path / "student") == ({8}, False)
