"""What a log must do for its sequencer: give a lease of a partition, and append batches under it.

A driver decides nothing about commands. Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol
from uuid import UUID

from artifact_store.errors import ArtifactStoreError
from services.core.decide import Decision
from services.log.records import AdministrativeHead, BadRecord, Confirmation
from services.log.state.loss import Loss
from services.log.state.partition_state import PartitionState


class Staged(NamedTuple):
    """Commands that were decided and folded into the state, and that wait to be appended."""

    decision: Decision
    traceparents: Sequence[str | None]
    """One for each command."""


class Lease(Protocol):
    """The right to append to a partition. Used by one thread.

    Any exception from `hand_over` or `commit` leaves the outcome unknown: close the lease, take over again, and look at
    the new state.
    """

    restored_from: str
    """What the state was made of: a file, a snapshot, or the whole log."""
    losses: Sequence[Loss]
    """Acknowledged records that the log lost: nothing may be appended."""

    @property
    def state(self) -> PartitionState:
        """What the log says of the partition's packages."""

    @property
    def stopped(self) -> BadRecord | None:
        """The record, no event, that the state ends before; None when the state has all of the log."""

    def hand_over(self, staged: Sequence[Staged]) -> list[bytes]:
        """Begin a transaction with these events; the values of their records."""

    def commit(self, values: Sequence[bytes]) -> None:
        """End the transaction; returns when its records, which have these values, were read back."""

    @property
    def proof_due(self) -> float:
        """When `prove` may be called next, by the monotonic clock (s)."""

    def prove(self) -> None:
        """Return if nobody else had appended anything when this was called."""

    def idle(self) -> None:
        """Do what connections need. Raises UnavailableError when another process has appended something."""

    def record(self, confirmation: Confirmation, now: int, require_readers: Callable[[], None]) -> AdministrativeHead:
        """Record what an operator confirmed. `now` in µs since 1970; `require_readers` is called before anything else
        is appended."""

    def save_if_due(self) -> None:
        """Save the state, if it is time for that. Raises StateFileError."""

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

    def require(self, partition: int, last_created_at: int) -> None:
        """Return if events may be appended after one of this time (µs). Does not block. Raises HeldError."""

    def require_readers(self) -> None:
        """Return if every process of the installation can read administrative records; else raise, and say which."""

    def refusal(self, error: BaseException) -> ArtifactStoreError | None:
        """What an exception of the log's client means, if somebody has to mend something; None for all others."""

    def spoiled_by_record(self, error: BaseException) -> bool:
        """Whether a transaction failed for what is in its records, so that trying them again cannot help."""
