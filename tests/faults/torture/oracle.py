"""The oracle: compares the promises to producers with the log as any Kafka consumer reads it, and runs `verify`.

It shares no code with the code that writes the log: only a plain consumer, the schemas, and the journals.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, TopicPartition

from artifact_store.events import Event, FileIngested, LogSkipped, PackageFinalized
from schemas.codec import decode
from schemas.digests import event_digest, record_digest
from services.config import Settings
from services.views.projections import PROJECTIONS
from tests.faults.torture.work import Answer, Entry
from tests.integration.processes import run_command

_READ_SECONDS = 60.0
_VERIFY_SECONDS = 1800.0
_KEPT = 200
_CLOCKS_DIFFER_MICROS = 300_000_000
"""A gateway whose clock differs by more than this writes nothing."""


@dataclass
class Verdict:
    """Counts for the last line, and the first violations in words."""

    acknowledged: int = 0
    missing: int = 0
    duplicates: int = 0
    violations: int = 0
    said: list[str] = field(default_factory=list)

    def violation(self, text: str, count: int = 1) -> None:
        """Note something that must not be."""
        self.violations += count
        self.say(text)

    def say(self, text: str) -> None:
        """Keep words for people, up to a number of them."""
        if len(self.said) < _KEPT:
            self.said.append(text)

    @property
    def clean(self) -> bool:
        """Whether every promise was kept."""
        return not (self.missing or self.duplicates or self.violations)


def compare(
    entries: Iterable[Entry],
    events: Iterable[Event],
    verdict: Verdict,
    *,
    strays: Collection[bytes] = (),
    began: int = 0,
) -> None:
    """Every acknowledged command once and as acknowledged; nothing else; no number and no path of a package twice.

    `strays`: the values of records that are no events, each of which was confirmed once. No event is much older than
    the beginning of the round (`began`, µs since 1970), or much newer than now.
    """
    promised: dict[tuple[UUID, UUID], Entry] = {}
    for entry in entries:
        promised[entry.work.package_id, entry.work.command_id] = entry
    verdict.acknowledged = len(promised)
    found: Counter[tuple[UUID, UUID]] = Counter()
    places: set[tuple[UUID, int | str]] = set()
    latest = time.time_ns() // 1000 + _CLOCKS_DIFFER_MICROS
    unconfirmed = {record_digest(b"", value) for value in strays}
    for event in events:
        if not began - _CLOCKS_DIFFER_MICROS < event.created_at < latest:
            verdict.violation(f"{event.event_type} {event.sequence} of {event.package_id} is of {event.created_at}")
        if isinstance(event.payload, LogSkipped):
            if event.payload.digest not in unconfirmed:
                verdict.violation(f"a record of digest {event.payload.digest.hex()} was confirmed twice, or by nobody")
            unconfirmed.discard(event.payload.digest)
            continue
        key = (event.package_id, event.command_id)
        found[key] += 1
        if found[key] > event.command_count:
            verdict.duplicates += 1
            verdict.say(f"command {event.command_id} of package {event.package_id} is in the log {found[key]} times")
        for place in _places(event):
            if place in places:
                verdict.duplicates += 1
                verdict.say(f"package {event.package_id} has {place[1]!r} twice")
            places.add(place)
        promise = promised.get(key)
        if promise is None:
            verdict.violation(f"{event.event_type} {event.sequence} of {event.package_id} was acknowledged to nobody")
        elif (_answer(event), _path(event)) != (promise.answer, promise.work.path):
            verdict.violation(f"{promise.work} was acknowledged as {promise.answer}, the log has {_answer(event)}")
    if unconfirmed:
        verdict.violation(f"the confirmation of {len(unconfirmed)} records is not in the log", len(unconfirmed))
    for key, entry in promised.items():
        if key not in found:
            verdict.missing += 1
            verdict.say(f"{entry.work}, acknowledged as {entry.answer}, is not in the log")


def read_log(settings: Settings, strays: Collection[bytes] = ()) -> Iterator[Event]:
    """Every committed event, by an ordinary consumer; `strays` are left out. Blocks.

    Raises TimeoutError when the end is not reached.
    """
    bootstrap, _, prefix = settings.log_url.removeprefix("kafka://").partition("/")
    topic = f"{prefix}.events"
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "torture-oracle",
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, p, 0) for p in range(settings.kafka_partitions)])
        unread = set(range(settings.kafka_partitions))
        deadline = time.monotonic() + _READ_SECONDS
        while unread:
            messages = consumer.consume(500, 0.2)
            if messages:
                deadline = time.monotonic() + _READ_SECONDS
            elif time.monotonic() > deadline:
                raise TimeoutError(f"partitions {sorted(unread)} cannot be read to their end")
            for message in messages:
                if (error := message.error()) is None:
                    value = message.value() or b""
                    if value not in strays:
                        yield decode(value)
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
    finally:
        consumer.close()


def verify(settings: Settings, verdict: Verdict, strays: Collection[bytes] = ()) -> None:
    """Let `artifact-store verify` read log, blobs and views. Blocks."""
    done = run_command(settings, "verify", "--json", seconds=_VERIFY_SECONDS)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        verdict.violation(f"verify failed: {(done.stdout + done.stderr)[-2000:].decode(errors='replace')}")
        return
    for violation in found["violations"]:
        verdict.say(f"verify: {violation['kind']} {violation['place']}: {violation['detail']}")
    verdict.violations += found["violation_count"]
    if found["repeated"]:
        verdict.violation(f"verify: {found['repeated']} records are in the log twice", found["repeated"])
    if found["skipped"] != len(strays):
        verdict.violation(f"verify: {found['skipped']} records were passed over, {len(strays)} are no events")
    for view in PROJECTIONS:
        if view not in found["views"]:
            verdict.violation(f"the view {view} was not compared with the log")


def caught_up(settings: Settings) -> bool:
    """Whether every projection stands at the end of the log. Blocks."""
    done = run_command(settings, "status", "--json")
    return done.returncode == 0 and all(p["behind"] == 0 for p in json.loads(done.stdout)["projections"])


def _places(event: Event) -> Iterator[tuple[UUID, int | str]]:
    yield event.package_id, event.sequence
    if isinstance(event.payload, FileIngested):
        yield event.package_id, event.payload.relative_path


def _path(event: Event) -> str:
    return event.payload.relative_path if isinstance(event.payload, FileIngested) else ""


def _answer(event: Event) -> Answer:
    match event.payload:
        case FileIngested() as file:
            address = f"blake3:{file.blake3.hex()}"
        case PackageFinalized():
            address = f"blake3:{event.payload_digest.hex()}"
        case _:
            address = ""
    return Answer(event.sequence, event_digest(event).hex(), address)
