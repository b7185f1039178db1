"""The audit stream: who requested what, from where, and whether it was allowed; one JSON object per line.

It never slows or stops the product. Records wait in a bounded queue for a thread that appends them to the file. If the
queue is full or the file cannot be written, they are lost and counted. The log records changes; the audit stream
records who read, who was refused and who administered.

    {"time": "2026-01-31T12:00:00.000001Z", "principal": "ci:job-7", "action": "GET /v1/packages/{package_id}",
     "allowed": true, "client": "10.1.2.3", "status": 200, "target": "/v1/packages/…"}

`"unseen": true` is added to a 404 if the target is missing, or hidden from this principal. `actor` is added if the
sender names another actor.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from prometheus_client import CollectorRegistry, Counter

from artifact_store.documents.times import to_text
from artifact_store.errors import ConfigurationError
from services.runtime.clock import Clock, system_clock

MAX_WAITING = 10_000
MAX_TEXT = 1_024
"""Longer texts are cut, because some of them come from strangers."""

_AT_ONCE = 1_000
_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)

Value = str | int | bool | None


class Audit:
    """Records to one file, from any thread. Without a file it does nothing."""

    def __init__(
        self,
        path: Path | None,
        metrics: CollectorRegistry | None = None,
        *,
        clock: Clock = system_clock,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """Raises ConfigurationError: the file cannot be written."""
        self._path = path
        self._clock = clock
        self._lost = Counter(
            "artifact_store_audit_lost",
            "Audit records that could not be written",
            registry=metrics or CollectorRegistry(),
        )
        self._waiting: queue.Queue[Mapping[str, Value] | None] = queue.Queue(max_waiting)
        self._thread: threading.Thread | None = None
        if path is not None:
            try:
                file = _File(path)
            except OSError as error:
                raise ConfigurationError(
                    f"ARTIFACT_STORE_AUDIT_FILE {path} cannot be written: {error.strerror}"
                ) from None
            self._thread = threading.Thread(target=self._write, args=(file,), name="audit", daemon=True)
            self._thread.start()

    def record(self, *, principal: str | None, action: str, allowed: bool, client: str, **about: Value) -> None:
        """Record that `principal` requested `action`; None is somebody unknown. Never waits, never raises.

        `client` is the address of the sender. `about` has further fields; those that are None are left out.
        """
        if self._thread is None:
            return
        entry: dict[str, Value] = {
            "time": to_text(self._clock()),
            "principal": principal,
            "action": action,
            "allowed": allowed,
            "client": client,
            **{name: value for name, value in about.items() if value is not None},
        }
        try:
            self._waiting.put_nowait({name: _cut(value) for name, value in entry.items()})
        except queue.Full:
            self._lost.inc()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write the waiting records. Takes some seconds at most. Records that are not written by then are lost."""
        if self._thread is not None and not await asyncio.to_thread(self._end, self._thread):
            _log.error("%d audit records were not written in time", self._waiting.qsize())

    def _end(self, thread: threading.Thread) -> bool:
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_SECONDS)
        thread.join(_CLOSE_SECONDS)
        return not thread.is_alive()

    def _write(self, file: _File) -> None:
        failed = False
        ending = False
        while not ending:
            entries = [self._waiting.get()]
            with suppress(queue.Empty):
                while len(entries) < _AT_ONCE:
                    entries.append(self._waiting.get_nowait())
            ending = None in entries
            lines = [
                json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries if entry is not None
            ]
            try:
                if lines:
                    file.append(b"".join(lines))
            except OSError as error:
                self._lost.inc(len(lines))
                if not failed:
                    _log.error("audit records are lost: %s cannot be written: %s", self._path, error.strerror)
                failed = True
            else:
                if failed and lines:
                    _log.warning("audit records are written to %s again", self._path)
                    failed = False
        file.close()


class _File:
    """A file to which several processes append whole lines, and which logrotate, for instance, may rename."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = False
        self._open()

    def append(self, lines: bytes) -> None:
        """Append the lines in one write. Raises OSError if not all of them were written."""
        if not self._is_there():
            self.close()
            self._open()
        if self._torn:
            lines = b"\n" + lines
        written = os.write(self._descriptor, lines)
        self._torn = written < len(lines)
        if self._torn:
            raise OSError(0, "only a part was written: the disk may be full")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o600)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except FileNotFoundError:
            return False


def _cut(value: Value) -> Value:
    return value[:MAX_TEXT] if isinstance(value, str) else value
