"""A teacher's features without labels, from the command to the exported student."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

import kdnas
from kdnas.cli.commands import main
from kdnas.jobs import commands
from kdnas.jobs._arguments import as_spec
from kdnas.jobs._preflight.findings import Finding
from kdnas.jobs._unlabelled import as_unlabelled, without_labels
from kdnas.preprocessing import Preprocessing
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, Recipe, Train
from kdnas.students.folder import read_student
from kdnas.students.source import load_source
from kdnas.tables import load_space
from kdnas.teachers.base import made_for
from kdnas.teachers.load import load_teacher
from tests.teachers.test_unlabelled import narrow

SHORT = ("--space", "toy", "--size", "16", "--steps", "3", "--batch-size", "8", "--num-evaluations", "3")
TEACHER = "tests.teachers.test_unlabelled:narrow"
BOTH = f"ensemble:{TEACHER},tests.teachers.test_unlabelled:wide"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(48):
        array = rng.integers(0, 100, (16, 16, 3), np.uint8)
        array[..., number % 2] += 100
        for place in (root / "flat", root / "classes" / "ab"[number % 2]):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{number}.png")
    return root


def run(*arguments):
    return main(["run", "--unlabelled", *SHORT, *map(str, arguments)])


def rows_of(folder):
    return {row["name"]: row for row in RunFolder(folder).results()["rows"]}


def test_a_flat_folder_of_images_gives_a_student_of_features(images, tmp_path):
    data = ("--data", f"folder:{images / 'flat'}", "--teacher", TEACHER, "--finalists", 2)
    assert run(*data, "--out", tmp_path / "run") in (0, None)
    storage, rows = RunFolder(tmp_path / "run"), rows_of(tmp_path / "run")
    assert rows["teacher"]["accuracy"] == pytest.approx(1, abs=1e-5)
    assert -1 <= rows["student"]["accuracy"] < 1
    assert "control" not in rows  # nothing could be learnt without the teacher
    assert storage.manifest["measure"] == "similarity to the teacher"
    assert {entry.scorer for entry in storage.ranking(1)} == {"rdm"}
    terms = {name for line in storage.lines("metrics.jsonl") for name in line.get("terms", {})}
    assert terms <= {"cosine"}
    folder = storage.path("students", "student")
    _, card = read_student(folder)
    assert (card.answers, len(card.class_names)) == ("values", 6)
    pixels = torch.rand(3, 3, 16, 16)
    vectors = load_source(folder)(pixels)
    assert vectors.shape == (3, 6)
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        graph = onnxruntime.InferenceSession(str(folder / "student.onnx"), providers=["CPUExecutionProvider"])
        (values,) = graph.run(None, {graph.get_inputs()[0].name: pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(values), vectors, rtol=1e-4, atol=1e-4)
    card_text = (folder / "README.md").read_text(encoding="utf-8")
    assert "image-feature-extraction" in card_text
    assert "Similarity to the teacher" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    own = Preprocessing(height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert made_for(load_teacher(str(folder)), 0, own)(pixels).logits.shape == (3, 6)


def test_class_folders_measure_by_neighbours_and_several_teachers_teach(images, tmp_path):
    data = ("--data", f"folder:{images / 'classes'}", "--teacher", BOTH, "--finalists", 1, "--no-deploy")
    assert run(*data, "--out", tmp_path / "run", "--controls") in (0, None)
    rows = rows_of(tmp_path / "run")
    assert {"teacher", "student", "largest"} <= set(rows)
    assert set(rows["student"]["measures"]) == {"linear probe accuracy"}
    assert read_student(tmp_path / "run" / "students" / "student")[1].class_names[-1] == "feature 14"
    assert RunFolder(tmp_path / "run").manifest["measure"] == "k-NN accuracy"


def test_objects_in_memory_need_no_labels_either(tmp_path):
    pixels = torch.rand(40, 3, 16, 16)
    options = {"steps": 2, "batch_size": 8, "num_evaluations": 2, "finalists": 1, "deploy": False, "size": 16}
    done = kdnas.run(data=list(pixels), teacher=narrow(), unlabelled=True, space="toy", out=tmp_path / "run", **options)
    assert {row["name"] for row in done.storage.results()["rows"]} == {"teacher", "student"}


@pytest.mark.parametrize(("part", "measure"), [("flat", "similarity to the teacher"), ("classes", "k-NN accuracy")])
def test_without_a_space_the_teachers_own_network_is_cut_down(images, tmp_path, part, measure):
    options = {"steps": 20, "batch_size": 8, "num_evaluations": 3, "finalists": 1, "deploy": False, "controls": True}
    source = f"folder:{images / part}"
    done = kdnas.run(data=source, teacher=TEACHER, unlabelled=True, budget="macs=60%", out=tmp_path / "run", **options)
    rows = rows_of(done.folder)
    assert (
        {"teacher", "student"} <= set(rows) <= {"teacher", "student", "equal", "random", "trained"}
    )  # no labels alone
    assert 0 < rows["student"]["macs"] <= 0.6 * rows["teacher"]["macs"]
    assert RunFolder(done.folder).manifest["measure"] == measure
    network, card = read_student(done.folder / "students" / "student")
    assert (card.answers, network(torch.rand(2, 3, 16, 16)).logits.shape) == ("values", (2, 6))
    terms = {name for line in done.storage.lines("metrics.jsonl") for name in line.get("terms", {})}
    assert terms <= {"cosine", "leading_channels"}


def test_scale_factors_and_several_teachers_have_no_network_to_cut(images, tmp_path):
    options = {"data": f"folder:{images / 'flat'}", "unlabelled": True, "budget": "macs=60%", "out": tmp_path / "run"}
    with pytest.raises(ValueError, match="`method` must be shares with --unlabelled, got scale_factors"):
        kdnas.prune(teacher=TEACHER, method="scale_factors", **options)
    with pytest.raises(ValueError, match="the teacher must be one network to be cut down, got several"):
        kdnas.run(teacher=BOTH, steps=2, batch_size=8, **options)


def test_stages_of_a_teacher_without_classes_are_listed(images):
    table = commands.taps(TEACHER, "toy", data=f"folder:{images / 'flat'}", unlabelled=True)
    assert len(table.splitlines()) > 2 and "6 x 4 x 4" in table


def test_systems_are_compared_by_neighbours_or_left_out_with_the_reason(images, tmp_path):
    options = {"teacher": TEACHER, "unlabelled": True, "systems": "spos,attentivenas,adanas", "space": "toy"}
    options |= {"max_time": 4}
    compared = commands.compare(data=f"folder:{images / 'classes'}", out=tmp_path / "compare", **options)["results"]
    assert 0 <= compared["spos"]["accuracy"] <= 1 and compared["spos"]["without teacher"] is None
    assert "can do without labels, got attentive" in compared["attentivenas"]["reason"]
    assert "a grown ensemble learns from labels" in compared["adanas"]["reason"]
    with pytest.raises(ValueError, match="a comparison measures students by labels, and these images have none"):
        commands.compare(data=f"folder:{images / 'flat'}", out=tmp_path / "none", **options)


@pytest.mark.parametrize("distiller", ["single_path", "block_wise", "conflict_free"])
def test_distillers_that_need_no_labels(tmp_path, distiller):
    teacher = load_teacher(TEACHER)
    train = Train(
        space=load_space("toy"),
        data=as_unlabelled("tests.toy:data", teacher),
        teacher=teacher,
        distiller=as_spec("kdnas.distillers", distiller),
        recipe=Recipe(steps=2, batch_size=8),
    )
    run = kdnas.train(without_labels(Experiment(train=train), ()), out=tmp_path / "run")
    terms = {name for line in run.storage.lines("metrics.jsonl") for name in line.get("terms", {})}
    assert terms <= {"cosine"} and all(torch.isfinite(t).all() for t in run.supernet.state_dict().values())


def test_doctor_takes_the_option(images):
    options = {"data": f"folder:{images / 'flat'}", "teacher": TEACHER, "space": "toy", "size": 16, "deploy": False}
    found = kdnas.doctor(unlabelled=True, batch_size=8, budget="macs=1M", **options)
    assert not [finding for finding in found if finding.kind == "fault"]
    assert any("features of the teacher" in finding.text for finding in found if isinstance(finding, Finding))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--unlabelled needs a teacher that is trained, got fit"),
        (("--teacher", TEACHER, "--loss", "cross_entropy"), "--loss cross_entropy reads labels"),
        (("--teacher", TEACHER, "--loss", "soft_targets=1"), "--loss soft_targets reads the logits of classes"),
        (("--teacher", TEACHER, "--scorer", "accuracy"), "the score accuracy reads labels"),
        (("--teacher", TEACHER, "--contrast", "in_place,scorer=loss"), "the score loss reads labels"),
        (("--teacher", TEACHER, "--distiller", "attentive"), "needs a distiller that can do without labels"),
        (("--teacher", TEACHER, "--distiller", "progressive"), "needs a distiller that can do without labels"),
        (
            ("--teacher", TEACHER, "--distiller", "conflict_free,inner=progressive"),
            "got progressive, which reads labels",
        ),
        (("--teacher", "tests.teachers.test_unlabelled:drawn"), "gives other features each time it is made"),
    ],
)
def test_what_needs_labels_is_refused_in_a_sentence(images, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        run("--data", f"folder:{images / 'flat'}", *arguments, "--out", tmp_path / "run")
    assert end.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_images_without_classes_name_the_option(images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["run", *SHORT, "--data", f"folder:{images / 'flat'}", "--teacher", TEACHER, "--out", str(tmp_path)])
    assert "Images without classes need --unlabelled" in capsys.readouterr().err


def test_a_student_of_features_is_not_retrained_by_labels(images, tmp_path, capsys):
    data = ("--data", f"folder:{images / 'flat'}", "--teacher", TEACHER, "--finalists", 1, "--no-deploy")
    run(*data, "--out", tmp_path / "run")
    student = str(tmp_path / "run" / "students" / "student")
    with pytest.raises(SystemExit):
        main(["retrain", student, "--teacher", "none", "--steps", "2", "--out", str(tmp_path / "again")])
    assert "what learns from labels has none with --unlabelled" in capsys.readouterr().err
    assert main(["retrain", student, "--steps", "2", "--out", str(tmp_path / "more")]) in (0, None)
