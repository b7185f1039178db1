"""Evidence that a partition lost acknowledged records.

A state holds only what was read back from the log, and remembers the last record that it read: its offset and the
digest of its value. A log that does not hold that record has lost it, and perhaps other acknowledged records too.
Writing to the partition stops, and the evidence is kept, until an operator accepts the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from services.log.records import AcceptedLoss
from services.log.state.state_file import Anchor

FILE = "file"
SNAPSHOT = "snapshot"
MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Witness:
    """A state that remembers a record of the log."""

    kind: str
    """FILE, SNAPSHOT or MEMORY."""
    log: UUID
    """The log that the state was folded from."""
    anchor: Anchor
    where: str
    """The file's path, the object's key or, for MEMORY, its owner."""

    @property
    def evidence(self) -> str:
        """Its name in `v1.log.loss_accepted`: FILE, which stands for every state of a writer, or SNAPSHOT."""
        return FILE if self.kind == MEMORY else self.kind


@dataclass(frozen=True, slots=True)
class Loss:
    """An acknowledged record that the partition does not hold."""

    partition: int
    witness: Witness
    found: str
    """What the log has instead, as the end of a sentence that begins with `the log`."""
    found_digest: bytes | None = None
    """The digest of the record that lies at the offset now, if there is one."""

    @property
    def key(self) -> tuple[UUID, Anchor]:
        """Equal for all witnesses of the same moment."""
        return self.witness.log, self.witness.anchor

    @property
    def offset(self) -> int:
        """Where the record lay."""
        return self.witness.anchor.next_offset - 1

    @property
    def digest(self) -> bytes:
        """BLAKE3 over the record's value."""
        return self.witness.anchor.digest

    def accepted_by(self, accepted: AcceptedLoss, log: UUID) -> bool:
        """Whether an operator's acceptance, which was recorded in `log`, covers this loss as well.

        If another log lost records, it covers all states of that log. If `log` itself did, it covers states up to its
        offset from before the acceptance, which has a later time than any record known to be lost then.
        """
        anchor = self.witness.anchor
        if accepted.log != self.witness.log:
            return False
        return accepted.log != log or (self.offset <= accepted.offset and anchor.last_created_at < accepted.created_at)

    @property
    def detail(self) -> str:
        """A text with both records, and what an operator can do."""
        witness = self.witness
        return (
            f"partition {self.partition} lost what it had acknowledged: the {witness.kind} {witness.where} stands on "
            f"the record at offset {self.offset} with digest {self.digest.hex()} of log {witness.log}, but the log "
            f"{self.found}. Restore the topic from a mirror or a backup; or accept the loss by `artifact-store log "
            f"accept-loss {self.partition} {self.offset} --digest {self.digest.hex()}`"
        )
