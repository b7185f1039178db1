"""One batch of requests, decided and appended in one transaction. Everything here blocks and runs in one thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from blake3 import blake3

from services.clock import Clock
from services.core.commands import Acknowledgement, Command
from services.core.decide import accept, acknowledge, check_ingest, decide
from services.core.limits import Limits
from services.errors import CorruptError, UnavailableError
from services.log.sqlite.file import LogFile, file_errors, open_file, write_lock
from services.log.sqlite.records import decoded, end_offset, records_from
from services.log.sqlite.states import PackageStates


@dataclass(frozen=True, slots=True)
class IngestCheck:
    """The question whether files of these paths could be ingested now."""

    package_id: UUID
    relative_paths: Sequence[str]
    command_id: UUID | None


Request = Command | IngestCheck
Answer = Acknowledgement | Exception | None
"""What becomes of a request: None says that the check passed."""


class Appender:
    """Holds the connection, the package states and what is known of the log's end."""

    def __init__(
        self, path: Path, *, limits: Limits, put_manifest: Callable[[bytes], None], clock: Clock, identity: UUID
    ) -> None:
        self._path = path
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._identity = identity
        self._states = PackageStates()
        self._file: LogFile | None = None
        self._end = 0
        self._known_end = 0
        """The end of the log when this process saw it last, with what it had acknowledged until then,"""
        self._known_digest = b""
        """and BLAKE3 over the value of the record before it."""
        self._appended = b""
        """The value of the last record that the transaction at hand inserted."""
        self._last_created_at = 0

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request; when it returns, what is acknowledged is on the disk.

        A request that is refused, or that cannot be understood, has no effect on the others.

        Raises (for the whole batch): PushBackError, nothing was recorded; UnavailableError; CorruptError.
        """
        with file_errors(self._path):
            if self._file is None:
                self._file = open_file(self._path, writable=True, identity=self._identity)
            connection = self._file.connection
            try:
                self._file.check_in_place()
            except UnavailableError:
                self.close()
                raise
            self._read_ahead(connection, requests)
            if all(isinstance(request, IngestCheck) for request in requests):
                return self._transaction(connection, "BEGIN", requests)
            with write_lock(self._path):
                return self._transaction(connection, "BEGIN IMMEDIATE", requests)

    def close(self) -> None:
        """Close the connection, undoing what is not committed, and forget the states."""
        self._states.clear()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read_ahead(self, connection: sqlite3.Connection, requests: Sequence[Request]) -> None:
        """Read what is not at hand before the write lock is taken: a large package takes seconds."""
        package_ids = {request.package_id for request in requests}
        self._states.pin(package_ids)
        others_wrote = end_offset(connection) != self._end
        for package_id in package_ids:
            if others_wrote or package_id not in self._states:
                # A broken package is told to its own requests, in the transaction.
                with suppress(CorruptError):
                    self._states.current(connection, package_id)

    def _transaction(self, connection: sqlite3.Connection, begin: str, requests: Sequence[Request]) -> list[Answer]:
        # Nothing has changed when this raises, because another program holds the file.
        connection.execute(begin)
        self._appended = b""
        try:
            self._see_end(connection)
            answers = [self._answer(connection, request) for request in requests]
            connection.execute("COMMIT")
        except BaseException:
            self.close()
            self._end = self._known_end
            raise
        self._known_end = self._end
        if self._appended:
            self._known_digest = _digest(self._appended)
        return answers

    def _see_end(self, connection: sqlite3.Connection) -> None:
        """Learn what other processes appended meanwhile. Raises CorruptError when the log lacks what it had before."""
        end = end_offset(connection)
        self._require_known(connection, end)
        if end != self._end:
            last = records_from(connection, end - 1, None, 1)[0]
            self._last_created_at = decoded(last).created_at
            self._end = self._known_end = end
            self._known_digest = _digest(last.value)

    def _require_known(self, connection: sqlite3.Connection, end: int) -> None:
        offset = self._known_end - 1
        if offset < 0:
            return
        found = f"ends at offset {end}"
        for record in records_from(connection, offset, offset + 1, 1):
            if (digest := _digest(record.value)) == self._known_digest:
                return
            found = f"holds a record with digest {digest.hex()} there"
        raise CorruptError(
            f"the log {self._path} lost what it had acknowledged: this process knows the record at offset {offset} "
            f"with digest {self._known_digest.hex()}, but the log {found}. Put the newer file back; or accept the loss "
            "by starting this process again"
        )

    def _answer(self, connection: sqlite3.Connection, request: Request) -> Answer:
        try:
            state = self._states.current(connection, request.package_id)
            now = max(self._clock(), self._last_created_at)
            if isinstance(request, IngestCheck):
                check_ingest(state, request.package_id, request.relative_paths, request.command_id, now, self._limits)
                return None
            decision = decide(state, request, now, self._limits)
            if decision.claim_check is not None:
                self._put_manifest(decision.claim_check)
        except sqlite3.Error:
            raise
        # Nothing of this command is written yet, so whatever it runs into concerns its caller alone: a command that
        # cannot even be encoded must not stop the others.
        except Exception as error:  # noqa: BLE001 - see above
            return error
        if decision.appended is not None:
            package_id, command_id = request.package_id.bytes, request.command_id.bytes
            for sequence, value in enumerate(decision.values, decision.appended.first_sequence):
                row = self._end, package_id, sequence, command_id, value
                connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
                self._end += 1
            self._appended = decision.values[-1]
            self._last_created_at = decision.created_at
        state = accept(state, decision)
        self._states.keep(state)
        return acknowledge(state, request)


def _digest(value: bytes) -> bytes:
    return blake3(value).digest()
