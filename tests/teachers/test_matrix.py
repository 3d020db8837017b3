"""Own teacher and own data by one command each; `make test-real` runs it."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdnas.cli.commands import main
from kdnas.preprocessing import Preprocessing
from kdnas.runs.folder import RunFolder
from kdnas.teachers.base import Teacher
from kdnas.teachers.load import load_teacher

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]

SIDE, CLASSES = 32, ("blue", "red")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def picture(number):
    rng = np.random.default_rng(number)
    array = rng.integers(0, 120, (SIDE, SIDE, 3), np.uint8)
    array[..., 0 if number % 2 else 2] += 120
    return Image.fromarray(array)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def plain():
    torch.manual_seed(0)
    return Plain()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    from torchvision import models

    root = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    for name, options in {"test_resnet": {}, "test_vit": {"img_size": SIDE}}.items():
        module = timm.create_model(name, num_classes=2, **options)
        timm.models.save_for_hf(module, root / name, safe_serialization=True, model_args=options)
    config = transformers.ViTConfig(
        **SHAPE, image_size=SIDE, patch_size=8, id2label=dict(enumerate(CLASSES)), label2id={}
    )
    transformers.ViTForImageClassification(config).save_pretrained(root / "vit")
    torch.save(models.mobilenet_v3_small(num_classes=2).state_dict(), root / "net.pth")
    return {
        "timm CNN": f"timm:{root / 'test_resnet'}",
        "timm ViT": f"timm:{root / 'test_vit'},size={SIDE}",
        "transformers ViT": f"hf:{root / 'vit'}",
        "torchvision file": f"torchvision:mobilenet_v3_small@{root / 'net.pth'},size={SIDE}",
        "plain module": f"{__name__}:plain",
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    datasets, webdataset = pytest.importorskip("datasets"), pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("sets")
    numbers = range(40)
    for number in numbers:
        place = root / "classes" / CLASSES[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number}.png")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    content = {"image": [picture(n) for n in numbers], "label": [n % 2 for n in numbers]}
    rows = datasets.Dataset.from_dict(content, features=features)
    rows.save_to_disk(root / "saved")
    rows.to_parquet(root / "table.parquet")
    with webdataset.TarWriter(str(root / "shard-00.tar")) as writer:
        for number in numbers:
            writer.write({"__key__": f"{number:04}", "png": picture(number), "txt": CLASSES[number % 2]})
    return {
        "class folders": f"folder:{root / 'classes'}",
        "datasets": f"hf:{root / 'saved'}",
        "parquet": f"parquet:{root / 'table.parquet'}",
        "webdataset": f"wds:{root / 'shard-00.tar'}",
    }


VIT = """
family = "vit"
patch = 8
widths = [16, 24]
depths = [2, 3]
heads = [2]
ratios = [2.0]
head_width = 8
reach = 2
cuts = [1]
drop_path = 0.0
classes = 2
resolutions = [16]
"""
TEACHERS = ("timm CNN", "timm ViT", "transformers ViT", "torchvision file", "plain module")
SETS = ("class folders", "datasets", "parquet", "webdataset")
SHORT = "--steps 1 --batch-size 8 --num-evaluations 2 --finalists 1 --scorer params --no-deploy --insist"


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_own_teacher_and_own_data_in_one_command(teachers, sets, tmp_path, teacher, data):
    command = ["run", "--data", sets[data], "--teacher", teachers[teacher], "--space", "toy", "--size", "16"]
    assert main([*command, *SHORT.split(), "--out", str(tmp_path / "run")]) in (0, None)
    assert {row["name"] for row in RunFolder(tmp_path / "run").results()["rows"]} >= {"teacher", "student"}


@pytest.mark.parametrize("teacher", ["timm ViT", "transformers ViT"])
def test_attention_maps_reach_the_loss_in_a_command(teachers, sets, tmp_path, teacher):
    """Without the teacher's maps the loss is refused."""
    (tmp_path / "vit.toml").write_text(VIT, encoding="utf-8")
    command = ["run", "--data", sets["class folders"], "--teacher", teachers[teacher], "--loss", "attention_map=1"]
    command += ["--space", str(tmp_path / "vit.toml"), "--size", "16", "--out", str(tmp_path / "run")]
    assert main([*command, *SHORT.split()]) in (0, None)


def test_an_ensemble_of_a_hub_and_a_zoo_has_both_members(teachers):
    text = f"ensemble:{teachers['transformers ViT']},{teachers['timm CNN']}"
    own = Preprocessing(height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = load_teacher(text)
    teacher = source.build(Teacher, classes=2, preprocessing=own, class_names=CLASSES)
    assert len(teacher(torch.rand(2, 3, SIDE, SIDE)).members) == 2
    assert dataclasses.asdict(own)["height"] == SIDE
