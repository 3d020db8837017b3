"""The databases, of Optuna's, in which processes on any hosts find each other: how one is opened, and what it says."""

import contextlib
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import create_engine, event, inspect
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    NoSuchModuleError,
    NotSupportedError,
    ProgrammingError,
)

from kdnas.plain import printable, reason
from kdnas.runs.files import plain
from kdnas.searchers._optuna import quiet

READS = ContextVar("reads", default=False)
"""Whether what is asked of a storage writes nothing."""
_ANSWER = 10.0  # seconds in which a proxy answers
_DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql"}  # of databases, each named as the extra that installs it


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
    if parsed.drivername in _DRIVERS:  # else the driver that SQLAlchemy takes depends on its version
        parsed = parsed.set(drivername=f"{parsed.drivername}+{_DRIVERS[parsed.drivername]}")
    url = parsed.render_as_string(hide_password=False)
    try:
        names = _tables(url)
        if names and "studies" not in names:
            raise ValueError(
                f"the storage {shown} must be a database of Optuna's alone, it has the table {plain(names[0], 80)}. "
                "Name another database."
            )
        with quiet():  # connections that were lost are replaced; versions are compared where it can be closed again
            storage = RDBStorage(url, engine_kwargs={"pool_pre_ping": True}, skip_compatibility_check=True)
    except ImportError as error:  # of Optuna, for SQLAlchemy's own
        driver = getattr(error.__cause__ or error, "name", None) or parsed.drivername
        package = {name: f"'kdnas[{extra}]'" for extra, name in _DRIVERS.items()}.get(driver, driver)
        raise ValueError(f"the storage {shown} needs the package {driver}: pip install {package}") from None
    except NoSuchModuleError:
        raise ValueError(
            f"`storage` must be a URL such as {form}; no database is called {parsed.drivername}."
        ) from None
    except DBAPIError as error:
        raise ValueError(
            f"the storage {shown} cannot be used: {cause_of(error)}. "
            + (remedy(error) if "full" in cause_of(error) else "Check server, name and password.")
        ) from None
    versions = storage.get_current_version(), storage.get_head_version()
    if versions[0] != versions[1]:
        storage.remove_session()
        storage.engine.dispose()
        raise ValueError(
            f"the storage {shown} has tables of another version of Optuna ({versions[0]}, not {versions[1]}). Name "
            "another database, or bring this one up to date: optuna storage upgrade --storage URL"
        )
    if parsed.get_backend_name() == "sqlite":
        _in_turn(storage.engine)
    return storage


def _in_turn(engine: Engine) -> None:
    """Let transactions that write on SQLite begin one after another: without locks of rows two could claim one."""

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # The driver would begin at the first write only, after what decides on it was read.
        connection.connection.dbapi_connection.isolation_level = None  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN" if READS.get() else "BEGIN IMMEDIATE")


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


def may_pass(cause: BaseException) -> bool:
    """Whether an error may pass by itself: that of a server that is away, or of a file that another process locks."""
    own = getattr(cause, "orig", None)
    if isinstance(own, sqlite3.Error):
        return "locked" in str(own)
    return not isinstance(cause, ProgrammingError | DataError | NotSupportedError)


def remedy(cause: BaseException) -> str:
    """What to do about an error that does not pass by itself."""
    if "full" in cause_of(cause):
        return "Make room there; the same command goes on."
    return "Name another database."


def cause_of(error: BaseException) -> str:
    """What a database says of an error, in one line."""
    return printable(reason(Exception(str(getattr(error, "orig", None) or error)))).rstrip(".")
