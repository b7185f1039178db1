"""A few threads that read the file, each with its own connection, so that the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypeVar
from uuid import UUID

from services.log.sqlite.file import LogFile, file_errors, open_file

_T = TypeVar("_T")
_THREADS = 4


class Readers:
    """Runs queries. Remembers the log's identity from the first connection; another log is refused from then on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="log-read")
        self._idle: list[LogFile] = []
        self._identity: UUID | None = None
        self._lock = Lock()

    async def run(self, work: Callable[[LogFile], _T]) -> _T:
        """Run `work` in a thread. Raises what it raises, and UnavailableError, ConfigurationError, LogIdentityError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._run, work)

    async def close(self) -> None:
        """Wait for what is running and close the connections."""
        await asyncio.to_thread(self._pool.shutdown)
        while self._idle:
            self._idle.pop().close()

    def _run(self, work: Callable[[LogFile], _T]) -> _T:
        file = self._take()
        try:
            with file_errors(self._path):
                file.check_in_place()
                result = work(file)
        except BaseException:
            # The connection may be what is broken: the next query opens a fresh one.
            file.close()
            raise
        with self._lock:
            self._idle.append(file)
        return result

    def _take(self) -> LogFile:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        file = open_file(self._path, identity=self._identity)
        with self._lock:
            self._identity = file.identity
        return file
