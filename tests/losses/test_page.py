"""docs/losses.md holds one row for every loss in the folder, and agrees with the class."""

import re
from pathlib import Path

import pytest

from kdnas.losses.base import Loss
from kdnas.specs import algorithms, resolve

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
FOUND = algorithms("kdnas.losses")
ROWS = {
    match[1]: [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in PAGE.splitlines()
    if (match := re.match(r"\| `(\w+)`", line))
}


def test_every_loss_has_one_row_and_every_row_a_loss():
    assert sorted(ROWS) == sorted(FOUND)
    assert len(re.findall(r"^\| `\w+`", PAGE, re.MULTILINE)) == len(ROWS)


def test_every_row_fills_every_column():
    header = next(line for line in PAGE.splitlines() if line.startswith("| Loss |"))
    for name, cells in ROWS.items():
        assert len(cells) == header.count("|") - 1 and all(cells), name


@pytest.mark.parametrize("name", sorted(FOUND))
def test_the_row_agrees_with_the_class(name):
    make = resolve(FOUND[name])
    _, kind, reads, _, _, weight, stages, _ = ROWS[name]
    assert kind == FOUND[name].split(".")[2]
    assert reads == ", ".join(make.needs)
    assert float(re.match(r"[\d.]+", weight)[0]) == make.weight
    if isinstance(make, type) and issubclass(make, Loss):
        for stage in make().stages():
            assert stage.name in stages, f"{name}: the stage {stage.name!r} is not in {stages!r}"
