"""Image classifiers of transformers as teachers; the real library is needed for `make test-real` only."""

import importlib
import json

import pytest
import torch

from kdnas.data.base import prepare
from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Teacher
from kdnas.teachers.load import load_teacher

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

DATA = Preprocessing(height=24, width=24, mean=(0.2,) * 3, std=(0.3,) * 3)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "tench, Tinca tinca", 3: "fox"}}


def built(text, classes=4, **options):
    return load_teacher(text).build(Teacher, classes=classes, preprocessing=DATA, **options)


def test_a_missing_library_is_a_sentence(monkeypatch):
    real = importlib.import_module

    def absent(name, *rest):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"transformers is not installed\. Run: pip install 'kdnas\[hf\]'"):
        built("hf:google/vit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:./nowhere", "./nowhere is no folder"),
        ("hf:google/vit,sise=3", "Did you mean 'size'"),
        ("hf:google/vit,size=big", "must be a whole number"),
        ("hf:", "a teacher is fit"),
    ],
)
def test_a_text_that_names_no_model_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(text)


def test_a_folder_is_stored_with_its_whole_path_and_a_name_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_teacher("hf:vit")["path"] == str(tmp_path / "vit")
    assert load_teacher("hf:google/vit,size=32")["path"] == "google/vit"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def vit(transformers, folder, processor=None, **options):
    config = transformers.ViTConfig(**{**SHAPE, **NAMES, "image_size": 32, "patch_size": 8, **options})
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return model


@pytest.mark.real
def test_a_saved_vit_gives_the_librarys_logits_features_and_attention_maps(tmp_path, transformers):
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=3
    )
    model = vit(transformers, tmp_path, processor)
    teacher = built(f"hf:{tmp_path}", class_names=("cat", "dog", "tench", "fox"))
    own = teacher.preprocessing
    assert (own.height, own.width, own.interpolation) == (32, 32, "bicubic")
    assert own.mean == pytest.approx((0.1, 0.2, 0.3), abs=1e-5) and own.std == pytest.approx((0.5, 0.6, 0.7), abs=1e-5)
    pixels = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(prepare(pixels, own), output_hidden_states=True, output_attentions=True)
    asked = teacher.with_attentions()(pixels)
    torch.testing.assert_close(asked.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(asked.features, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(asked.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.real
def test_a_processor_is_followed_whatever_its_options(tmp_path, transformers):
    cropping = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    vit(transformers, tmp_path / "crop", cropping)
    teacher = built(f"hf:{tmp_path / 'crop'}")
    assert round(32 / teacher.crop) == 40 and teacher.preprocessing.height == 32
    assert built(f"hf:{tmp_path / 'crop'},crop=1").crop == 1
    plain = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False)
    vit(transformers, tmp_path / "bytes", plain)
    assert built(f"hf:{tmp_path / 'bytes'}").preprocessing.std == pytest.approx((1 / 255,) * 3, abs=1e-6)
    assert built(f"hf:{tmp_path / 'bytes'},normalise=data").preprocessing.mean == DATA.mean


@pytest.mark.real
def test_blue_green_red_is_fed_as_such(tmp_path, transformers):
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], **NAMES
    )
    model = transformers.MobileViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    transformers.MobileViTImageProcessor(size={"shortest_edge": 64}, do_center_crop=False).save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels.flip(1)).logits
    torch.testing.assert_close(built(f"hf:{tmp_path}")(pixels).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.real
def test_without_a_processor_the_kinds_usual_feeding_is_named(tmp_path, transformers):
    vit(transformers, tmp_path)
    teacher = built(f"hf:{tmp_path}")
    assert teacher.preprocessing.height == 32 and teacher.preprocessing.mean == pytest.approx((0.5,) * 3, abs=1e-5)
    assert teacher.note == "no preprocessor_config.json: as a ViTImageProcessor does by default"


@pytest.mark.real
def test_classes_are_matched_by_the_names_of_the_configuration(tmp_path, transformers):
    vit(transformers, tmp_path)
    whole, some = built(f"hf:{tmp_path}"), built(f"hf:{tmp_path}", 2, class_names=("Fox", "tench"))
    pixels = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(some(pixels).logits, whole(pixels).logits[:, [3, 2]])
    assert "2 of its 4 classes, by their names" in some.note
    with pytest.raises(ValueError, match=r"has 4 classes, the data 2; its names include no class 'owl'"):
        built(f"hf:{tmp_path}", 2, class_names=("fox", "owl"))
    chosen = built(f"hf:{tmp_path},select=3+dog", 2)
    torch.testing.assert_close(chosen(pixels).logits, whole(pixels).logits[:, [3, 1]])


@pytest.mark.real
def test_what_is_no_classifier_or_needs_code_or_pickles_is_refused(tmp_path, transformers):
    transformers.ViTModel(transformers.ViTConfig(**SHAPE, image_size=32, patch_size=8)).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"must be an image classifier, it is a ViTModel"):
        built(f"hf:{tmp_path / 'b'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be loaded .*It must hold config.json and model.safetensors"):
        built(f"hf:{tmp_path / 'empty'}")
    model = vit(transformers, tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        built(f"hf:{tmp_path / 'p'}")
    vit(transformers, tmp_path / "code")
    path = tmp_path / "code" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    path.write_text(json.dumps(config))
    (tmp_path / "code" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        built(f"hf:{tmp_path / 'code'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.real
def test_weights_that_are_missing_are_counted(tmp_path, transformers):
    from safetensors.torch import load_file, save_file

    vit(transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights of 1 tensors of its ViTFor.*such as classifier.weight"):
        built(f"hf:{tmp_path}")


@pytest.mark.real
def test_a_name_that_cannot_be_downloaded_is_a_sentence(monkeypatch, transformers):
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf:nobody/nothing cannot be loaded .*hf download NAME --local-dir FOLDER"):
        built("hf:nobody/nothing")
