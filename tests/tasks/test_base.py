"""A task that is defined here passes train, search, finals, export and report with no other file changed."""

import dataclasses
import json
import runpy
from collections.abc import Sequence
from typing import Any, ClassVar, final

import numpy as np
import pytest
import torch
from torch import Tensor

from kdnas.data.base import Data, TensorImages
from kdnas.distillers.mutual import Mutual
from kdnas.distillers.sandwich import Sandwich
from kdnas.jobs._run import Run, insisting
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs
from kdnas.report import write_report
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, Finals
from kdnas.specs import Spec, spec
from kdnas.statistics import difference_interval
from kdnas.tasks import Task
from kdnas.tasks.classification import CLASSIFICATION
from kdnas.tasks.labels import as_tensor
from kdnas.testing import TaskContract
from tests import toy


@final
class Squares(Loss):
    """Squared differences from the labels, or from the teacher."""

    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, *, of: str = "teacher") -> None:
        super().__init__()
        self.of = of

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        other = teacher.logits if self.of == "teacher" else labels[:, None]
        return (student.logits - other).square().mean()


@final
@dataclasses.dataclass(frozen=True)
class Brightness(Task):
    """A number per image, measured by the explained share of its variance."""

    name: ClassVar[str] = "brightness"
    measure: ClassVar[str] = "R2"
    answers: ClassVar[Any] = "values"

    @property
    def losses(self) -> dict[str, Spec]:
        teacher = spec(Squares)
        return {
            "cross_entropy": spec(Squares, of="labels"),
            "soft_targets": teacher,
            "alpha_divergence": teacher,
        }

    def as_labels(self, labels: Any, count: int) -> Tensor:
        numbers = as_tensor(labels, "labels").float()
        if tuple(numbers.shape) != (count,):
            raise ValueError(f"`labels` must be one number per image, got {tuple(numbers.shape)}.")
        return numbers

    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        if not torch.isfinite(labels).all():
            raise ValueError(f"labels of the {part} part must be finite.")

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        squares = (logits[:, 0] - labels).square()
        return squares if reduction == "none" else squares.mean()

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        error = (logits[:, 0] - labels).square()
        return torch.stack([error, labels, labels.square()], 1).double()

    def quality(self, means: Any) -> Any:
        return 1 - means[..., 0] / (means[..., 2] - means[..., 1] ** 2)

    def details(self, means: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        return {"mean squared error": float(means[0])}


def _part(name: str) -> TensorImages:
    labels = torch.linspace(-1, 1, 30)
    images = toy.part(30, name).images * 0.3 + 0.3 * (labels[:, None, None, None] + 1)
    return TensorImages(images.clamp(0, 1), labels, Brightness())


def numbers() -> Data:
    return Data(_part("train"), _part("search"), _part("test"), ("brightness",), task=Brightness())


def experiment() -> Experiment:
    base = toy.experiment()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, data=spec("tests.tasks.test_base:numbers")),
        finals=Finals(finalists=2, controls=("labels", "random"), seeds=2),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "numbers"
    with insisting(True):
        run = train(experiment(), path)
        search(run, run.experiment.search)
        finals(run, run.experiment.finals, run.experiment.retrain)
    write_report(path)
    return path


def test_a_task_of_a_test_passes_train_search_finals_and_report(folder):
    results = RunFolder(folder).results()
    assert {row["name"] for row in results["rows"]} >= {"teacher", "student", "control"}
    for row in results["rows"]:
        assert row["measures"]["mean squared error"] > 0 and row["accuracy"] < 1 and "balanced_accuracy" not in row
    assert "test R2 less that of" in results["controls"]["distillation"]["sentence"]
    assert "R2" in str(Run(folder)).splitlines()[0] and "accuracy" not in str(Run(folder)).splitlines()[0]
    page = (folder / "report.html").read_text()
    assert "Test R2" in page and "mean squared error" in page and "test accuracy" not in page


def test_its_student_answers_in_values(folder, tmp_path, monkeypatch, capsys):
    student = folder / "students" / "student"
    card = json.loads((student / "student.json").read_text())
    assert card["answers"] == "values" and card["output"]["shape"] == ["batch", 1]
    torch.save(torch.rand(2, 3, 8, 8), tmp_path / "images.pt")
    monkeypatch.setattr("sys.argv", ["student.py", str(tmp_path / "images.pt")])
    runpy.run_path(str(student / "student.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("brightness ") for line in lines)


def test_distillers_have_the_losses_of_the_task():
    sandwich, mutual = Sandwich(), Mutual()
    sandwich.suit(Brightness())
    mutual.suit(Brightness())
    assert isinstance(sandwich.soft, Squares) and isinstance(mutual.divergence, Squares)
    assert [loss.of for loss in sandwich.objective.losses.values()] == ["labels", "teacher"]
    untouched = Sandwich()
    before = list(untouched.modules())
    untouched.suit(CLASSIFICATION)
    assert list(untouched.modules()) == before


def test_intervals_are_of_the_measure_over_images():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=200)
    grades = [np.stack([rng.normal(scale=s, size=200) ** 2, labels, labels**2], 1)[None] for s in (0.3, 0.6)]
    quality = Brightness().quality
    value, low, high = difference_interval(*grades, quality=quality)
    assert value == pytest.approx(float(quality(grades[0][0].mean(0)) - quality(grades[1][0].mean(0))))
    assert low < value < high and low > 0
    again = [np.concatenate([g, g]) for g in grades]
    assert difference_interval(*again, quality=quality)[0] == pytest.approx(value)


def test_the_chosen_network_has_the_better_measure(folder):
    rows = {row["name"]: row for row in RunFolder(folder).phase("finals")["rows"]}
    winner = RunFolder(folder).phase("finals")["winner"]
    assert rows[winner]["accuracy"] == max(row["accuracy"] for row in rows.values() if row["step"] == row["steps"])


class TestBrightness(TaskContract):
    def data(self) -> Data:
        return numbers()
