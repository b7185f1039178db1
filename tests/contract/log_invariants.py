"""The oracle of every test that writes: reads a whole log and checks its invariants (docs/architecture.md).

It checks each event with `services.verify.check_log`, which shares no code with deciding and evolving.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from uuid import UUID

from artifact_store.events import FileIngested, RecordedEvent
from artifact_store.models import Acknowledgement
from schemas.digests import event_digest
from services.core.decide import Command, IngestFiles
from services.log.port import Log
from services.verify.check_log import Histories
from services.verify.notes import Notes


async def read_valid(log: Log) -> list[RecordedEvent]:
    """Every event of the log, in the order in which it was read, once it is sure that they are valid.

    Per package: sequences without gap or repeat, an unbroken chain, creation first, no path twice, nothing after the
    finalization, a manifest of exactly its events, commands whole and in one piece. Per partition: positions that grow,
    times that never decrease.
    """
    events = [event async for event in log.read()]
    wrong: list[str] = []
    last: dict[int, RecordedEvent] = {}
    with Notes() as notes:
        histories = Histories(notes, lambda kind, place, detail: wrong.append(f"{kind}: {place}: {detail}"))
        for event in events:
            histories.follow(event)
        wrong += [f"torn: command {command} of package {package}" for package, command in notes.unfinished()]
    for event in events:
        partition = log.partition_of(event.package_id)
        before = last.get(partition)
        if before is not None and event.position.offsets[partition] <= before.position.offsets[partition]:
            wrong.append(f"position: partition {partition} does not move on at {event.package_id} {event.sequence}")
        if before is not None and event.created_at < before.created_at:
            wrong.append(f"created-at: partition {partition} steps back at {event.package_id} {event.sequence}")
        last[partition] = event
    assert wrong == []
    return events


def assert_recorded_once(
    events: Iterable[RecordedEvent], acknowledged: Iterable[tuple[Command, Acknowledgement]]
) -> None:
    """Every acknowledged command is in the log once, whole, and as its acknowledgement says."""
    found: dict[tuple[UUID, UUID], list[RecordedEvent]] = defaultdict(list)
    for event in events:
        found[event.package_id, event.command_id].append(event)
    for command, answer in acknowledged:
        mine = found.get((command.package_id, command.command_id), [])
        count = len(command.files) if isinstance(command, IngestFiles) else 1
        assert [event.command_index for event in mine] == list(range(count)), f"command {command.command_id}"
        assert {event.command_count for event in mine} == {count}
        assert (answer.package_id, answer.sequence) == (command.package_id, mine[-1].sequence)
        assert answer.event_digest == event_digest(mine[-1])
        if isinstance(command, IngestFiles):
            assert [_as_event(event) for event in mine] == [
                (file.file_id, file.relative_path, file.size_bytes, file.blake3, file.sha256, file.sequence, digest)
                for file, digest in ((file, file.event_digest) for file in answer.files)
            ]


def _as_event(event: RecordedEvent) -> tuple[UUID, str, int, bytes, bytes, int, bytes]:
    file = event.payload
    assert isinstance(file, FileIngested)
    return (
        file.file_id,
        file.relative_path,
        file.size_bytes,
        file.blake3,
        file.sha256,
        event.sequence,
        event_digest(event),
    )
