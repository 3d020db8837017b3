"""Systems as `kdnas compare` runs them: each fits a space or says why not, plans its time, and gives one student."""

import abc
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import scipy.stats

from kdnas.costs.budget import Budget
from kdnas.data.base import Data
from kdnas.distillers.base import Distiller, Model
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._arguments import load_settings
from kdnas.jobs.chain import chain
from kdnas.jobs.grow import grow
from kdnas.jobs.prune import prune
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.settings import Experiment, Grow, Prune, Recipe
from kdnas.space import SearchSpace
from kdnas.specs import Spec
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
class Task:
    """What all systems of a comparison have in common.

    Attributes:
        data: makes `loaded`.
        loaded: the data set.
        space: the search space, not yet fitted to the data.
        teacher: makes `taught`.
        taught: the teacher.
        budget: of every student.
        seed: of every system.
    """

    data: Spec
    loaded: Data
    space: SearchSpace
    teacher: Spec
    taught: Teacher
    budget: Budget
    seed: int

    @property
    def fitted(self) -> SearchSpace:
        """The space with the data's classes and channels."""
        return self.space.fitted(classes=self.loaded.classes, image_channels=self.loaded.channels)


class Contestant(abc.ABC):
    """One system on a task."""

    @abc.abstractmethod
    def step_seconds(self) -> float:
        """Seconds of one of its training steps, 0 where it trains nothing before it searches.

        Raises:
            ValueError: the system does not fit the space.
        """

    @abc.abstractmethod
    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """What it does in so many seconds, when a step takes `each`: plain numbers, kept for a resumption."""

    @abc.abstractmethod
    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """Do it, or go on with it.

        Returns:
            `accuracy`, its 95 % `interval`, `params`, `macs`, `evaluations`, the controls `without teacher` and
            `random`, and what is `said` of both.
        """


def contestant(name: str, task: Task) -> Contestant:
    """The system that an experiment's file describes by its `small()`.

    Raises:
        ValueError: no such experiment, or one that cannot be compared.
    """
    own = load_settings(f"{name}:small", object)
    if isinstance(own, Experiment):
        return Chained(own, task)
    if isinstance(own, Grow):
        return Grown(own, task)
    if isinstance(own, Prune):
        return Pruned(own, task)
    raise ValueError(f"{name}:small is a {type(own).__name__}, which cannot be compared yet.")


@final
class Chained(Contestant):
    """Supernet or none, search, export, retraining: `kdnas run`."""

    def __init__(self, own: Experiment, task: Task) -> None:
        self.own, self.task = own, task

    def step_seconds(self) -> float:
        """Of the supernet's training."""
        train = self.own.train
        if train.distiller is None:
            return 0.0
        make = partial(Supernet, self.task.fitted, corner if train.share is None else train.share.build())
        distiller = train.distiller.build(Distiller)
        return timed_step(make, distiller, self.task.loaded, self.task.taught, train.recipe)

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps of the supernet and of each retraining, seconds of the search."""
        shares = _SHARES if each else _ALONE
        steps = max(LEAST_STEPS, int(shares["train"] * seconds / each)) if each else self.own.train.recipe.steps
        return {"steps": steps, "retrain_steps": retrain_steps, "search": max(1.0, shares["search"] * seconds)}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The chain without deployment."""
        own, task = self.own, self.task
        recipe = dataclasses.replace(own.train.recipe, steps=int(plan["steps"]), seed=task.seed)
        retrain = dataclasses.replace(own.retrain.recipe, steps=int(plan["retrain_steps"]), seed=task.seed)
        experiment = Experiment(
            train=dataclasses.replace(
                own.train, space=task.space, data=task.data, teacher=task.teacher, recipe=recipe, weights=""
            ),
            search=dataclasses.replace(
                own.search,
                budget=task.budget,
                exact=False,  # it takes the time it takes, and blocks of this space may share choices
                num_evaluations=max(own.search.num_evaluations, 1000),
                num_images=min(own.search.num_images, len(task.loaded.search)),
                max_time=plan["search"],
                seed=task.seed,
            ),
            retrain=dataclasses.replace(own.retrain, recipe=retrain),
        )
        storage = chain(experiment, folder, deploy=False).storage
        results = storage.results()
        rows = {row["name"]: row for row in results["rows"]}
        drawn = [row["accuracy"] for name, row in rows.items() if name.startswith("random")]
        said = [results["controls"].get(key) for key in ("distillation", "choice")]
        return {
            **_student(rows["student"], task.loaded),
            "evaluations": storage.require("search", "kdnas search")["evaluations"],
            "without teacher": rows["control"]["accuracy"],
            "random": sum(drawn) / len(drawn) if drawn else None,
            "said": [control["sentence"] for control in said if control is not None],
        }


@final
class Grown(Contestant):
    """An ensemble grown member by member: `kdnas grow`. Its teacher is itself, the comparison's is not asked."""

    def __init__(self, own: Grow, task: Task) -> None:
        self.own, self.task = own, task

    def step_seconds(self) -> float:
        """Of the smallest member's training."""
        space = self.task.fitted
        return timed_step(
            lambda: Network(space.blueprint(space.smallest)), FromLabels(), self.task.loaded, None, self.own.recipe
        )

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps of each candidate: two for each member, and as many again for each of three controls."""
        del retrain_steps
        candidates = 2 * self.own.num_members * 4
        return {"steps": max(LEAST_STEPS, int(0.8 * seconds / (candidates * each)))}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The growth with its controls."""
        task = self.task
        settings = dataclasses.replace(
            self.own,
            space=task.space,
            data=task.data,
            recipe=dataclasses.replace(self.own.recipe, steps=int(plan["steps"]), seed=task.seed),
            budget=task.budget,
        )
        found = grow(settings, folder)
        rows = found["controls"]
        return {
            **_student(found, task.loaded),
            "evaluations": len(found["members"]),
            "without teacher": rows.get("not taught", {}).get("accuracy"),
            "random": rows.get("random candidates", {}).get("accuracy"),
            "said": [],
        }


@final
class Pruned(Contestant):
    """A student cut out of the teacher's topology by scale factors: `kdnas prune`. The space is not searched."""

    def __init__(self, own: Prune, task: Task) -> None:
        self.own, self.task = own, task

    def step_seconds(self) -> float:
        """Of the training of a network and its factors.

        Raises:
            ValueError: the teacher is no student folder, and so has no topology to begin with.
        """
        if "path" not in dict(self.task.teacher.arguments):
            raise ValueError("the teacher is not a network that kdnas wrote, so its topology cannot be pruned here.")
        path = str(self.task.teacher["path"])
        if self.task.budget.admits(read_student(path)[1].cost):
            raise ValueError("the teacher's own network is within the budget, so nothing of it is to be removed.")
        return timed_step(lambda: read_student(path)[0], FromTeacher(), self.task.loaded, self.task.taught, Recipe())

    def plan(self, seconds: float, each: float, retrain_steps: int) -> Plan:
        """Steps with factors, and of each retraining."""
        return {"steps": max(LEAST_STEPS, int(0.4 * seconds / each)), "retrain_steps": retrain_steps}

    def run(self, folder: Path, plan: Plan) -> dict[str, Any]:
        """The pruning with its controls."""
        own, task = self.own, self.task
        retrained = dataclasses.replace(own.retrain.recipe, steps=int(plan["retrain_steps"]), seed=task.seed)
        settings = dataclasses.replace(
            own,
            data=task.data,
            budget=task.budget,
            source=f"checkpoint:{task.teacher['path']}",
            teacher=task.teacher,
            recipe=dataclasses.replace(own.recipe, steps=int(plan["steps"]), seed=task.seed),
            retrain=dataclasses.replace(own.retrain, recipe=retrained),
        )
        found = prune(settings, folder)
        rows = found["controls"]
        return {
            **_student(found, task.loaded),
            "evaluations": 1,
            "without teacher": rows["control"]["accuracy"],
            "random": rows["random"]["accuracy"],
            "said": [],
        }


def timed_step(
    make: Callable[[], Model], distiller: Distiller, data: Data, teacher: Teacher | None, recipe: Recipe
) -> float:
    """The mean time of a step on a model of its own, from at most two seconds of them; the first is not counted."""
    recipe = dataclasses.replace(recipe, steps=1000)
    training = Training(initialised(make, recipe.seed), distiller, data, teacher, recipe, default_device())
    training.step()
    began, taken = time.perf_counter(), 0
    while taken < 20 and (taken < 2 or time.perf_counter() - began < 2.0):
        training.step()
        taken += 1
    return (time.perf_counter() - began) / taken


def _student(row: dict[str, Any], data: Data) -> dict[str, Any]:
    count = len(data.test)
    interval = scipy.stats.binomtest(round(row["accuracy"] * count), count).proportion_ci(0.95, "wilson")
    held = {key: row[key] for key in ("accuracy", "params", "macs")}
    return {**held, "interval": [float(interval.low), float(interval.high)]}
