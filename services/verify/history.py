"""The history of one package, checked event by event against DESIGN's invariants.

Written apart from `services.core`, which wrote the history: it shares the language (`schemas`) and the rules for single
values with it, none of the code that decides, evolves or builds manifests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from schemas.canonical import canonical_cbor
from schemas.digests import event_digest, manifest_digest, payload_digest
from schemas.events import (
    FILE_INGESTED,
    NO_DIGEST,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    Event,
    FileIngested,
    PackageCreated,
    PackageFinalized,
)
from services.core.paths import check_path
from services.errors import InvalidPathError

_PAYLOADS = {PACKAGE_CREATED: PackageCreated, FILE_INGESTED: FileIngested, PACKAGE_FINALIZED: PackageFinalized}

Complain = Callable[[str, str, str], None]


@dataclass(slots=True)
class _Command:
    actor: str
    event_type: str
    count: int
    done: int = 0


@dataclass(slots=True)
class PackageHistory:
    """What must be remembered of a package between its events; a finalized one forgets its files."""

    package_id: UUID
    created: PackageCreated | None = None
    created_at: int = 0
    sequence: int = 0
    digest: bytes = NO_DIGEST
    finalized: bool = False
    files: dict[str, tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=dict)
    total_bytes: int = 0
    open_command: tuple[UUID, _Command] | None = None
    seen_commands: set[UUID] = field(default_factory=set)

    def follow(self, event: Event, complain: Complain) -> bytes | None:
        """Check the package's next event; return the manifest that a claim check must lead to, if it is one."""
        place = f"package {self.package_id} event {event.sequence}"
        manifest = None
        self._check_chain(event, place, complain)
        self._check_command(event, place, complain)
        payload = event.payload
        if not isinstance(payload, _PAYLOADS.get(event.event_type, ())):
            complain("event-type", place, f"a payload that is not one of {event.event_type}")
        if self.finalized:
            complain("after-finalized", place, f"{event.event_type} follows the finalization")
        if (event.sequence == 1) != isinstance(payload, PackageCreated):
            complain("creation", place, "the first event, and only it, must create the package")
        match payload:
            case PackageCreated():
                self._check_created(event, payload, place, complain)
            case FileIngested():
                self._check_file(event, payload, place, complain)
            case PackageFinalized():
                manifest = self._check_finalized(event, payload, place, complain)
        self.sequence = event.sequence
        self.digest = event_digest(event)
        return manifest

    def _check_chain(self, event: Event, place: str, complain: Complain) -> None:
        if event.sequence != self.sequence + 1:
            complain("sequence", place, f"follows event {self.sequence}")
        if event.previous_digest != self.digest:
            complain("chain", place, "previous_digest is not the digest of the event before it")
        if event.event_id != uuid5(event.package_id, str(event.sequence)):
            complain("event-id", place, "event_id is not derived from package and sequence")

    def _check_command(self, event: Event, place: str, complain: Complain) -> None:
        if self.open_command is not None and self.open_command[0] != event.command_id:
            complain("torn-command", place, f"command {self.open_command[0]} before it is not whole")
            self.open_command = None
        if self.open_command is None:
            if event.command_id in self.seen_commands:
                complain("repeated-command", place, f"command {event.command_id} was applied before")
            self.seen_commands.add(event.command_id)
            command = _Command(event.actor, event.event_type, event.command_count)
        else:
            command = self.open_command[1]
        if (event.command_index, event.command_count, event.actor, event.event_type) != (
            command.done,
            command.count,
            command.actor,
            command.event_type,
        ):
            complain("command-order", place, f"is not part {command.done} of {command.count} of its command")
        command.done += 1
        self.open_command = None if command.done >= command.count else (event.command_id, command)

    def _check_created(self, event: Event, payload: PackageCreated, place: str, complain: Complain) -> None:
        self.created, self.created_at = payload, event.created_at
        if payload_digest(payload) != event.payload_digest:
            complain("payload-digest", place, "payload_digest is not that of the payload")
        try:
            is_object = isinstance(json.loads(payload.metadata), dict)
        except ValueError:
            is_object = False
        if not is_object:
            complain("metadata", place, "metadata is not a JSON object")

    def _check_file(self, event: Event, payload: FileIngested, place: str, complain: Complain) -> None:
        if payload_digest(payload) != event.payload_digest:
            complain("payload-digest", place, "payload_digest is not that of the payload")
        try:
            check_path(payload.relative_path)
        except InvalidPathError as error:
            complain("path", place, error.detail)
        if payload.relative_path in self.files:
            complain("duplicate-path", place, f"{payload.relative_path!r} was ingested before")
        receipt = payload.receipt
        if payload.file_id != uuid5(event.package_id, f"file:{payload.relative_path}"):
            complain("file-id", place, "file_id is not derived from package and path")
        where = f"location:{receipt.backend_id}:{receipt.key}:{receipt.offset}:{receipt.length}"
        if receipt.location_id != uuid5(payload.file_id, where):
            complain("location-id", place, "location_id is not derived from file and place")
        if receipt.length != payload.size_bytes or receipt.offset < 0:
            complain("receipt", place, "the receipt is not for size_bytes bytes")
        self.total_bytes += payload.size_bytes
        self.files[payload.relative_path] = (
            {
                "file_id": str(payload.file_id),
                "relative_path": payload.relative_path,
                "media_type": payload.media_type,
                "size_bytes": payload.size_bytes,
                "blake3": payload.blake3.hex(),
                "sha256": payload.sha256.hex(),
            },
            {
                "file_id": str(payload.file_id),
                "location_id": str(receipt.location_id),
                "backend_id": receipt.backend_id,
                "key": receipt.key,
                "offset": receipt.offset,
                "length": receipt.length,
                "stored_at": receipt.stored_at,
            },
        )

    def _check_finalized(self, event: Event, payload: PackageFinalized, place: str, complain: Complain) -> bytes | None:
        manifest = self._manifest(event.created_at)
        if manifest_digest(manifest) != event.payload_digest:
            complain("manifest-address", place, "payload_digest is not that of the manifest of the package's events")
        if payload.manifest is not None and payload.manifest != manifest:
            complain("manifest", place, "the manifest is not that of the package's events")
        if (payload.manifest is None) == (payload.manifest_key is None):
            complain("manifest", place, "the manifest must be either inline or a claim check")
        if (payload.file_count, payload.total_bytes) != (len(self.files), self.total_bytes):
            complain("manifest-totals", place, "file_count or total_bytes is not that of the package's events")
        self.finalized = True
        self.files = {}
        self.seen_commands = set()
        return manifest if payload.manifest_key is not None else None

    def _manifest(self, finalized_at: int) -> bytes:
        created = self.created or PackageCreated("", "", "", "", None, "{}")
        ordered = [self.files[path] for path in sorted(self.files, key=lambda path: path.encode(errors="replace"))]
        try:
            metadata = json.loads(created.metadata)
        except ValueError:
            metadata = None
        return canonical_cbor(
            {
                "manifest_version": 1,
                "package": {
                    "id": str(self.package_id),
                    "name": created.name,
                    "producer": created.producer,
                    "subject": created.subject,
                    "retention_class": created.retention_class,
                    "metadata": metadata,
                    "status": "finalized",
                    "created_at": self.created_at,
                    "finalized_at": finalized_at,
                },
                "files": [file for file, _ in ordered],
                "storage_receipts": [receipt for _, receipt in ordered],
            }
        )
