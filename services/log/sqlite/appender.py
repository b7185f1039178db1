"""One batch of requests, decided and appended in one transaction. Everything here blocks and runs in one thread."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

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
        committed_end = self._end
        try:
            self._see_end(connection)
            committed_end = self._end
            answers = [self._answer(connection, request) for request in requests]
            connection.execute("COMMIT")
        except BaseException:
            self.close()
            self._end = committed_end
            raise
        return answers

    def _see_end(self, connection: sqlite3.Connection) -> None:
        """Learn what other processes appended meanwhile."""
        end = end_offset(connection)
        if end < self._end:
            raise CorruptError(
                f"the log {self._path} is shorter than it was: acknowledged events are not in it any more"
            )
        if end != self._end:
            self._last_created_at = decoded(records_from(connection, end - 1, None, 1)[0]).created_at
            self._end = end

    def _answer(self, connection: sqlite3.Connection, request: Request) -> Answer:
        try:
            state = self._states.current(connection, request.package_id)
            if isinstance(request, IngestCheck):
                check_ingest(state, request.package_id, request.relative_paths, request.command_id, self._limits)
                return None
            decision = decide(state, request, max(self._clock(), self._last_created_at), self._limits)
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
            self._last_created_at = decision.created_at
        state = accept(state, decision)
        self._states.keep(state)
        return acknowledge(state, request)
