"""The history of a package, checked event by event against the second of the invariants in docs/architecture.md.

Written apart from `services.core`, which wrote the history: it shares the language (`schemas`) and the rules for single
values with it, none of the code that decides, evolves or builds manifests. What no check here has named is then held
against `decide` itself (`conformance.py`).
"""

from __future__ import annotations

import json
from uuid import uuid5

from artifact_store.canonical import canonical_cbor, jcs
from artifact_store.errors import InvalidPathError
from artifact_store.events import Event, FileIngested, PackageCreated, PackageFinalized
from artifact_store.manifest import content_key
from artifact_store.rules import check_path
from schemas.digests import event_digest, payload_digest
from schemas.identifiers import package_id
from services.verify.conformance import differs
from services.verify.manifest import ManifestCheck
from services.verify.notes import Claim, Head, Notes, OpenCommand
from services.verify.report import Complain


class Histories:
    """All packages of a log. Memory is bounded: what must be remembered lies in the notes."""

    def __init__(self, notes: Notes, complain: Complain) -> None:
        self._notes = notes
        self._report = complain
        self._named = 0

    def follow(self, event: Event) -> tuple[bool, Claim | None] | None:
        """Check the next event of its package; whether the package is new, and what the event claims of a blob.

        None for an event whose number the package has already: it is passed over, as everybody does.
        """
        head, is_new = self._notes.head(event.package_id)
        if 1 <= event.sequence <= head.sequence:
            return None
        place = f"package {event.package_id} event {event.sequence}"
        named = self._named
        payload = event.payload
        self._check_chain(event, head, place)
        self._check_command(event, head, place)
        if head.finalized:
            self._complain("after-finalized", place, f"{event.event_type} follows the finalization")
        if (event.sequence == 1) != isinstance(payload, PackageCreated):
            self._complain("creation", place, "the first event, and only it, must create the package")
        claim = None
        known_path = False
        match payload:
            case PackageCreated():
                self._check_created(event, payload, place)
            case FileIngested():
                known_path = self._check_file(event, payload, place)
                claim = _claim_of(event, payload)
            case PackageFinalized():
                claim = self._check_finalized(event, payload, head, place)
        if self._named == named and (difference := differs(event, head, known_path=known_path)):
            self._complain("decide", place, difference)
        self._move(head, event)
        return is_new, claim

    def _complain(self, kind: str, place: str, detail: str) -> None:
        self._named += 1
        self._report(kind, place, detail)

    def _check_chain(self, event: Event, head: Head, place: str) -> None:
        if event.sequence != head.sequence + 1:
            self._complain("sequence", place, f"follows event {head.sequence}")
        if event.previous_digest != head.digest:
            self._complain("chain", place, "previous_digest is not the digest of the event before it")
        if event.event_id != uuid5(event.package_id, str(event.sequence)):
            self._complain("event-id", place, "event_id is not derived from package and sequence")

    def _check_command(self, event: Event, head: Head, place: str) -> None:
        if head.command is not None and head.command.command_id != event.command_id:
            self._complain("torn-command", place, f"command {head.command.command_id} before it is not whole")
            head.command = None
        command = head.command
        if command is None:
            if not self._notes.note_command(event.package_id, event.command_id):
                self._complain("repeated-command", place, f"command {event.command_id} was applied before")
            command = OpenCommand(event.command_id, event.actor, event.event_type, event.command_count)
        found = (event.command_index, event.command_count, event.actor, event.event_type)
        count = event.command_count
        possible = count >= 1 if isinstance(event.payload, FileIngested) else count == 1
        if not possible or found != (command.done, command.count, command.actor, command.event_type):
            self._complain(
                "command-order", place, f"is not part {command.done} of {command.count} of command {event.command_id}"
            )
        command.done += 1
        head.command = None if command.done >= command.count else command

    def _check_created(self, event: Event, payload: PackageCreated, place: str) -> None:
        self._check_payload_digest(event, payload, place)
        if event.sequence == 1 and event.package_id != package_id(event.actor, event.command_id):
            self._complain("package-id", place, "package_id is not derived from actor and command")
        if not _is_jcs_object(payload.metadata):
            self._complain("metadata", place, "metadata is not a JSON object in JCS form")
        if payload.retention_days is not None and payload.retention_days < 0:
            self._complain("retention", place, f"{payload.retention_days} days are no period")
        self._notes.note_creation(event.package_id, payload)

    def _check_file(self, event: Event, payload: FileIngested, place: str) -> bool:
        """Whether the path was there before."""
        self._check_payload_digest(event, payload, place)
        try:
            check_path(payload.relative_path)
        except InvalidPathError as error:
            self._complain("path", place, error.detail)
        receipt = payload.receipt
        if payload.file_id != uuid5(event.package_id, f"file:{payload.relative_path}"):
            self._complain("file-id", place, "file_id is not derived from package and path")
        where = f"location:{receipt.backend_id}:{receipt.key}:{receipt.offset}:{receipt.length}"
        if receipt.location_id != uuid5(payload.file_id, where):
            self._complain("location-id", place, "location_id is not derived from file and place")
        if receipt.length != payload.size_bytes or receipt.offset < 0 or receipt.length < 0:
            self._complain("receipt", place, "the receipt is not for size_bytes bytes")
        entry = {
            "file_id": str(payload.file_id),
            "relative_path": payload.relative_path,
            "media_type": payload.media_type,
            "size_bytes": payload.size_bytes,
            "blake3": payload.blake3.hex(),
            "sha256": payload.sha256.hex(),
        }
        proof = {
            "file_id": str(payload.file_id),
            "location_id": str(receipt.location_id),
            "backend_id": receipt.backend_id,
            "key": receipt.key,
            "offset": receipt.offset,
            "length": receipt.length,
            "stored_at": receipt.stored_at,
        }
        fresh = self._notes.note_file(
            event.package_id, payload.relative_path, canonical_cbor(entry), canonical_cbor(proof)
        )
        if not fresh:
            self._complain("duplicate-path", place, f"{payload.relative_path!r} was ingested before")
        return not fresh

    def _check_finalized(self, event: Event, payload: PackageFinalized, head: Head, place: str) -> Claim | None:
        built = ManifestCheck(self._notes, event, head, payload.manifest)
        if built.digest != event.payload_digest:
            self._complain("manifest-address", place, "payload_digest is not that of the manifest of the events")
        if payload.manifest is not None and not built.same:
            self._complain("manifest", place, "the manifest is not that of the package's events")
        if (payload.manifest is None) == (payload.manifest_key is None):
            self._complain("manifest-form", place, "the manifest must be either inline or a claim check")
        elif payload.manifest_key is not None and payload.manifest_key != content_key(event.payload_digest):
            self._complain("manifest-key", place, "the claim check is not the manifest's content-addressed key")
        if (payload.file_count, payload.total_bytes) != (head.files, head.total_bytes):
            self._complain("manifest-totals", place, "file_count or total_bytes is not that of the package's events")
        self._notes.forget(event.package_id)
        if payload.manifest_key is None:
            return None
        key, size = payload.manifest_key, built.length
        return Claim(key, 0, size, built.digest, b"", True, event.package_id, event.sequence, "")

    def _check_payload_digest(self, event: Event, payload: PackageCreated | FileIngested, place: str) -> None:
        if payload_digest(payload) != event.payload_digest:
            self._complain("payload-digest", place, "payload_digest is not that of the payload")

    def _move(self, head: Head, event: Event) -> None:
        if isinstance(event.payload, PackageCreated):
            head.created_at = event.created_at
        elif isinstance(event.payload, FileIngested):
            head.files += 1
            head.total_bytes += event.payload.size_bytes
        else:
            head.finalized = True
        head.sequence = event.sequence
        head.digest = event_digest(event)
        head.last_at = event.created_at


def _claim_of(event: Event, file: FileIngested) -> Claim:
    at = file.receipt
    whole = at.offset == 0 and at.key == content_key(file.blake3)
    path, sequence = file.relative_path, event.sequence
    return Claim(at.key, at.offset, at.length, file.blake3, file.sha256, whole, event.package_id, sequence, path)


def _is_jcs_object(text: str) -> bool:
    try:
        value = json.loads(text)
        return isinstance(value, dict) and jcs(value) == text
    except (ValueError, RecursionError):
        return False
