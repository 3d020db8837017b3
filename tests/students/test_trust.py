import pytest

from kdnas.data.builtin import digits
from kdnas.data.load import load_data
from kdnas.network import Network
from kdnas.settings import CardTeacher, NoTeacher
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.trust import data_of, provenance, source_of
from kdnas.tables import load_space
from kdnas.trust import Untrusted, remember, trusting

SPACE = load_space("toy")
DATA = digits()
TEACHER = spec("kdnas.teachers.zoo:student_teacher", path="teacher")
FOREIGN = spec("tests.toy:data")


def card(**origin):
    space = SPACE.fitted(classes=DATA.classes, image_channels=DATA.channels)
    return Card.of(Network(space.blueprint(space.smallest)), DATA, origin, space.smallest, space)


def test_a_card_that_names_foreign_code_is_refused_whatever_lies_around_it(tmp_path):
    (tmp_path / "run" / "students").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"job": {}, "phases": {}}')
    foreign = card(data=spec("tests.toy:data", other=1).to_json())
    for folder in (tmp_path / "run" / "students" / "a", tmp_path / "elsewhere"):
        with pytest.raises(Untrusted, match=r"student\.json names code .*: tests\.toy:data\. Add --data"):
            source_of(folder, foreign, "data")
    with trusting(True):
        assert source_of(tmp_path, foreign, "data") == spec("tests.toy:data", other=1)


def test_what_was_begun_here_may_be_named(tmp_path):
    remember(FOREIGN.to_json())
    assert source_of(tmp_path, card(data=FOREIGN.to_json()), "data") == FOREIGN


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


@pytest.mark.parametrize(
    "content", [3, "digits", [1], {"make": "kdnas.data.builtin:digits"}, {"make": 3, "arguments": {}}]
)
def test_a_card_whose_data_are_no_spec_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"the data of .*student\.json is damaged: .*\. Add --data\.$"):
        source_of(tmp_path, card(data=content), "data")
