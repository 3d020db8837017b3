"""Segmentation from the command line: the whole chain under three levels of distillation, a kill, and refusals."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import kdnas
from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.data.masks import masks
from kdnas.jobs._arguments import recipe_for
from kdnas.jobs._preflight.data import size_findings
from kdnas.jobs._preflight.findings import Finding
from kdnas.jobs._texts import lines
from kdnas.runs.folder import RunFolder
from kdnas.settings import FitTeacher, Recipe
from kdnas.students.folder import read_student
from kdnas.teachers.zoo import student_teacher
from tests.jobs.test_killed import same_weights
from tests.killing import CHECKPOINT, drafts, killed, no_graph  # noqa: F401

SPACE = """
family = "segmenter"
stem_widths = [4]
head_widths = [4, 8]
[[stages]]
widths = [4, 8]
depths = [1]
stride = 2
"""
LOSSES = [word for loss in ("pixel_wise", "region_similarity", "holistic") for word in ("--loss", loss)]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """20 images of 11 x 14 with a bright rectangle each, and the table of a space."""
    root, rng = tmp_path_factory.mktemp("streets"), np.random.default_rng(0)
    for place in ("images", "masks"):
        (root / place).mkdir()
    for number in range(20):
        mask = np.zeros((11, 14), np.uint8)
        top, left = rng.integers(0, 6, 2)
        mask[top : top + 5, left : left + 8] = 1
        mask[:, -1] = 255
        image = rng.integers(0, 90, (11, 14, 3)) + 120 * (mask == 1)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("road\ncar\n")
    (root / "space.toml").write_text(SPACE)
    (root / "deep.toml").write_text(SPACE + SPACE.partition("head_widths = [4, 8]\n")[2])
    return root


def arguments(root, out, *more, teacher="fit,width=4,blocks=1"):
    space = ["--space", str(root / "space.toml"), "--budget", "macs=2e9", "--budget", "latency=30s"]
    short = ["--steps", "3", "--batch-size", "4", "--num-evaluations", "2", "--finalists", "1"]
    task = ["run", "--task", "segmentation", "--data", f"masks:{root}"]
    return [*task, "--teacher", teacher, "--insist", *space, *short, *LOSSES, *more, "--out", str(out)]


def lanes(root, out):
    """As `arguments`, of synthetic roads."""
    data = ["run", "--task", "lanes", "--data", "roads:30,height=16,width=32", "--teacher", "fit,width=4,blocks=1"]
    loss = ["--loss", "self_attention,start=0.3", "--insist", "--steps", "3", "--batch-size", "4"]
    search = ["--space", str(root / "deep.toml"), "--num-evaluations", "2", "--finalists", "1"]
    return [*data, *loss, *search, "--out", str(out)]


@pytest.mark.slow  # each starts a process of its own
@pytest.mark.parametrize("task", ["segmentation", "lanes"])
def test_a_killed_run_ends_as_one_that_was_not(task, streets, tmp_path):
    """Killed in the supernet's training: of segmenters with a critic, of lanes after self-attention has begun."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    make = arguments if task == "segmentation" else lanes
    main(make(streets, whole))
    killed(
        make(streets, folder),
        "given[0].name.startswith('checkpoint.') and given[1]['training']['index'] == 2",
        **CHECKPOINT,
    )
    assert RunFolder(folder).phase("train") is None
    main(make(streets, folder))

    def told(place):
        rows = RunFolder(place).results()["rows"]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert told(folder) == told(whole) and drafts(folder) == []
    same_weights(folder / "students" / "student", whole / "students" / "student")
    trained = {name for line in RunFolder(folder).lines("metrics.jsonl") for name in line.get("losses", {})}
    assert ("holistic_discriminator" in trained) == (task == "segmentation")


@pytest.mark.slow  # 42 million parameters
def test_a_segmenter_of_torchvision_teaches_the_whole_chain(streets, tmp_path):
    """deeplabv3_resnet50 from a checkpoint of two classes, with the classifier beside it in its training."""
    make, options = models.segmentation.deeplabv3_resnet50, {"weights": None, "weights_backbone": None}
    torch.save(make(**options, num_classes=2, aux_loss=True).state_dict(), tmp_path / "w.pth")
    teacher = f"torchvision:deeplabv3_resnet50@{tmp_path / 'w.pth'},size=32"
    main(arguments(streets, tmp_path / "run", teacher=teacher))
    storage = RunFolder(tmp_path / "run")
    rows = {row["name"]: row for row in storage.results()["rows"]}
    assert rows["teacher"]["params"] > 39e6 > 100 * rows["student"]["params"]
    assert {"IoU road", "IoU car", "pixel accuracy"} <= rows["student"]["measures"].keys()


def test_losses_that_do_not_fit_are_refused_before_the_teacher_is_trained(streets, tmp_path):
    space, teacher = str(streets / "space.toml"), FitTeacher(recipe=Recipe(steps=3), width=4, blocks=1)
    for loss, message in (("self_attention", "at least 2 stages of the student, got 1"), ("hint,pairs=0-9", "pair")):
        with pytest.raises(ValueError, match=message):
            kdnas.run(
                data=f"masks:{streets}", teacher=teacher, space=space, loss=[loss], out=tmp_path / "run", insist=True
            )
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_pixels_is_cut_down(streets, tmp_path, caplog):
    """Without a space: removals by the agreement of pixels, controls, pictures and the IoU of each class."""
    options = {"steps": 3, "batch_size": 4, "num_evaluations": 3, "finalists": 1, "deploy": False, "insist": True}
    teacher = FitTeacher(recipe=Recipe(steps=3, batch_size=4), width=8, blocks=1)
    kdnas.run(data=f"masks:{streets}", teacher=teacher, budget="macs=50%", out=tmp_path / "run", **options)
    assert "before the training" in caplog.text and "resized from" not in caplog.text
    storage = RunFolder(tmp_path / "run")
    whole, left = (storage.phase("removal")[key]["macs"] for key in ("whole", "left"))
    assert left <= whole / 2
    rows = {row["name"]: row for row in storage.results()["rows"]}
    assert {"teacher", "student", "control"} <= rows.keys() and "IoU car" in rows["student"]["measures"]
    network, card = read_student(tmp_path / "run" / "students" / "student")
    assert card.cost == cost(card.blueprint) and card.blueprint.image == (3, 11, 14) and card.blueprint.dense
    assert network(torch.rand(2, 3, 9, 20)).logits.shape == (2, 2, 9, 20)
    pictures = json.loads((tmp_path / "run" / "pictures.json").read_text())
    assert len(pictures["images"]) == 4 and "What it sees" in (tmp_path / "run" / "report.html").read_text()
    source, _ = read_student(tmp_path / "run" / "students" / "source")
    built, images = student_teacher(str(tmp_path / "run" / "teacher"), 2), torch.rand(2, 3, 11, 14)
    data = masks(str(streets))
    with torch.no_grad():
        torch.testing.assert_close(source(data.normalise(images)).logits, built(images).logits, rtol=1e-4, atol=1e-4)


def test_networks_for_every_pixel_resize_no_images_which_the_doctor_says_too(streets):
    data = dataclasses.replace(masks(str(streets)), source="")
    assert size_findings(data, (32, 224), decided=False) == []
    assert recipe_for(data, {}).batch_size == len(data.train) < data.task.images_at_once
    larger = SimpleNamespace(train=range(500), task=data.task)
    assert recipe_for(larger, {}).batch_size == 16 and recipe_for(larger, {"batch_size": 40}).batch_size == 40


def test_what_is_printed_has_the_name_of_the_measure():
    result = {"student": "s", "search_accuracy": 0.25, "accuracy": 0.5, "measure": "mIoU", "params": 1200}
    assert lines(result, {}).split() == ["student", "s", "search_mIoU", "0.2500", "mIoU", "0.5000", "params", "1,200"]
    assert "accuracy         0.5000" in lines({"accuracy": 0.5}, {})
    nested = lines({"interval": [0.1, 0.25], "measures": {"IoU car": 0.5}}, {}).splitlines()
    assert nested == ["interval         0.1000, 0.2500", "measures", "  IoU car          0.5000"]


def test_a_source_for_whole_images_is_refused(streets, tmp_path):
    with pytest.raises(
        ValueError, match=r"one tensor of logits \[batch, classes, height, width\], it returns a tensor \[2, 2\]"
    ):
        kdnas.prune(
            data=f"masks:{streets}",
            budget="macs=50%",
            source=f"{__name__}:classifier",
            teacher="fit",
            out=tmp_path / "run",
        )
    with pytest.raises(ValueError, match="`task` must be that of the data, segmentation, got 'lanes'"):
        kdnas.prune(data=f"masks:{streets}", task="lanes", budget="macs=50%", out=tmp_path / "run")


def test_images_with_masks_are_pruned_in_the_batches_of_their_task(streets, tmp_path, monkeypatch):
    monkeypatch.setattr("kdnas.jobs.prune.prune", lambda settings, folder: settings)
    options = {"data": f"masks:{streets}", "budget": "macs=50%", "out": tmp_path / "run"}
    settings, named = kdnas.prune(**options), kdnas.prune(**options, batch_size=5)
    most = min(16, len(masks(str(streets)).train))
    for each, size in ((settings, most), (named, 5)):
        assert {each.recipe.batch_size, each.retrain.batch_size, each.teacher.recipe.batch_size} == {size}


def classifier():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--data", "digits", "--task", "segmentation"),
            "data, classification, got 'segmentation'. Images with masks are masks:",
        ),
        (("--data", "masks:{}", "--task", "classification"), "the data, segmentation, got 'classification'. Drop it"),
    ],
)
def test_a_task_that_is_not_the_data_s_is_refused(streets, tmp_path, capsys, options, message):
    options = [option.format(streets) for option in options]
    for budget in (["--space", str(streets / "space.toml")], ["--budget", "macs=1M"]):
        with pytest.raises(SystemExit) as end:
            main(["run", *options, *budget, "--out", str(tmp_path / "run")])
        assert end.value.code == 2 and message in capsys.readouterr().err
    task = options[-1]
    assert Finding("data", kdnas.doctor(data=options[1], task=task)[-1].text, "fault") in kdnas.doctor(
        data=options[1], task=task
    )
    assert not (tmp_path / "run").exists()
