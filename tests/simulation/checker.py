"""The invariants of the log, checked after each step against what was committed and what was answered.

It reads the copies of the true leaders, below their last stable offsets, and shares no code with deciding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from artifact_store.events import (
    NO_DIGEST,
    AdministrativePayload,
    Event,
    FileIngested,
    LossAccepted,
    PackageCreated,
    PackageFinalized,
)
from artifact_store.models import Acknowledgement
from schemas.codec import UndecodableEventError, decode
from schemas.digests import event_digest
from services.core.decide import Command, IngestFiles
from services.log.kafka.connection import partition_of
from tests.simulation.kafka import Cluster, Entry, Replica
from tests.simulation.scheduler import Process

Answered = tuple[UUID, UUID]
"""A command: its package and its id."""


class ViolationError(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class History:
    """What the log says of one package."""

    digests: list[bytes] = field(default_factory=list)
    """Of its events, in their order."""
    paths: set[str] = field(default_factory=set)
    finalized: bool = False
    commands: dict[UUID, list[Event]] = field(default_factory=dict)


@dataclass(slots=True)
class _Seen:
    """How far a partition was looked at."""

    offset: int = 0
    end: int = 0
    last: Entry | None = None
    time: int = 0


STORE = "the store"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Something that remembers a record which the log has lost: who has it must not write, and must not lose it."""

    partition: int
    log: UUID
    offset: int
    holder: Process | str
    """A process, whose writer has read the record; by name a gateway, which has a state file of it; or STORE."""


class Checker:
    """Raises ViolationError as soon as something is wrong."""

    def __init__(self, cluster: Cluster) -> None:
        self.histories: dict[UUID, History] = {}
        self.acknowledged: dict[Answered, tuple[Command, Acknowledgement]] = {}
        self.refused: set[Answered] = set()
        """Commands of which somebody was told that nothing is recorded, and will not be."""
        self.events = 0
        self.foreign: list[set[int]] = [set() for _ in cluster.partitions]
        """Offsets of records that a stranger has put there, which are no events."""
        self.repeated: list[set[int]] = [set() for _ in cluster.partitions]
        """Offsets of events that a mirror has put there once more."""
        self.evidence: list[Evidence] = []
        """Of losses that no operator has accepted."""
        self.is_kept: Callable[[Evidence], bool] = lambda _: True
        """Whether the evidence is still where it was."""
        self.violation: str | None = None
        self._gone: set[bytes] = set()
        """Digests of events that the log has lost."""
        self._gone_commands: set[Answered] = set()
        self._survivors = [0 for _ in cluster.partitions]
        """Below this offset are the records that the last loss has left."""
        self._cluster = cluster
        self._seen = [_Seen() for _ in cluster.partitions]

    def broken(self, what: str) -> ViolationError:
        """Note that a promise is broken: whoever catches the exception, the simulation ends."""
        self.violation = self.violation or what
        return ViolationError(what)

    def look(self) -> None:
        """Check what was committed since the last look."""
        for number, seen in enumerate(self._seen):
            leader = self._cluster.truth(number)
            if leader is None:
                continue
            if seen.last is not None and (
                len(leader.log) < seen.offset or leader.log[seen.offset - 1] is not seen.last
            ):
                raise self.broken(f"the model lost what was committed in partition {number}")
            stable = leader.stable
            while seen.offset < stable:
                entry, offset = leader.log[seen.offset], seen.offset
                seen.offset, seen.last = offset + 1, entry
                if entry.control is None and offset not in leader.aborted:
                    self._follow(number, offset, entry, seen)

    def end(self, number: int) -> int:
        """The offset behind the last event of the partition."""
        self.look()
        return self._seen[number].end

    def lost(self, number: int, copy: Replica, evidence: list[Evidence]) -> None:
        """A partition has lost its tail, or all that it had: from now on it is what this copy has."""
        parts = len(self._seen)
        before = {found: h for found, h in self.histories.items() if partition_of(found, parts) == number}
        for package_id, history in before.items():
            del self.histories[package_id]
            self.events -= len(history.digests)
        for marked in (self.foreign[number], self.repeated[number]):
            marked.intersection_update(range(len(copy.log)))
        self._survivors[number] = len(copy.log)
        self._seen[number] = seen = _Seen()
        for offset in range(min([len(copy.log), *copy.open.values()])):
            seen.offset, seen.last = offset + 1, copy.log[offset]
            if seen.last.control is None and offset not in copy.aborted:
                self._follow(number, offset, seen.last, seen)
        for package_id, history in before.items():
            left = self.histories.get(package_id, History())
            self._gone.update(history.digests[len(left.digests) :])
            self._gone_commands |= {(package_id, command) for command in history.commands.keys() - left.commands.keys()}
        for name in self._gone_commands & self.acknowledged.keys():
            del self.acknowledged[name]
        self.evidence += evidence

    def _accepted(self, number: int, payload: LossAccepted) -> None:
        """An operator has accepted a loss; until now nothing that proves it may have gone."""
        ours = [found for found in self.evidence if found.partition == number]
        for found in ours:
            if not self.is_kept(found):
                raise self.broken(f"{found.holder} has thrown away what proves that partition {number} lost events")
        for found in ours:
            another = payload.previous_log is not None and payload.previous_log == found.log
            if another or (payload.previous_log is None and found.offset <= payload.expected_offset):
                self.evidence.remove(found)

    def _require_ignorance(self, number: int, sender: Process | None) -> None:
        """Who can know that the partition lost events does not write to it."""
        for found in self.evidence:
            if sender is None or found.partition != number:
                continue
            # A frozen process may have heard nothing from the store in time.
            awake = sender.frozen_until + 30.0 < self._cluster.scheduler.now
            if found.holder in (sender, sender.name) or (found.holder == STORE and awake):
                raise self.broken(
                    f"{sender.name} writes to partition {number}, which lost the record at offset {found.offset}"
                )

    def _follow(self, number: int, offset: int, entry: Entry, seen: _Seen) -> None:
        place = f"offset {offset} of partition {number}"
        try:
            event = decode(entry.value or b"")
        except UndecodableEventError as error:
            if offset in self.foreign[number]:
                return
            raise self.broken(f"{place} cannot be read: {error}") from None
        if isinstance(event.payload, AdministrativePayload):
            seen.time = max(seen.time, event.created_at)
            if isinstance(event.payload, LossAccepted):
                self._accepted(number, event.payload)
            return
        if offset in self.repeated[number]:
            if event_digest(event) != self.histories[event.package_id].digests[event.sequence - 1]:
                raise self.broken(f"{place}: the simulation repeats what was not there")
            return
        # A loss may leave half of a transaction, without its marker: the marker of the next one commits it again.
        if offset >= self._survivors[number]:
            self._require_ignorance(number, entry.sender)
        self.events += 1
        package_id = event.package_id
        history = self.histories.setdefault(package_id, History())
        if entry.key != str(package_id).encode() or partition_of(package_id, len(self._seen)) != number:
            raise self.broken(f"{place}: package {package_id} is in the wrong place")
        if event.sequence != len(history.digests) + 1:
            raise self.broken(
                f"{place}: package {package_id} goes on with {event.sequence} after {len(history.digests)}"
                f" ({event.event_type}, command {event.command_id})"
            )
        if event.previous_digest != (history.digests[-1] if history.digests else NO_DIGEST):
            raise self.broken(f"{place}: the chain of package {package_id} is broken")
        if isinstance(event.payload, PackageCreated) != (event.sequence == 1):
            raise self.broken(f"{place}: package {package_id} does not begin with its creation")
        if history.finalized:
            raise self.broken(f"{place}: package {package_id} goes on after its finalization")
        if event.created_at < seen.time:
            raise self.broken(f"{place}: time steps back")
        if isinstance(event.payload, FileIngested):
            if event.payload.relative_path in history.paths:
                raise self.broken(f"{place}: {event.payload.relative_path} of package {package_id} is there twice")
            history.paths.add(event.payload.relative_path)
        whole = history.commands.setdefault(event.command_id, [])
        if event.command_index != len(whole):
            raise self.broken(f"{place}: command {event.command_id} has event {event.command_index} after {len(whole)}")
        if (package_id, event.command_id) in self.refused:
            raise self.broken(f"{place}: command {event.command_id} is recorded, and was refused")
        whole.append(event)
        seen.time, seen.end = event.created_at, offset + 1
        history.finalized = isinstance(event.payload, PackageFinalized)
        history.digests.append(event_digest(event))

    def answered(self, command: Command, answer: Acknowledgement) -> None:
        """A writer has acknowledged a command: it is in the log, whole, and any answer before was the same."""
        self.look()
        name = command.package_id, command.command_id
        if name in self._gone_commands:
            return  # it was in the log, which has lost it since
        history = self.histories.get(command.package_id)
        recorded = history.commands.get(command.command_id, []) if history is not None else []
        count = len(command.files) if isinstance(command, IngestFiles) else 1
        if history is None or len(recorded) != count:
            raise self.broken(f"command {command.command_id} was acknowledged; the log has {len(recorded)} of {count}")
        if answer.sequence != recorded[-1].sequence or answer.event_digest != history.digests[answer.sequence - 1]:
            raise self.broken(f"command {command.command_id} was acknowledged as another event than the log has")
        senders = {(event.actor, event.principal) for event in recorded}
        if senders != {(command.actor, command.principal)}:
            raise self.broken(
                f"command {command.command_id} was acknowledged to {command.principal}: it is of {senders}"
            )
        before = self.acknowledged.setdefault(name, (command, answer))
        if before[1] != answer:
            raise self.broken(f"command {command.command_id} was answered in two ways")

    def denied(self, command: Command, why: str) -> None:
        """A writer has refused a command for good, or said that nothing of it is recorded."""
        self.look()
        history = self.histories.get(command.package_id)
        if history is not None and command.command_id in history.commands:
            raise self.broken(f"command {command.command_id} is recorded, but its writer says: {why}")

    def refused_for_good(self, command: Command, why: str) -> None:
        """Refused by a rule, on its first try: it will never be recorded."""
        self.denied(command, why)
        self.refused.add((command.package_id, command.command_id))

    def exists(self, package_id: UUID) -> bool:
        """Whether the log has the package."""
        self.look()
        return package_id in self.histories

    def folded(self, event: Event) -> None:
        """A view has folded an event: it is the one that the log has."""
        self.look()
        history = self.histories.get(event.package_id)
        if event_digest(event) in self._gone:
            return  # it was read before the log lost it
        if history is None or event.sequence > len(history.digests):
            raise self.broken(f"a view has event {event.sequence} of package {event.package_id}, the log has not")
        if event_digest(event) != history.digests[event.sequence - 1]:
            raise self.broken(f"a view has another event {event.sequence} of package {event.package_id}")
