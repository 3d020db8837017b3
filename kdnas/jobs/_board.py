"""A command shared by processes on any hosts: its parts are trials in a database of Optuna's, claimed one by one."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, final

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from kdnas.jobs._storage import READS, cause_of, may_pass, opened, remedy
from kdnas.runs import lock
from kdnas.searchers._optuna import quiet

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_BEAT = 5.0  # seconds between signs of life
_DEAD = 30.0  # seconds without one after which the parts of a process are others'
_PATIENCE = 300.0  # seconds for which a lost connection is tried again
_WAIT = (0.05, 1.0)  # seconds between looks at the storage while there is nothing to do: the first, and the longest
_TRIES = 10  # of a part with a name whose process is lost each time

Request = Mapping[str, Any]
Answer = Callable[[Request, int], dict[str, Any]]
"""(a part, the number of its claim) to its result, as plain JSON; `value` of it is what Optuna's dashboard shows."""


@final
@dataclass
class Board:
    """The processes of one command and its parts, in a storage.

    Every process has a trial with signs of its life; every part is a trial that one process claims, and that another
    one does again where its process is not heard of for 30 seconds. One process leads: it posts parts, does some
    itself, and records the results. Clocks are not compared.

    Attributes:
        storage: Optuna's.
        name: of the study; it stands for all that the results depend on.
        leads: whether this process leads.
        outcome: what the leading process tells the others where it ends well.
    """

    storage: BaseStorage
    name: str
    leads: bool = False
    outcome: Any = None
    _beats: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _claimed: dict[int, float] = field(default_factory=dict)
    _study: int = -1
    _process: int = -1
    _ended: threading.Event = field(default_factory=threading.Event)
    _ids: dict[int, int] = field(default_factory=dict)
    _warned: bool = False

    def __post_init__(self) -> None:
        self._study = self._call(self._begun)
        attributes = {"process": lock.own_record(), "leads": True, "beat": 0}
        self._process = self._create(TrialState.RUNNING, attributes)
        self.leads = not any(t.number < self._process and self._is_leader(t) for t in self._trials())
        if not self.leads:
            self._set(self._process, "leads", False)
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def close(self, state: TrialState) -> None:
        """End this process's part in the command: COMPLETE where all is done, else FAIL."""
        self._ended.set()
        self._life.join(_DEAD)  # its connection is free then
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            if self.leads and state == TrialState.COMPLETE:
                self._set(self._process, "outcome", self.outcome)
            self._finish(self._process, state, 0.0)

    def is_older(self, part: FrozenTrial) -> bool:
        """Whether a part was posted before this process came."""
        return part.number < self._process

    @property
    def parallel(self) -> int:
        """The number of processes that are heard of."""
        return max(1, sum(self._is_process(trial) for trial in self._trials()))

    def post(self, request: Request, tries: int = 0) -> None:
        """Offer a part to whoever claims it first; one with a `name` is offered again until it is done.

        Raises:
            ValueError: ten processes were lost with it.
        """
        if tries >= _TRIES:
            raise ValueError(
                f"{tries} processes that worked on {request['name']} were lost, perhaps for memory. Mend that; "
                "the same command goes on."
            )
        self._create(TrialState.WAITING, {"part": dict(request), "tries": tries})

    def parts(self) -> list[FrozenTrial]:
        """All parts, in the order in which they were posted; those whose process is lost are given up first.

        Raises:
            ValueError: this process itself was thought to be lost, and another one leads.
        """
        while True:
            trials = self._trials()
            if self.leads and any(t.number == self._process and t.state.is_finished() for t in trials):
                raise ValueError(
                    f"this process was not heard of for {_DEAD:.0f} seconds, so that another one leads now."
                )
            alive = {t.number for t in trials if self._is_process(t)}
            parts = [t for t in trials if "part" in t.user_attrs]
            lost = [t for t in parts if t.state == TrialState.RUNNING and not self._is_worked_on(t, alive)]
            if not lost:
                return parts
            for trial in lost:
                with contextlib.suppress(UpdateFinishedTrialError):  # it ended after all, or another process was faster
                    self._finish(trial.number, TrialState.FAIL)
                    if "name" in trial.user_attrs["part"]:
                        self.post(trial.user_attrs["part"], trial.user_attrs["tries"] + 1)

    def work(self, answer: Answer) -> bool:
        """Claim a part, do it and store the result; False where there is none to claim."""
        for trial in self._trials(TrialState.WAITING):
            if "part" not in trial.user_attrs or not self._claim(trial):
                continue
            try:
                result = answer(trial.user_attrs["part"], trial.number)
            except (ValueError, FloatingPointError) as error:
                result = {"refusal": str(error)}
            with contextlib.suppress(UpdateFinishedTrialError):  # this process was thought to be lost
                self._set(trial.number, "result", result)
                self._finish(trial.number, TrialState.COMPLETE, float(result.get("value", 0.0)))
            return True
        return False

    def follow(self, answer: Answer, folder: Path | None = None) -> bool:
        """Do parts until the command has ended, or this process is the next to lead it.

        Args:
            answer: does a part.
            folder: where parts write; it must be the one that the process which leads has locked.

        Returns:
            Whether the command has ended; else the process that led is not heard of any more, and this one leads.

        Raises:
            ValueError: the process that leads was stopped or met an error; or it writes in another folder.
        """
        waits, companion = self.waits(), -1
        while True:
            trials = self._trials()
            leaders = [t for t in trials if t.user_attrs.get("leads") and t.number != self._process]
            for leader in leaders:
                if leader.state == TrialState.COMPLETE:
                    self.outcome = leader.user_attrs.get("outcome")
                    return True
            if not any(t.state == TrialState.RUNNING for t in leaders):
                raise ValueError("the process that leads this command was stopped. Start the same command again.")
            alive = [t.number for t in trials if self._is_process(t)]  # asks of all: each asking counts their beats
            leader = next((t for t in leaders if t.number in alive), None)
            if leader is None and min(alive) == self._process:
                self._lead(leaders)
                return False
            if leader is not None and leader.number != companion and folder is not None:
                self._accompany(leader, folder)
                companion = leader.number
            if leader is not None and self.work(answer):
                waits = self.waits()
                continue
            self.parts()
            time.sleep(next(waits))

    def waits(self) -> Iterator[float]:
        """Seconds to wait between looks at the storage, as long as there is nothing to do."""
        shortest, longest = _WAIT
        while True:
            yield shortest
            shortest = min(longest, 1.5 * shortest)

    def _lead(self, before: list[FrozenTrial]) -> None:
        """Lead in place of processes that are not heard of; they are told, should they come back."""
        self._set(self._process, "leads", True)
        self.leads = True
        for trial in before:
            if trial.state == TrialState.RUNNING:
                with contextlib.suppress(UpdateFinishedTrialError):
                    self._finish(trial.number, TrialState.FAIL)

    def _accompany(self, leader: FrozenTrial, folder: Path) -> None:
        """Write beside the process that leads, once it has locked the folder."""
        record, waits, until = leader.user_attrs["process"], self.waits(), time.monotonic() + _DEAD
        while not lock.is_locked_by(folder, record):
            if time.monotonic() > until:
                raise ValueError(
                    f"{folder} must be the folder that the leading process {record['pid']} on {record['host']} writes, "
                    "which has no lock there. Put it on a file system that all hosts share."
                )
            time.sleep(next(waits))
        lock.accompany(record)

    def _is_worked_on(self, trial: FrozenTrial, alive: set[int]) -> bool:
        """Whether a claimed part is in the hands of a process that is heard of."""
        if "by" in trial.user_attrs:
            return trial.user_attrs["by"] in alive
        return time.monotonic() - self._claimed.setdefault(trial.number, time.monotonic()) < _DEAD

    def _is_process(self, trial: FrozenTrial) -> bool:
        """Whether a trial is a process that is heard of; the beats are counted here, so that no clocks are compared."""
        if "process" not in trial.user_attrs or trial.state != TrialState.RUNNING:
            return False
        if trial.number == self._process:
            return True
        record, beat = trial.user_attrs["process"], trial.user_attrs.get("beat")
        if lock.has_ended(record):
            return False
        known, since = self._beats.get(trial.number, (None, 0.0))
        if beat != known:
            self._beats[trial.number] = beat, time.monotonic()
        is_alive = beat != known or time.monotonic() - since < _DEAD
        lock.believe(record, ended=not is_alive)
        return is_alive

    def _is_leader(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get("leads")) and self._is_process(trial)

    def _claim(self, trial: FrozenTrial) -> bool:
        try:
            if not self._call(self.storage.set_trial_state_values, self._id(trial.number), TrialState.RUNNING):
                return False
            self._set(trial.number, "by", self._process)
            if "name" not in trial.user_attrs["part"]:
                return True
            # Two processes may have offered it again.
            others = [t for t in self._trials(TrialState.WAITING, TrialState.RUNNING) if t.number < trial.number]
            if all(key_of(t.user_attrs.get("part", {})) != key_of(trial.user_attrs["part"]) for t in others):
                return True
            self._finish(trial.number, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass
        return False

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials, or those in one of some states, in the order in which they were made."""
        return self._call(self.storage.get_all_trials, self._study, False, states or None)

    def _create(self, state: TrialState, attributes: Mapping[str, Any]) -> int:
        trial = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=dict(attributes))
        trial.state = state
        made = self._call(self.storage.create_new_trial, self._study, trial)
        number = self._call(self.storage.get_trial_number_from_id, made)
        self._ids[number] = made
        return number

    def _id(self, number: int) -> int:
        if number not in self._ids:
            self._ids[number] = self._call(self.storage.get_trial_id_from_study_id_trial_number, self._study, number)
        return self._ids[number]

    def _set(self, trial: int, key: str, value: Any) -> None:
        self._call(self.storage.set_trial_user_attr, self._id(trial), key, value)

    def _finish(self, trial: int, state: TrialState, value: float | None = None) -> None:
        values = [value] if state == TrialState.COMPLETE and value is not None else None
        self._call(self.storage.set_trial_state_values, self._id(trial), state, values)

    def _begun(self) -> int:
        with quiet():
            try:
                return self.storage.create_new_study([StudyDirection.MAXIMIZE], self.name)
            except DuplicatedStudyError:
                return self.storage.get_study_id_from_name(self.name)

    def _live(self) -> None:
        beat = 0
        while not self._ended.wait(_BEAT):
            beat += 1
            with contextlib.suppress(Exception):  # the next one may come through; what fails is said where it matters
                self.storage.set_trial_user_attr(self._id(self._process), "beat", beat)
        self.storage.remove_session()  # a thread's own

    def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """What the storage answers; a lost connection is tried again for five minutes."""
        until, pause, was_away = time.monotonic() + _PATIENCE, 0.5, False
        while True:
            token = READS.set(function.__name__.startswith("get_"))
            try:
                result = function(*arguments)
            except (StorageInternalError, DBAPIError) as error:
                was_away, cause = True, error.__cause__ or error
                if not may_pass(cause):
                    raise ValueError(f"the storage cannot be used: {cause_of(cause)}. {remedy(cause)}") from error
                if time.monotonic() > until:
                    raise ValueError(
                        f"the storage does not answer ({cause_of(cause)}). Once it does, the same command goes on."
                    ) from error
                if not self._warned:
                    _log.warning(
                        f"the storage does not answer ({cause_of(cause)}); it is tried again for five minutes."
                    )
                    self._warned = True
                time.sleep(pause)
                pause = min(5.0, 2 * pause)
                continue
            finally:
                READS.reset(token)
            if was_away:  # nobody could give a sign of life
                self._beats = {number: (beat, time.monotonic()) for number, (beat, _) in self._beats.items()}
            return result


def key_of(request: Request) -> tuple[Any, ...]:
    """What tells parts with names apart: kind, name, and how far it goes."""
    return tuple(request.get(name) for name in ("kind", "name", "step"))


@contextlib.contextmanager
def joined(url: str, name: str) -> Iterator[Board]:
    """A board of this process for a block; where the block ends well, a process that leads has ended the command.

    Raises:
        ValueError: as `opened`.
    """
    with opened(url) as storage:
        board = Board(storage, name)
        try:
            yield board
        except BaseException:
            board.close(TrialState.FAIL)
            raise
        board.close(TrialState.COMPLETE)
