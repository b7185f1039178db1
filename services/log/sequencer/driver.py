"""What a log must do for its sequencer: give a lease of a partition, and append batches under it.

A driver decides nothing about commands. Everything here blocks. The drivers inherit from `Driver` and `Lease`: what one
log has no need of does nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, InvalidRequestError
from artifact_store.events import Event
from services.core.state import PackageState
from services.log.port import PackageExtent
from services.log.records import AdministrativeHead, BadRecord, Confirmation
from services.log.state.loss import Loss
from services.log.state.state_file import Irregular


class Staged(NamedTuple):
    """Events of one package that were folded into its state, and that wait to be appended."""

    events: Sequence[Event]
    values: Sequence[bytes]
    """Their record values."""
    traceparents: Sequence[str | None]
    """One for each command that they are of."""


class State(Protocol):
    """A partition's packages: what the log says of them, and what was decided since. Used by one thread."""

    last_created_at: int
    """The time of the partition's newest event (µs since 1970); 0 before there is any."""
    next_offset: int
    """Where the log ends, as far as it was read."""
    memory_only: str | None
    """Why the newest part of the state is in memory alone, where it is saved to a disk; None when it is not."""
    pinned: set[UUID]
    """Packages that stay in memory."""

    @property
    def irregular(self) -> Irregular:
        """What the partition held that is no next event of a package."""

    def package(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """The package, with what this command became; None when the partition has no event of it.

        Raises CorruptError when the package's history breaks an invariant: others are sound. Any other exception ends
        the lease.
        """

    def fold(self, before: PackageState | None, events: Sequence[Event]) -> PackageState:
        """Fold in events that were just decided on `before`."""

    def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, as far as that is known. From any thread, while the lease lasts."""
        return None

    def away(self, package_id: UUID) -> bool:
        """Whether the package is large and not in memory, so that `package` would take long. Raises as `package`."""

    def loading(self, package_id: UUID) -> Callable[[], PackageState | None]:
        """What reads a package that is away, in another thread."""

    def adopt(self, package: PackageState) -> None:
        """Hold a package that was read so, if it is still what the log says."""


class Lease(Protocol):
    """The right to append to a partition. Used by one thread.

    Any exception from `hand_over` or `commit` leaves the outcome unknown: close the lease, take over again, and look at
    the new state.
    """

    restored_from: str = "log"
    """What the state was made of: a file, a snapshot, or the whole log."""
    exclusive: bool = True
    """Whether nobody else can append while the lease lasts. Otherwise every batch is enclosed by `begin_batch` and
    `end_batch`, and a large manifest, which names the time of its event, is stored between the two."""
    losses: Sequence[Loss] = ()
    """Acknowledged records that the log lost: nothing may be appended."""

    @property
    def state(self) -> State:
        """What the log says of the partition's packages."""

    @property
    def stopped(self) -> BadRecord | None:
        """The record, no event, that the state ends before; None when the state has all of the log."""
        return None

    def begin_batch(self, package_ids: Collection[UUID], *, appends: bool) -> None:
        """Bring the state of these packages up to date. With `appends`, nobody else appends until `end_batch`.

        Raises errors of our tree, after which nothing was tried and the lease goes on.
        """
        return

    def end_batch(self) -> None:
        """Let others append again; what was not committed is undone. Never raises."""
        return

    def hand_over(self, staged: Sequence[Staged]) -> list[bytes]:
        """Begin a transaction with these events; the values of their records."""

    def commit(self, values: Sequence[bytes]) -> None:
        """End the transaction; returns when its records, which have these values, are in the log for good."""

    @property
    def proof_due(self) -> float:
        """When `prove` may be called next, by the monotonic clock (s)."""
        return 0.0

    def prove(self) -> None:
        """Return if nobody else had appended anything when this was called."""
        return

    def idle(self) -> None:
        """Do what connections need. Raises UnavailableError when another process has appended something."""
        return

    def record(self, confirmation: Confirmation, now: int, require_readers: Callable[[], None]) -> AdministrativeHead:
        """Record what an operator confirmed. `now` in µs since 1970; `require_readers` is called before anything else
        is appended."""
        raise InvalidRequestError("this log records nothing that operators confirm")

    def save_if_due(self) -> None:
        """Save the state, if it is time for that. Raises StateFileError."""
        return

    def tidy(self) -> float:
        """As `save_if_due`, between two batches; and after how many seconds there is more to do."""
        return math.inf

    def close(self) -> None:
        """Give the right up, and save what is certain of the state."""


class Driver(Protocol):
    """A log that is written to under leases; shared by the sequencers of a process."""

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
        """Take the partition over, and read all of it. Raises errors of our tree."""

    def holds(self, partition: int) -> bool | None:
        """Whether the partition is assigned to this process; None when that is not known now."""
        return True

    def require(self, partition: int, last_created_at: int) -> None:
        """Return if events may be appended after one of this time (µs). Does not block. Raises HeldError."""
        return

    def require_readers(self) -> None:
        """Return if every process of the installation can read administrative records; else raise, and say which."""
        return

    def refusal(self, error: BaseException) -> ArtifactStoreError | None:
        """What an exception of the log's client means, if somebody has to mend something; None for all others."""
        return None

    def spoiled_by_record(self, error: BaseException) -> bool:
        """Whether a transaction failed for what is in its records, so that trying them again cannot help."""
        return False
