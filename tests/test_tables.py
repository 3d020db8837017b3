"""Tables to values and back, and errors a person can act on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdnas.jobs._arguments import load_settings
from kdnas.settings import Experiment, Recipe, Train
from kdnas.space import SearchSpace
from kdnas.spaces.toy import Toy
from kdnas.specs import Spec, find_spec, spec
from kdnas.tables import load_space, shared_folder, space_from_table, structure, table_of, unstructure


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_space_is_loaded_by_name_or_path(tmp_path):
    assert load_space("toy") == load_space(shared_folder("search_spaces") / "toy.toml")
    space = load_space(write(tmp_path, 'family = "toy"\nwidths = [2, 4, 6]'))
    assert space == Toy(name="mine", widths=(2, 4, 6))


def test_a_table_may_name_its_space_itself(tmp_path):
    assert load_space(write(tmp_path, 'family = "toy"\nname = "other"')).name == "other"


def test_a_table_survives_the_round_trip_through_json():
    space = load_space("digits")
    table = json.loads(json.dumps(table_of(space)))
    assert table["family"] == "mbconv" and table["stages"][0]["width"] == [8, 16]
    assert space_from_table(table) == space


EXPERIMENTS = [
    path.stem
    for path in sorted(shared_folder("experiments").glob("*.py"))
    if "def experiment()" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_survives_the_round_trip_through_json(name, monkeypatch):
    monkeypatch.setenv("KDNAS_CIFAR10", "data/cifar10")
    experiment = load_settings(name, object)
    content = json.loads(json.dumps(experiment.to_json()))
    if isinstance(experiment, Experiment):
        assert content["train"]["space"] == table_of(experiment.train.space)
        assert Experiment.from_json(content) == experiment
    else:
        assert structure(*content.values(), type(experiment)) == experiment


def test_spaces_and_specs_inside_other_values_have_their_own_json():
    train = Train(space=Toy(name="x"), data=spec("a:b", size=8), distiller=None)
    content = unstructure(train)
    assert list(content["space"])[:2] == ["family", "name"] and content["space"]["family"] == "toy"
    assert content["data"] == {"make": "a:b", "arguments": {"size": 8}} and content["distiller"] is None
    assert structure(content, Train) == train
    assert structure([content["space"]], list[SearchSpace]) == [train.space]
    assert structure({"x": None}, dict[str, Spec | None]) == {"x": None}
    with pytest.raises(ValueError, match=r"space there is no family 'tyo'"):
        structure(content | {"space": {"family": "tyo"}}, Train)
    with pytest.raises(ValueError, match="unknown key 'depth'"):
        structure(content | {"space": {"family": "toy", "depth": [1]}}, Train)
    with pytest.raises(ValueError, match="a spec has the keys make and arguments"):
        structure(content | {"data": {"make": "a:b"}}, Train)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widths = [4, 8]", 'a search space must have the key `family`, such as family = "mbconv"'),
        ('family = "tyo"', "there is no family 'tyo'. Did you mean 'toy'?"),
        ('family = "toy"\nwidth = [4]', "unknown key 'width'. Did you mean 'widths'?"),
        ('family = "toy"\nwidths = [4, "8"]', "widths[1] must be an int, got '8'"),
        ('family = "toy"\nwidths = [4, 8.0]', "widths[1] must be an int, got 8.0"),
        ('family = "toy"\nwidths = 8', "widths must be a list, got a value of type int"),
        ('family = "mbconv"\nstem = 8\nstages = [5]', "stages[0] must be a table, got a value of type int"),
        ('family = "toy"\nnum_stages = true', "num_stages must be an int, got True"),
        ('family = "mbconv"\nstem = {width = [8]}\nstages = [{width = [8], kernal = [3]}]', "stages[0]: unknown key"),
        ('family = "mbconv"\nstages = [{width = [8]}]', "stem is missing"),
        ('family = "toy"\nwidths = [4]\ndepths = [1]', "must have at least two architectures, got 1"),
        ("family = ", "is not valid TOML"),
        ('family = "no.such.module:Space"', "names code that is none of kdnas's algorithms: no.such.module:Space"),
        ('family = "kdnas.space:Layer"', "names code that is none of kdnas's algorithms: kdnas.space:Layer"),
        ('family = "kdnas.space:layer"', "names code that is none of kdnas's algorithms: kdnas.space:layer"),
        ('family = "kdnas.spaces.toy:Toi"', "names code that is none of kdnas's algorithms: kdnas.spaces.toy:Toi"),
    ],
)
def test_a_wrong_table_is_refused_with_its_path_and_the_place(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_space(path)
    assert str(caught.value).startswith(str(path))


def test_two_mistakes_are_reported_at_once(tmp_path):
    path = write(tmp_path, 'family = "toy"\nwidth = [4]\nnum_stages = "2"')
    with pytest.raises(ValueError) as caught:
        load_space(path)
    assert "num_stages must be an int, got '2'" in str(caught.value)
    assert "unknown key 'width'" in str(caught.value)


def test_an_unknown_name_offers_the_nearest_and_a_missing_file_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no search space 'alphanett'"):
        load_space("alphanett")
    with pytest.raises(ValueError, match="Did you mean 'alphanet'"):
        load_space("alphanett")
    with pytest.raises(ValueError, match="there is no file"):
        load_space(tmp_path / "none.toml")


def test_a_table_that_begins_with_the_mark_of_windows_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbffamily = "toy"\nwidths = [4, 8]\n')
    assert load_space(path).widths == (4, 8)


def test_binary_content_is_no_table(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_space(path)


def test_a_family_may_be_a_class_of_ones_own_and_keeps_its_path():
    space = space_from_table({"family": "kdnas.spaces.toy:Toy", "name": "x"})
    assert space == Toy(name="x")
    assert table_of(space)["family"] == "toy"


def test_what_people_write_is_read_as_utf_8_whatever_the_system_s_encoding_is():
    code = (
        "from kdnas.settings import systems; from kdnas.jobs.listing import listing; "
        "from kdnas.tables import load_space; systems(); listing('experiments'); load_space('toy')"
    )
    strict = [sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-c", code]
    done = subprocess.run(strict, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_shared_folders_are_found_in_a_checkout():
    assert (shared_folder("search_spaces") / "toy.toml").is_file()
    assert shared_folder("search_spaces") == Path(__file__).parents[1] / "search_spaces"


def test_a_field_that_was_added_later_is_not_written_at_its_default():
    assert "per_process" not in unstructure(Recipe())
    written = unstructure(Recipe(per_process="statistics"))
    assert structure(written, Recipe) == Recipe(per_process="statistics")
    assert structure(unstructure(Recipe()), Recipe) == Recipe()


@pytest.mark.parametrize(
    "call", [load_space, lambda name: space_from_table({"family": name}), lambda name: find_spec("kdnas.losses", name)]
)
def test_a_name_of_thousands_of_letters_is_shortened(call):
    with pytest.raises(ValueError, match="999") as refusal:
        call("9" * 5000)
    assert len(str(refusal.value)) < 500
