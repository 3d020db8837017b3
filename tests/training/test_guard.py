"""What is said of a supernet that starves an option or collapses, and how a collapse is taken back."""

import json
import math

import pytest
import torch

from kdnas.distillers.base import Distiller, Schedule
from kdnas.distillers.sandwich import Sandwich
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, Recipe
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.guard import Guard
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, TOY, supernet
from tests.toy import experiment


def training(distiller=None, steps=40, **more):
    recipe = Recipe(steps=steps, batch_size=12, learning_rate=0.02, **more)
    return Training(supernet(), distiller or Sandwich(terms=()), DATA, None, recipe)


def guard(tmp_path, made=None, rollback=False):
    return Guard(made or training(), tmp_path / "healthy.safetensors", rollback=rollback)


def test_every_option_is_counted():
    made = training(steps=3)
    for _ in range(3):
        made.step()
    uses = made.model.uses
    for choice in (c for c in TOY.choices if c.needs is None):
        assert sum(uses[choice.name, option] for option in choice.options) == 12  # four subnets in each step
        assert all(uses[choice.name, option] >= 3 for option in choice.options)  # the largest, the smallest


def test_a_starved_option_is_named_once(tmp_path):
    found = guard(tmp_path)
    found.supernet.uses.update({("stage0.depth", 1): 1})
    assert found.starved() == []  # the window opens
    found.supernet.uses.update({("stage0.depth", 2): 100, ("stage1.depth", 1): 50, ("stage1.depth", 2): 40})
    assert found.starved() == ["stage0.depth = 1 is starved: trained 0 times, an equal share is 50"]
    assert found.starved() == []


def test_what_was_said_is_not_said_again_after_a_kill(tmp_path):
    found = guard(tmp_path)
    found.supernet.uses.update({("stage0.depth", 1): 1})
    found.starved()
    found.supernet.uses.update({("stage0.depth", 2): 100})
    assert len(found.starved()) == 1
    place = tmp_path / "state.safetensors"
    save_state(place, found.state())
    again = guard(tmp_path)
    again.supernet.uses.update(found.supernet.uses)
    again.load(load_state(place))
    assert again.starved() == []
    assert again.state() == found.state()


def test_health_is_recorded_at_the_end_of_every_epoch(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"note": 1}, 0)
    made = training(steps=13)  # epochs of 4 steps
    train_with_checkpoints(
        made, "train", tmp_path / "c.safetensors", run, lambda: {"largest": 0.5}, guard=guard(tmp_path, made)
    )
    lines = run.lines("metrics.jsonl")
    assert made.epoch_steps == 4
    healthy = [line for line in lines if "health" in line]
    assert [line["step"] for line in healthy] == [3, 7, 11, 12]
    for line in healthy:
        assert -1 <= line["conflict"] <= 1
        assert sum(line["options"]["stage0.depth"].values()) == 4 * (line["step"] + 1)


def test_too_few_uses_prove_nothing(tmp_path):
    found = guard(tmp_path)
    found.supernet.uses.update({("stage0.depth", 2): 1})
    found.starved()
    found.supernet.uses.update({("stage0.depth", 2): 30})
    assert found.starved() == []


def test_options_that_a_schedule_holds_back_are_not_starved(tmp_path):
    found = guard(tmp_path)
    allowed = {"stage0.depth": (2,)}
    found.training.schedule = Schedule(
        found.training.recipe.steps, options=lambda choice, index: allowed.get(choice.name, choice.options)
    )
    found.supernet.uses.update({("stage0.depth", 2): 1})
    found.starved()
    found.supernet.uses.update({("stage0.depth", 2): 100})
    assert found.starved() == []
    allowed["stage0.depth"] = (1, 2)
    assert found.starved() == []  # a new stage: the count begins anew
    found.supernet.uses.update({("stage0.depth", 2): 100})
    assert len(found.starved()) == 1


@pytest.mark.parametrize(
    ("norm", "accuracy", "says"),
    [
        (1.2, 0.7, None),
        (1.2, 0.46, None),
        (1.2, 0.4, "accuracy fell from 0.900 to 0.400"),
        (150.0, None, "norm is 150, its median was 1"),
        (0.005, None, "norm is 0.005"),
        (math.nan, None, "norm is nan"),
    ],
)
def test_a_cliff_of_accuracy_or_gradient_is_a_collapse(tmp_path, norm, accuracy, says):
    found = guard(tmp_path)
    found.best, found.norms = 0.9, [1.0] * 10
    said = found.collapse(norm, accuracy)
    assert (said is None) if says is None else says in said


def test_no_accuracy_is_a_cliff_before_something_was_learned(tmp_path):
    found = guard(tmp_path)
    found.best = 0.5  # three classes: guessing gives 0.33
    assert found.collapse(1.0, 0.1) is None


def test_a_collapse_is_rolled_back_once_and_the_batches_are_not_repeated(tmp_path, log):
    made = training()
    found = guard(tmp_path, made, rollback=True)
    for _ in range(3):
        made.step()
    assert found.examine({"largest": 0.9}) == []
    healthy = {name: tensor.clone() for name, tensor in made.state()["model"].items()}
    for _ in range(2):
        made.step()
    warnings = found.examine({"largest": 0.3})
    assert "collapse at step 5" in warnings[0] and "rolled back" in warnings[1] and "after step 3" in warnings[1]
    assert made.index == 5
    assert all(torch.equal(tensor, healthy[name]) for name, tensor in made.state()["model"].items())
    assert [(r.levelname, r.getMessage()) for r in log.records] == [("WARNING", warning) for warning in warnings]
    made.step()
    assert len(found.examine({"largest": 0.3})) == 1  # said, not taken back again
    assert any(not torch.equal(tensor, healthy[name]) for name, tensor in made.state()["model"].items())


def test_without_the_request_a_collapse_is_only_reported(tmp_path):
    made = training()
    found = guard(tmp_path, made)
    found.examine({"largest": 0.9})
    made.step()
    moved = made.model.state_dict()["bank.stem:shared.0.weight"].clone()
    assert len(found.examine({"largest": 0.2})) == 1
    assert torch.equal(moved, made.model.state_dict()["bank.stem:shared.0.weight"])
    assert not found.checkpoint.exists()


class Breaking(Distiller):
    """Finite but at one step."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def losses(self, model, batch, step):
        logits = model(batch.images, model.space.largest).logits
        yield "largest", logits.square().mean() * (math.inf if step.index == self.at else 1.0)


def test_a_loss_that_is_not_finite_is_taken_back_on_request_and_else_stops(tmp_path):
    for rollback in (True, False):
        made = training(Breaking(30))
        run = RunFolder.create(tmp_path / str(rollback), experiment().to_json(), 0)
        found = guard(run.folder, made, rollback=rollback)
        arguments = made, "train", run.path("checkpoint.safetensors"), run, lambda: {"largest": 0.9}
        if not rollback:
            with pytest.raises(FloatingPointError):
                train_with_checkpoints(*arguments, guard=found)
            continue
        train_with_checkpoints(*arguments, guard=found)
        assert made.done
        lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "warnings" in line] == [30]


def test_records_hold_conflict_gradient_norm_and_uses(tmp_path):
    made = training(steps=8)
    run = RunFolder.create(tmp_path / "run", experiment().to_json(), 0)
    train_with_checkpoints(
        made, "train", run.path("c.safetensors"), run, lambda: {"largest": 0.5}, guard=guard(run.folder, made)
    )
    lines = run.lines("metrics.jsonl")
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert all(-1 <= line["conflict"] <= 1 for line in lines)
    assert lines[-1]["options"]["stage0.depth"]["1"] >= 8


def test_conflict_is_the_cosine_between_the_first_loss_and_the_rest():
    made, plain = training(), training()
    assert made.step(watch=True) == plain.step()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name]), name

    class Against(Distiller):
        def losses(self, model, batch, step):
            for name, sign in (("largest", 1.0), ("other", -0.5)):
                yield name, sign * model(batch.images, TOY.largest, batch_statistics=True).logits.square().mean()

    against = training(Against())
    against.step(watch=True)
    assert against.conflict == pytest.approx(-1, abs=1e-4)


def test_rollback_and_sharing_rule_are_settings_that_a_manifest_holds():
    import dataclasses

    from kdnas.sharing import KernelTransform
    from kdnas.specs import spec

    asked = experiment()
    asked = dataclasses.replace(
        asked, train=dataclasses.replace(asked.train, rollback=True, share=spec(KernelTransform))
    )
    assert Experiment.from_json(json.loads(json.dumps(asked.to_json()))) == asked
