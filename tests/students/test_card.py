"""A card as JSON and back: every key, and every way in which a file may be another."""

import json

import pytest

from kdnas.costs.count import cost
from kdnas.preprocessing import Preprocessing
from kdnas.runs.files import FORMAT
from kdnas.students.card import Card
from kdnas.tables import load_space, table_of

SPACE = load_space("toy")
BLUEPRINT = SPACE.blueprint(SPACE.largest)
PREPROCESSING = Preprocessing(height=10, width=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
NAMES = tuple(f"class {i}" for i in range(10))


def card(**changes):
    fields = {"architecture": SPACE.largest, "space": table_of(SPACE), "blueprint": BLUEPRINT, "cost": cost(BLUEPRINT)}
    return Card(**(fields | {"preprocessing": PREPROCESSING, "class_names": NAMES, "origin": {"place": 1}} | changes))


def test_the_json_object_tells_how_to_use_the_files():
    content = card().to_json()
    assert list(content) == [
        "format",
        "architecture",
        "space",
        "cost",
        "input",
        "output",
        "preprocessing",
        "class_names",
        "origin",
        "forms",
        "blueprint",
    ]
    assert content["format"] == FORMAT
    assert content["architecture"] == dict(SPACE.largest) and content["space"] == table_of(SPACE)
    assert content["cost"] == {"params": cost(BLUEPRINT).params, "macs": cost(BLUEPRINT).macs}
    assert content["input"]["name"] == "images" and content["input"]["shape"] == ["batch", 3, 10, 8]
    assert content["input"]["dtype"] == "float32"
    assert content["output"] == {"name": "logits", "shape": ["batch", 10]}
    expected = {"height": 10, "width": 8, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
    assert content["preprocessing"] == expected
    assert content["class_names"] == list(NAMES) and content["origin"] == {"place": 1}
    assert content["blueprint"] == BLUEPRINT.to_json()


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": None}, {"space": None}, {"origin": {}}, {"class_names": NAMES[:1]}]
)
def test_a_card_survives_its_text(changes):
    own = card(**changes)
    text = own.to_text()
    assert text.endswith("}\n") and text.startswith(f'{{\n  "format": {FORMAT},')
    assert Card.from_json(json.loads(text)) == own
    assert (own.to_json()["architecture"] is None) == (own.architecture is None)
    assert (own.to_json()["space"] is None) == (own.space is None)


def test_names_are_written_as_they_are():
    assert "Käfer" in card(class_names=("Käfer", "b")).to_text()


def test_without_an_origin_it_is_empty():
    fields = {name: getattr(card(), name) for name in Card.__dataclass_fields__ if name != "origin"}
    assert Card(**fields).origin == {}


@pytest.mark.parametrize("origin", [{"a": float("inf")}, {"a": object()}, {1: "a"}, {"a": (1,)}, {"a": {2: 3}}])
def test_an_origin_must_be_plain_json(origin):
    with pytest.raises(ValueError, match=r"`Card\.origin` must be plain JSON"):
        card(origin=origin).to_text()


def test_channels_and_names_must_fit():
    with pytest.raises(ValueError, match="each of the network's 3 channels, got 4"):
        card(preprocessing=Preprocessing(height=8, width=8, mean=(0.5,) * 4, std=(0.5,) * 4))
    with pytest.raises(ValueError, match="`class_names` must not be empty"):
        card(class_names=())


def read(**changes):
    content = {**card().to_json(), **changes}
    return Card.from_json({name: value for name, value in content.items() if value is not ...})


@pytest.mark.parametrize("value", [[], "text", None])
def test_a_card_is_an_object(value):
    with pytest.raises(ValueError, match=rf"student\.json must be a JSON object, got {type(value).__name__}"):
        Card.from_json(value)


@pytest.mark.parametrize("value", [0, FORMAT + 1, "1", None, ...])
def test_another_format_is_refused(value):
    shown = None if value is ... else value
    with pytest.raises(ValueError, match=f"`format` must be 1 to {FORMAT}, got {shown!r}"):
        read(format=value)


@pytest.mark.parametrize(
    "name", sorted(Card.__dataclass_fields__.keys() - {"forms", "answers", "measure", "image_outputs", "pipeline"})
)
def test_every_field_but_the_forms_of_older_cards_is_required(name):
    with pytest.raises(ValueError, match=f"`{name}` is missing"):
        read(**{name: ...})


def test_what_describes_the_files_is_not_required():
    assert read(input=..., output=...) == card()


def test_an_unknown_key_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown key 'outputs'.*'output'"):
        read(outputs={})


@pytest.mark.parametrize(
    ("name", "kind"), [("class_names", "list"), ("origin", "dict"), ("blueprint", "dict"), ("cost", "dict")]
)
def test_a_value_of_another_kind_is_named(name, kind):
    with pytest.raises(ValueError, match=f"`{name}` must be a JSON {kind}, got 'x'"):
        read(**{name: "x"})


@pytest.mark.parametrize("changes", [{"cost": {"params": 1}}, {"architecture": 3}, {"blueprint": {"image": [3, 8, 8]}}])
def test_a_value_of_another_form_is_refused(changes):
    with pytest.raises(ValueError, match=r"a value has the wrong form \("):
        read(**changes)


@pytest.mark.parametrize("forms", ["x", [1], {"onnx": 3}, {"onnx": {"file": 3}}, {"onnx": {"file": ["student.onnx"]}}])
def test_forms_that_are_none_are_refused(forms):
    with pytest.raises(ValueError, match="`forms` must be a JSON dict of dicts, with texts for files"):
        read(forms=forms)
