"""What the writers of a process share, and what they have counted together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event as Flag
from typing import TYPE_CHECKING
from uuid import UUID

from services.clock import Clock
from services.core.limits import Limits
from services.log.kafka.cluster import Cluster
from services.log.kafka.guard import Guard
from services.log.kafka.restore import States
from services.log.kafka.settings import KafkaSettings
from services.log.kafka.turns import Turns
from services.log.port import PutManifest

if TYPE_CHECKING:
    from services.log.kafka.writer import PartitionWriter


@dataclass(slots=True)
class Counts:
    """What the writers of a process have counted; each number only grows, whichever thread looks."""

    takeovers: Counter[str] = field(default_factory=Counter)
    """By what the state was restored from."""
    takeover_seconds: float = 0.0
    """Of all of them together."""
    failed_tenures: int = 0
    """How often a partition was taken over again because something went wrong."""
    pushed_back: int = 0
    """Requests that were told to come again later."""


@dataclass(frozen=True, slots=True)
class WriterContext:
    """What the writers of a process share."""

    kafka: KafkaSettings
    cluster: Cluster
    identity: UUID
    limits: Limits
    put_manifest: PutManifest
    clock: Clock
    loop: asyncio.AbstractEventLoop
    submit_seconds: float
    """How long a request may wait for its answer."""
    states: States
    holds: Callable[[int], bool | None]
    """Asks the group whether the partition is this process's; None when it cannot say now. Blocks."""
    require_readers: Callable[[], None]
    """Raises unless every member of the installation can read administrative records. Blocks."""
    disowned: Callable[[PartitionWriter], None]
    """Told, in this writer's thread, that the group has given its partition to another."""
    give_way: Callable[[str], None]
    """Told, in the writer's thread, that the partition cannot be written to from here, and why. Blocks."""
    doubt: Flag
    """Set while it is not known that the topic is still the log's."""
    guard: Guard
    counts: Counts
    turns: Turns
