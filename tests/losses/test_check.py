import math

import pytest

from kdnas.losses import check
from kdnas.losses.base import Loss
from kdnas.losses.check import GoldenCheck, agrees, describe, losses, table, value
from kdnas.losses.relation.relational_distance import RelationalDistance
from kdnas.losses.response.cross_entropy import CrossEntropy


class Broken(Loss):
    """Raises, as a loss might on a torch build that lacks what it calls."""

    golden = 1.0

    def compute(self, student, teacher, labels, at):
        raise RuntimeError("no such operator")


class Drifted(Loss):
    """Half of what it should be."""

    golden = 2.0

    def compute(self, student, teacher, labels, at):
        return student.logits.sum() * 0 + 1


def test_losses_are_found_by_their_files_names():
    found = losses()
    assert found["relational_distance"] is RelationalDistance
    assert found["cross_entropy"] is CrossEntropy
    assert not {"base", "check", "example"} & set(found)


def test_the_check_says_which_losses_have_their_known_value(monkeypatch):
    known = {"relational_distance": RelationalDistance, "broken": Broken, "drifted": Drifted}
    monkeypatch.setattr(check, "losses", lambda: known)
    good, broken, drifted = check.check()
    assert good.matches and good.error == "" and good.value == value(RelationalDistance)
    assert not broken.matches and math.isnan(broken.value) and broken.error == "RuntimeError: no such operator"
    assert drifted == GoldenCheck("drifted", 2.0, 1.0, False, "")


@pytest.mark.parametrize(
    ("golden", "found", "same"),
    [(1.0, 1 + 1e-11, True), (1.0, 1 + 1e-7, False), (0.0, 1e-15, True), (1e-6, 2e-6, False), (math.nan, 1.0, False)],
)
def test_values_agree_to_nine_digits(golden, found, same):
    assert agrees(golden, found) is same


def test_a_loss_is_described_from_its_own_code():
    rows = {row.name: row for row in describe()}
    assert set(rows) == set(losses())
    row = rows["relational_distance"]
    assert (row.kind, row.needs, row.weight) == ("relation", "features", 25.0)
    assert row.summary == RelationalDistance.__doc__.splitlines()[0]
    assert row.source.startswith("Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019")
    assert "Differs" not in row.source


def test_every_loss_has_a_summary_and_a_source():
    for row in describe():
        assert row.summary and row.source, row.name
        assert row.needs, row.name


def test_the_table_has_aligned_columns_and_shouts_where_a_value_is_off():
    text = table(
        [GoldenCheck("one", 1.5, 1.5, True, ""), GoldenCheck("another", 2.0, math.nan, False, "ValueError: odd")]
    )
    lines = text.splitlines()
    assert lines[0].split() == ["name", "golden", "value", "matches", "error"]
    assert lines[1].split() == ["one", "1.5", "1.5", "yes"]
    assert lines[2].split() == ["another", "2", "nan", "NO", "ValueError:", "odd"]
    assert len({line.index(word) for line, word in zip(lines, ("golden", "1.5", "2 "), strict=True)}) == 1
    assert table([]) == "no losses found"
