"""The rows of a state file: CBOR with a checksum, and how commands and files of a package are spread over them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from uuid import UUID

import cbor2

from schemas.digests import DIGEST_BYTES, items_digest
from schemas.events import PACKAGE_CREATED, PACKAGE_FINALIZED, PackageCreated
from services.core.paths import PathPair, Unportable
from services.core.state import Answered, CommandState, FileState, PackageState, file_states

ROW_ENTRIES = 128
"""A row is closed when it holds so many commands and files, one of answers when it holds so many commands."""

_CHECKSUM = 4
_ID_BYTES = 16

Command = tuple[bytes, str, str, int, int, int, bytes]
"""Of one command: its id, and what it became, in the order of `CommandState`."""

Answer = tuple[Command, list[Any] | None, tuple[bytes, bytes] | None]
"""Of one command: what it became, what else its answer needs, and what is kept of files that it brought.

The second is the creation's fields if it was that, and `Unportable` if it finalized a package that holds any.
"""


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
    files_of = state.files
    commands: list[Command] = []
    files: list[list[FileState]] = []
    paths: list[list[str]] = []
    size = 0
    for command_id, command in _since(state.commands, saved):
        # Its events come one behind the other.
        new = min(len(command.paths), command.last_sequence - saved)
        own = command.paths[len(command.paths) - new :]
        commands.append(_command(command_id, command))
        paths.append(own)
        files.append([files_of[path] for path in own])
        size += 1 + new
        if size >= ROW_ENTRIES:
            yield command.last_sequence, sealed(_columns(commands), paths, files)
            commands, paths, files, size = [], [], [], 0
    if commands:
        yield state.sequence, sealed(_columns(commands), paths, files)


def add_command_row(state: PackageState, body: bytes) -> int:
    """Put back what `command_rows` gave; how many events that is. Raises as `unsealed`."""
    events = 0
    for command, paths, files in _commands(body):
        known = _add_command(state, command)
        state.add_files(paths, file_states(files))
        known.paths += paths
        events += len(files) or 1
    return events


def entries_of(body: bytes) -> int:
    """How many commands and files a row of `command_rows` holds. Raises as `unsealed`."""
    return sum(1 + len(files) for _, _, files in _commands(body))


def answers_of(state: PackageState) -> Iterator[Answer]:
    """What retries of the package's commands are compared with and answered by."""
    files_of = state.files
    of_package = package_values(state)
    for command_id, known in state.commands.items():
        command = _command(command_id, known)
        yield command, _needed(command, *of_package), _answered([files_of[path] for path in known.paths])


def answers_of_rows(bodies: Iterable[bytes], of_package: Sequence[list[Any]]) -> Iterator[Answer]:
    """The same, made of rows that `command_rows` gave, and of `package_values`. Raises as `unsealed`."""
    for body in bodies:
        for command, _, files in _commands(body):
            yield command, _needed(command, *of_package), _answered(files)


def answer_rows(answers: Iterable[Answer]) -> Iterator[tuple[bytes, bytes]]:
    """Several commands to a row, that makes few rows: the ids of its commands one behind the other, and its body."""
    left = iter(answers)
    while found := list(islice(left, ROW_ENTRIES)):
        commands, needed, answered = zip(*found, strict=True)
        columns = _columns(commands)
        yield columns[0], sealed(columns, needed, answered)


def add_answers(state: PackageState, body: bytes, command_id: UUID) -> None:
    """Put back what `answer_rows` gave of this command. Raises as `unsealed`."""
    for command, needed, answered in _commands(body):
        if command[0] != command_id.bytes:
            continue
        known = _add_command(state, command)
        if needed is not None and known.event_type == PACKAGE_CREATED:
            state.created = PackageCreated(*needed)
        elif needed is not None:
            state.unportable = _unportable(*needed)
        if answered is not None:
            known.answered = (*known.answered, Answered(*answered))


def created_values(created: PackageCreated) -> list[Any]:
    """The creation's fields in their order."""
    return [getattr(created, name) for name in PackageCreated.__slots__]


def package_values(state: PackageState) -> list[list[Any]]:
    """What answers need of a finalized package beside its commands and files."""
    return [created_values(state.created), list(state.unportable)]


def _needed(command: Command, created: list[Any], unportable: Sequence[Any] = ()) -> list[Any] | None:
    """What of `package_values`, which may come from a file of before there was the second, this command needs."""
    if command[1] == PACKAGE_CREATED:
        return created
    return list(unportable) if command[1] == PACKAGE_FINALIZED and unportable and unportable[0] else None


def _unportable(number: int, pairs: Sequence[Sequence[str]]) -> Unportable:
    return Unportable(number, tuple(PathPair(*pair) for pair in pairs))


def _add_command(state: PackageState, values: Command) -> CommandState:
    """The command as the newest row has it, with what those before it have of its files."""
    command_id = UUID(bytes=values[0])
    before = state.commands.get(command_id)
    state.commands[command_id] = command = CommandState(*values[1:])
    if before is not None:
        command.paths += before.paths
        command.answered += before.answered
    return command


def _command(command_id: UUID, command: CommandState) -> Command:
    return (
        command_id.bytes,
        command.event_type,
        command.actor,
        command.count,
        command.done,
        command.last_sequence,
        command.last_digest,
    )


def _columns(commands: Iterable[Command]) -> tuple[Any, ...]:
    """By column, of which those of equal length are one piece each."""
    ids, *between, digests = zip(*commands, strict=True)
    return b"".join(ids), *between, b"".join(digests)


def _commands(body: bytes) -> Iterator[tuple[Command, Any, Any]]:
    """The commands of a row, each with what the row's other two columns have of it. Raises as `unsealed`."""
    (ids, *between, digests), *others = unsealed(body)
    columns = _pieces(ids, _ID_BYTES), *between, _pieces(digests, DIGEST_BYTES)
    return zip(zip(*columns, strict=True), *others, strict=True)


def _pieces(joined: bytes, size: int) -> list[bytes]:
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def _answered(files: Sequence[Sequence[Any]]) -> tuple[bytes, bytes] | None:
    """The values of `Answered`, of files as `command_rows` has them."""
    if not files:
        return None
    return items_digest([item for _, _, item, _ in files]), b"".join([digest for _, digest, _, _ in files])


def _since(commands: dict[UUID, CommandState], saved: int) -> list[tuple[UUID, CommandState]]:
    """Those with events after `saved`. They come in the order of their events, so that what is new is at the end."""
    found = []
    for item in reversed(commands.items()):
        if item[1].last_sequence <= saved:
            break
        found.append(item)
    found.reverse()
    return found
