"""The sequencer's port to a log: a `Driver` gives a `Lease` of a partition, and batches are appended under the lease.

A driver decides nothing about commands. Methods block unless they say otherwise. Drivers inherit from `Driver` and
`Lease`; methods that only one of the logs needs do nothing here.

For each batch, the writer reads `Lease.state`, decides, and calls `hand_over` and `commit`. On a lease that is not
`exclusive`, `begin_batch` and `end_batch` enclose this. A batch that appends nothing may need `prove` instead. `idle`
and `tidy` are called between batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, InvalidRequestError
from artifact_store.events import Event, PackageCreated
from services.core.state import PackageState
from services.log.port import PackageExtent
from services.log.records import AdministrativeHead, BadRecord, Confirmation
from services.log.state.loss import Loss
from services.log.state.state_file import Irregular


class Staged(NamedTuple):
    """Events of one package that were folded into its state and wait to be appended."""

    events: Sequence[Event]
    values: Sequence[bytes]
    """Their record values."""
    traceparents: Sequence[str | None]
    """One for each of the commands that became these events."""
    created: PackageCreated
    """The payload of the package's creation."""


class State(Protocol):
    """The state of a partition's packages: from the log, and from what was decided since. Used by one thread."""

    last_created_at: int
    """The time of the partition's newest event (µs since 1970); 0 before there is any."""
    next_offset: int
    """Where the log ends, as far as it was read."""
    memory_only: str | None
    """Why the newest changes are in memory only (a full disk, say); None while they are saved, or need not be."""
    pinned: set[UUID]
    """Packages that stay in memory."""

    @property
    def irregular(self) -> Irregular:
        """The partition's records that are not the next event of a package: skipped, repeated, or contradicting."""

    def package(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """The package, with the result of this command if it was applied; None if the partition has no event of it.

        Raises CorruptError if the package's history breaks an invariant; other packages can be written to. Any other
        exception ends the lease.
        """

    def fold(self, before: PackageState | None, events: Sequence[Event]) -> PackageState:
        """Fold in events that were just decided on the state `before`. Returns the package's new state."""

    def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, if that is known. May be called by any thread while the lease lasts."""
        return None

    def away(self, package_id: UUID) -> bool:
        """Whether the package is large and not in memory, so that `package` would take long. Raises as `package`."""

    def loading(self, package_id: UUID) -> Callable[[], PackageState | None]:
        """A function that reads a package that is `away`, for another thread to call."""

    def adopt(self, package: PackageState) -> None:
        """Keep a package in memory that such a function has read, unless its state has changed since."""


class Lease(Protocol):
    """The right to append to a partition. Used by one thread.

    Any exception from `hand_over` or `commit` leaves the outcome unknown: close the lease, take over again, and look at
    the new state.
    """

    restored_from: str = "log"
    """What the state was restored from: a file, a snapshot, or the whole log."""
    exclusive: bool = True
    """Whether nobody else can append while the lease lasts. If not, `begin_batch` and `end_batch` enclose every batch,
    and a large manifest, which holds the time of its event, is stored between the two."""
    losses: Sequence[Loss] = ()
    """Acknowledged records that the log lost. While there are any, nothing may be appended."""
    committed_at: int | None = None
    """When the last transaction was committed, before it was read back (ns since 1970); None: nothing is read back."""

    @property
    def state(self) -> State:
        """The state of the partition's packages."""

    @property
    def stopped(self) -> BadRecord | None:
        """The record before which the state ends, because it is not an event; None if the state has the whole log."""
        return None

    def begin_batch(self, package_ids: Collection[UUID], *, appends: bool) -> None:
        """Bring the state of these packages up to date. With `appends`, nobody else appends until `end_batch`.

        Raises ArtifactStoreError: nothing was tried, and the lease continues.
        """
        return

    def end_batch(self) -> None:
        """Let others append again; what was not committed is undone. Never raises."""
        return

    def hand_over(self, staged: Sequence[Staged]) -> list[bytes]:
        """Begin a transaction and put these events into it. Returns the values of their records, for `commit`."""

    def commit(self, values: Sequence[bytes]) -> None:
        """Commit the transaction. Returns when its records, which have these values, are durable in the log."""

    def offset_of(self, package_id: UUID, sequence: int) -> int | None:
        """The offset of an event that was appended earlier; None for a log that cannot tell at once."""
        return None

    @property
    def proof_due(self) -> float:
        """When `prove` may be called next, by the monotonic clock (s)."""
        return 0.0

    def prove(self) -> None:
        """Return if nobody else had appended anything when this was called; else raise, which ends the lease."""
        return

    def idle(self) -> None:
        """Keep connections alive while no requests come. Raises UnavailableError if another process has appended."""
        return

    def record(self, confirmation: Confirmation, now: int, require_readers: Callable[[], None]) -> AdministrativeHead:
        """Record an operator's confirmation. `now` is in µs since 1970; `require_readers` is called before anything is
        appended."""
        raise InvalidRequestError("this log records nothing that operators confirm")

    def save_if_due(self) -> None:
        """Save the state, if it is time for that. Raises StateFileError."""
        return

    def tidy(self) -> float:
        """As `save_if_due`, with other upkeep between two batches. Returns after how many seconds to call it again."""
        return math.inf

    def close(self) -> None:
        """Save the confirmed part of the state, and give up the lease."""


class Driver(Protocol):
    """A log that is written to under leases; shared by the sequencers of a process."""

    topic: str | None = None
    """The log's name if others can read it; None if nobody else reads it."""

    @property
    def identity(self) -> UUID:
        """The log's id."""

    def take_over(
        self,
        partition: int,
        *,
        is_ours: Callable[[], bool],
        stopping: Callable[[], bool],
        progressed: Callable[[], None],
    ) -> Lease:
        """Take the partition over, and read all of it, which may take minutes.

        `is_ours` tells whether the partition is still assigned to this process, `stopping` whether to give up.
        `progressed` is called after each step that need not be repeated if the take-over fails. Raises
        ArtifactStoreError.
        """

    def holds(self, partition: int) -> bool | None:
        """Whether the partition is assigned to this process; None if that is not known now."""
        return True

    def require(self, partition: int, last_created_at: int) -> None:
        """Return if events may be appended now, after one of this time (µs since 1970). Does not block.

        Raises HeldError while the log's settings or a clock could cost events.
        """
        return

    def require_readers(self) -> None:
        """Return if all processes of the installation can read administrative records; else raise, naming one."""
        return

    def refusal(self, error: BaseException) -> ArtifactStoreError | None:
        """Our error for an exception of the log's client that an operator has to fix; None for all others."""
        return None

    def cause(self, error: BaseException) -> str:
        """The text of an exception for operators. Never empty, and without the log client's own texts."""
        if isinstance(error, ArtifactStoreError):
            return error.detail
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    def spoiled_by_record(self, error: BaseException) -> bool:
        """Whether a transaction failed because of its records, so that trying them again cannot help."""
        return False
