"""Whether the core would have made an event: its command is made out of the event, and decided again.

`decide` is pure and given only what it asks the state for, so that this needs no more memory than one event. An event
of a command of many files is decided as a command of that file alone, which differs in index and count and nothing else
(`history.py` holds those to be whole). Not judged again: limits, which were the deployment's at the time; which
retention classes there are and what they stand for, which is recorded for that reason; and the manifest, which
`manifest.py` builds.
"""

from __future__ import annotations

from dataclasses import replace

from artifact_store.errors import ArtifactStoreError
from artifact_store.events import Event, FileIngested, PackageCreated, PackageFinalized
from artifact_store.rules import check_text
from services.core.commands import Command, CreatePackage, FinalizePackage, IngestFiles, StoredFile
from services.core.decide import decide
from services.core.limits import Limits
from services.core.retention import RETENTION_CLASSES
from services.core.state import CREATED, FINALIZED, FileState, PackageState
from services.verify.notes import Head

_ENDLESS = 1 << 62
_NO_LIMITS = Limits(_ENDLESS, _ENDLESS, _ENDLESS, _ENDLESS, _ENDLESS, _ENDLESS)
_SOMETHING = PackageCreated("name", "producer", "subject", "class", None, "{}")
_FILE = FileState(0, b"", b"", b"")
_FIELDS = tuple(Event.__slots__)


def differs(event: Event, head: Head, *, known_path: bool) -> str | None:
    """What of the event is not as `decide` makes it, given what came before; None if all of it is.

    `head` stands before the event; `known_path`: the package held the event's path already.
    """
    try:
        if isinstance(event.payload, PackageCreated):
            check_text("retention_class", event.payload.retention_class)
        (made,) = decide(_state(event, head, known_path), _command(event), event.created_at, _NO_LIMITS).events
    except (ArtifactStoreError, ValueError) as error:
        return f"the core rejects the command: {error}"
    made = replace(made, command_index=event.command_index, command_count=event.command_count)
    if not isinstance(event.payload, FileIngested):
        made = replace(made, payload=event.payload, payload_digest=event.payload_digest)
    wrong = [name for name in _FIELDS if getattr(made, name) != getattr(event, name)]
    return f"the core makes another event of the command: {', '.join(wrong)}" if wrong else None


def _state(event: Event, head: Head, known_path: bool) -> PackageState | None:
    if head.sequence == 0:
        return None
    status = FINALIZED if head.finalized else CREATED
    state = PackageState(event.package_id, _SOMETHING, 0, head.last_at, head.sequence, head.digest, status)
    if known_path and isinstance(event.payload, FileIngested):
        state.files[event.payload.relative_path] = _FILE
    return state


def _command(event: Event) -> Command:
    package, command, actor = event.package_id, event.command_id, event.actor
    match event.payload:
        case PackageCreated() as made:
            about = (made.name, made.producer, made.subject, RETENTION_CLASSES[0].name, made.metadata)
            return CreatePackage(package, command, actor, *about)
        case FileIngested() as file:
            at = file.receipt
            stored = StoredFile(
                *(file.relative_path, file.media_type, file.size_bytes, file.blake3, file.sha256),
                *(at.backend_id, at.key, at.offset, at.length, at.stored_at),
            )
            return IngestFiles(package, command, actor, (stored,))
        case PackageFinalized():
            return FinalizePackage(package, command, actor)
    raise ValueError(f"no command becomes {event.event_type}")
