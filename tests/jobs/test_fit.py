"""A teacher trained by itself, in a folder that `--teacher` takes."""

import dataclasses
import json

import pytest
import torch
from torchvision import models

from kdnas.cli.commands import main
from kdnas.data.base import Data
from kdnas.data.builtin import digits
from kdnas.evaluation import teacher_accuracy
from kdnas.jobs._arguments import losses_of
from kdnas.jobs._run import build_teacher, insisting
from kdnas.jobs.fit import fit, fit_teacher, member_training, teacher_result
from kdnas.runs.folder import RunFolder
from kdnas.settings import Fit, FitTeacher, Recipe
from kdnas.specs import spec
from kdnas.teachers.load import load_teacher
from tests.toy import SealedImages, by_params

RECIPE = Recipe(steps=6, batch_size=32, learning_rate=0.05)


def settings(**changes):
    return Fit(**{"data": spec(digits), "teacher": FitTeacher(recipe=RECIPE)} | changes)


def zoo(**changes):
    return settings(network="torchvision:mobilenet_v3_small", weights="fresh", size=32, **changes)


@pytest.mark.parametrize("make", [zoo, lambda: settings(teacher=FitTeacher(recipe=RECIPE, width=4))])
def test_a_stopped_fit_goes_on_and_ends_with_the_same_teacher(tmp_path, monkeypatch, make):
    whole = fit(make(), tmp_path / "whole")
    from kdnas.training.loop import Training

    step, count = Training.step, []

    def stopping(self, **options):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(self, **options)

    monkeypatch.setattr("kdnas.training.driver.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(Training, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(make(), tmp_path / "stopped")
    resumed = fit(make(), tmp_path / "stopped")
    assert len(count) == 4 + 3
    data = digits()
    logits = [
        build_teacher(load_teacher(str(tmp_path / name)), data)(data.test.images[:4]).logits
        for name in ("whole", "stopped")
    ]
    assert torch.equal(*logits)
    assert {**whole, "teacher": "", "seconds": 0} == {**resumed, "teacher": "", "seconds": 0}
    assert fit(make(), tmp_path / "stopped") == resumed  # nothing is left to do
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(set(line["losses"]) == {"teacher"} for line in lines)
    assert not list((tmp_path / "stopped").glob("*.draft*"))


def test_what_is_reported_is_what_the_folder_gives(tmp_path):
    result = fit(zoo(), tmp_path / "t")
    data = digits()
    teacher = build_teacher(load_teacher(str(tmp_path / "t")), data)
    assert result["accuracy"] == teacher_accuracy(teacher, data.test, data)
    assert result["params"] == sum(p.numel() for p in teacher.parameters())
    card = json.loads((tmp_path / "t" / "teacher" / "teacher.json").read_text())
    assert card["size"] == 32 and card["origin"]["fingerprint"] == data.fingerprint
    metrics = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["accuracy"] >= 0 and "teacher" in metrics[-1]["losses"]


def test_fine_tuning_begins_with_the_body_of_a_file_of_other_classes(tmp_path):
    source = models.get_model("mobilenet_v3_small", num_classes=5)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    still = FitTeacher(recipe=Recipe(steps=1, batch_size=32, learning_rate=1e-12, weight_decay=0.0))
    name = f"torchvision:mobilenet_v3_small@{tmp_path / 'w.pth'}"
    fit(settings(network=name, size=32, teacher=still), tmp_path / "t")
    teacher = build_teacher(load_teacher(str(tmp_path / "t")), digits())
    torch.testing.assert_close(teacher.module.features[0][0].weight, source.features[0][0].weight, atol=1e-6, rtol=0)
    assert teacher.module.classifier[3].weight.shape[0] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "resnet18"}, "`network` must be resnet, torchvision:NAME or timm:NAME"),
        ({"size": 32}, "`size` is for a zoo's network"),
        ({"network": "timm:x", "teacher": FitTeacher(width=3)}, "`blocks` and `width` are for resnet"),
        ({"weights": "random"}, "`weights` must be one of pretrained, fresh"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)


def test_a_fit_may_add_losses_of_its_own_stages(tmp_path):
    """They begin when their schedule says, and a fit without any is stored as before there were some."""
    losses = losses_of(["self_attention=2,start=0.5,reduction=sum"])
    assert losses[0][0] == 2 and losses[0][1]["start"] == 0.5 and losses[0][1]["reduction"] == "sum"
    assert "losses" not in settings().to_json()["fit"] and settings(losses=losses).to_json()["fit"]["losses"]
    teacher, data = FitTeacher(recipe=dataclasses.replace(RECIPE, steps=2), width=4), digits()
    weights = []
    for own in (losses, losses_of(["self_attention=0,start=0.5"])):
        training = member_training(teacher, data, losses=own)
        training.step()
        early = [p.detach().clone() for p in training.model.parameters()]
        training.step()
        weights.append((early, [p.detach().clone() for p in training.model.parameters()]))
    assert all(map(torch.equal, weights[0][0], weights[1][0]))
    assert not all(map(torch.equal, weights[0][1], weights[1][1]))
    with pytest.raises(ValueError, match="`loss` of a fit must use no teacher, got hint"):
        fit(settings(losses=losses_of(["hint"])), tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
    with pytest.raises(ValueError, match="`loss` is for resnet"):
        zoo(losses=losses)


def test_the_command_fits_and_names_the_next_one(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--data", "digits", "--width", "4", "--steps", "2", "--batch-size", "16", "--out", "t", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["teacher"] == "t"
    assert "next: kdnas run --data digits --teacher t --space SPACE --out RUN" in printed.err
    with pytest.raises(SystemExit):
        main(["fit", "--data", "digits", "--network", "timm:nothing@gone.pth", "--out", "u"])
    assert "timm has no 'nothing'" in capsys.readouterr().err or "timm is not installed" in capsys.readouterr().err


def test_a_run_s_teacher_is_not_measured_on_test_images_before_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(SealedImages, "run", None)
    data = by_params().train.data.build(Data)
    storage = RunFolder.create(tmp_path / "run", {}, 0)
    with insisting(True):
        source = fit_teacher(FitTeacher(recipe=Recipe(steps=1, batch_size=8)), data, storage)
    record = storage.phase("teacher")
    assert "accuracy" not in record and 0 <= record["search_accuracy"] <= 1 and not storage.results()["rows"]
    teacher = build_teacher(source, data)
    with pytest.raises(AssertionError, match="before the choice"):
        teacher_result(storage, teacher, data)
    row = teacher_result(storage, teacher, dataclasses.replace(data, test=data.search))
    assert row["accuracy"] == record["search_accuracy"] and row["seconds"] == record["seconds"] > 0
