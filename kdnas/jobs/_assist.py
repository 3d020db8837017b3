"""Teacher assistants: networks between teacher and student in size, each taught by the one before it."""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.evaluation import accuracy
from kdnas.jobs.retrain import check_uses_teacher, retrain
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.runs.folder import CARD
from kdnas.runs.steps import StudentSteps
from kdnas.settings import CardTeacher, NoTeacher, Retrain, TeacherChoice
from kdnas.space import SearchSpace
from kdnas.specs import Spec, spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.students.trust import provenance
from kdnas.tables import space_from_table, unstructure
from kdnas.teachers.zoo import student_teacher
from kdnas.trust import admit

AUTO, CHOICE = "auto", "choice.json"
_SIZES = 3
_SHORT = 4


def retrain_assisted(
    student: Path,
    settings: Retrain,
    out: Path,
    assistants: str,
    *,
    data: Spec | None = None,
    teacher: TeacherChoice = CardTeacher(),
    deploy: bool = True,
) -> dict[str, Any]:
    """Train a student under the last of a chain of assistants; the same call resumes.

    Each assistant is a network of the student's space, trained from fresh weights with the student's settings under the
    teacher, or under the assistant before it. They lie in `OUT-assistants`. `auto` takes one, and searches its size:
    of three drawn networks, evenly spread in the logarithm of the MACs between the student and the space's largest,
    the one under which the student learns best on the search part, each pair trained for a quarter of the steps.

    Args:
        student: a student folder that knows its space.
        settings: of every training.
        out: the new student folder.
        assistants: codes of the space, joined by commas, largest first; or `auto`.
        data: other data than the student was found on.
        teacher: another teacher of the first assistant.
        deploy: as `retrain`'s, of the student.

    Returns:
        What `retrain` returns, and the `assistants`' codes.

    Raises:
        ValueError: as `retrain`; the student knows no space; a code is not the space's, or its network is smaller than
            the student or larger than the assistant before it; no data is known; the distiller uses no teacher.

    Reference: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020, sections 3 and 4.
    Differs: the paper tries every size in full; `auto` tries three, shortly.
    """
    check_uses_teacher(settings, "--assistants")
    _, card = read_student(student)
    if card.space is None:
        raise ValueError(f"{student / CARD} names no search space, which assistants come from. Export it from a run.")
    data, source = provenance(student, card, data, teacher)
    admit(card.space, student / CARD)
    space = space_from_table(dict(card.space))
    codes = () if assistants == AUTO else _descending(space, assistants, card)
    current: Spec | NoTeacher = source or NoTeacher()
    loaded: Data = data.build(Data)
    identity = [unstructure(settings), assistants, data.to_json(), None if source is None else source.to_json()]
    identity += [card.blueprint.to_json(), loaded.fingerprint]
    steps = StudentSteps(out.parent / f"{out.name}-assistants", identity)
    if assistants == AUTO:
        codes = (_search_size(student, settings, steps, space, card, data, current),)
    fresh = dataclasses.replace(settings, weights="fresh")
    for code in codes:
        assistant = _fresh(steps, space, code, card)
        options = {"phase": f"assistant {code}", "data": data, "teacher": current, "deploy": False}
        current = _as_teacher(steps.student(f"trained-{code}", partial(retrain, assistant, fresh, **options)))
    return retrain(student, settings, out, data=data, teacher=current, deploy=deploy) | {"assistants": ",".join(codes)}


class _Choice(TypedDict):
    chosen: str


def _descending(space: SearchSpace, assistants: str, card: Card) -> tuple[str, ...]:
    """The codes, each of a network between the one before it and the student."""
    codes, before, bound = [], "", float("inf")
    for text in assistants.split(","):
        architecture = space.parse(text)
        macs = cost(space.blueprint(architecture)).macs
        if not card.cost.macs <= macs <= bound:
            above = f", at most the {bound:,} of {before}" if before else ""
            raise ValueError(
                f"an assistant has at least the student's {card.cost.macs:,} MACs{above}, got {text} with {macs:,}. "
                "Name networks between teacher and student, largest first."
            )
        codes.append(space.code(architecture))
        before, bound = text, macs
    return tuple(codes)


def _search_size(
    student: Path,
    settings: Retrain,
    steps: StudentSteps,
    space: SearchSpace,
    card: Card,
    data: Spec,
    teacher: Spec | NoTeacher,
) -> str:
    """The code of the assistant under which the student learns best in short trainings; recorded in `choice.json`."""
    choice = steps.read(CHOICE, None, _Choice)
    if choice is not None:
        return str(choice["chosen"])
    loaded: Data = data.build(Data)
    recipe = dataclasses.replace(settings.recipe, steps=max(1, settings.recipe.steps // _SHORT))
    short = dataclasses.replace(settings, weights="fresh", recipe=recipe)
    accuracies: dict[str, float] = {}
    for architecture in between(space, card.cost.macs, settings.recipe.seed):
        code = space.code(architecture)
        options: dict[str, Any] = {"phase": f"assistant {code}", "data": data, "teacher": teacher, "deploy": False}
        source = _fresh(steps, space, code, card)
        assistant = steps.student(f"short-{code}", partial(retrain, source, short, **options))
        options |= {"phase": f"student of {code}", "teacher": _as_teacher(assistant)}
        pupil = steps.student(f"short-{code}-student", partial(retrain, student, short, **options))
        accuracies[code] = accuracy(read_student(pupil)[0], loaded.search, loaded)
    code = max(accuracies, key=lambda name: accuracies[name])
    steps.write(CHOICE, {"chosen": code, "search accuracy of the student": accuracies})
    return code


def between(space: SearchSpace, macs: int, seed: int) -> list[Architecture]:
    """Networks of three sizes between `macs` and the largest's, evenly spaced in the logarithm; some may coincide."""
    rng = python_rng(seed, "assistants")
    costs = {a: cost(space.blueprint(a)).macs for a in (space.largest, *(space.sample(rng) for _ in range(300)))}
    larger = {a: m for a, m in costs.items() if m > macs} or {space.largest: costs[space.largest]}
    low, high = math.log(macs), math.log(max(larger.values()))
    targets = [low + (high - low) * (i + 1) / (_SIZES + 1) for i in range(_SIZES)]
    return list(dict.fromkeys(min(larger, key=lambda a: abs(math.log(larger[a]) - t)) for t in targets))


def _fresh(steps: StudentSteps, space: SearchSpace, code: str, card: Card) -> Path:
    """A student folder with an assistant's random weights."""
    architecture = space.parse(code)
    blueprint = space.blueprint(architecture)
    origin = {"role": "assistant"}
    own = dataclasses.replace(card, architecture=architecture, blueprint=blueprint, cost=cost(blueprint), origin=origin)

    def write(folder: Path) -> None:
        write_student(folder, initialised(lambda: Network(blueprint), 0), own, deploy=False)

    return steps.student(f"fresh-{code}", write)


def _as_teacher(folder: Path) -> Spec:
    return spec(student_teacher, path=str(folder.resolve()))
