"""A search shared by processes on any hosts: its parts are trials in a database of Optuna's, claimed one by one."""

import contextlib
import logging
import math
import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    NoSuchModuleError,
    NotSupportedError,
    ProgrammingError,
)

from kdnas.architecture import Architecture
from kdnas.jobs._scoring import scores_of, split
from kdnas.plain import printable, reason
from kdnas.runs.files import plain
from kdnas.runs.lock import has_ended, own_record
from kdnas.scorers.base import LayerCount, Score
from kdnas.space import SearchSpace

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_BEAT = 5.0  # seconds between signs of life
_DEAD = 30.0  # seconds without one after which the parts of a process are others'
_PATIENCE = 300.0  # seconds for which a lost connection is tried again
_WAIT = (0.05, 1.0)  # seconds between looks at the storage while there is nothing to do: the first, and the longest
_ANSWER = 10.0  # seconds in which a proxy answers
_LARGEST = 64  # candidates of a part, so that a trial stays small and a lost process costs little
_ROUNDS = 2  # parts per process and call

ScoreCodes = Callable[[str, Sequence[str]], dict[str, Any]]
"""(name of a score, codes of candidates) to what `kdnas.jobs._scoring.scored` returns."""


@contextlib.contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    """Optuna's storage at a URL, for a block: of a relational database, or `grpc://host:port` of its proxy.

    No connection is open after the block.

    Raises:
        ValueError: no such URL, driver, server or password, or tables of another version.

    Example:
        >>> with opened("my.db"):
        ...     pass
        Traceback (most recent call last):
        ValueError: `storage` must be a URL such as sqlite:///search.db or postgresql://me@host/name, got 'my.db'.
    """
    form = "sqlite:///search.db or postgresql://me@host/name"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        shown = printable(re.sub(":.*@", ":***@", url.partition("?")[0]))  # what may be a password is not shown
        raise ValueError(f"`storage` must be a URL such as {form}, got {shown!r:.80}.") from None
    if parsed.drivername == "grpc":
        storage: Any = _proxy(parsed.host or "localhost", parsed.port or 13000)
        close = storage.close
    else:
        storage = _database(parsed, form)
        close = storage.engine.dispose
    try:
        yield get_storage(storage)
    finally:
        storage.remove_session()
        close()


def _database(parsed: URL, form: str) -> RDBStorage:
    """Optuna's storage in a relational database, whose tables are made where there are none."""
    shown = printable(parsed.set(query={}).render_as_string(hide_password=True))
    if parsed.drivername == "postgresql":  # else the driver that SQLAlchemy takes depends on its version
        parsed = parsed.set(drivername="postgresql+psycopg")
    url = parsed.render_as_string(hide_password=False)
    try:
        names = _tables(url)
        if names and "studies" not in names:
            raise ValueError(
                f"the storage {shown} must be a database of Optuna's alone, it has the table {plain(names[0], 80)}. "
                "Name another database."
            )
        with _quiet():  # connections that were lost are replaced; versions are compared where it can be closed again
            storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True}, skip_compatibility_check=True)
    except ImportError as error:  # of Optuna, for SQLAlchemy's own
        driver = getattr(error.__cause__ or error, "name", None) or parsed.drivername
        package = {"psycopg": "'kdnas[postgresql]'", "MySQLdb": "mysqlclient"}.get(driver, driver)
        raise ValueError(f"the storage {shown} needs the package {driver}: pip install {package}") from None
    except NoSuchModuleError:
        raise ValueError(
            f"`storage` must be a URL such as {form}; no database is called {parsed.drivername}."
        ) from None
    except DBAPIError as error:
        raise ValueError(
            f"the storage {shown} cannot be used: {_cause(error)}. Check server, name and password."
        ) from None
    versions = storage.get_current_version(), storage.get_head_version()
    if versions[0] != versions[1]:
        storage.remove_session()
        storage.engine.dispose()
        raise ValueError(
            f"the storage {shown} has tables of another version of Optuna ({versions[0]}, not {versions[1]}). Name "
            "another database, or bring this one up to date: optuna storage upgrade --storage URL"
        )
    return storage


def _tables(url: str) -> list[str]:
    engine = create_engine(url)
    try:
        return inspect(engine).get_table_names()
    finally:
        engine.dispose()


def _proxy(host: str, port: int) -> Any:
    from optuna.storages import GrpcStorageProxy

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            proxy = GrpcStorageProxy(host=host, port=port)
    except ImportError as error:
        raise ValueError(f"a storage grpc:// needs a package that is missing ({error}): pip install grpcio") from None
    try:
        proxy.wait_server_ready(timeout=_ANSWER)
        return proxy
    except Exception as error:
        proxy.close()
        raise ValueError(f"no proxy answers at {host}:{port} ({reason(error, named=True)}). Start it first.") from None


def _may_pass(cause: BaseException) -> bool:
    """Whether an error may pass by itself: that of a server that is away, or of a file that another process locks."""
    own = getattr(cause, "orig", None)
    if isinstance(own, sqlite3.Error):
        return "locked" in str(own)
    return not isinstance(cause, ProgrammingError | DataError | NotSupportedError)


def _cause(error: BaseException) -> str:
    return printable(reason(Exception(str(getattr(error, "orig", None) or error)))).rstrip(".")


@final
@dataclass
class Board:
    """The processes of one search and its parts, in a storage.

    Every process has a trial with signs of its life; every part of the search is a trial that one process claims, and
    that another one does again where its process is not heard of for 30 seconds. One process leads: it runs the
    searcher, posts parts, scores some itself, and records the ranking.

    Attributes:
        storage: Optuna's.
        name: of the study; it stands for the run's weights, the search's settings and its number.
        leads: whether this process leads.
        scores: by score and code, what is known so far.
    """

    storage: BaseStorage
    name: str
    leads: bool = False
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    _layers: list[tuple[int, int]] = field(default_factory=list)
    _pending: set[tuple[str, str]] = field(default_factory=set)
    _read: set[int] = field(default_factory=set)
    _beats: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _claimed: dict[int, float] = field(default_factory=dict)
    _study: int = -1
    _process: int = -1
    _ended: threading.Event = field(default_factory=threading.Event)
    _ids: dict[int, int] = field(default_factory=dict)
    _warned: bool = False

    def __post_init__(self) -> None:
        self._study = self._call(self._begun)
        owner = own_record()
        attributes = {"process": owner, "leads": True, "beat": 0}
        self._process = self._create(TrialState.RUNNING, attributes)
        self.leads = not any(t.number < self._process and self._is_leader(t) for t in self._trials())
        if not self.leads:
            self._set(self._process, "leads", False)
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def close(self, state: TrialState) -> None:
        """End this process's part in the search: COMPLETE where the search is done, else FAIL."""
        self._ended.set()
        self._life.join(_ANSWER)  # its connection is free then
        with contextlib.suppress(UpdateFinishedTrialError, ValueError):
            self._finish(self._process, state, 0.0)

    # What the leading process does.

    @property
    def parallel(self) -> int:
        """The number of processes that are heard of."""
        return max(1, sum(self._is_process(trial) for trial in self._trials()))

    def of(self, name: str, space: SearchSpace, score: ScoreCodes) -> "SharedScores":
        """Evaluates candidates by one of the search's scores, together with the other processes."""
        return SharedScores(self, name, space, score)

    def missing(self, name: str, codes: Sequence[str]) -> tuple[list[str], bool]:
        """Codes that are neither scored nor in anybody's hands, and whether some are not scored yet."""
        self._refresh()
        unknown = [code for code in codes if (name, code) not in self.scores]
        return [code for code in unknown if (name, code) not in self._pending], bool(unknown)

    def post(self, name: str, parts: Sequence[Sequence[str]]) -> None:
        """Offer parts of the search to whoever claims them first."""
        for codes in parts:
            self._create(TrialState.WAITING, {"score": name, "codes": list(codes)})

    def layers(self, layer_count: LayerCount) -> None:
        """Add the layers of all parts that came in since the last call."""
        for evaluated, one_by_one in self._layers:
            layer_count.evaluated += evaluated
            layer_count.one_by_one += one_by_one
        self._layers.clear()

    # What every process does.

    def work(self, score: ScoreCodes) -> bool:
        """Claim a part, score it and store the result; False where there is none to claim."""
        for trial in self._trials(TrialState.WAITING):
            if "codes" not in trial.user_attrs or not self._claim(trial.number):
                continue
            result = score(trial.user_attrs["score"], trial.user_attrs["codes"])
            best = max((value for value, *_ in result["scores"] if math.isfinite(value)), default=0.0)
            with contextlib.suppress(UpdateFinishedTrialError):  # this process was thought to be dead
                self._set(trial.number, "result", result)
                self._finish(trial.number, TrialState.COMPLETE, best)
            return True
        return False

    def follow(self, score: ScoreCodes) -> bool:
        """Score parts until the search has ended, or this process is the next to lead it.

        Returns:
            Whether the search has ended; else the process that led is not heard of any more, and this one leads.

        Raises:
            ValueError: the process that leads was stopped or met an error.
        """
        waits = _waits()
        while True:
            if self.work(score):
                waits = _waits()
                continue
            trials = self._trials()
            leaders = [t for t in trials if t.user_attrs.get("leads") and t.number != self._process]
            if any(t.state == TrialState.COMPLETE for t in leaders):
                return True
            if not any(t.state == TrialState.RUNNING for t in leaders):
                raise ValueError("the process that leads this search was stopped. Start the same command again.")
            alive = [t.number for t in trials if self._is_process(t)]  # asks of all: each asking counts their beats
            if not {t.number for t in leaders} & set(alive) and min(alive) == self._process:
                self._set(self._process, "leads", True)
                self.leads = True
                return False
            time.sleep(next(waits))

    # Trials.

    def _refresh(self) -> None:
        """Read results, and give up parts whose process is dead."""
        self._pending = set()
        trials = self._trials()
        alive = {t.number for t in trials if self._is_process(t)}
        for trial in trials:
            attributes = trial.user_attrs
            if "codes" not in attributes:
                continue
            keys = [(attributes["score"], code) for code in attributes["codes"]]
            if trial.state == TrialState.COMPLETE and trial.number not in self._read:
                self._read.add(trial.number)
                count = LayerCount()
                try:
                    self.scores |= zip(keys, scores_of(attributes["result"], count), strict=True)
                except (KeyError, TypeError, ValueError) as error:  # not of kdnas: it is done again
                    _log.warning(f"trial {trial.number} of the storage holds no scores: {reason(error, named=True)}.")
                    continue
                self._layers.append((count.evaluated, count.one_by_one))
            elif trial.state == TrialState.WAITING or (trial.state == TrialState.RUNNING and self._runs(trial, alive)):
                self._pending.update(keys)
            elif trial.state == TrialState.RUNNING:
                with contextlib.suppress(UpdateFinishedTrialError):  # its process ended it after all
                    self._finish(trial.number, TrialState.FAIL)

    def _runs(self, trial: FrozenTrial, alive: set[int]) -> bool:
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
        if has_ended(trial.user_attrs["process"]):
            return False
        beat, (known, since) = trial.user_attrs.get("beat"), self._beats.get(trial.number, (None, 0.0))
        if beat != known:
            self._beats[trial.number] = beat, time.monotonic()
            return True
        return time.monotonic() - since < _DEAD

    def _is_leader(self, trial: FrozenTrial) -> bool:
        return bool(trial.user_attrs.get("leads")) and self._is_process(trial)

    def _claim(self, trial: int) -> bool:
        try:
            if not self._call(self.storage.set_trial_state_values, self._id(trial), TrialState.RUNNING):
                return False
            self._set(trial, "by", self._process)
            return True
        except UpdateFinishedTrialError:
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
        with _quiet():
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
        until, pause = time.monotonic() + _PATIENCE, 0.5
        while True:
            try:
                return function(*arguments)
            except (StorageInternalError, DBAPIError) as error:
                cause = error.__cause__ or error
                if not _may_pass(cause):
                    raise ValueError(f"the storage cannot be used: {_cause(cause)}. Name another database.") from error
                if time.monotonic() > until:
                    raise ValueError(
                        f"the storage does not answer ({_cause(cause)}). Once it does, the same command goes on."
                    ) from error
                if not self._warned:
                    _log.warning(f"the storage does not answer ({_cause(cause)}); it is tried again for five minutes.")
                    self._warned = True
                time.sleep(pause)
                pause = min(5.0, 2 * pause)


@final
@dataclass(frozen=True)
class SharedScores:
    """Scores by all processes of a search, equal to those of one process with one thread; see `Evaluator`.

    Attributes:
        board: of the process that leads.
        name: of the score.
        space: of the candidates.
        score: scores a part here.
    """

    board: Board
    name: str
    space: SearchSpace
    score: ScoreCodes

    @property
    def parallel(self) -> int:
        """The number of processes."""
        return self.board.parallel

    def __call__(self, architectures: Sequence[Architecture], layer_count: LayerCount) -> list[Score]:
        """The scores, in the order of the architectures."""
        board, codes, waits = self.board, [self.space.code(a) for a in architectures], _waits()
        by_code = dict(zip(codes, architectures, strict=True))
        while True:
            free, unfinished = board.missing(self.name, codes)
            if not unfinished:
                board.layers(layer_count)
                return [board.scores[self.name, code] for code in codes]
            if free:
                count = max(_ROUNDS * board.parallel, -(-len(free) // _LARGEST))
                parts = split(self.space, [by_code[code] for code in free], count)
                board.post(self.name, [[free[index] for index in part] for part in parts])
            if board.work(self.score):
                waits = _waits()
            elif not free:
                time.sleep(next(waits))


def _waits() -> Iterator[float]:
    shortest, longest = _WAIT
    while True:
        yield shortest
        shortest = min(longest, 1.5 * shortest)


@contextlib.contextmanager
def joined(url: str, name: str) -> Iterator[Board]:
    """A board of this process for a block; where the block ends well, a process that leads has ended the search.

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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
