import json

import pytest

from kdnas.data.builtin import digits
from kdnas.data.load import load_data
from kdnas.network import Network
from kdnas.settings import CardTeacher, NoTeacher
from kdnas.specs import Spec, spec
from kdnas.students.card import Card
from kdnas.students.trust import data_of, is_trusted, provenance, source_of
from kdnas.tables import load_space

SPACE = load_space("toy")
DATA = digits()
TEACHER = spec("kdnas.teachers.zoo:student_teacher", path="teacher")
FOREIGN = spec("tests.toy:data")


def card(**origin):
    space = SPACE.fitted(classes=DATA.classes, image_channels=DATA.channels)
    return Card.of(Network(space.blueprint(space.smallest)), DATA, origin, space.smallest, space)


def in_a_run(root):
    (root / "students" / "a").mkdir(parents=True)
    (root / "run.json").write_text(json.dumps({"job": {}, "phases": {}}))
    return root / "students" / "a"


@pytest.mark.parametrize("module", ["kdnas.data", "kdnas.data.builtin", "kdnas.data.load"])
def test_a_maker_is_trusted_under_every_path_that_reaches_it(module):
    assert is_trusted(spec(f"{module}:digits"), "data")


def test_every_kind_of_data_that_a_person_types_is_trusted(tmp_path):
    for text in ("digits", "strong:digits", *(f"{kind}:{tmp_path}" for kind in ("folder", "cifar10", "cifar100"))):
        assert is_trusted(load_data(text), "data"), text


def test_teachers_are_trusted_where_every_member_is():
    ensemble = spec("kdnas.teachers:several_teachers", kind="ensemble", members=(TEACHER, TEACHER))
    assert is_trusted(TEACHER, "teacher") and is_trusted(ensemble, "teacher")
    assert not is_trusted(ensemble.replace(members=(TEACHER, FOREIGN)), "teacher")
    assert not is_trusted(TEACHER, "data") and not is_trusted(load_data("digits"), "teacher")
    assert not is_trusted(spec("kdnas.teachers:own_teacher", module=FOREIGN), "teacher")


@pytest.mark.parametrize(
    "make", ["subprocess:call", "kdnas.data.load:Path", "kdnas.data:missing", "kdnas.__main__:main", "kdnas.database:x"]
)
def test_other_makers_are_not_trusted_and_not_imported(make):
    assert not is_trusted(Spec(make), "data")


def test_asking_imports_nothing_of_the_student(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_trusted(Spec("evil:data"), "data")


def test_a_run_may_name_what_a_student_from_elsewhere_may_not(tmp_path):
    foreign = card(data=FOREIGN.to_json())
    assert source_of(in_a_run(tmp_path / "run"), foreign, "data") == FOREIGN
    with pytest.raises(ValueError, match=r"student\.json names tests\.toy:data as its data; .*Add --data"):
        source_of(tmp_path / "elsewhere", foreign, "data")


def test_arguments_come_before_the_card(tmp_path):
    own = card(data=load_data("digits").to_json(), teacher=TEACHER.to_json())
    assert provenance(tmp_path, own, None, CardTeacher()) == (load_data("digits"), TEACHER)
    assert provenance(tmp_path, own, FOREIGN, FOREIGN) == (FOREIGN, FOREIGN)
    assert provenance(tmp_path, own, None, NoTeacher()) == (load_data("digits"), None)
    assert provenance(tmp_path, card(data=own.origin["data"]), None, CardTeacher())[1] is None


def test_a_card_without_data_asks_for_it(tmp_path):
    with pytest.raises(ValueError, match=r"names no data set\. Add --data"):
        data_of(tmp_path, card(), None)
    assert data_of(tmp_path, card(), FOREIGN) == FOREIGN
