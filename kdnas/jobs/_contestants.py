"""Systems as `kdnas compare` runs them: each fits a space or raises, plans its time, and trains one student."""

import abc
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from kdnas.costs.budget import Budget
from kdnas.data.base import Data
from kdnas.distillers.base import Distiller, Model
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import row_of
from kdnas.jobs._arguments import load_settings
from kdnas.jobs._unlabelled import pruned_without_labels, reads_classes, without_labels
from kdnas.jobs.chain import chain
from kdnas.jobs.grow import check_grown, grow
from kdnas.jobs.prune import prune
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.settings import Experiment, Finals, Grow, Prune, Recipe, Search
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.statistics import wilson
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet, corner
from kdnas.teachers.base import Teacher
from kdnas.training.loop import Training

# Of a system's time: supernet, search with its random control, three retrainings; the rest is evaluation.
RETRAIN_SHARE = 0.50
_SHARES = {"train": 0.25, "search": 0.15}
_ALONE = {"train": 0.0, "search": 0.40}
LEAST_STEPS = 10

Plan = dict[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class Contest:
    """What all systems of a comparison have in common.

    Attributes:
        data_spec: makes `data`.
        data: the data set.
        space: the search space, not yet fitted to the data.
        teacher_spec: makes `teacher`.
        teacher: of every student.
        budget: of every student.
        seed: of every system.
    """

    data_spec: Spec
    data: Data
    space: SearchSpace
    teacher_spec: Spec
    teacher: Teacher
    budget: Budget
    seed: int

    @property
    def fitted(self) -> SearchSpace:
        """The space with the data's classes and channels."""
        return self.data.fitted(self.space)


class Contestant(abc.ABC):
    """One system of a contest."""

    @abc.abstractmethod
    def step_seconds(self) -> float:
        """Seconds of one of its training steps, 0 where it trains nothing before it searches.

        Raises:
            ValueError: the system does not fit the space.
        """

    @abc.abstractmethod
    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """How to spend the time, as plain numbers that are recorded for a resumption.

        Args:
            seconds: for the whole system.
            each: seconds of a step.
            retrain_steps: of every student of the comparison.
        """

    @abc.abstractmethod
    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """Run the plan, or resume it.

        Returns:
            `accuracy`, its 95 % `interval`, `params`, `macs`, `evaluations`, the accuracies of the controls
            `without teacher` and `random`, and the sentences on both, `said`.
        """


def contestant(name: str, contest: Contest) -> Contestant:
    """The system that an experiment's file describes by its `small()`.

    Raises:
        ValueError: no such experiment, or one that cannot be compared.
    """
    template = load_settings(f"{name}:small", object)
    if isinstance(template, Experiment):
        return ChainContestant(template, contest)
    if isinstance(template, Grow):
        return GrowContestant(template, contest)
    if isinstance(template, Prune):
        return PruneContestant(template, contest)
    raise ValueError(f"{name}:small is a {type(template).__name__}, which cannot be compared yet.")


@final
class ChainContestant(Contestant):
    """Supernet or none, search, export, retraining: `kdnas run`."""

    def __init__(self, template: Experiment, contest: Contest) -> None:
        if not contest.data.task.has_classes:
            train = dataclasses.replace(template.train, data=contest.data_spec)
            search = template.search
            if reads_classes(search.scorer):
                search = dataclasses.replace(search, scorer=Search.scorer)  # another one takes its place
            template = without_labels(dataclasses.replace(template, train=train, search=search), ())
        self.template, self.contest = template, contest

    def step_seconds(self) -> float:
        """Of the supernet's training."""
        train = self.template.train
        if train.distiller is None:
            return 0.0
        make = partial(Supernet, self.contest.fitted, corner if train.share is None else train.share.build())
        distiller = train.distiller.build(Distiller)
        return timed_step(make, distiller, self.contest.data, self.contest.teacher, train.recipe)

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps of the supernet and of each retraining, seconds of the search."""
        shares = _SHARES if each else _ALONE
        steps = max(LEAST_STEPS, int(shares["train"] * seconds / each)) if each else self.template.train.recipe.steps
        return {"steps": steps, "retrain_steps": retrain_steps, "search": max(1.0, shares["search"] * seconds)}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The chain without deployment."""
        template, contest = self.template, self.contest
        recipe = dataclasses.replace(template.train.recipe, steps=int(plan["steps"]), seed=contest.seed)
        retrain = dataclasses.replace(template.retrain.recipe, steps=int(plan["retrain_steps"]), seed=contest.seed)
        experiment = Experiment(
            train=dataclasses.replace(
                template.train,
                space=contest.space,
                data=contest.data_spec,
                teacher=contest.teacher_spec,
                recipe=recipe,
                weights="",
            ),
            search=dataclasses.replace(
                template.search,
                budget=contest.budget,
                exact=False,  # it takes the time it takes, and blocks of this space may share choices
                num_evaluations=max(template.search.num_evaluations, 1000),
                num_images=min(template.search.num_images, len(contest.data.search)),
                max_time=plan["search"],
                seed=contest.seed,
            ),
            retrain=dataclasses.replace(template.retrain, recipe=retrain),
            finals=Finals(finalists=1, controls=("labels", "random") if contest.data.task.has_classes else ("random",)),
        )
        storage = chain(experiment, folder, deploy=False).storage
        results = storage.results()
        rows = {row["name"]: row for row in results["rows"]}
        controls = [results["controls"].get(key) for key in ("distillation", "choice")]
        return {
            **_student(rows["student"], contest.data),
            "evaluations": storage.require("search", "kdnas search")["evaluations"],
            "without teacher": rows["control"]["accuracy"] if "control" in rows else None,
            "random": rows["random networks"]["accuracy"] if "random networks" in rows else None,
            "said": [control["sentence"] for control in controls if control is not None],
        }


@final
class GrowContestant(Contestant):
    """An ensemble grown member by member: `kdnas grow`. It is its own teacher; the comparison's is not used."""

    def __init__(self, template: Grow, contest: Contest) -> None:
        if not contest.data.task.has_classes:
            raise ValueError("a grown ensemble learns from labels, and with --unlabelled there are none.")
        check_grown(contest.data)
        self.template, self.contest = template, contest

    def step_seconds(self) -> float:
        """Of the smallest member's training."""
        space = self.contest.fitted
        return timed_step(
            lambda: Network(space.blueprint(space.smallest)),
            FromLabels(),
            self.contest.data,
            None,
            self.template.recipe,
        )

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps of each candidate: two for each member, and as many again for each of three controls."""
        del retrain_steps
        candidates = 2 * self.template.num_members * 4
        return {"steps": max(LEAST_STEPS, int(0.8 * seconds / (candidates * each)))}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The growth with its controls."""
        contest = self.contest
        settings = dataclasses.replace(
            self.template,
            space=contest.space,
            data=contest.data_spec,
            recipe=dataclasses.replace(self.template.recipe, steps=int(plan["steps"]), seed=contest.seed),
            budget=contest.budget,
        )
        ensemble = grow(settings, folder)
        rows = ensemble["controls"]
        return {
            **_student(ensemble, contest.data),
            "evaluations": len(ensemble["members"]),
            "without teacher": rows.get("not taught", {}).get("accuracy"),
            "random": rows.get("random candidates", {}).get("accuracy"),
            "said": [],
        }


@final
class PruneContestant(Contestant):
    """A student cut out of the teacher's topology by scale factors: `kdnas prune`. The space is not searched."""

    def __init__(self, template: Prune, contest: Contest) -> None:
        if not contest.data.task.has_classes:
            template = pruned_without_labels(dataclasses.replace(template, data=contest.data_spec), ())
        self.template, self.contest = template, contest

    def step_seconds(self) -> float:
        """Of the training of a network and its factors.

        Raises:
            ValueError: the teacher is no student folder, so there is no topology to start from.
        """
        if "path" not in dict(self.contest.teacher_spec.arguments):
            raise ValueError("the teacher is no student folder of kdnas, so its topology cannot be pruned.")
        path = str(self.contest.teacher_spec["path"])
        if self.contest.budget.admits(read_student(path)[1].cost):
            raise ValueError("the teacher is within the budget, so there is nothing to remove.")
        return timed_step(
            lambda: read_student(path)[0], FromTeacher(), self.contest.data, self.contest.teacher, Recipe()
        )

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps with factors, and of each retraining."""
        return {"steps": max(LEAST_STEPS, int(0.4 * seconds / each)), "retrain_steps": retrain_steps}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The pruning with its controls."""
        template, contest = self.template, self.contest
        settings = dataclasses.replace(
            template,
            data=contest.data_spec,
            budget=contest.budget,
            source=f"checkpoint:{contest.teacher_spec['path']}",
            teacher=contest.teacher_spec,
            recipe=dataclasses.replace(template.recipe, steps=int(plan["steps"]), seed=contest.seed),
            retrain=dataclasses.replace(template.retrain, steps=int(plan["retrain_steps"]), seed=contest.seed),
        )
        student = prune(settings, folder)
        rows = student["controls"]
        return {
            **_student(student, contest.data),
            "evaluations": 1,
            "without teacher": rows["control"]["accuracy"] if "control" in rows else None,
            "random": rows["random"]["accuracy"] if "random" in rows else None,  # None where it is the student
            "said": [],
        }


def timed_step(
    make: Callable[[], Model], distiller: Distiller, data: Data, teacher: Teacher | None, recipe: Recipe
) -> float:
    """The mean time of a step on a model of its own, from at most two seconds of them; the first is not counted."""
    recipe = dataclasses.replace(recipe, steps=1000)
    training = Training(initialised(make, recipe.seed), distiller, data, teacher, recipe, default_device())
    training.step()
    began, count = time.perf_counter(), 0
    while count < 20 and (count < 2 or time.perf_counter() - began < 2.0):
        training.step()
        count += 1
    return (time.perf_counter() - began) / count


def _student(row: dict[str, Any], data: Data) -> dict[str, Any]:
    own = row_of(row)
    if "interval" not in own:
        count = len(data.test)
        own["interval"] = list(wilson(round(row["accuracy"] * count), count))
    return own
