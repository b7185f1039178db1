"""The rows of a state file: CBOR with a checksum, and how commands and files of a package are spread over them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import UUID

import cbor2

from schemas.events import PackageCreated
from services.core.state import CommandState, FileState, PackageState

ROW_ENTRIES = 128
"""A row is closed when it holds so many commands and files."""

_CHECKSUM = 4

Answer = tuple[bytes, tuple[Any, ...], list[Any] | None, list[Any]]
"""Of one command: its id, what it became, the creation if it was that, and the files that it brought."""


class DamagedRowError(ValueError):
    """The checksum of a row is not that of its content."""


def sealed(*values: Any) -> bytes:
    """The values as a row's body."""
    content = cbor2.dumps(values)
    return content + zlib.crc32(content).to_bytes(_CHECKSUM)


def unsealed(body: bytes) -> list[Any]:
    """The values of a row's body. Raises DamagedRowError."""
    content, checksum = body[:-_CHECKSUM], body[-_CHECKSUM:]
    if zlib.crc32(content).to_bytes(_CHECKSUM) != checksum:
        raise DamagedRowError
    found: list[Any] = cbor2.loads(content)
    return found


def command_rows(state: PackageState, saved: int) -> Iterator[tuple[int, bytes]]:
    """Of an open package what came after the event `saved`, several commands to a row: the last sequence, the body."""
    files_of, found, size = state.files, [], 0
    for command_id, command in _since(state.commands, saved):
        # Its events come one behind the other.
        new = min(len(command.paths), command.last_sequence - saved)
        files = [
            (path, (f := files_of[path]).sequence, f.event_digest, f.manifest_item, f.receipt_item)
            for path in command.paths[len(command.paths) - new :]
        ]
        found.append((command_id.bytes, _command(command), files))
        size += 1 + new
        if size >= ROW_ENTRIES:
            yield command.last_sequence, sealed(*found)
            found, size = [], 0
    if found:
        yield state.sequence, sealed(*found)


def add_command_row(state: PackageState, body: bytes) -> int:
    """Put back what `command_rows` gave; how many events that is. Raises as `unsealed`."""
    events = 0
    for id_, command, files in unsealed(body):
        command_id = UUID(bytes=id_)
        known = _add_command(state, command_id, command)
        for path, sequence, event_digest, item, receipt in files:
            state.files[path] = FileState(command_id, sequence, event_digest, item, receipt)
            known.paths.append(path)
        events += len(files) or 1
    return events


def entries_of(body: bytes) -> int:
    """How many commands and files a row of `command_rows` holds. Raises as `unsealed`."""
    return sum(1 + len(files) for _, _, files in unsealed(body))


def answers_of(state: PackageState) -> Iterator[Answer]:
    """What retries of the package's commands are compared with and answered by."""
    of_package = state.files
    for command_id, command in state.commands.items():
        created = created_values(state.created) if command.last_sequence == 1 else None
        files = [(path, (f := of_package[path]).sequence, f.event_digest, f.manifest_item) for path in command.paths]
        yield command_id.bytes, _command(command), created, files


def answers_of_rows(bodies: Iterable[bytes], created: list[Any]) -> Iterator[Answer]:
    """The same, made of rows that `command_rows` gave. Raises as `unsealed`."""
    for body in bodies:
        for id_, command, files in unsealed(body):
            _, _, _, _, last_sequence, _ = command
            yield id_, tuple(command), created if last_sequence == 1 else None, [file[:4] for file in files]


def answer_rows(answers: Iterable[Answer]) -> Iterator[tuple[bytes, bytes]]:
    """Several commands to a row, that makes few rows: the ids of its commands one behind the other, and its body."""
    found: list[Answer] = []
    size = 0
    for answer in answers:
        found.append(answer)
        size += 1 + len(answer[3])
        if size >= ROW_ENTRIES:
            yield b"".join(answer[0] for answer in found), sealed(*found)
            found, size = [], 0
    if found:
        yield b"".join(answer[0] for answer in found), sealed(*found)


def add_answers(state: PackageState, body: bytes, command_id: UUID) -> None:
    """Put back what `answer_rows` gave of this command. Raises as `unsealed`."""
    for id_, known, created, files in unsealed(body):
        if id_ != command_id.bytes:
            continue
        command = _add_command(state, command_id, known)
        if created is not None:
            state.created = PackageCreated(*created)
        for path, sequence, event_digest, item in files:
            state.files[path] = FileState(command_id, sequence, event_digest, item, b"")
            command.paths.append(path)


def created_values(created: PackageCreated) -> list[Any]:
    """The creation's fields in their order."""
    return [getattr(created, name) for name in PackageCreated.__slots__]


def _add_command(state: PackageState, command_id: UUID, values: list[Any]) -> CommandState:
    """The command as the newest row has it, with the paths of those before."""
    before = state.commands.get(command_id)
    state.commands[command_id] = command = CommandState(*values)
    if before is not None:
        command.paths += before.paths
    return command


def _command(command: CommandState) -> tuple[Any, ...]:
    return (
        command.event_type,
        command.actor,
        command.count,
        command.done,
        command.last_sequence,
        command.last_digest,
    )


def _since(commands: dict[UUID, CommandState], saved: int) -> list[tuple[UUID, CommandState]]:
    """Those with events after `saved`. They come in the order of their events, so that what is new is at the end."""
    found = []
    for item in reversed(commands.items()):
        if item[1].last_sequence <= saved:
            break
        found.append(item)
    found.reverse()
    return found
