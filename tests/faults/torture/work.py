"""The requests of producers, and the journal that they write about each answer before their next step.

A request is derived only from its few numbers, so that anyone who reads the journal can send exactly the same request
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from schemas import identifiers

ACTOR = "torture"
MEDIA_TYPE = "text/plain"

CREATE, INGEST, FINALIZE = "create", "ingest", "finalize"


@dataclass(frozen=True, slots=True)
class Work:
    """One command. `path` and `content` are those of a file: what is in it is told by the number."""

    kind: str
    package_id: UUID
    command_id: UUID
    path: str = ""
    content: int = 0

    @property
    def bytes(self) -> bytes:
        """The file's bytes."""
        return b"file %d\n" % self.content


def creation(command_id: UUID) -> Work:
    """The creation of a package, whose id follows from the command's."""
    return Work(CREATE, identifiers.package_id(ACTOR, command_id), command_id)


def package_fields(work: Work) -> dict[str, Any]:
    """What a creation says about its package."""
    return {
        "name": f"torture {work.command_id.hex[:8]}",
        "producer": ACTOR,
        "subject": "faults",
        "retention_class": "scratch",
        "metadata": {"command": str(work.command_id)},
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """What an acknowledgement promises; `address` is the file's or the manifest's, empty for a creation."""

    sequence: int
    event_digest: str
    address: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An acknowledged command. Times are seconds of the system's monotonic clock."""

    work: Work
    answer: Answer
    began: float
    ended: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Complaint:
    """An answer that no producer should ever get."""

    text: str


class Journal:
    """A file that entries are appended to; each is the system's before `write` returns, whatever ends the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, entry: Entry | Complaint) -> None:
        """Append one entry."""
        os.write(self._file, (_line(entry) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class JournalReader:
    """Reads journals that are still being written, each time what is new."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._offsets = dict.fromkeys(paths, 0)

    def new(self) -> Iterator[Entry | Complaint]:
        """The whole lines that came since."""
        for path in self._paths:
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._offsets[path])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[path] += len(line)
                    yield _parsed(line)


def _line(entry: Entry | Complaint) -> str:
    if isinstance(entry, Complaint):
        return json.dumps({"complaint": entry.text})
    work, answer = entry.work, entry.answer
    return json.dumps(
        {
            "kind": work.kind,
            "package": str(work.package_id),
            "command": str(work.command_id),
            "path": work.path,
            "content": work.content,
            **asdict(answer),
            "began": entry.began,
            "ended": entry.ended,
            "attempts": entry.attempts,
        }
    )


def _parsed(line: bytes) -> Entry | Complaint:
    found = json.loads(line)
    if "complaint" in found:
        return Complaint(found["complaint"])
    return Entry(
        Work(found["kind"], UUID(found["package"]), UUID(found["command"]), found["path"], found["content"]),
        Answer(found["sequence"], found["event_digest"], found["address"]),
        found["began"],
        found["ended"],
        found["attempts"],
    )
