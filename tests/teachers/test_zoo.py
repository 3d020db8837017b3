"""A zoo's network is fed as the zoo trains it; what a person may change of that; networks that say their size."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from kdnas.data.base import prepare
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Teacher
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import as_frozen, declared_size, student_teacher, write_zoo_teacher, zoo_network

DATA = Preprocessing(height=24, width=24, mean=(0.2,) * 3, std=(0.3,) * 3)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "w.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": models.get_model("mobilenet_v3_small", num_classes=3).state_dict()}, path)
    return path


def built(text, **options):
    return load_teacher(text).build(Teacher, classes=3, preprocessing=DATA, **options)


def test_a_network_with_own_weights_keeps_the_zoos_size_normalisation_and_interpolation(weights):
    teacher = built(f"torchvision:mobilenet_v3_small@{weights}")
    assert teacher.preprocessing == Preprocessing(height=224, width=224, interpolation="bilinear", **IMAGENET)
    pixels = torch.rand(2, 3, 24, 24)
    large = F.interpolate(pixels, (224, 224), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(IMAGENET[name])[:, None, None] for name in ("mean", "std"))
    expected = teacher.module((large - mean) / std)
    torch.testing.assert_close(teacher(pixels).logits, expected)


def test_size_normalisation_and_interpolation_can_be_chosen(weights):
    options = "size=32,normalise=data,interpolation=nearest"
    teacher = built(f"torchvision:mobilenet_v3_small@{weights},{options}")
    expected = Preprocessing(height=32, width=32, mean=DATA.mean, std=DATA.std, interpolation="nearest")
    assert teacher.preprocessing == expected


def test_a_timm_network_keeps_its_configuration(tmp_path):
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet", num_classes=3)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    teacher, config = built(f"timm:test_resnet@{tmp_path / 'w.safetensors'}"), module.pretrained_cfg
    p = teacher.preprocessing
    assert (p.height, p.mean, p.std, p.interpolation) == (
        config["input_size"][1],
        config["mean"],
        config["std"],
        config["interpolation"],
    )
    with pytest.raises(ValueError, match=r"timm has no 'test_resnt'.*Did you mean 'test_resnet'"):
        built("timm:test_resnt@w.pth")


def test_a_transformer_of_timm_is_built_for_the_size_that_is_asked_for(tmp_path):
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    assert built(f"timm:test_vit@{tmp_path / 'w.pth'},size=32").preprocessing.height == 32
    with pytest.raises(ValueError, match=r"pos_embed.*size=N"):
        built(f"timm:test_vit@{tmp_path / 'w.pth'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchvision:resnet18@w.pth,sze=3", "Did you mean 'size'"),
        ("torchvision:resnet18@w.pth,size=big", "must be a whole number"),
        ("fit,width=x", "must be a whole number"),
        ("fit,widht=3", "Did you mean 'width'"),
        ("fit,width=0", "`width` must be at least 1"),
    ],
)
def test_unknown_options_are_answered_with_the_nearest(text, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm:resnet18@", "timm:NAME@WEIGHTS"),
        ("torchvision:@w.pth", "torchvision:NAME or"),
        ("torchvision:resnet18,size=-1", "`size` must be at least 0"),
        ("torchvision:resnet18,normalise=imagenet", "must be one of"),
    ],
)
def test_a_text_that_names_no_network_no_file_or_no_size_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(text).build(classes=2, preprocessing=None)


def test_a_home_folder_is_found_behind_the_sign_of_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_teacher("timm:resnet18@~/w.pth")["weights"] == str(tmp_path / "w.pth")
    assert load_teacher("checkpoint:~/student")["path"] == str(tmp_path / "student")


def test_one_output_for_two_classes_is_told_from_other_classes():
    with pytest.raises(ValueError, match=r"1 output, the data 2 classes\. Return two logits"):
        as_frozen(nn.Sequential(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "mine", 2, DATA)


def test_a_file_of_weights_alone_is_told_that_it_needs_a_network(weights):
    with pytest.raises(ValueError, match=r"A file of weights needs its network: torchvision:NAME@FILE"):
        load_teacher(str(weights))


def test_options_in_an_ensemble_belong_to_their_teacher(weights):
    one = f"torchvision:mobilenet_v3_small@{weights}"
    members = load_teacher(f"ensemble:{one},size=32,{one},size=64,normalise=data")["members"]
    assert [m["size"] for m in members] == [32, 64] and members[1]["normalise"] == "data"
    weighted = load_teacher(f"ensemble:{one},size=32=2,{one}=1")
    assert weighted["weights"] == (2.0, 1.0) and weighted["members"][0]["size"] == 32


def test_a_fitted_teacher_has_the_width_that_is_asked_for():
    from kdnas.costs.count import cost
    from kdnas.teachers.fitted import fitted_teacher

    assert load_teacher("fit,blocks=1,width=8").width == 8
    params = [cost(fitted_teacher((3, 32, 32), 10, 1, width)).params for width in (8, 64, None)]
    assert params[0] < params[1] / 40 and params[1] == params[2]


def test_a_gray_image_is_fed_to_a_network_of_three_channels(weights):
    teacher = built(f"torchvision:mobilenet_v3_small@{weights},size=32")
    gray = torch.rand(2, 1, 24, 24)
    torch.testing.assert_close(teacher(gray).logits, teacher(gray.expand(-1, 3, -1, -1)).logits)


class Sized(nn.Module):
    """Accepts one size only."""

    def __init__(self, **says):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x):
        if x.shape[2] != 16:
            raise ValueError(f"Input image size ({x.shape[2]}*{x.shape[3]}) doesn't match model (16*16).")
        return {"logits": self.head(self.conv(x).mean((2, 3)))}


class Config:
    image_size = 16


@pytest.mark.parametrize(
    "says", [{"config": Config()}, {"image_size": (16, 16)}, {"pretrained_cfg": {"input_size": (3, 16, 16)}}]
)
def test_a_module_that_fails_on_the_datas_size_gets_the_one_that_it_says(says):
    module = Sized(**says)
    assert declared_size(module) == (16, 16)
    teacher = as_frozen(module, "own", 3, DATA)
    assert (teacher.preprocessing.height, teacher.preprocessing.mean) == (16, DATA.mean)
    assert teacher(torch.rand(2, 3, 24, 24)).logits.shape == (2, 3)


def test_a_fault_other_than_the_size_is_not_answered_with_the_size():
    class Silent(nn.Module):
        image_size = 16

        def forward(self, x):
            return x.mean((2, 3))

    with pytest.raises(ValueError, match="no submodule of the teacher returns a feature map"):
        as_frozen(Silent(), "own", 3, DATA)
    module = Sized(image_size=16)
    module.conv = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match="has no values yet"):
        as_frozen(module, "own", 3, DATA)


def test_a_module_that_says_no_size_is_refused_with_its_words():
    assert declared_size(Sized()) is None
    with pytest.raises(ValueError, match=r"fails on them \(ValueError: Input image size \(24\*24\)"):
        as_frozen(Sized(), "own", 3, DATA)


def test_logits_of_another_form_are_refused():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return Outputs(self.conv(x))

    with pytest.raises(ValueError, match=r"teacher own must return logits \[batch, classes\], got \(2, 3, 24, 24\)"):
        as_frozen(Dense(), "own", 3, DATA).freeze()


def test_a_folder_of_a_fine_tuned_network_is_a_teacher(tmp_path):
    module, own = zoo_network("torchvision", "mobilenet_v3_small", 3, 32)
    source = {"zoo": "torchvision", "name": "mobilenet_v3_small", "size": 32, "origin": {}}
    write_zoo_teacher(tmp_path / "t", module, source, own, ("a", "b", "c"))
    pixels = torch.rand(2, 3, 24, 24)
    for text in (str(tmp_path / "t"), f"checkpoint:{tmp_path / 't'}"):
        teacher = built(text)
        assert teacher.class_names == ("a", "b", "c")
        torch.testing.assert_close(teacher(pixels).logits, module.eval()(prepare(pixels, own)).detach())
    with pytest.raises(ValueError, match=r"has 3 classes, the data 5. Fine-tune it .*kdnas fit"):
        student_teacher(str(tmp_path / "t"), 5, DATA)
    (tmp_path / "t" / "teacher.json").write_text("{}")
    with pytest.raises(ValueError, match=r"teacher.json is damaged"):
        built(str(tmp_path / "t"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no finished teacher yet"):
        built(str(tmp_path / "run"))


@pytest.mark.parametrize("values", [{"interpolation": "cubic"}, {"height": 0}])
def test_preprocessing_that_cannot_be_done_is_refused(values):
    with pytest.raises(ValueError, match=r"`interpolation` must be one of|`height` must be at least 1"):
        Preprocessing(**{"height": 8, "width": 8, "mean": (0.5,), "std": (1.0,)} | values)


def timm_folder(folder, **options):
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(module, folder, safe_serialization=True, **options)
    return module


def test_a_folder_of_timm_is_a_teacher_with_its_configuration(tmp_path):
    config = {
        "input_size": (3, 48, 48),
        "mean": (0.1,) * 3,
        "std": (0.4,) * 3,
        "crop_pct": 0.75,
        "interpolation": "bilinear",
    }
    module = timm_folder(tmp_path, model_config={"label_names": ["a", "b", "c"], **config})
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"pretrained_cfg": config}))
    teacher = built(f"timm:{tmp_path}", class_names=("c", "a", "b"))
    own = Preprocessing(height=48, width=48, mean=(0.1,) * 3, std=(0.4,) * 3, interpolation="bilinear")
    assert teacher.preprocessing == own and teacher.crop == 0.75 and teacher.columns == (2, 0, 1)
    pixels = torch.rand(2, 3, 24, 24)
    large = prepare(pixels, dataclasses.replace(own, height=64, width=64))[..., 8:56, 8:56]
    torch.testing.assert_close(teacher(pixels).logits, module(large).detach()[:, [2, 0, 1]])
    assert built(f"timm:{tmp_path},crop=1").crop == 1


def test_a_folder_that_is_none_of_timm_is_refused(tmp_path):
    timm_folder(tmp_path)
    with pytest.raises(ValueError, match=r"is a network of 3 classes, got 5"):
        zoo_network("timm", str(tmp_path), 5)
    content = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architecture": "test_resnt"}, "timm has no 'test_resnt', .*Did you mean"),
        ({"architecture": "hf-hub:x/y"}, "timm has no 'hf-hub:x/y'"),
        ({"architecture": "test_vit"}, "does not fit the network"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            built(f"timm:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_args": {"checkpoint_path": "/x.pth"}}))
    assert built(f"timm:{tmp_path}").class_names is None  # which would load another file
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors. Write it with timm.models.save_for_hf"):
        built(f"timm:{tmp_path}")


def test_a_files_network_keeps_the_classes_of_the_file_where_some_are_selected(tmp_path):
    module = models.get_model("mobilenet_v3_small", num_classes=5)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    teacher = built(f"torchvision:mobilenet_v3_small@{tmp_path / 'w.pth'},size=32,select=4+0+2")
    pixels = torch.rand(2, 3, 32, 32)
    expected = module.eval()(prepare(pixels, teacher.preprocessing)).detach()[:, [4, 0, 2]]
    torch.testing.assert_close(teacher(pixels).logits, expected)
    assert teacher.crop == 1
