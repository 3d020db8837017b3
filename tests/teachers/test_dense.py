"""Teachers of every pixel: torchvision's, a user's, several together, and those of transformers under `real`."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import kdnas
from kdnas.blocks.basic import enlarge
from kdnas.data.base import prepare
from kdnas.jobs._preflight.teacher import teacher_findings
from kdnas.jobs._run import build_teacher
from kdnas.preprocessing import Preprocessing
from kdnas.specs import spec
from kdnas.teachers.base import made_for
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import as_frozen, own_teacher, student_teacher, whole, write_zoo_teacher, zoo_network
from tests import toy
from tests.tasks.test_segmentation import shapes

DATA = Preprocessing(height=24, width=33, mean=(0.2,) * 3, std=(0.3,) * 3)
NAMES = ("road", "car", "sky")
PIXELS = torch.rand(2, 3, 24, 33, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "w.pth"
    torch.manual_seed(0)
    torch.save(models.get_model("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=3).state_dict(), path)
    return path


def built(text, classes=3, names=NAMES):
    return made_for(load_teacher(text), classes, DATA, names, dense=True)


def enlarged(logits):
    return F.interpolate(logits, (24, 33), mode="bilinear", align_corners=False)


def test_a_segmenter_of_torchvision_sees_the_whole_image_and_answers_for_the_data_s_pixels(weights):
    teacher = built(f"torchvision:lraspp_mobilenet_v3_large@{weights},size=64")
    own = teacher.preprocessing
    assert (own.height, own.width, own.interpolation) == (64, 88, "bilinear")
    outputs = teacher(PIXELS)
    torch.testing.assert_close(outputs.logits, enlarged(teacher.module(prepare(PIXELS, own))["out"]))
    assert teacher.stages[-1] == "classifier.cbr"
    head, read = teacher.module.classifier, []
    handle = head.low_classifier.register_forward_hook(lambda _, __, output: read.append(output))
    teacher(PIXELS)
    handle.remove()
    # The deep map as the classifier reads it: weighted channel by channel, and enlarged.
    logits = F.interpolate(head.high_classifier(outputs.classified) + read[0], (64, 88), mode="bilinear")
    torch.testing.assert_close(enlarged(logits), outputs.logits)


def test_the_classifier_beside_the_network_in_its_training_is_left_out(tmp_path):
    make, options = models.segmentation.deeplabv3_mobilenet_v3_large, {"weights_backbone": None, "num_classes": 3}
    torch.save(make(**options, aux_loss=True).state_dict(), tmp_path / "w.pth")
    module, own = zoo_network("torchvision", "deeplabv3_mobilenet_v3_large", 3)
    assert module.aux_classifier is None and (own.height, own.width) == (520, 520)
    assert whole(own, DATA, 0, "").width == 715
    teacher = built(f"torchvision:deeplabv3_mobilenet_v3_large@{tmp_path / 'w.pth'},size=32")
    assert teacher(PIXELS).logits.shape == (2, 3, 24, 33) and teacher.stages[-1] == "classifier.3"


def test_other_classes_and_a_part_of_the_image_are_refused(weights):
    text = f"torchvision:lraspp_mobilenet_v3_large@{weights}"
    with pytest.raises(ValueError, match=r"w.pth does not fit the network: its head .* has 3 classes, the data 5"):
        built(text, 5, ())
    with pytest.raises(ValueError, match=r"must see all of them, got crop=0\.5"):
        built(f"{text},crop=0.5")
    chosen = made_for(load_teacher(f"{text},size=32,select=2+0"), 2, DATA, NAMES[:2], dense=True)
    torch.testing.assert_close(chosen(PIXELS).logits, built(f"{text},size=32")(PIXELS).logits[:, [2, 0]])


def test_a_fine_tuned_segmenter_is_read_as_one(tmp_path):
    module, own = zoo_network("torchvision", "lraspp_mobilenet_v3_large", 3, 32)
    source = {"zoo": "torchvision", "name": "lraspp_mobilenet_v3_large", "size": 32}
    write_zoo_teacher(tmp_path / "teacher", module.eval(), source, own, NAMES)
    teacher = student_teacher(str(tmp_path / "teacher"), 3, class_names=NAMES)
    torch.testing.assert_close(teacher(PIXELS).logits, enlarged(module(prepare(PIXELS, own))["out"]))


def test_a_network_for_another_task_is_not_fine_tuned(tmp_path):
    for data, network, other in (
        (f"{__name__}:shapes", "torchvision:resnet18", "torchvision:lraspp_mobilenet_v3_large"),
        ("digits", "torchvision:fcn_resnet50", "torchvision:resnet18"),
    ):
        with pytest.raises(ValueError, match=f"for the data's task, .*, {network} is not. Use {other}"):
            kdnas.fit(data=data, network=network, out=tmp_path / "fit")
    assert not (tmp_path / "fit").exists()


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_the_map_that_is_classified_is_not_that_of_a_second_classifier(name):
    torch.manual_seed(0)
    module = models.get_model(name, weights_backbone=None, num_classes=3, aux_loss=True).eval()
    outputs = as_frozen(module, name, 3, replace(DATA, height=32, width=44), dense=True)(PIXELS)
    logits = F.interpolate(module.classifier[-1](outputs.classified), (32, 44), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged(logits), outputs.logits)


class Own(nn.Module):
    """A user's network: logits of stride 4 in a dictionary."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 8, 3, 2, 1), nn.ReLU()) for c in (3, 8))
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, images):
        for stage in self.stages:
            images = stage(images)
        return {"out": self.classifier(images), "aux": images}


class WithoutGraph(Own):
    """The same in a forward pass that never has a graph."""

    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


def test_a_user_s_network_shows_what_its_classifier_reads_unless_it_hides_it():
    outputs = as_frozen(Own(), "mine", 3, DATA, dense=True)(PIXELS)
    torch.testing.assert_close(enlarged(Own().classifier(outputs.classified)), outputs.logits)
    hidden = as_frozen(WithoutGraph(), "mine", 3, DATA, dense=True)(PIXELS)
    assert hidden.classified is None and torch.equal(hidden.logits, outputs.logits)
    batches = replace_batch(as_frozen(Own(), "mine", 3, DATA, dense=True))(PIXELS)
    assert torch.equal(batches.classified, outputs.classified)


class WithFiner(Own):
    """The same, with the classes of a finer map, which are computed last."""

    def __init__(self):
        super().__init__()
        self.finer = nn.Conv2d(8, 3, 1)

    def forward(self, images):
        fine = self.stages[0](images)
        return enlarge(self.classifier(self.stages[1](fine)), fine) + self.finer(fine)


def test_of_two_maps_that_are_classified_the_deeper_one_is_shown():
    teacher = as_frozen(WithFiner(), "mine", 3, DATA, dense=True)
    assert teacher.position_classifier == "classifier" and teacher(PIXELS).classified.shape == (2, 8, 6, 9)


def replace_batch(teacher):
    """The same teacher, which takes three images at once."""
    teacher.batch = 3
    return teacher


def test_a_user_s_network_answers_for_every_pixel_where_the_task_does():
    teacher = as_frozen(Own(), "mine", 3, DATA, dense=True)
    torch.testing.assert_close(teacher(PIXELS).logits, enlarged(Own()(prepare(PIXELS, DATA))["out"]))
    with pytest.raises(ValueError, match=r"must return logits \[batch, classes\], got \(2, 3, 6, 9\)"):
        as_frozen(Own(), "mine", 3, DATA)
    with pytest.raises(ValueError, match="the teacher mine has 4 classes, the data 3"):
        as_frozen(Own(4), "mine", 3, DATA, NAMES, dense=True)
    one = Preprocessing(height=3, width=4, mean=(0.2,) * 3, std=(0.3,) * 3)
    assert as_frozen(Own(), "mine", 3, one, dense=True)(PIXELS).logits.shape == (2, 3, 24, 33)
    with pytest.raises(ValueError, match=r"height, width\], got \(2, 3\)"):
        as_frozen(lambda images: images.mean((2, 3)), "mine", 3, DATA, dense=True)


def first():
    return Own(2, 0)


def second():
    return Own(2, 1)


def test_the_task_of_the_data_asks_for_it():
    teacher = build_teacher(spec(own_teacher, function=f"{__name__}:first"), shapes())
    assert teacher(shapes().test.images[:2]).logits.shape == (2, 2, 12, 20)
    with pytest.raises(ValueError, match="must give logits for whole images, as the task classification needs"):
        build_teacher(spec(f"{__name__}:frozen"), toy.data())


def test_a_classifier_of_images_is_refused_before_it_is_judged(tmp_path):
    torch.save(models.get_model("mobilenet_v3_small", num_classes=2).state_dict(), tmp_path / "w.pth")
    source = load_teacher(f"torchvision:mobilenet_v3_small@{tmp_path / 'w.pth'},size=32")
    for judge in (build_teacher, teacher_findings):
        with pytest.raises(ValueError, match="must give logits for every pixel, as the task segmentation needs"):
            judge(source, shapes())


def frozen(classes, preprocessing):
    del classes
    return as_frozen(Own(), "mine", 3, preprocessing, dense=True)


@pytest.mark.parametrize("mean", ["ensemble", "ensemble+logits", "ensemble+reliable", "ensemble+random"])
def test_several_of_them_are_joined_pixel_by_pixel(mean):
    text = f"{mean}:{__name__}:first,{__name__}:second"
    joint = made_for(load_teacher(text), 2, DATA, dense=True)
    labels = torch.randint(2, (2, 24, 33), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    logits = torch.stack([enlarged(module(prepare(PIXELS, DATA))["out"]) for module in (first(), second())])
    if mean == "ensemble+logits":
        expected = logits.mean(0)
    elif mean == "ensemble+random":
        expected = logits[0 if torch.allclose(joint(PIXELS, labels).logits, logits[0], atol=1e-5) else 1]
    else:
        shares = torch.full((2, 2, 1, 24, 33), 0.5)
        if mean == "ensemble+reliable":
            wrong = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
            shares = (1 - wrong.softmax(0))[:, :, None]
        expected = (shares * logits.softmax(2)).sum(0).log()
    torch.testing.assert_close(joint(PIXELS, labels).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def segformer(transformers, folder, labels, **processor):
    config = transformers.SegformerConfig(
        num_encoder_blocks=4, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(folder)
    transformers.SegformerImageProcessor(**processor).save_pretrained(folder)
    return model


@pytest.mark.real
@pytest.mark.filterwarnings("default")
def test_a_segformer_s_logits_of_stride_4_are_brought_to_the_labels_size(tmp_path, transformers):
    size = {"height": 64, "width": 96}
    model = segformer(transformers, tmp_path, ("sky", "road", "car"), size=size, image_mean=[0.1, 0.2, 0.3])
    teacher = built(f"hf:{tmp_path}")
    own = teacher.preprocessing
    assert (own.height, own.width) == (64, 96) and own.mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-5)
    with torch.no_grad():
        logits = model(prepare(PIXELS, own)).logits
    assert logits.shape == (2, 3, 16, 24)
    torch.testing.assert_close(teacher(PIXELS).logits, enlarged(logits)[:, [1, 2, 0]], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has 3 classes, the data 5; its names include no class 'tram'"):
        built(f"hf:{tmp_path}", 5, ("sky", "road", "car", "tram", "bus"))
    with pytest.raises(ValueError, match=r"must see all of them, got crop=0\.5"):
        built(f"hf:{tmp_path},crop=0.5")
    assert built(f"hf:{tmp_path},size=48").preprocessing.width == 66  # the data's proportion
    assert teacher.position_classifier == "decode_head.classifier"
    with torch.no_grad():
        torch.testing.assert_close(
            model.decode_head.classifier(teacher(PIXELS).classified), logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.real
@pytest.mark.filterwarnings("default")
def test_a_model_for_other_outputs_is_refused(tmp_path, transformers):
    segformer(transformers, tmp_path, NAMES)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["SegformerForDepthEstimation"]}))
    with pytest.raises(ValueError, match=r"or \.\.\.ForSemanticSegmentation"):
        built(f"hf:{tmp_path}")
