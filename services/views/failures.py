"""What a database's errors mean: one place that turns them into the tree of `services.errors`.

No statement, parameter or URL gets into a text: they may hold secrets or a producer's data.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from services.errors import ArtifactStoreError, ConfigurationError, CorruptError, UnavailableError


class DamagedDatabaseError(CorruptError):
    """The file is damaged, or is no views database: no event is to blame, and nothing can be written."""

    problem = "damaged-database"


class TablesError(ConfigurationError):
    """Tables are missing, of another layout, or lost: `migrate` or a replay mends that while everything runs."""


class LockedError(UnavailableError):
    """Others held a lock for longer than was to be waited; nothing was changed. Try again."""


_DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# Classes and codes of SQLSTATE (PostgreSQL documentation, appendix A).
_CONFIGURATION = ("28", "3D", "3F", "42501", "42P01", "42703")
_MIGRATED = (
    "3F",
    "42P01",
    "42703",
)  # schemas, tables and columns; the database itself and its users are not ours to make
_DEPENDED_ON = "2BP01"
_LOCKED = "55P03"
_CORRUPT = ("22", "23", "54000")  # the last: a text that is too long for an index
_UNAVAILABLE = ("08", "25006", "25P03", "40", "53", "57", "58")

_SQLITE_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
}
_SQLITE_CORRUPT = {sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_TOOBIG}
_SQLITE_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_MIGRATE = "`artifact-store migrate` creates what is missing, and names what is to be replayed then"
_SETTING = "check the database, the user and its rights in ARTIFACT_STORE_VIEWS_URL"


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise UnavailableError, CorruptError or ConfigurationError in place of what the drivers raise.

    An error that says nothing about the database's state is a mistake in this program and passes unchanged.
    """
    try:
        yield
    except ArtifactStoreError:
        raise
    except PoolTimeoutError as error:
        raise UnavailableError("the views database: every connection is in use") from error
    except (*_DRIVER, DBAPIError, sqlite3.Error, OSError, TimeoutError, OverflowError) as error:
        # `from None`: SQLAlchemy's own text shows statement and parameters.
        meaning = _meaning(error)
        if meaning is None:
            raise
        raise meaning from None


def _meaning(error: BaseException) -> ArtifactStoreError | None:
    if isinstance(error, OverflowError):  # what the drivers say of a number that no column takes
        return CorruptError("the views cannot take this: a number has more than 64 bits")
    if isinstance(error, sqlite3.Error):
        return _of_sqlite(error)
    if isinstance(error, DBAPIError):
        if isinstance(error.orig, sqlite3.Error):
            return _of_sqlite(error.orig)
        invalidated = error.connection_invalidated
        cause: BaseException = error.orig if error.orig is not None else error
    else:
        invalidated, cause = False, error
    if isinstance(cause, TimeoutError):
        return UnavailableError("the views database gives no answer in time")
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or ""
    text = _first_line(cause)
    if state == _DEPENDED_ON:
        return ConfigurationError(
            f"the views database: {text}; drop what depends on it, and make that anew behind this"
        )
    if state == _LOCKED:
        return LockedError(f"the views database: {text}")
    if state.startswith(_CONFIGURATION):
        if state.startswith(_MIGRATED):
            return TablesError(f"the views database refuses: {text}; {_MIGRATE}")
        return ConfigurationError(f"the views database refuses: {text}; {_SETTING}")
    if state.startswith(_CORRUPT):
        return CorruptError(f"the views cannot take this: {text}")
    if state.startswith(_UNAVAILABLE) or invalidated or isinstance(cause, OSError):
        return UnavailableError(f"the views database cannot be reached: {text}")
    # The driver's own errors about a connection carry no state. One that breaks between two steps of a COPY is taken
    # for busy ("another operation is in progress"), in that step and in the rollback that follows.
    if not state and any(sign in text.lower() for sign in ("connection", "another operation")):
        return UnavailableError(f"the views database cannot be reached: {text}")
    return None


def _of_sqlite(error: sqlite3.Error) -> ArtifactStoreError | None:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the low byte is the primary code
    text = _first_line(error)
    if code in _SQLITE_UNAVAILABLE:
        return UnavailableError(f"the views database cannot be used now: {text}")
    if code in _SQLITE_DAMAGED:
        return DamagedDatabaseError(
            f"the views database is damaged: {text}; end what uses the file, set it aside, and "
            "`artifact-store migrate` makes another, into which everything is folded again"
        )
    if code in _SQLITE_CORRUPT:
        return CorruptError(f"the views cannot take this: {text}")
    if text.startswith(("no such table", "no such column")):
        return TablesError(f"the views database: {text}; {_MIGRATE}")
    return None


def _first_line(error: BaseException) -> str:
    """What the driver says in one line; for a connection refused that is an address and never a password."""
    lines = str(error).splitlines()
    # The dialect puts the driver's class before the message: "<class '…'>: message".
    said = lines[0].rpartition("'>: ")[2] if lines else ""
    return said or type(error).__name__
