"""What the processes of a shared command do for each other: scores of candidates, trainings, whole systems."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final

from optuna.trial import FrozenTrial, TrialState

from kdnas.architecture import Architecture
from kdnas.jobs._arguments import as_run
from kdnas.jobs._board import Answer, Board, Request, joined, key_of
from kdnas.jobs._memory import IN_MEMORY
from kdnas.jobs._run import Run
from kdnas.jobs._scoring import scores_of, split
from kdnas.jobs._trainings import answer, log_of, one_thread
from kdnas.jobs._workers import Message, Wire
from kdnas.plain import reason
from kdnas.runs.folder import CHECKPOINT, RunFolder
from kdnas.runs.steps import digest_of
from kdnas.scorers.base import LayerCount, Score
from kdnas.space import SearchSpace
from kdnas.students.card import digest_of as checksum_of

_log = logging.getLogger(__name__)
say = _log.info
_T = TypeVar("_T")

_LARGEST = 64  # candidates of a part, so that a trial stays small and a lost process costs little
_ROUNDS = 2  # parts per process and call

ScoreCodes = Callable[[str, Sequence[str]], dict[str, Any]]
"""(name of a score, codes of candidates) to what `kdnas.jobs._scoring.scored` returns."""


def identity(run: Run, **settings: Any) -> str:
    """A digest of what results depend on: two processes with the same one compute the same."""
    checkpoint, manifest = run.storage.path(CHECKPOINT), run.storage.manifest
    weights = checksum_of(checkpoint) if checkpoint.is_file() else ""
    return digest_of(settings | {"weights": weights} | {name: manifest.get(name) for name in ("job", "data")})[:16]


def check_named(job: Any) -> None:
    """Raise a ValueError where a job's teacher or data are objects of one process."""
    if IN_MEMORY in json.dumps(job):
        raise ValueError("`storage` is for runs whose teacher and data have names: no other process has these objects.")


def led(url: str, name: str, answers: Answer, lead: Callable[[Board], _T], folder: Path | None = None) -> _T:
    """What the process that leads returns; in another one its `outcome` once it has ended.

    Args:
        url: of a database for Optuna.
        name: of the command, with all that its results depend on.
        answers: does a part.
        lead: posts parts and records their results.
        folder: where parts write, if they do; it must be one for all processes.

    Raises:
        ValueError: the storage cannot be used, the process that leads was stopped, or its folder is another.
    """
    with joined(url, name) as board:
        if not board.leads:
            say(f"this process joins {name!r} that another one leads")
            if board.follow(answers, folder):
                return board.outcome  # type: ignore[no-any-return]
        return lead(board)


def led_run(run: Run, url: str, name: str, answers: Answer, lead: Callable[[Board], _T], *, shares: bool) -> _T:
    """As `led`, of a command about a run, which is read anew where another process has recorded it.

    Args:
        run: the run; where `shares` is off it may be a copy.
        url: as `led`.
        name: as `led`.
        answers: as `led`.
        lead: as `led`.
        shares: whether parts write in the run's folder.
    """

    def record(board: Board) -> _T:
        as_run(run, writes=True)
        say(f"this process leads {name!r} and records it in {run.folder}; others join by the same command")
        return lead(board)

    result = led(url, name, answers, record, run.folder if shares else None)
    run.storage = RunFolder(run.folder)
    return result


def trains(run: Run) -> Answer:
    """Takes trainings of a run to their marks; what is to be recorded goes to a file beside the training's state."""

    def train(request: Request, number: int) -> dict[str, Any]:
        path = log_of(run, request["name"], number)
        path.parent.mkdir(exist_ok=True)
        with one_thread(), path.open("w", encoding="utf-8") as out:
            return {"end": answer(run, request, Wire(out, lambda: os.fsync(out.fileno())))}

    return train


def scores(score: ScoreCodes) -> Answer:
    """Scores parts of a search."""

    def answer(request: Request, number: int) -> dict[str, Any]:
        del number
        result = score(request["score"], request["codes"])
        return result | {"value": max((v for v, *_ in result["scores"] if math.isfinite(v)), default=0.0)}

    return answer


@final
@dataclass(frozen=True)
class SharedAnswers:
    """Has requests answered by all processes of a command, as `Workers` does by those that it started.

    Attributes:
        board: of the process that leads.
        answer: answers a request here.
        keeps: whether results that an earlier process which led did not record count.
    """

    board: Board
    answer: Answer
    keeps: bool = False

    @property
    def is_apart(self) -> bool:
        """See `Answers`: others started them."""
        return True

    @property
    def count(self) -> int:
        """The number of processes."""
        return self.board.parallel

    def answers(self, requests: Sequence[Request], tell: Callable[[Message], None]) -> list[Message]:
        """The results of all requests, in their order.

        Args:
            requests: see `Workers.answers`.
            tell: receives `{"logs": name}` where nobody is at work any more on what has that name, with its `result`
                where there is one.

        Raises:
            ValueError: a process says so, or ten were lost with one request.
        """
        board, waits = self.board, self.board.waits()
        before = set() if self.keeps else {part.number for part in board.parts() if part.state.is_finished()}
        results: dict[int, Message] = {}
        while True:
            parts = [part for part in board.parts() if part.number not in before]
            for index, request in enumerate(requests):
                if index in results:
                    continue
                own = [p for p in parts if key_of(p.user_attrs["part"]) == key_of(request)]
                ends = [p.user_attrs["result"] for p in own if p.state == TrialState.COMPLETE]
                if ends:
                    tell({"logs": request["name"], "result": ends[0]})
                    results[index] = ends[0]
                    if "refusal" in ends[0]:
                        raise ValueError(ends[0]["refusal"])
                elif not any(p.state in (TrialState.WAITING, TrialState.RUNNING) for p in own):
                    tell({"logs": request["name"]})  # what a process that is lost has left
                    board.post(request, len(own))
            if len(results) == len(requests):
                return [results[index] for index in range(len(requests))]
            if board.work(self.answer):
                waits = board.waits()
            else:
                time.sleep(next(waits))


@final
@dataclass
class SharedSearch:
    """The scores of one search, by all its processes.

    Attributes:
        board: of this process.
        space: of the candidates.
        answer: scores a part here.
        scores: by score and code, what is known so far.
    """

    board: Board
    space: SearchSpace
    answer: Answer
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    _layers: list[tuple[int, int]] = field(default_factory=list)
    _pending: set[tuple[str, str]] = field(default_factory=set)
    _read: set[int] = field(default_factory=set)

    def of(self, name: str) -> "SharedScores":
        """Evaluates candidates by one of the search's scores, together with the other processes."""
        return SharedScores(self, name)

    def missing(self, name: str, codes: Sequence[str]) -> tuple[list[str], bool]:
        """Codes that are neither scored nor in anybody's hands, and whether some are not scored yet."""
        self._refresh()
        unknown = [code for code in codes if (name, code) not in self.scores]
        return [code for code in unknown if (name, code) not in self._pending], bool(unknown)

    def layers(self, layer_count: LayerCount) -> None:
        """Add the layers of all parts that came in since the last call."""
        for evaluated, one_by_one in self._layers:
            layer_count.evaluated += evaluated
            layer_count.one_by_one += one_by_one
        self._layers.clear()

    def _refresh(self) -> None:
        self._pending = set()
        for trial in self.board.parts():
            request: Mapping[str, Any] = trial.user_attrs["part"]
            keys = [(request["score"], code) for code in request["codes"]]
            if trial.state in (TrialState.WAITING, TrialState.RUNNING):
                self._pending.update(keys)
            elif trial.state == TrialState.COMPLETE and trial.number not in self._read:
                self._read.add(trial.number)
                self._add(keys, trial)

    def _add(self, keys: Sequence[tuple[str, str]], trial: FrozenTrial) -> None:
        count, result = LayerCount(), trial.user_attrs["result"]
        if isinstance(result, dict) and "refusal" in result:
            if self.board.is_older(trial):
                return  # this command is another try
            raise ValueError(result["refusal"])
        try:
            self.scores |= zip(keys, scores_of(result, count), strict=True)
        except (KeyError, TypeError, ValueError) as error:  # not of kdnas: it is done again
            _log.warning(f"trial {trial.number} of the storage holds no scores: {reason(error, named=True)}.")
            return
        self._layers.append((count.evaluated, count.one_by_one))


@final
@dataclass(frozen=True)
class SharedScores:
    """Scores by all processes of a search, equal to those of one process with one thread; see `Evaluator`.

    Attributes:
        search: the scores of the process that leads.
        name: of the score.
    """

    search: SharedSearch
    name: str

    @property
    def parallel(self) -> int:
        """The number of processes."""
        return self.search.board.parallel

    def __call__(self, architectures: Sequence[Architecture], layer_count: LayerCount) -> list[Score]:
        """The scores, in the order of the architectures."""
        search, board, waits = self.search, self.search.board, self.search.board.waits()
        codes = [search.space.code(a) for a in architectures]
        by_code = dict(zip(codes, architectures, strict=True))
        while True:
            free, is_unfinished = search.missing(self.name, codes)
            if not is_unfinished:
                search.layers(layer_count)
                return [search.scores[self.name, code] for code in codes]
            if free:
                count = max(_ROUNDS * board.parallel, -(-len(free) // _LARGEST))
                for part in split(search.space, [by_code[code] for code in free], count):
                    board.post({"score": self.name, "codes": [free[index] for index in part]})
            if board.work(search.answer):
                waits = board.waits()
            elif not free:
                time.sleep(next(waits))
