"""Checking the log: every event of every package in order. Each event's claims about the blob store are noted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import fields, replace
from itertools import chain
from uuid import UUID, uuid5

from blake3 import blake3

from artifact_store.canonical import canonical_cbor, cbor_array_head, jcs
from artifact_store.errors import ArtifactStoreError, CorruptError, InvalidPathError
from artifact_store.events import NO_DIGEST, Event, FileIngested, PackageCreated, PackageFinalized, Payload
from artifact_store.manifest import content_key
from artifact_store.rules import check_path, check_text
from schemas.codec import UndecodableEventError, decode
from schemas.digests import event_digest, payload_digest, payload_digest_holds, record_digest
from schemas.identifiers import event_id, package_id
from schemas.runs import StoredFile
from services.blobs.port import checked_key
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles, Limits, decide
from services.core.lifecycle import RETENTION_CLASSES
from services.core.state import CREATED, FINALIZED, FileState, PackageState
from services.log.port import Log, Record
from services.log.records import AdministrativeHead, BadRecord, Skips, is_administrative, read_record
from services.verify.notes import Claim, Head, Notes, OpenCommand
from services.verify.report import Complain, Report

Progress = Callable[[Report], None]

_PROGRESS_EVERY = 1000


class LogCheck:
    """One pass over the log. Its memory does not depend on the log's length."""

    def __init__(self, log: Log, notes: Notes, report: Report, *, backend_id: str, progress: Progress) -> None:
        """`backend_id` is that of the blob store in use."""
        self._log = log
        self._notes = notes
        self._report = report
        self._backend_id = backend_id
        self._progress = progress
        self._histories = Histories(notes, report.add)
        self._last_at: dict[int, int] = {}
        self._skips = Skips(log)
        self._administrative: dict[UUID, AdministrativeHead] = {}

    async def run(self) -> None:
        """Read up to the log's end at the time of the call, and add what is wrong to the report.

        Raises UnavailableError; CorruptError: the log has no readable identity.
        """
        end = await self._log.end()
        await self._look_below()
        batches = self._log.scan(dict.fromkeys(end.offsets, 0), end.offsets)
        try:
            async with aclosing(batches):
                async for batch in batches:
                    for record in batch.records:
                        await self._read(record)
            await self._compare_repeats()
        except CorruptError as error:
            self._report.add("gone", "log", f"reading stopped: {error.detail}")
        for package, command_id in self._notes.unfinished():
            self._report.unfinished_commands += 1
            self._report.add("unfinished-command", f"package {package}", f"command {command_id} waits for its retry")
        self._progress(self._report)

    async def _compare_repeats(self) -> None:
        """Compare repeated events with the first ones: reads the log once more, up to the last repeat."""
        ends = self._notes.repeats_end()
        if not ends:
            return
        async with aclosing(self._log.scan(dict.fromkeys(ends, 0), ends)) as batches:
            async for batch in batches:
                for record in batch.records:
                    event = read_record(record, self._log.partition_of)
                    if not isinstance(event, Event):
                        continue
                    first = record_digest(record.key, record.value)
                    for offset, digest in self._notes.take_repeats(event):
                        place = f"package {event.package_id} event {event.sequence}"
                        if digest == first:
                            self._report.repeated += 1
                        else:
                            where = f"at offset {offset} of partition {record.partition}"
                            what = f"has another content {where} than at offset {record.offset}"
                            self._report.add("repeated-event", place, what)

    async def _look_below(self) -> None:
        try:
            damage = await self._log.damage()
        except CorruptError as error:
            damage = [error.detail]
        for what in damage:
            self._report.add("log-file", "log", what)

    async def _read(self, record: Record) -> None:
        found = read_record(record, self._log.partition_of)
        if isinstance(found, Event):
            self._follow(record, found)
        elif await self._skips.covers(found):
            self._report.skipped += 1
        else:
            self._name(record, found)
        if self._report.events % _PROGRESS_EVERY == 0:
            self._progress(self._report)
            await asyncio.sleep(0)

    def _name(self, record: Record, bad: BadRecord) -> None:
        """Report a record that is not a valid event. An event that is in it is followed: its package may need it."""
        with suppress(UndecodableEventError):
            event = decode(record.value)
            if not is_administrative(event):
                self._follow(record, event, bad)
                return
        place = f"partition {record.partition} offset {record.offset}"
        self._report.add("undecodable", place, bad.error.detail)

    def _follow(self, record: Record, event: Event, bad: BadRecord | None = None) -> None:
        report = self._report
        if is_administrative(event):
            self._follow_administrative(record, event)
            return
        report.events += 1
        place = f"package {event.package_id} event {event.sequence}"
        self._check_place(record, event, place, bad)
        followed = self._histories.follow(event)
        if followed is None:
            self._notes.note_repeat(record, event)
            return
        self._check_time(record, event, place)
        is_new, claim = followed
        report.packages += is_new
        match event.payload:
            case FileIngested() as file:
                report.files += 1
                if file.receipt.backend_id != self._backend_id:
                    report.add("backend", place, f"{file.receipt.backend_id!r} is not the backend in use")
                    claim = None
            case PackageFinalized():
                report.manifests += 1
        if claim is not None:
            self._note(claim)

    def _check_place(self, record: Record, event: Event, place: str, bad: BadRecord | None) -> None:
        if bad is not None and record.key == str(event.package_id).encode():
            self._report.add("partition", place, bad.error.detail)
        elif bad is not None:
            self._report.add("key", place, bad.error.detail)
        if record.sequence not in (None, event.sequence):
            self._report.add("listed", place, f"the log lists it as event {record.sequence} of its package")

    def _follow_administrative(self, record: Record, event: Event) -> None:
        """Check that the administrative records of one partition, in one log, are numbered and chained."""
        self._report.administrative += 1
        place = f"partition {record.partition} offset {record.offset}"
        after = self._administrative.get(event.package_id, AdministrativeHead(0, NO_DIGEST))
        numbered = event.sequence == after.sequence + 1 and event.previous_digest == after.digest
        derived = event.event_id == event_id(event.package_id, event.sequence)
        if not numbered or not derived or not payload_digest_holds(event):
            self._report.add("administrative", place, f"record {event.sequence} does not follow {after.sequence}")
        self._administrative[event.package_id] = AdministrativeHead.of(event)
        self._check_time(record, event, place)

    def _check_time(self, record: Record, event: Event, place: str) -> None:
        partition = record.partition
        if event.created_at < self._last_at.get(partition, 0):
            self._report.add("created-at", place, f"created_at decreases within partition {partition}")
        self._last_at[partition] = event.created_at

    def _note(self, claim: Claim) -> None:
        if claim.start >= 0 and claim.length >= 0:  # anything else is reported as a bad receipt
            self._notes.note_claim(claim)


class Histories:
    """The histories of all packages of a log. Memory is bounded: `notes` holds what must be remembered."""

    def __init__(self, notes: Notes, complain: Complain) -> None:
        self._notes = notes
        self._report = complain
        self._named = 0

    def follow(self, event: Event) -> tuple[bool, Claim | None] | None:
        """Check the next event of its package. Returns whether the package is new, and the event's claim about a blob.

        Returns None for an event whose sequence the package already has: all readers pass over such an event.
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
                claim = Claim.of_file(event, payload)
            case PackageFinalized():
                claim = self._check_finalized(event, payload, head, place)
        judged = self._named == named and not _names_no_key(payload)
        if judged and (difference := differs(event, head, known_path=known_path)):
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
            command = OpenCommand(
                event.command_id, event.actor, event.event_type, event.command_count, principal=event.principal
            )
        found = (event.command_index, event.command_count, event.actor, event.principal, event.event_type)
        count = event.command_count
        possible = count >= 1 if isinstance(event.payload, FileIngested) else count == 1
        if not possible or found != (
            command.done,
            command.count,
            command.actor,
            command.principal,
            command.event_type,
        ):
            self._complain(
                "command-order", place, f"is not part {command.done} of {command.count} of command {event.command_id}"
            )
        command.done += 1
        head.command = None if command.done >= command.count else command

    def _check_created(self, event: Event, payload: PackageCreated, place: str) -> None:
        self._check_payload_digest(event, payload, place)
        if event.sequence == 1 and event.package_id != package_id(event.principal or event.actor, event.command_id):
            self._complain("package-id", place, "package_id is not derived from sender and command")
        if not _is_jcs_object(payload.metadata):
            self._complain("metadata", place, "metadata is not a JSON object in JCS form")
        if payload.retention_days is not None and payload.retention_days < 0:
            self._complain("retention", place, f"{payload.retention_days} days are not a period")
        self._notes.note_creation(event.package_id, payload)

    def _check_file(self, event: Event, payload: FileIngested, place: str) -> bool:
        """Check the event of a file. Returns whether the package already had its path."""
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


def _is_jcs_object(text: str) -> bool:
    try:
        value = json.loads(text)
        return isinstance(value, dict) and jcs(value) == text
    except (ValueError, RecursionError):
        return False


_NO_LIMITS = Limits(*[1 << 62] * len(fields(Limits)))
_SOMETHING = PackageCreated("name", "producer", "subject", "class", None, "{}")
_FILE = FileState(0, b"", b"", b"")
_FIELDS = tuple(Event.__slots__)


def differs(event: Event, head: Head, *, known_path: bool) -> str | None:
    """How the event differs from what `decide` makes in the package's state, as text; None if it does not.

    `head` is the package's head before the event; `known_path` says whether the package already had the event's path.
    """
    try:
        if isinstance(event.payload, PackageCreated):
            check_text("retention_class", event.payload.retention_class)
        (made,) = decide(_state(event, head, known_path), _command(event), event.created_at, _NO_LIMITS)
    except (ArtifactStoreError, ValueError) as error:
        return f"the core rejects the command: {error}"
    made = replace(made, command_index=event.command_index, command_count=event.command_count)
    if not isinstance(event.payload, FileIngested):
        made = replace(made, payload=event.payload, payload_digest=event.payload_digest)
    wrong = [name for name in _FIELDS if getattr(made, name) != getattr(event, name)]
    return f"the core makes another event of the command: {', '.join(wrong)}" if wrong else None


def _names_no_key(payload: Payload) -> bool:
    """Whether the receipt's key is invalid, which the check of the blobs reports."""
    try:
        return isinstance(payload, FileIngested) and not checked_key(payload.receipt.key)
    except CorruptError:
        return True


def _state(event: Event, head: Head, known_path: bool) -> PackageState | None:
    if head.sequence == 0:
        return None
    status = FINALIZED if head.finalized else CREATED
    state = PackageState(event.package_id, _SOMETHING, 0, head.last_at, head.sequence, head.digest, status)
    if known_path and isinstance(event.payload, FileIngested):
        state.files[event.payload.relative_path] = _FILE
    return state


def _command(event: Event) -> Command:
    package, command, actor, principal = event.package_id, event.command_id, event.actor, event.principal
    match event.payload:
        case PackageCreated() as made:
            about = (made.name, made.producer, made.subject, RETENTION_CLASSES[0].name, made.metadata)
            return CreatePackage(package, command, actor, *about, principal=principal)
        case FileIngested() as file:
            at = file.receipt
            stored = StoredFile(
                *(file.relative_path, file.media_type, file.size_bytes, file.blake3, file.sha256),
                *(at.backend_id, at.key, at.offset, at.length, at.stored_at),
            )
            return IngestFiles(package, command, actor, (stored,), principal=principal)
        case PackageFinalized():
            return FinalizePackage(package, command, actor, principal=principal)
    raise ValueError(f"no command becomes {event.event_type}")


_MAP_OF_FOUR = b"\xa4"


class ManifestCheck:
    """The digest (32 raw bytes) and length of the manifest of the noted events, and whether `recorded` is the same.

    Memory is bounded, because the manifest is not kept.
    """

    def __init__(self, notes: Notes, event: Event, head: Head, recorded: bytes | None) -> None:
        hasher = blake3()
        length = 0
        same = recorded is not None
        for piece in _pieces(notes, event, head):
            if recorded is not None and same:
                same = recorded[length : length + len(piece)] == piece
            hasher.update(piece)
            length += len(piece)
        self.digest = hasher.digest()
        self.length = length
        self.same = same and recorded is not None and len(recorded) == length


def _pieces(notes: Notes, event: Event, head: Head) -> Iterator[bytes]:
    package = event.package_id
    created = notes.creation(package) or PackageCreated("", "", "", "", None, "{}")
    try:
        metadata = json.loads(created.metadata)
    except ValueError:
        metadata = None
    about = {
        "id": str(package),
        "name": created.name,
        "producer": created.producer,
        "subject": created.subject,
        "retention_class": created.retention_class,
        "metadata": metadata,
        "status": "finalized",
        "created_at": head.created_at,
        "finalized_at": event.created_at,
    }
    values: dict[str, Iterator[bytes]] = {
        "manifest_version": iter([canonical_cbor(1)]),
        "package": iter([canonical_cbor(about)]),
        "files": chain([cbor_array_head(head.files)], notes.entries(package)),
        "storage_receipts": chain([cbor_array_head(head.files)], notes.receipts(package)),
    }
    yield _MAP_OF_FOUR
    for name in sorted(values, key=canonical_cbor):
        yield canonical_cbor(name)
        yield from values[name]
