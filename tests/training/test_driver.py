"""When something is recorded, evaluated, compared and saved: a training without a network, a clock that stands."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch

from kdnas.losses.objective import Share
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.folder import METRICS, RunFolder
from kdnas.training.driver import train_with_checkpoints


class Fake:
    """A training whose steps take seconds and fail where told; its losses are the steps' numbers."""

    def __init__(self, steps, epoch_steps, now, seconds=1.0, failures=()):
        self.recipe, self.epoch_steps, self.index = SimpleNamespace(steps=steps), epoch_steps, 0
        self.gradient_norm, self.conflict = torch.tensor(0.5), None
        self.now, self.seconds, self.failures, self.watched = now, seconds, failures, []
        self.weighed, self.shares = [], {}

    @property
    def done(self):
        return self.index >= self.recipe.steps

    def close(self):
        self.closed = True

    def step(self, *, watch, weigh):
        if weigh:
            self.weighed.append(self.index)
            self.shares = {"hint": Share(2.0, 0.004), "soft_targets": Share(1.0, 0.996)}
        self.now["seconds"] += self.seconds
        if self.index in self.failures:
            raise FloatingPointError(f"the loss is not finite at step {self.index}")
        if watch:
            self.watched.append(self.index)
            self.conflict = 0.25 + self.index
        self.index += 1
        return {"student": float(self.index), "teacher": 2.0}

    def rate(self, index):
        return 0.1 * index

    def state(self):
        return {"index": self.index}

    def load(self, state):
        self.index = state["index"]


class Watch:
    """A guard that notes what it examines."""

    def __init__(self, warnings=(), rollback=True):
        self.warnings, self.rollback, self.examined, self.loaded = list(warnings), rollback, [], None

    def examine(self, accuracies=None, *, error=None):
        self.examined.append(accuracies if error is None else error)
        if error is not None and not self.rollback:
            raise error
        return ["rolled back"] if error is not None else self.warnings

    def options(self):
        return {"depth": {"1": 3}}

    def state(self):
        return {"examined": len(self.examined)}

    def load(self, state):
        self.loaded = state


@pytest.fixture
def now(monkeypatch):
    now = {"seconds": 100.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["seconds"])
    return now


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"note": 1}, 0)


def driven(training, run, tmp_path, **options):
    seconds = train_with_checkpoints(training, "train", tmp_path / "state.safetensors", run, **options)
    return seconds, [] if run is None else run.lines(METRICS)


def steps(lines, key="step"):
    return [line["step"] for line in lines if key in line]


def test_a_line_holds_step_losses_rate_and_seconds(run, tmp_path, now):
    seconds, lines = driven(Fake(2, 5, now, 1.23456), run, tmp_path)
    assert lines == [
        {
            "phase": "train",
            "step": 0,
            "total": 2,
            "losses": {"student": 1.0, "teacher": 2.0},
            "seconds": 1.235,
            "lr": 0.0,
        },
        {
            "phase": "train",
            "step": 1,
            "total": 2,
            "losses": {"student": 2.0, "teacher": 2.0},
            "seconds": 2.469,
            "lr": 0.1,
        },
    ]
    assert seconds == 2.469


def test_about_two_hundred_steps_are_recorded_and_eight_evaluated(run, tmp_path, now):
    accuracies = iter(range(100))
    _, lines = driven(Fake(399, 7, now), run, tmp_path, evaluate=lambda: {"accuracy": next(accuracies)})
    # 399 // 200 = 1 and 399 // 8 = 49; the last step is recorded and evaluated whatever its number.
    evaluated = [49 * i - 1 for i in range(1, 9)] + [398]
    assert steps(lines, "accuracy") == evaluated
    assert [line["accuracy"] for line in lines if "accuracy" in line] == list(range(9))
    assert steps(lines) == list(range(399))


def test_a_long_epoch_is_not_evaluated_before_its_end(run, tmp_path, now):
    _, lines = driven(Fake(16, 5, now), run, tmp_path, evaluate=lambda: {"accuracy": 0.5})
    assert steps(lines, "accuracy") == [4, 9, 14, 15]
    assert steps(lines) == list(range(16))


def test_a_guarded_training_is_evaluated_at_every_epoch_and_compared_about_fifty_times(run, tmp_path, now):
    training, guard = Fake(400, 61, now), Watch()
    _, lines = driven(training, run, tmp_path, evaluate=lambda: {"largest": 0.5}, guard=guard)
    ends = [60, 121, 182, 243, 304, 365, 399]
    assert steps(lines, "health") == steps(lines, "options") == ends
    # Records every 2 steps, comparisons every 2 * (8 // 2) = 8 and at every evaluation.
    assert training.watched == sorted({*range(7, 400, 8), *ends})
    assert steps(lines) == sorted({*range(1, 400, 2), *ends})
    assert steps(lines, "conflict") == training.watched
    assert all(line["conflict"] == line["step"] + 0.25 for line in lines if "conflict" in line)
    assert {line["gradient_norm"] for line in lines} == {0.5} and not steps(lines, "warnings")
    assert lines[-1]["options"] == {"depth": {"1": 3}} and lines[-1]["health"] == {"largest": 0.5}
    assert guard.examined == [{"largest": 0.5} if line["step"] in ends else None for line in lines]


def test_without_a_guard_nothing_is_compared(run, tmp_path, now):
    training = Fake(20, 5, now)
    _, lines = driven(training, run, tmp_path)
    assert training.watched == [] and not steps(lines, "conflict") and not steps(lines, "gradient_norm")


def test_comparisons_fall_on_records(run, tmp_path, now):
    training = Fake(392, 392, now)
    driven(training, run, tmp_path, guard=Watch())
    # 392 // 200 = 1 and 392 // 50 = 7.
    assert training.watched == list(range(6, 392, 7))


def test_a_conflict_that_cannot_be_measured_is_left_out(run, tmp_path, now):
    training = Fake(3, 3, now)
    training.step = lambda **_: setattr(training, "index", training.index + 1) or {}
    _, lines = driven(training, run, tmp_path, guard=Watch())
    assert steps(lines) == [0, 1, 2] and not steps(lines, "conflict")


def test_warnings_are_recorded(run, tmp_path, now):
    _, lines = driven(Fake(2, 2, now), run, tmp_path, guard=Watch(["an option starves"]))
    assert [line["warnings"] for line in lines] == [["an option starves"]] * 2


def test_a_step_that_is_rolled_back_is_left_out_and_recorded_whenever_it_comes(run, tmp_path, now):
    training, guard, seen = Fake(400, 400, now, failures=(6,)), Watch(), []
    _, lines = driven(training, run, tmp_path, guard=guard, after_step=seen.append)
    assert seen == list(range(1, 401))
    assert isinstance(guard.examined[3], FloatingPointError)
    assert [(line["step"], line["losses"]) for line in lines if "warnings" in line] == [(6, {})]
    assert [line["warnings"] for line in lines if "warnings" in line] == [["rolled back"]]
    assert 6 in steps(lines) and 4 not in steps(lines)


def test_a_failure_without_a_guard_or_a_rollback_ends_the_training(run, tmp_path, now):
    for guard in (None, Watch(rollback=False)):
        training = Fake(20, 5, now, failures=(3,))
        with pytest.raises(FloatingPointError, match="at step 3"):
            driven(training, run, tmp_path, guard=guard)
        assert training.index == 3


def test_a_checkpoint_is_written_every_ten_seconds_and_at_the_end(run, tmp_path, now, monkeypatch):
    saved = []

    def noted(path, state):
        saved.append(state)
        save_state(path, state)

    monkeypatch.setattr("kdnas.training.driver.save_state", noted)
    seen = []
    driven(Fake(17, 5, now, 3.0), run, tmp_path, after_step=lambda taken: seen.append((taken, len(saved))))
    # Every fourth step: 12 s after the last checkpoint.
    assert [state["training"]["index"] for state in saved] == [4, 8, 12, 16, 17]
    assert [state["seconds"] for state in saved] == [12.0, 24.0, 36.0, 48.0, 51.0]
    assert (4, 0) in seen and (5, 1) in seen
    saved.clear()
    (tmp_path / "state.safetensors").unlink()
    driven(Fake(5, 5, now, 5.0), run, tmp_path)
    assert [state["training"]["index"] for state in saved] == [2, 4, 5]
    assert all("guard" not in state for state in saved)


def test_a_resumed_training_adds_the_seconds_before_and_replaces_the_lines_after(run, tmp_path, now):
    first, place = Fake(6, 3, now, failures=(4,)), tmp_path / "state.safetensors"
    save_state(place, {"training": {"index": 2}, "seconds": 40.0, "guard": {"examined": 7}})
    guard = Watch()
    with pytest.raises(FloatingPointError):
        driven(first, run, tmp_path, guard=Watch(rollback=False))
    assert steps(run.lines(METRICS)) == [2, 3]
    seconds, lines = driven(Fake(6, 3, now), run, tmp_path, guard=guard)
    assert guard.loaded == {"examined": 7}
    assert seconds == 44.0 and steps(lines) == [2, 3, 4, 5]
    assert [line["seconds"] for line in lines] == [41.0, 42.0, 43.0, 44.0]
    state = load_state(place)
    assert state == {"training": {"index": 6}, "seconds": 44.0, "guard": {"examined": 4}}
    again = Fake(6, 3, now)
    assert driven(again, run, tmp_path, guard=guard)[0] == 44.0 and again.index == 6


def test_without_a_guard_its_state_is_left_alone_and_without_a_folder_nothing_is_recorded(tmp_path, now):
    save_state(tmp_path / "state.safetensors", {"training": {"index": 1}, "seconds": 3.0})
    draft = tmp_path / ".state.safetensors.12345.draft"
    draft.write_text("left by a kill")
    evaluated = []
    seconds, _ = driven(Fake(3, 1, now), None, tmp_path, evaluate=lambda: evaluated.append(1) or {"accuracy": 1.0})
    assert seconds == 5.0 and not evaluated and not draft.exists()
    assert load_state(tmp_path / "state.safetensors") == {"training": {"index": 3}, "seconds": 5.0}


def test_the_progress_line_shows_the_losses(tmp_path, now, log):
    driven(Fake(2, 2, now), None, tmp_path)
    assert any("2/2" in line and "student 2.000, teacher 2.000" in line for line in log.text.splitlines())


@pytest.mark.parametrize(("steps", "weighed"), [(49, []), (130, [49, 99]), (4000, list(range(199, 4000, 200)))])
def test_the_shares_of_the_terms_are_measured_rarely_and_on_records(run, tmp_path, now, steps, weighed):
    training = Fake(steps, 1000, now)
    _, lines = driven(training, run, tmp_path)
    assert training.weighed == weighed
    assert [line["step"] for line in lines if "terms" in line] == weighed


def test_a_term_that_makes_nearly_all_or_nothing_of_the_gradient_is_warned_of_once(run, tmp_path, now, log):
    _, lines = driven(Fake(150, 1000, now), run, tmp_path)
    assert lines[-1]["terms"] == {
        "hint": {"value": 2.0, "gradient": 0.004},
        "soft_targets": {"value": 1.0, "gradient": 0.996},
    }
    warnings = [r.getMessage() for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith("train, step 50: the loss 'hint' makes 0.4% of the gradient, so that it hardly acts")
    assert warnings[1].startswith(
        "train, step 50: the loss 'soft_targets' makes 99.6% of the gradient, so that the others"
    )
