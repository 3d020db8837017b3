"""The experiment on drawn roads, in small: its page, and what it keeps."""

import experiments.lanes as experiment
from kdnas.data.roads import roads
from kdnas.specs import spec
from tests.tasks.test_lanes import space


def test_the_page_has_every_method_and_nothing_is_trained_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROADS", spec(roads, count=20, height=16, width=32))
    monkeypatch.setattr(experiment, "SPACE", space())
    page = tmp_path / "page.md"
    small = ["--steps", "3", "--seeds", "1", "--out", str(tmp_path / "runs"), "--page", str(page)]
    experiment.main(small)
    text = page.read_text()
    assert "14 training, 2 search and 4 test images of 16 x 32" in text
    assert all(f"| {row} |" in text for row in experiment.METHODS) and "+0.00 [" in text
    monkeypatch.setattr(experiment, "one_run", None)
    experiment.main(small)
    assert page.read_text() == text
    assert next(iter(experiment.METHODS)) == experiment.CONTROL
