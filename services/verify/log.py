"""Checking the log: every event of every package in order, noting what each claims of the blob store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing, suppress
from uuid import UUID

from artifact_store.errors import CorruptError
from artifact_store.events import NO_DIGEST, Event, FileIngested, PackageFinalized
from schemas.codec import UndecodableEventError, decode
from schemas.digests import payload_digest_holds, record_digest
from schemas.identifiers import event_id
from services.log.port import Log, Record
from services.log.records import AdministrativeHead, BadRecord, Skips, is_administrative, read_record
from services.verify.history import Histories
from services.verify.notes import Claim, Notes
from services.verify.report import Report

Progress = Callable[[Report], None]

_PROGRESS_EVERY = 1000


class LogCheck:
    """One pass over the log, in memory that does not depend on its length."""

    def __init__(self, log: Log, notes: Notes, report: Report, *, backend_id: str, progress: Progress) -> None:
        """`backend_id` is that of the blob store at hand."""
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
        """Read to the end as it is now. Raises UnavailableError; what is wrong with the log goes into the report.

        Also CorruptError: the log cannot be told from others.
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
        for package_id, command_id in self._notes.unfinished():
            self._report.unfinished_commands += 1
            self._report.add("unfinished-command", f"package {package_id}", f"command {command_id} waits for its retry")
        self._progress(self._report)

    async def _compare_repeats(self) -> None:
        """Look whether events that came again are those that were there: read once more up to the last of them."""
        ends = self._notes.repeats_end()
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
        """Name a record that is no event. If an event is in it, its package may lack just that: it is followed."""
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
                    report.add("backend", place, f"{file.receipt.backend_id!r} is not the backend that is at hand")
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
        if claim.start >= 0 and claim.length >= 0:  # anything else is no receipt, and named as that
            self._notes.note_claim(claim)
