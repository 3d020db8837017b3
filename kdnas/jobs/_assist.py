"""Teacher assistants: networks between teacher and student in size, each taught by the one before it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.evaluation import accuracy
from kdnas.jobs.retrain import forget_drafts, lock_settings, retrain, taught_by_teacher
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.runs.files import current_folder, write_json
from kdnas.settings import Retrain
from kdnas.space import SearchSpace
from kdnas.specs import Spec, spec
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.students.trust import provenance
from kdnas.tables import space_from_table, unstructure
from kdnas.teachers.zoo import student_teacher

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
    teacher: Spec | None = None,
    deploy: bool = True,
) -> dict[str, Any]:
    """Train a student under the last of a chain of assistants; what is finished is left, so that the call resumes.

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
            the student or larger than the assistant before it; no data is known; the distiller asks no teacher.

    Reference: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020, sections 3 and 4.
    Differs: the paper tries every size in full; `auto` tries three, shortly.
    """
    taught_by_teacher(settings, "assistants")
    _, card = read_student(student)
    if card.space is None:
        raise ValueError(f"{student} knows no search space to take assistants from. Export it from a run.")
    made_data, teacher = provenance(student, card, data, teacher)
    space = space_from_table(dict(card.space))
    named_codes = () if assistants == AUTO else _descending(space, assistants, card)
    folder = out.parent / f"{out.name}-assistants"
    named = [made_data.to_json(), None if teacher is None else teacher.to_json(), card.blueprint.to_json()]
    lock_settings(folder, [unstructure(settings), assistants, *named])
    given = {"data": made_data, "deploy": False}
    if assistants == AUTO:
        codes = [_searched(student, settings, folder, space, card, made_data, teacher)]
    else:
        codes = list(named_codes)
    fresh = dataclasses.replace(settings, weights="fresh")
    for code in codes:
        trained = folder / f"trained-{code}"
        if not current_folder(trained).exists():
            retrain(
                _drawn(folder, space, code, card), fresh, trained, phase=f"assistant {code}", teacher=teacher, **given
            )
        forget_drafts(trained)
        teacher = _as_teacher(trained)
    found = retrain(student, settings, out, data=made_data, teacher=teacher, deploy=deploy)
    return found | {"assistants": ",".join(codes)}


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


def _searched(
    student: Path,
    settings: Retrain,
    folder: Path,
    space: SearchSpace,
    card: Card,
    data: Spec,
    teacher: Spec | None,
) -> str:
    """The code of the assistant under which the student learns best in short trainings; kept in `choice.json`."""
    path = folder / CHOICE
    if path.exists():
        return str(json.loads(path.read_text())["chosen"])
    loaded: Data = data.build(Data)
    short = dataclasses.replace(
        settings,
        weights="fresh",
        recipe=dataclasses.replace(settings.recipe, steps=max(1, settings.recipe.steps // _SHORT)),
    )
    found: dict[str, float] = {}
    for architecture in between(space, card.cost.macs, settings.recipe.seed):
        code = space.code(architecture)
        pair = [folder / f"short-{code}", folder / f"short-{code}-student"]
        if not current_folder(pair[0]).exists():
            source = _drawn(folder, space, code, card)
            retrain(source, short, pair[0], phase=f"assistant {code}", data=data, teacher=teacher, deploy=False)
        if not current_folder(pair[1]).exists():
            taught = _as_teacher(pair[0])
            retrain(student, short, pair[1], phase=f"student of {code}", data=data, teacher=taught, deploy=False)
        for one in pair:
            forget_drafts(one)
        found[code] = accuracy(read_student(pair[1])[0], loaded.search, loaded)
    chosen = max(found, key=lambda code: found[code])
    write_json(path, {"chosen": chosen, "search accuracy of the student": found})
    return chosen


def between(space: SearchSpace, macs: int, seed: int) -> list[Architecture]:
    """Networks of three sizes between `macs` and the largest's, evenly spread in the logarithm; some may coincide."""
    rng = python_rng(seed, "assistants")
    drawn = {a: cost(space.blueprint(a)).macs for a in (space.largest, *(space.sample(rng) for _ in range(300)))}
    larger = {a: m for a, m in drawn.items() if m > macs} or {space.largest: drawn[space.largest]}
    low, high = math.log(macs), math.log(max(larger.values()))
    targets = [low + (high - low) * (i + 1) / (_SIZES + 1) for i in range(_SIZES)]
    return list(dict.fromkeys(min(larger, key=lambda a: abs(math.log(larger[a]) - t)) for t in targets))


def _drawn(folder: Path, space: SearchSpace, code: str, card: Card) -> Path:
    """A student folder with an assistant's fresh weights."""
    place = folder / f"fresh-{code}"
    if not current_folder(place).exists():
        architecture = space.parse(code)
        blueprint = space.blueprint(architecture)
        made = dataclasses.replace(
            card, architecture=architecture, blueprint=blueprint, cost=cost(blueprint), origin={"role": "assistant"}
        )
        write_student(place, initialised(lambda: Network(blueprint), 0), made, deploy=False)
    return place


def _as_teacher(folder: Path) -> Spec:
    return spec(student_teacher, path=str(folder.resolve()))
