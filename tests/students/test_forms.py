import dataclasses
import errno
import json
import random
import re
from pathlib import Path

import onnxruntime
import pytest
import torch

import kdnas.runtimes
from kdnas.costs.count import cost
from kdnas.data.base import normalise
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.spaces.vit import ViT
from kdnas.students.card import Card
from kdnas.students.folder import add_forms, read_student, write_student
from kdnas.students.forms import FORMS, Interface, forms_table
from kdnas.students.stock import why_not_timm
from tests.students.test_folder import PREPROCESSING, SPACE, card_of, trained

VIT = ViT(
    classes=5,
    resolutions=(16,),
    patch=4,
    widths=(16,),
    depths=(2,),
    heads=(1, 2),
    ratios=(2.0,),
    head_width=8,
    reach=0,
    cuts=(1,),
    drop_path=0.0,
    pool="class",
    norm_eps=1e-6,
)


def with_changes(**changes):
    space = dataclasses.replace(VIT, **changes)
    return space.blueprint(space.uniform(2))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A student without any other form."""
    folder, blueprint = tmp_path_factory.mktemp("forms") / "bare", SPACE.blueprint(SPACE.smallest)
    write_student(folder, trained(blueprint), card_of(blueprint, architecture=SPACE.smallest), forms=())
    return folder


def transformer(heads=2, **changes):
    """A transformer with weights of the size that training gives, and its card."""
    space = dataclasses.replace(VIT, **changes)
    blueprint = space.blueprint(space.uniform(heads))
    network = Network(blueprint).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    card = Card(
        architecture=None,
        space=None,
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=Preprocessing(height=16, width=16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)),
        class_names=tuple("abcde"),
    )
    return network, card


def test_a_program_and_a_graph_take_any_batch_and_are_recorded(bare, tmp_path):
    records = add_forms(bare, tmp_path / "more", ("pt2", "onnx"), Interface("normalised", "probabilities"))
    assert list(records) == ["python", "pt2", "onnx"] and "student.pt2" in forms_table(records)
    images = torch.rand(5, 3, 8, 8)
    network, card = read_student(tmp_path / "more")
    assert card.forms == records
    inputs = normalise(images, PREPROCESSING)
    expected = network(inputs).logits.softmax(1)
    program = torch.export.load(tmp_path / "more" / "student.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "more" / "student.onnx")
    (probabilities,) = session.run(["probabilities"], {"images": inputs.numpy()})
    for outputs in (program(inputs), torch.from_numpy(probabilities)):
        assert torch.allclose(outputs, expected, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(card.class_names)
    assert (metadata["input"], metadata["output"]) == ("normalised", "probabilities")
    for name, file in (("pt2", "student.pt2"), ("onnx", "student.onnx")):
        record, path = records[name], tmp_path / "more" / file
        assert record["bytes"] == path.stat().st_size and record["milliseconds"] > 0
        assert record["input"] == "normalised" and record["difference"] <= 1e-5
        assert str(Path.cwd()).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()


def test_forms_that_are_there_stay_and_a_failure_leaves_nothing_of_its_form(bare, tmp_path, monkeypatch, log):
    def half(draft):
        (draft.folder / "student.pte").write_bytes(b"half")
        raise RuntimeError("no kernel for this\nline")

    monkeypatch.setitem(FORMS, "pte", FORMS["pte"]._replace(extra="", write=half))
    monkeypatch.setitem(FORMS, "pt2", FORMS["pt2"]._replace(write=lambda draft: _plain(draft)))
    folder = tmp_path / "student"
    add_forms(bare, folder, ("pt2",))
    records = add_forms(folder, folder, ("pte",))
    assert records["pt2"]["file"] == "student.pt2" and (folder / "student.pt2").read_bytes() == b"whole"
    assert records["pte"] == {"problem": "RuntimeError: no kernel for this line"}
    assert not (folder / "student.pte").exists() and "student.pte is left out: RuntimeError" in log.text
    assert add_forms(folder, folder, ())["pt2"] == records["pt2"]

    def full(draft):
        raise OSError(errno.ENOSPC, "No space left on device", "student.pte")

    monkeypatch.setitem(FORMS, "pte", FORMS["pte"]._replace(extra="", write=full))
    with pytest.raises(OSError, match="No space left"):
        add_forms(folder, folder, ("pte",))


def _plain(draft):
    (draft.folder / "student.pt2").write_bytes(b"whole")
    return {"file": "student.pt2", "bytes": 5}


def test_what_is_missing_or_unknown_is_said_before_anything_is_written(bare, tmp_path, monkeypatch, log):
    with pytest.raises(ValueError, match=r"a form must be one of onnx, pt2, .*, got 'onx'\. Did you mean 'onnx'\?"):
        add_forms(bare, tmp_path / "x", ("onx",))
    with pytest.raises(ValueError, match="`output` must be logits or probabilities or coarse_logits, got 'classes'"):
        Interface(output="classes")
    with pytest.raises(ValueError, match="logits or probabilities for a network of whole images, got coarse_logits"):
        add_forms(bare, tmp_path / "coarse", ("pt2",), Interface(output="coarse_logits"))
    monkeypatch.setattr(kdnas.runtimes, "_is_installed", lambda module: module == "onnx")
    message = r"needs the extra 'onnx': onnxscript and onnxruntime are not installed\. Run: pip install 'kdnas\[onnx\]'"
    with pytest.raises(ValueError, match=message):
        add_forms(bare, tmp_path / "x", ("onnx",))
    assert not (tmp_path / "x").exists()
    network, card = read_student(bare)
    write_student(tmp_path / "y", network, card)
    assert not (tmp_path / "y" / "student.onnx").exists()
    assert "student.onnx is left out: onnxscript and onnxruntime are not installed" in log.text
    assert "kdnas export STUDENT --forms onnx" in log.text


def test_integers_need_data_and_pixels(bare, tmp_path):
    for interface, reason in ((Interface("normalised"), "takes pixels"), (Interface(), "no data is known")):
        records = add_forms(bare, tmp_path / "a", ("int8",), interface)
        assert reason in records["int8"]["problem"]


def test_timm_loads_a_transformer_of_equal_blocks(tmp_path):
    timm = pytest.importorskip("timm")
    for number, changes in enumerate(({}, {"norm_eps": 1e-5, "pool": "mean"})):
        network, card = transformer(**changes)
        folder = tmp_path / str(number)
        write_student(folder, network, card, forms=("timm",))
        record = read_student(folder)[1].forms["timm"]
        assert record["file"] == "model.safetensors" and record["difference"] <= 1e-5
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = torch.randn(2, 3, 16, 16)
        with torch.inference_mode():
            assert torch.allclose(model(images), network(images).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("blueprint", "reason"),
    [
        (SPACE.blueprint(SPACE.smallest), "with the layer kdnas.blocks.basic:ConvNormAct"),
        (VIT.blueprint(VIT.uniform(1)), "1 x 8 for 16"),
        (VIT.blueprint(VIT.mutate(VIT.uniform(1), random.Random(1))), "`heads`|1 x 8"),
        (with_changes(norm_eps=1e-3), r"constant 1e-6 or 1e-5, these \[0\.001\]"),
        (with_changes(reach=3), "no relative positions"),
    ],
)
def test_a_network_that_timm_has_not_says_why(blueprint, reason):
    assert re.search(reason, why_not_timm(blueprint))


def test_the_model_card_has_controls_and_no_code_of_names(tmp_path, bare):
    from kdnas.students.readme import readme_text

    network, card = read_student(bare)
    del network
    controls = {"distillation": {"sentence": "It helped | by <b>one</b> point."}, "odd": 3}
    text = readme_text(card, controls)
    assert text.startswith("---\nlibrary_name: kdnas\n")
    assert "- It helped \\| by &lt;b>one&lt;/b> point." in text
    assert "No controls are recorded" in readme_text(card, {})
    assert "pipeline_tag: image-classification\n" in text and "# An image classifier" in text
    own = dataclasses.replace(card, pipeline="depth-estimation")
    assert Card.from_json(own.to_json()) == own and "pipeline" not in card.to_json()
    assert "pipeline_tag: depth-estimation\n" in readme_text(own, {}) and "# A network" in readme_text(own, {})
    assert "1e" not in text.split("## Forms")[0] and "`student.py`" in text


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_executorch_runs_a_student(bare, tmp_path):
    from executorch.runtime import Runtime

    record = add_forms(bare, tmp_path / "a", ("pte",))["pte"]
    assert record["difference"] <= 1e-4 and record["batch"] == 1 and record["milliseconds"] > 0
    method = Runtime.get().load_program(tmp_path / "a" / "student.pte").load_method("forward")
    image = torch.rand(1, 3, 8, 8)
    network, _ = read_student(bare)
    with torch.inference_mode():
        assert torch.allclose(method.execute([image])[0], network(normalise(image, PREPROCESSING)).logits, atol=1e-3)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_timm_loads(tmp_path):
    from transformers import AutoModelForImageClassification

    network, card = transformer()
    write_student(tmp_path / "a", network, card, forms=("timm",))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a").eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(model(images).logits, network(images).logits, atol=1e-5)
    assert model.config.id2label[4] == "e"
