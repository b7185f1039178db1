"""The views' database: opening it, its layout, its two kinds of transactions, and what its errors mean.

SQLite runs in WAL mode: readers never wait for the one writer. Rows and checkpoint share a transaction, so after a
crash folding goes on from whatever is there.

`database_errors` turns the drivers' errors into those of `artifact_store.errors`. No statement, parameter or URL gets
into an error's text: they may hold secrets or a producer's data.
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
"""How long a connection counts as alive after it was used."""
_STATEMENT_SECONDS = 300  # a frozen server must not hold a projector for ever
MAX_PARKED = 100
_MIGRATION_LOCK = 0x61727466  # any number, the same for every process of ours
_LOST = -1
"""The layout of a projection that lost a table, of its own or of what keeps account of it: the table is made anew, but
empty beside others that are not.
"""

_READ_SECONDS = OPERATION_SECONDS.labels("views", "read")
_READ_FAILURES = OPERATION_FAILURES.labels("views", "read")
_WRITE_SECONDS = OPERATION_SECONDS.labels("views", "write")
_WRITE_FAILURES = OPERATION_FAILURES.labels("views", "write")


class Views:
    """One views database, opened from its URL. Connections are made when they are needed; `close` releases them."""

    def __init__(self, url: str, *, answer_seconds: float = 10.0) -> None:
        """`sqlite+aiosqlite:///PATH` or `postgresql+asyncpg://…`. Does not connect; makes SQLite's folder.

        `answer_seconds` bounds a short read, so that a database that hangs costs a request no more than that.

        Raises ConfigurationError: another kind of URL. The text never holds the URL, which may have a password in it.
        """
        parsed = _parse(url)
        self.dialect = "sqlite" if parsed.drivername == "sqlite+aiosqlite" else "postgresql"
        self.engine = _open_sqlite(parsed) if self.dialect == "sqlite" else _open_postgresql(parsed)
        self.is_private = _is_private(parsed)
        """Whether nobody between can read what is said: it is a file, this machine, or TLS."""
        self.max_parked = MAX_PARKED
        """How many packages one projection may park before it stops."""
        self._answer_seconds = answer_seconds
        self._writing = self.engine.execution_options(writes=True)
        self._single = self.engine
        if self.dialect == "postgresql":  # on SQLite beginning a transaction asks nobody
            self._single = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self.folding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """One lock a projection: folds of one process wait for each other here instead of racing to the guard."""

    @property
    def connections_in_use(self) -> int:
        """How many connections of this process are in use, of 15 at most."""
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, QueuePool) else 0

    @asynccontextmanager
    async def reading(
        self, *, snapshot: bool = False, long: bool = False, single: bool = False
    ) -> AsyncIterator[AsyncConnection]:
        """A connection to read by. With `snapshot` all statements see one state of the database.

        Unless it is a `long` one, the block must end within the bound for answers. A block with a `single` statement,
        whose result is read at once, needs no transaction: beginning and ending one would ask the database twice more.

        Raises UnavailableError, ConfigurationError (tables are missing), also for what is raised inside.
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
        """A transaction that commits on leaving, or rolls back on an error; the only writer on SQLite, waited for.

        Raises UnavailableError (after which a commit may or may not have happened), CorruptError (a row that is there
        already, or a value that no column takes), ConfigurationError (tables are missing).
        """
        with database_errors(), _WRITE_SECONDS.time(), _WRITE_FAILURES.count_exceptions():
            async with self._writing.begin() as connection:
                yield connection

    async def migrate(self) -> None:
        """Create the tables and seeds that are missing. Safe to repeat, also by several processes at once.

        Raises TablesError when a projection's tables have another layout, or one of them was lost: they are then to be
        folded again.
        """
        for why in (await self.create_missing()).values():
            raise TablesError(why)

    async def create_missing(self) -> Mapping[str, str]:
        """As `migrate`; instead of raising, returns which projections are to be folded again, by name, and why.

        Raises ConfigurationError: the database cannot hold every text.
        """
        if self.dialect == "sqlite":
            with database_errors():
                await asyncio.to_thread(_write_ahead, Path(str(self.engine.url.database)))
        async with self.writing() as connection:
            await _require_utf8(connection)
            await self._create(connection)
            return await _outdated(connection, PROJECTIONS.values())

    async def check(self) -> None:
        """Return if the database can be reached and its tables are those of this version.

        Raises UnavailableError, ConfigurationError.
        """
        async with self.reading() as connection:
            await _require_utf8(connection)
            await check_layouts(connection, PROJECTIONS.values())

    async def close(self) -> None:
        """Release every connection; blocks until done."""
        await self.engine.dispose()

    async def _create(self, connection: AsyncConnection) -> None:
        if self.dialect == "postgresql":  # two that create one table at once would collide in the catalogue
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        missing = await connection.run_sync(_missing_tables)
        await connection.run_sync(metadata.create_all)
        # A view's own tables never change: they are folded again.
        await connection.run_sync(add_missing_columns, [projection_checkpoints])
        table = projection_generations.c
        known = {row.projection: row for row in await connection.execute(select(projection_generations))}
        progress = missing & {projection_checkpoints, parked_packages}
        if progress:  # what was built has lost its own too
            await connection.execute(delete(projection_builds))
        for name, projection in PROJECTIONS.items():
            row, lost = known.get(name), progress or missing.intersection(projection.tables)
            # Of another layout it is refused anyway, and one that has folded nothing misses nothing.
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
    """Raise ConfigurationError for a database of PostgreSQL's that holds the characters of some languages alone."""
    if not on_postgresql(connection):
        return
    encoding = (await connection.execute(text("SHOW server_encoding"))).scalar_one()
    if encoding not in ("UTF8", "SQL_ASCII"):  # the second keeps bytes as they come, and ours are UTF-8
        raise ConfigurationError(
            f"the views database has the encoding {encoding}, which does not hold every text: make another, by "
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
    """Raise TablesError unless the tables of these projections are there, in this version's layout."""
    for why in (await _outdated(connection, projections)).values():
        raise TablesError(why)


async def _outdated(connection: AsyncConnection, projections: Iterable[Projection]) -> dict[str, str]:
    """Which of these projections cannot be used as their tables are, by name; why, and what mends it."""
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
    """Bring the retention classes to what this version knows; writes nothing when they are so already."""
    columns = [retention_classes.c[name] for name in ("name", "days", "immutable", "description")]
    wanted = {(c.name, c.days, c.immutable, c.description) for c in RETENTION_CLASSES}
    if {tuple(row) for row in await connection.execute(select(*columns))} != wanted:
        await connection.execute(retention_classes.delete())
        seeds = [dict(zip((column.name for column in columns), row, strict=True)) for row in sorted(wanted, key=str)]
        await connection.execute(insert(retention_classes), seeds)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a port that is no number, which may well be a piece of the password
        parsed = None
    if parsed is None or parsed.drivername not in ("sqlite+aiosqlite", "postgresql+asyncpg"):
        raise ConfigurationError(
            "the views URL must be sqlite+aiosqlite:///PATH or postgresql+asyncpg://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    if parsed.drivername == "sqlite+aiosqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("the views URL must name a file: a view in memory would end with its connection")
    return parsed


def _engine(url: URL, **options: Any) -> AsyncEngine:
    """An engine that says what of the URL its driver cannot use: some of it here, the rest when it connects."""
    try:
        engine = create_async_engine(url, hide_parameters=True, **options)
    except (ArgumentError, TypeError, ValueError):
        raise _unusable() from None
    event.listen(engine.sync_engine, "do_connect", _connect)
    return engine


def _connect(dialect: Dialect, _record: object, arguments: tuple[Any, ...], parameters: dict[str, Any]) -> Any:
    try:
        return dialect.connect(*arguments, **parameters)
    except OSError:  # of a certificate that is not trusted, too, whose error is a ValueError as well
        raise
    except (TypeError, ValueError, OverflowError):
        raise _unusable() from None
    except dialect.loaded_dbapi.Error as error:
        if isinstance(error.__cause__, ClientConfigurationError):  # what it takes, or which file; never a secret
            raise _unusable(f" ({str(error.__cause__).splitlines()[0]})") from None
        raise


def _unusable(why: str = "") -> ConfigurationError:
    return ConfigurationError(
        f"ARTIFACT_STORE_VIEWS_URL holds something that the database's driver cannot use{why}: check host, port (up to "
        "65535) and what follows a `?` (as ?ssl=require: asyncpg does not know libpq's sslmode)"
    )


def _open_sqlite(url: URL) -> AsyncEngine:
    try:
        make_folder(Path(str(url.database)).parent)  # durably: blobs and log may come to lie in it
    except OSError as error:
        raise ConfigurationError(f"the folder of the views file cannot be made: {error.strerror}") from error
    engine = _engine(url, connect_args={"timeout": _BUSY_SECONDS, "async_creator_fn": connect})
    event.listen(engine.sync_engine, "connect", partial(_prepare_sqlite, Path(str(url.database))))
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _write_ahead(path: Path) -> None:
    """Put the file into WAL mode, which lasts as long as the file; blocks.

    Two connections that change the mode at once do not wait for each other, SQLite refuses one: hence the lock.
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
    """Raise ConfigurationError for a file with an application id, as the log of record has one: views have none.

    They would write and checkpoint beside the log's lock, and whoever makes damaged views anew would remove the log.
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
    """Take transactions away from the driver (it would begin them late), and set what lasts as long as a connection."""
    _refuse_foreign(path, connection)
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("synchronous = NORMAL", "temp_store = MEMORY"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Writers take the lock at once: a reader that turned writer could find that its snapshot is out of date."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


_NO_TLS = frozenset({"disable", "allow", "prefer"})
"""Values of `ssl` by which asyncpg goes on without TLS when the server, or somebody between, has none."""


def _is_local(url: URL) -> bool:
    """Whether the database is asked through a socket or on loopback. asyncpg takes hosts of `PGHOST` as well."""
    given = url.query.get("host", url.host or os.environ.get("PGHOST", ""))
    hosts = [host for text in ([given] if isinstance(given, str) else given) for host in str(text).split(",")]
    names = [host.rpartition(":")[0] if host.count(":") == 1 else host.strip("[]") for host in hosts]
    return all(not name or name.startswith("/") or is_loopback(name) for name in names)


def _is_private(url: URL) -> bool:
    return url.drivername == "sqlite+aiosqlite" or _is_local(url) or url.query.get("ssl") not in _NO_TLS


def _open_postgresql(url: URL) -> AsyncEngine:
    # Without `ssl` in the URL asyncpg would ask for TLS and go on without it when it gets none.
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
    """Replace a connection that was lost, so that no request fails because the database was restarted.

    A server that ends a connection says so. Only where none may have said it, because the connection was not used for a
    while, the server is asked, as `pool_pre_ping` asks it each time: that takes three answers.
    """
    now = time.monotonic()
    last, record.info["used"] = record.info.get("used"), now
    if last is None:  # it was made just now
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


class SqliteConnection(aiosqlite.Connection):
    """A connection whose thread is told to stop once.

    A task that is cancelled a second time while its connection is being closed stops it at once, beside the closing
    that is under way. aiosqlite (0.22.1) then waits for an answer of a thread that has ended, for ever, and so does the
    end of the event loop.
    """

    def stop(self) -> asyncio.Future[Any] | None:
        """Stop the thread, which closes the file; nothing happens when it was told before. Returns at once."""
        return super().stop() if self._running else None

    async def close(self) -> None:
        """Close the file and wait until that is done, unless the thread was told to stop before."""
        if self._running:
            await super().close()


class _RollingBack(sqlite3.Connection):
    """A connection whose transaction ends when it is closed.

    SQLite keeps a closed connection with its transaction and locks until the last of its statements is finalized. The
    cursor of a task that was cancelled is part of a cycle with the traceback, and so lives until the next collection.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):  # it is closed already, or the file cannot be written
            if self.in_transaction:
                self.rollback()
        super().close()


def connect(path: str, **options: Any) -> SqliteConnection:
    """A connection to open by awaiting it, with the options of `sqlite3.connect`."""
    made = SqliteConnection(lambda: sqlite3.connect(path, factory=_RollingBack, **options), iter_chunk_size=64)
    made._thread.daemon = True  # as SQLAlchemy has it: a connection that was never closed must not hold the process
    return made
