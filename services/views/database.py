"""The views' database: how it is opened, its layout, its two kinds of transactions, and the meaning of its errors.

SQLite runs in WAL mode, so readers never wait for the one writer. Rows and checkpoint are written in one transaction,
so after a crash folding continues from whatever was committed.

`database_errors` turns the drivers' errors into those of `artifact_store.errors`. An error's text never contains a
statement, parameter or URL, because they may hold secrets or a producer's data.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiosqlite
import asyncpg
from asyncpg.exceptions import ClientConfigurationError
from sqlalchemy import Table, delete, event, insert, inspect, select, text, update
from sqlalchemy.engine import URL, Connection, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

from artifact_store.errors import ArtifactStoreError, ConfigurationError, CorruptError, UnavailableError
from artifact_store.rules import is_loopback
from services.core.lifecycle import RETENTION_CLASSES
from services.runtime.file_system import FileLock, make_folder, private_file
from services.runtime.metrics import OPERATION_FAILURES, OPERATION_SECONDS
from services.views.bulk import on_postgresql
from services.views.projections import PROJECTIONS, Projection
from services.views.tables import (
    metadata,
    parked_packages,
    projection_builds,
    projection_checkpoints,
    projection_generations,
    retention_classes,
)

_BUSY_SECONDS = 10
_CONNECT_SECONDS = 10
_PROVEN_SECONDS = 1.0
"""How long a connection counts as alive after its last use."""
_STATEMENT_SECONDS = 300  # a frozen server must not hold a projector for ever
MAX_PARKED = 100
_MIGRATION_LOCK = 0x61727466  # an arbitrary number, the same in all our processes
_LOST = -1
"""The layout of a projection that lost one of its tables, or the table of checkpoints or of parked packages.

`migrate` creates the table again, but empty, so it no longer matches the others.
"""

_READ_SECONDS = OPERATION_SECONDS.labels("views", "read")
_READ_FAILURES = OPERATION_FAILURES.labels("views", "read")
_WRITE_SECONDS = OPERATION_SECONDS.labels("views", "write")
_WRITE_FAILURES = OPERATION_FAILURES.labels("views", "write")


class Views:
    """One views database, opened from its URL. Connects on first use; `close` releases all connections."""

    def __init__(self, url: str, *, answer_seconds: float = 10.0) -> None:
        """`url` is `sqlite+aiosqlite:///PATH` or `postgresql+asyncpg://…`. Does not connect; makes SQLite's folder.

        `answer_seconds` bounds a short read, so that a hanging database delays a request no longer than that.

        Raises ConfigurationError for another kind of URL. Its text omits the URL, which may contain a password.
        """
        parsed = _parse(url)
        self.dialect = "sqlite" if parsed.drivername == "sqlite+aiosqlite" else "postgresql"
        self.engine = _open_sqlite(parsed) if self.dialect == "sqlite" else _open_postgresql(parsed)
        self.is_private = _is_private(parsed)
        """Whether the connection cannot be overheard: it is a file, a server on this machine, or uses TLS."""
        self.max_parked = MAX_PARKED
        """How many packages one projection may park before it stops."""
        self._answer_seconds = answer_seconds
        self._writing = self.engine.execution_options(writes=True)
        self._single = self.engine
        if self.dialect == "postgresql":  # on SQLite, beginning a transaction takes no round trip
            self._single = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self.folding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """A lock for each projection: one process's folds wait here for each other instead of racing for the guard."""

    @property
    def connections_in_use(self) -> int:
        """How many connections this process is using; at most 15."""
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, QueuePool) else 0

    @asynccontextmanager
    async def reading(
        self, *, snapshot: bool = False, long: bool = False, single: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """A connection for reading. With `snapshot`, all statements see one state of the database.

        Unless it is `long`, the block must end within `answer_seconds`. `single` promises one statement whose result
        is read at once: it needs no transaction, which saves two round trips on PostgreSQL.

        Raises UnavailableError, ConfigurationError (tables are missing), also for driver errors raised in the block.
        """
        timed = nullcontext() if long else _READ_SECONDS.time()
        counted = nullcontext() if long else _READ_FAILURES.count_exceptions()
        with database_errors(), timed, counted:
            engine = self._single if single else self.engine
            async with asyncio.timeout(None if long else self._answer_seconds), engine.connect() as connection:
                if snapshot and self.dialect == "postgresql":  # a transaction on SQLite is a snapshot anyway
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that commits when the block ends, or rolls back on an error. On SQLite, it waits for its turn.

        Raises UnavailableError (after which the commit may or may not have happened), CorruptError (a row exists
        already, or a value does not fit its column), ConfigurationError (tables are missing).
        """
        with database_errors(), _WRITE_SECONDS.time(), _WRITE_FAILURES.count_exceptions():
            async with self._writing.begin() as connection:
                yield connection

    async def migrate(self) -> None:
        """Create missing tables and seeds. Safe to repeat, also by several processes at once.

        Raises TablesError when a projection's tables have another layout, or one of them was lost: the projection must
        then be replayed.
        """
        for why in (await self.create_missing()).values():
            raise TablesError(why)

    async def create_missing(self) -> Mapping[str, str]:
        """As `migrate`, but instead of raising TablesError, return the projections to replay, by name, and why.

        Raises ConfigurationError: the database's encoding cannot store every text.
        """
        if self.dialect == "sqlite":
            with database_errors():
                await asyncio.to_thread(_write_ahead, Path(str(self.engine.url.database)))
        async with self.writing() as connection:
            await _require_utf8(connection)
            await self._create(connection)
            return await _outdated(connection, PROJECTIONS.values())

    async def check(self) -> None:
        """Return if the database can be reached and its tables have this version's layout.

        Raises UnavailableError, ConfigurationError.
        """
        async with self.reading() as connection:
            await _require_utf8(connection)
            await check_layouts(connection, PROJECTIONS.values())

    async def close(self) -> None:
        """Release every connection; blocks until done."""
        await self.engine.dispose()

    async def _create(self, connection: AsyncConnection) -> None:
        if self.dialect == "postgresql":  # two processes that create one table at once collide in the catalogue
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        missing = await connection.run_sync(_missing_tables)
        await connection.run_sync(metadata.create_all)
        # A view's own tables never get new columns: another layout is folded again from the log.
        await connection.run_sync(add_missing_columns, [projection_checkpoints])
        table = projection_generations.c
        known = {row.projection: row for row in await connection.execute(select(projection_generations))}
        progress = missing & {projection_checkpoints, parked_packages}
        if progress:  # builds have lost their checkpoints or marks too
            await connection.execute(delete(projection_builds))
        for name, projection in PROJECTIONS.items():
            row, lost = known.get(name), progress or missing.intersection(projection.tables)
            # A projection with another layout is refused anyway, and one that has folded nothing has lost nothing.
            if lost and row is not None and row.layout == projection.layout and row.log is not None:
                await connection.execute(
                    update(projection_generations).where(table.projection == name).values(layout=_LOST)
                )
        fresh = [
            {
                "projection": name,
                "generation": uuid4(),
                "layout": projection.layout if missing.issuperset(projection.tables) else _LOST,
                "log": None,
            }
            for name, projection in PROJECTIONS.items()
            if name not in known
        ]
        if fresh:
            await connection.execute(insert(projection_generations), fresh)
        await _seed(connection)


async def _require_utf8(connection: AsyncConnection) -> None:
    """Raise ConfigurationError for a PostgreSQL database whose encoding cannot store every character."""
    if not on_postgresql(connection):
        return
    encoding = (await connection.execute(text("SHOW server_encoding"))).scalar_one()
    if encoding not in ("UTF8", "SQL_ASCII"):  # SQL_ASCII stores bytes as they are, and ours are UTF-8
        raise ConfigurationError(
            f"the views database has the encoding {encoding}, which cannot store every text: create another with "
            "`CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0`, and name it in ARTIFACT_STORE_VIEWS_URL"
        )


def _missing_tables(connection: Connection) -> set[Table]:
    there = inspect(connection)
    return {table for table in metadata.tables.values() if not there.has_table(table.name)}


def add_missing_columns(connection: Connection, tables: Iterable[Table]) -> None:
    """Add the columns that these tables lack because an earlier version created them."""
    there = inspect(connection)
    for table in tables:
        known = {column["name"] for column in there.get_columns(table.name)}
        for column in (column for column in table.columns if column.name not in known):
            kind = column.type.compile(connection.dialect)
            connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}"))


async def check_layouts(connection: AsyncConnection, projections: Iterable[Projection]) -> None:
    """Raise TablesError unless the tables of these projections exist in this version's layout."""
    for why in (await _outdated(connection, projections)).values():
        raise TablesError(why)


async def _outdated(connection: AsyncConnection, projections: Iterable[Projection]) -> dict[str, str]:
    """The projections whose tables cannot be used as they are, by name: the reason, and what mends it."""
    found = {row.projection: row.layout for row in await connection.execute(select(projection_generations))}
    outdated: dict[str, str] = {}
    for name, layout in ((projection.name, projection.layout) for projection in projections):
        mend = f"`artifact-store replay {name}` builds them from the log"
        if name not in found:
            outdated[name] = f"the views have no {name}: `artifact-store migrate` creates it"
        elif found[name] == _LOST:
            outdated[name] = f"a table that {name} needs was lost and is empty now: {mend}"
        elif found[name] != layout:
            outdated[name] = f"the tables of {name} have layout {found[name]}, this version needs {layout}: {mend}"
    return outdated


async def _seed(connection: AsyncConnection) -> None:
    """Make the seeded retention classes those of this version; writes nothing if they are already."""
    columns = [retention_classes.c[name] for name in ("name", "days", "immutable", "description")]
    wanted = {(c.name, c.days, c.immutable, c.description) for c in RETENTION_CLASSES}
    if {tuple(row) for row in await connection.execute(select(*columns))} != wanted:
        await connection.execute(retention_classes.delete())
        seeds = [dict(zip((column.name for column in columns), row, strict=True)) for row in sorted(wanted, key=str)]
        await connection.execute(insert(retention_classes), seeds)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # such as a port that is not a number, and may be part of the password
        parsed = None
    if parsed is None or parsed.drivername not in ("sqlite+aiosqlite", "postgresql+asyncpg"):
        raise ConfigurationError(
            "the views URL must be sqlite+aiosqlite:///PATH or postgresql+asyncpg://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("the views URL must name a file: a view in memory would end with its connection")
    return parsed


def _engine(url: URL, **options: Any) -> AsyncEngine:
    """Create an engine. Raises ConfigurationError for a URL that the driver cannot use, here or when it connects."""
    try:
        engine = create_async_engine(url, hide_parameters=True, **options)
    except (ArgumentError, TypeError, ValueError):
        raise _unusable() from None
    event.listen(engine.sync_engine, "do_connect", _connect)
    return engine


def _connect(dialect: Dialect, _record: object, arguments: tuple[Any, ...], parameters: dict[str, Any]) -> Any:
    try:
        return dialect.connect(*arguments, **parameters)
    except OSError:  # also for an untrusted certificate, whose error is a ValueError as well
        raise
    except (TypeError, ValueError, OverflowError):
        raise _unusable() from None
    except dialect.loaded_dbapi.Error as error:
        if isinstance(error.__cause__, ClientConfigurationError):  # names accepted values, or a file; never a secret
            raise _unusable(f" ({str(error.__cause__).splitlines()[0]})") from None
        raise


def _unusable(why: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"ARTIFACT_STORE_VIEWS_URL holds something that the database's driver cannot use{why}: check host, port (up to "
        "65535) and what follows a `?` (as ?ssl=require: asyncpg does not know libpq's sslmode)"
    )


def _open_sqlite(url: URL) -> AsyncEngine:
    try:
        make_folder(Path(str(url.database)).parent)  # durably, because blobs and log may later lie in it
    except OSError as error:
        raise ConfigurationError(f"the folder of the views file cannot be made: {error.strerror}") from error
    engine = _engine(url, connect_args={"timeout": _BUSY_SECONDS, "async_creator_fn": connect})
    event.listen(engine.sync_engine, "connect", partial(_prepare_sqlite, Path(str(url.database))))
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _write_ahead(path: Path) -> None:
    """Put the file into WAL mode, which lasts as long as the file. Blocks.

    The lock is needed because two connections that change the mode at once do not wait: SQLite refuses one of them.
    """
    lock = FileLock(path.with_name(path.name + ".lock"))
    if not lock.take(_BUSY_SECONDS):
        raise UnavailableError(f"another process has been preparing {path} for more than {_BUSY_SECONDS} s")
    try:
        with closing(sqlite3.connect(private_file(path), timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            _refuse_foreign(path, connection)
            connection.execute("PRAGMA journal_mode = WAL")
    finally:
        lock.release()


def _refuse_foreign(path: Path, connection: Any) -> None:
    """Raise ConfigurationError for a file with an application id: the log of record has one, views have none.

    Views would write and checkpoint in the log's file without its lock, and replacing damaged views would remove the
    log.
    """
    cursor = connection.cursor()
    cursor.execute("PRAGMA application_id")
    (application,) = cursor.fetchone()
    cursor.close()
    if application != 0:
        raise ConfigurationError(
            f"{path} holds a log or another program's data, not views; "
            "set ARTIFACT_STORE_VIEWS_URL to a file of their own, and leave this one as it is"
        )


def _prepare_sqlite(path: Path, connection: Any, _record: object) -> None:
    """Stop the driver from beginning transactions (it begins them late), and set the connection's pragmas."""
    _refuse_foreign(path, connection)
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("synchronous = NORMAL", "temp_store = MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction. Writers lock at once: a reader that becomes a writer may have an outdated snapshot."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_NO_TLS = frozenset({"disable", "allow", "prefer"})
"""Values of `ssl` with which asyncpg connects without TLS if the server, or a man in the middle, offers none."""


def _is_local(url: URL) -> bool:
    """Whether the database is reached through a Unix socket or loopback. asyncpg also reads hosts from `PGHOST`."""
    given = url.query.get("host", url.host or os.environ.get("PGHOST", ""))
    hosts = [host for text in ([given] if isinstance(given, str) else given) for host in str(text).split(",")]
    names = [host.rpartition(":")[0] if host.count(":") == 1 else host.strip("[]") for host in hosts]
    return all(not name or name.startswith("/") or is_loopback(name) for name in names)


def _is_private(url: URL) -> bool:
    return url.drivername == "sqlite+aiosqlite" or _is_local(url) or url.query.get("ssl") not in _NO_TLS


def _open_postgresql(url: URL) -> AsyncEngine:
    # Without `ssl` in the URL, asyncpg would prefer TLS but connect without it if the server has none.
    secure = {} if "ssl" in url.query or _is_local(url) else {"ssl": ssl.create_default_context()}
    engine = _engine(
        url,
        pool_size=5,
        max_overflow=10,
        pool_timeout=_CONNECT_SECONDS,
        connect_args={
            **secure,
            "timeout": _CONNECT_SECONDS,
            "command_timeout": _STATEMENT_SECONDS,
            "server_settings": {"application_name": "artifact-store", "jit": "off"},
        },
    )
    event.listen(engine.sync_engine, "checkout", partial(_replace_lost, engine.dialect))
    return engine


def _replace_lost(dialect: Dialect, connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
    """Replace a lost connection, so that no request fails because the database was restarted.

    A server that closes a connection normally tells the client. A connection that was not used for a while may have
    been lost without that, so it is pinged. `pool_pre_ping` would ping it at every checkout, in three round trips.
    """
    now = time.monotonic()
    last, record.info["used"] = record.info.get("used"), now
    if last is None:  # it was opened just now
        return
    if not connection.driver_connection.is_closed():
        if now < last + _PROVEN_SECONDS:
            return
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error:
            if not connection.driver_connection.is_closed():
                raise
        else:
            return
    raise InvalidatePoolError


class DamagedDatabaseError(CorruptError):
    """The file is damaged, or not an SQLite database. The events are not the cause, and nothing can be written."""

    problem = "damaged-database"


class TablesError(ConfigurationError):
    """Tables are missing, lost, or have another layout. `migrate` or a replay mends that while everything runs."""


class LockedError(UnavailableError):
    """Waiting for a lock took too long; nothing was changed. Try again."""


_DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)

# Classes and codes of SQLSTATE (PostgreSQL documentation, appendix A).
_CONFIGURATION = ("28", "3D", "3F", "42501", "42P01", "42703")
_MIGRATED = (
    "3F",
    "42P01",
    "42703",
)  # schemas, tables and columns; `migrate` does not create the database itself or its users
_DEPENDED_ON = "2BP01"
_LOCKED = "55P03"
_CORRUPT = ("22", "23", "54000")  # 54000: a text that is too long for an index
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

_MIGRATE = "`artifact-store migrate` creates what is missing, and names the views that must then be replayed"
_SETTING = "check the database, the user and its rights in ARTIFACT_STORE_VIEWS_URL"


@contextmanager
def database_errors() -> Iterator[None]:
    """Replace the drivers' errors by UnavailableError, CorruptError or ConfigurationError.

    An error that says nothing about the database's state is a bug in this program and passes unchanged.
    """
    try:
        yield
    except ArtifactStoreError:
        raise
    except PoolTimeoutError as error:
        raise UnavailableError("the views database: every connection is in use") from error
    except (*_DRIVER, DBAPIError, sqlite3.Error, OSError, TimeoutError, OverflowError) as error:
        # `from None`, because SQLAlchemy's text shows statement and parameters.
        meaning = _meaning(error)
        if meaning is None:
            raise
        raise meaning from None


def _meaning(error: BaseException) -> ArtifactStoreError | None:
    if isinstance(error, OverflowError):  # the drivers raise it for a number that no column can hold
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
        return UnavailableError("the views database gave no answer in time")
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or ""
    text = _first_line(cause)
    if state == _DEPENDED_ON:
        return ConfigurationError(
            f"the views database: {text}; drop what depends on it, and create it again afterwards"
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
    # The driver's own errors about a connection have no SQLSTATE. If a connection breaks between two steps of a COPY,
    # the driver reports "another operation is in progress", in that step and in the rollback that follows.
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
            f"the views database is damaged: {text}; stop what uses the file, and move it away. "
            "`artifact-store migrate` then creates a new one, into which everything is folded again"
        )
    if code in _SQLITE_CORRUPT:
        return CorruptError(f"the views cannot take this: {text}")
    if text.startswith(("no such table", "no such column")):
        return TablesError(f"the views database: {text}; {_MIGRATE}")
    return None


def _first_line(error: BaseException) -> str:
    """The first line of the driver's text. For a refused connection it has the address, never a password."""
    lines = str(error).splitlines()
    # The dialect puts the driver's class before the message: "<class '…'>: message".
    said = lines[0].rpartition("'>: ")[2] if lines else ""
    return said or type(error).__name__


class SqliteConnection(aiosqlite.Connection):
    """A connection that stops its thread only once.

    If a task is cancelled a second time while its connection is being closed, the connection is also stopped, while
    the closing is still under way. aiosqlite (0.22.1) then waits for ever for an answer from a thread that has ended,
    and so does the end of the event loop.
    """

    def stop(self) -> asyncio.Future[Any] | None:
        """Stop the thread, which closes the file. Does nothing if it was told before. Returns at once."""
        return super().stop() if self._running else None

    async def close(self) -> None:
        """Close the file and wait until it is closed, unless the thread was told to stop before."""
        if self._running:
            await super().close()


class _RollingBack(sqlite3.Connection):
    """A connection whose transaction ends when it is closed.

    SQLite keeps a closed connection, with its transaction and locks, until the last of its statements is finalized. The
    cursor of a cancelled task is in a reference cycle with the traceback, so it lives until garbage is collected.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):  # it is closed already, or the file cannot be written
            if self.in_transaction:
                self.rollback()
        super().close()


def connect(path: str, **options: Any) -> SqliteConnection:
    """A connection with the options of `sqlite3.connect`. Await it to open it."""
    made = SqliteConnection(lambda: sqlite3.connect(path, factory=_RollingBack, **options), iter_chunk_size=64)
    made._thread.daemon = True  # as in SQLAlchemy: a connection that was never closed must not keep the process alive
    return made
