"""How long trainings must be for their order to say something: measured before many of them are paid for."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdnas.jobs._preflight import duration
from kdnas.jobs._trainings import Job, TrainingRow, Trainings, with_length
from kdnas.runs.entry import Entry
from kdnas.settings import Retrain
from kdnas.statistics import kendall

say = logging.getLogger(__name__).info

LENGTHS = "training lengths"
"""The phase of a run that holds what was measured."""

SEEDS = 2
ROLE = "trained"
_NETWORKS, _SHARES = 5, (4, 2, 1)
_LEAST_TAU = 0.8


class Length(NamedTuple):
    """A number of steps, and the noise of accuracies after it.

    Attributes:
        steps: of a training.
        noise: standard deviation of the accuracy over seeds; None where it was not measured.
    """

    steps: int
    noise: float | None


def shortest_length(trainings: Trainings, settings: Retrain, entries: Sequence[Entry], count: int) -> Length | None:
    """The shortest length of a training whose order agrees with the longest's, measured once per run and recorded.

    Five networks, evenly spaced in the ranking, are trained with two seeds for a quarter, a half and all of the steps,
    each with its own learning rate curve. A length's agreement is Kendall's tau between its accuracies with one seed
    and those of the longest with the other, the mean of both ways round; the longest agrees with itself as well as its
    seeds do. The shortest with at least 0.8 is used.

    Args:
        trainings: of the run.
        settings: the longest training.
        entries: best first.
        count: number of trainings that are to follow.

    Returns:
        The length, or None where no agreement reaches 0.8; a sentence is logged in both cases.
    """
    storage = trainings.run.storage
    record = storage.phase(LENGTHS)
    if record is None or record["recipe"] != settings.recipe.steps:
        record = _measured(trainings, settings, entries)
        storage.finish(LENGTHS, **record)
    say(_sentence(record, count))
    return Length(record["steps"], record["noise"][str(record["steps"])]) if record["steps"] else None


def _measured(trainings: Trainings, settings: Retrain, entries: Sequence[Entry]) -> dict[str, Any]:
    whole = settings.recipe.steps
    lengths = sorted({max(1, whole // share) for share in _SHARES})
    places = np.linspace(0, len(entries) - 1, min(_NETWORKS, len(entries))).round().astype(int)
    networks = [entries[place].architecture for place in dict.fromkeys(places.tolist())]
    each = trainings.seconds_of(networks[0], settings)
    amount = len(networks) * SEEDS * sum(lengths) / whole
    say(
        f"trainings: {len(networks)} networks are trained for {', '.join(f'{n:,}' for n in lengths)} steps with "
        f"{SEEDS} seeds, to see which length tells them apart; {amount:.1f} trainings of {whole:,} steps, roughly "
        f"{duration(each * amount)}"
    )
    settings_of = [with_length(settings, n, seed) for n in lengths for seed in range(SEEDS)]
    jobs = [Job(ROLE, network, own) for own in settings_of for network in networks]
    rows = iter(trainings.train_all(jobs))
    table = {n: [[_accuracy(next(rows)) for _ in networks] for _ in range(SEEDS)] for n in lengths}
    longest = table[whole]
    agreement = {n: float(np.mean([kendall(a[0], longest[1]), kendall(a[1], longest[0])])) for n, a in table.items()}
    noise = {n: float(np.sqrt(np.mean(np.subtract(a[0], a[1]) ** 2) / 2)) for n, a in table.items()}
    steps = next((n for n in lengths if agreement[n] >= _LEAST_TAU), 0)
    return {
        "recipe": whole,
        "steps": steps,
        "agreement": {str(n): round(tau, 6) for n, tau in agreement.items()},
        "noise": {str(n): round(value, 6) for n, value in noise.items()},
        "seconds": round(each, 3),
    }


def _accuracy(row: TrainingRow) -> float:
    if row.accuracy is None:
        raise ValueError(f"the training {row.name} failed: {row.problem} Lower --learning-rate in the run's recipe.")
    return row.accuracy


def _sentence(record: Mapping[str, Any], count: int) -> str:
    whole, steps = record["recipe"], record["steps"]
    taus = ", ".join(f"{int(n):,} steps {tau:.2f}" for n, tau in record["agreement"].items())
    agreement = f"trainings: agreement (tau) with the order after {whole:,} steps under another seed: {taus}"
    if steps:
        return f"{agreement}; {steps:,} steps are used"
    return (
        f"{agreement}; none reaches {_LEAST_TAU}, so results would be noise to the ranking, and the score's order "
        f"stays. {count} trainings of {whole:,} steps would cost roughly {duration(record['seconds'] * count)}, and "
        f"those of twice as many {duration(2 * record['seconds'] * count)}: train longer, or buy them all the same "
        "with --no-quality"
    )
