"""Teachers that give features, and data without labels."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdnas.data.base import Data
from kdnas.data.load import load_data
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.specs import spec
from kdnas.tasks.features import Neighbours, Similarity
from kdnas.teachers.base import Frozen, Teacher, made_for
from kdnas.teachers.load import load_teacher
from kdnas.teachers.stages import features_of
from kdnas.teachers.unlabelled import unlabelled, widths_of

SIDE = 16
OWN = Preprocessing(height=SIDE, width=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)
PIXELS = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


class Backbone(nn.Module):
    """Gives one vector for each image, or a function of its last map."""

    def __init__(self, width=6, give=lambda x: x.mean((2, 3))):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, width, 3, 2, 1), nn.ReLU())
        self.give = give

    def forward(self, x):
        return self.give(self.second(self.first(x)))


class Classifier(Backbone):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(super().forward(x))


def narrow():
    torch.manual_seed(0)
    return Backbone()


def wide():
    torch.manual_seed(1)
    return Backbone(9)


def tokens():
    torch.manual_seed(0)
    return Backbone(give=lambda x: x.flatten(2).transpose(1, 2))


def a_map():
    torch.manual_seed(0)
    return Backbone(give=lambda x: x)


def named():
    torch.manual_seed(0)
    return Backbone(
        give=lambda x: {"last_hidden_state": x.flatten(2).transpose(1, 2) + 9, "pooler_output": x.mean((2, 3))}
    )


def drawn():
    torch.seed()
    return Backbone()


def rounded():
    return Backbone(give=lambda x: x.mean((2, 3)).long())


def one_number():
    return Backbone(give=lambda x: x.mean((1, 2, 3))[:, None])


def of(name):
    return load_teacher(f"{__name__}:{name}")


@pytest.mark.parametrize("name", ["tokens", "a_map", "named"])
def test_tokens_maps_and_named_outputs_are_pooled(name):
    expected = made_for(of("narrow"), 0, OWN)(PIXELS)
    outputs = made_for(of(name), 0, OWN)(PIXELS)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert [f.shape for f in outputs.features] == [(3, 4, 8, 8), (3, 6, 4, 4)]


Pair = namedtuple("Pair", "last_hidden_state pooler_output")


def test_what_libraries_return_is_understood():
    state, vector = torch.rand(2, 5, 4), torch.rand(2, 4)
    assert torch.equal(features_of(Pair(state, vector)), vector)
    torch.testing.assert_close(features_of(Pair(state, None)), state.mean(1))
    torch.testing.assert_close(features_of({"feature_maps": (torch.rand(2, 3, 8, 8), state)}), state.mean(1))
    assert torch.equal(features_of({"x_norm_patchtokens": state, "x_norm_clstoken": vector}), vector)
    assert torch.equal(features_of((state, vector)), vector)
    assert features_of(torch.rand(2, 4, 1, 1)).shape == (2, 4)
    assert torch.equal(features_of(Outputs(vector)), vector)


@pytest.mark.parametrize("value", ["text", None, torch.rand(2), torch.zeros(2, 3).long(), (), {"a": 1}])
def test_what_has_no_vector_is_a_sentence(value):
    with pytest.raises(ValueError, match=r"^the teacher must return features: a vector for each image"):
        features_of(value)


def test_a_classifier_gives_what_its_classifier_gets():
    torch.manual_seed(0)
    module = Classifier()
    teacher = Frozen(module, preprocessing=OWN, classes=3)
    features = teacher.without_classifier()(PIXELS).logits
    assert features.shape == (3, 6)
    torch.testing.assert_close(module.head(features), teacher(PIXELS).logits)


def test_an_ensemble_has_each_ones_vector_of_length_one():
    teacher = made_for(load_teacher(f"ensemble:{__name__}:narrow,{__name__}:wide"), 0, OWN)
    parts = teacher(PIXELS).logits.split([6, 9], 1)
    for name, part in zip(("narrow", "wide"), parts, strict=True):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(3))
        alone = made_for(of(name), 0, OWN)(PIXELS).logits
        torch.testing.assert_close(part, nn.functional.normalize(alone))
    assert widths_of(load_teacher(f"ensemble:{__name__}:narrow,{__name__}:wide"), OWN) == (6, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(30):
        array = rng.integers(0, 100, (SIDE, SIDE, 3), np.uint8)
        array[..., number % 2] += 100
        for place in (
            root / "flat",
            root / "classes" / "ab"[number % 2],
            root / "parts" / ("train", "test")[number % 2],
        ):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{number}.png")
    (root / "list.csv").write_text("path\n" + "\n".join(f"flat/{number}.png" for number in range(30)))
    np.savez(root / "arrays.npz", images=rng.integers(0, 255, (30, SIDE, SIDE, 3), np.uint8))
    return root


@pytest.mark.parametrize("form", ["folder:{}/flat", "folder:{}/parts", "csv:{}/list.csv", "npz:{}/arrays.npz"])
def test_images_without_labels_are_measured_by_similarity(folders, form):
    source = load_data(form.format(folders))
    data = spec(unlabelled, data=source, teacher=of("narrow"), widths=(6,)).build(Data)
    assert isinstance(data.task, Similarity)
    assert data.classes == 6
    assert len(data.train) + len(data.search) + len(data.test) == 30
    teacher = made_for(of("narrow"), 0, data.preprocessing)
    pixels, vectors = next(data.test.batches())
    torch.testing.assert_close(vectors, teacher(pixels).logits)
    with pytest.raises(ValueError, match="--unlabelled"):
        source.build(Data)


def test_labels_of_class_folders_measure_alone(folders):
    data = unlabelled(load_data(f"folder:{folders}/classes"), of("wide"), (9,))
    assert isinstance(data.task, Neighbours)
    assert data.classes == 9
    assert data.test.labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize(("classes", "name"), [(0, "headless"), (7, "headed")])
def test_networks_of_timm_give_features_with_and_without_a_head(tmp_path, classes, name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=classes).eval()
    timm.models.save_for_hf(module, tmp_path / name, safe_serialization=True)
    teacher = load_teacher(f"timm:{tmp_path / name},size={SIDE},crop=1").build(Teacher, classes=0, preprocessing=OWN)
    module.reset_classifier(0)
    mean, std = (torch.tensor(module.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(teacher(PIXELS).logits, module((PIXELS - mean) / std), rtol=1e-4, atol=1e-5)
    torch.save(module.state_dict(), tmp_path / "net.pth")
    again = load_teacher(f"timm:test_resnet@{tmp_path / 'net.pth'},size={SIDE}").build(
        Teacher, classes=0, preprocessing=OWN
    )
    torch.testing.assert_close(again(PIXELS).logits, teacher(PIXELS).logits)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounded", "must return features"),
        ("one_number", r"at least 2, got \(2, 1\)"),
        ("narrow,select=1+2", "`select` names classes"),
        ("ensemble:{0}:narrow=2,{0}:wide=1", r"must weigh alike and are not averaged, got the weights \(2.0, 1.0\)"),
        ("ensemble+logits:{0}:narrow,{0}:wide", r"not averaged, got ensemble\+logits"),
    ],
)
def test_a_teacher_that_gives_no_features_is_a_sentence(text, words):
    text = text.format(__name__) if ":" in text else f"{__name__}:{text}"
    with pytest.raises(ValueError, match=words):
        made_for(load_teacher(text), 0, OWN)


@pytest.mark.parametrize("name", ["narrow", "tokens", "named", "a_map"])
def test_features_where_classes_are_needed_name_the_option(name):
    with pytest.raises(ValueError, match="--unlabelled"):
        made_for(of(name), 3, OWN)


def test_a_network_of_timm_without_classes_is_not_taken_for_one_of_as_many(tmp_path):
    """Not even where it gives as many features as there are classes."""
    timm = pytest.importorskip("timm")
    module = timm.create_model("test_resnet", num_classes=0)
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match=r"has no classes. Distil its features by --unlabelled"):
        made_for(load_teacher(f"timm:{tmp_path},size={SIDE}"), module.num_features, OWN)


@pytest.mark.real
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2Backbone", "ViTForImageClassification", "ResNetModel"])
def test_models_of_transformers_give_features(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tokens_ = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    options = {**tokens_, "image_size": 16, "patch_size": 4}
    if name == "ResNetModel":
        options = {"depths": [1, 1], "hidden_sizes": [8, 24], "embedding_size": 8, "layer_type": "basic"}
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kind(kind.config_class(**options)).save_pretrained(tmp_path)
    teacher = load_teacher(f"hf:{tmp_path},size=16").build(Teacher, classes=0, preprocessing=OWN)
    outputs = teacher(PIXELS)
    assert outputs.logits.shape == (3, 24)
    assert outputs.features
    if "Classification" not in name:
        with pytest.raises(ValueError, match="--unlabelled"):
            load_teacher(f"hf:{tmp_path}").build(Teacher, classes=3, preprocessing=OWN)
