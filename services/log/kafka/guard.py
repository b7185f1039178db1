"""The guard that holds while a process writes: a topic that could lose events, or a wrong clock, stops its writers.

One process looks at the topic's settings every few seconds for all of its writers, which ask the guard before each
batch. That nobody answers is no reason to stop: the settings are then what they were.

Times never decrease within a partition. One event by a clock that is a day ahead would give its time to all that follow
in the next day, and would end the time for which retries of everything before it are answered. So this machine's clock
is compared with the blob store's and with the partition's last event, here, and with the brokers', by the topic's own
setting.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from services.clock import FAR_SECONDS, Clock, StoreClock, span
from services.errors import ConfigurationError, UnavailableError
from services.log.kafka import topic
from services.log.kafka.cluster import Cluster
from services.log.kafka.failures import HeldError
from services.log.kafka.settings import KafkaSettings

_MICROS = 1_000_000

_LOG = logging.getLogger(__name__)


class Guard:
    """Belongs to one process. `look` is for one thread at a time, all else for any."""

    def __init__(self, kafka: KafkaSettings, cluster: Cluster, clock: Clock, store: StoreClock | None = None) -> None:
        """`clock` is this machine's, `store` that of the blob store, if it has one."""
        self._kafka = kafka
        self._cluster = cluster
        self._clock = clock
        self._store = store
        self._trouble: str | None = None
        self._ahead_seconds = FAR_SECONDS
        """How far the last event of a partition may be ahead of our clock."""
        self._needless: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why this process may write to no partition, and what mends it; None when nothing is wrong."""
        return self._trouble or (None if self._store is None else self._store.trouble())

    @property
    def skew_seconds(self) -> float | None:
        """How far this machine's clock is ahead of the blob store's (negative: behind); None when that is not known."""
        ahead = None if self._store is None else self._store.ahead()
        return None if ahead is None else ahead / _MICROS

    def look(self) -> None:
        """Look at the topic again; keeps what was known when the cluster does not say. Blocks. Never raises."""
        try:
            settings = self._cluster.topic_settings()
            troubles = topic.hazards(self._kafka, self._cluster, settings)
            needless = topic.needless(self._kafka, self._cluster, settings)
        except (UnavailableError, ConfigurationError) as error:
            _LOG.debug("the topic's settings could not be looked at: %s", error.detail)
            return
        except Exception:  # noqa: BLE001 - the process goes on writing, and the cause is logged whole
            _LOG.exception("the topic's settings could not be looked at")
            return
        self._trouble = topic.unfit(self._kafka, troubles) if troubles else None
        allowed = topic.times_ahead_ms(settings)
        # An operator lets Kafka take a time that is far ahead, and so do we.
        self._ahead_seconds = FAR_SECONDS if allowed <= topic.TIMES_AHEAD_MS else allowed / 1000
        if needless is not None and needless != self._needless:
            _LOG.warning("topic %s: %s; until then no gateway can start", self._kafka.topic, needless)
        self._needless = needless

    def require(self, partition: int, last_created_at: int) -> None:
        """Return if events may be appended now, after one of this time (µs). Does not block. Raises HeldError."""
        if (trouble := self.trouble) is not None:
            raise HeldError(trouble, own_clock=self._trouble is None)
        ahead = last_created_at / _MICROS - self._clock() / _MICROS
        if ahead > self._ahead_seconds:
            raise HeldError(self._future(partition, last_created_at // _MICROS, ahead))

    def _future(self, partition: int, second: int, ahead: float) -> str:
        # A whole hour more than is needed: brokers' clocks differ, and the operator takes a while.
        needed = {topic.TIMES_AHEAD: (int(ahead // 3600) + 2) * 3_600_000}
        usual = {topic.TIMES_AHEAD: topic.TIMES_AHEAD_MS}
        until = datetime.fromtimestamp(second, UTC).isoformat()
        return (
            f"the last event of partition {partition} has the time {until}, {span(ahead)} ahead of this machine's "
            "clock, and times never step back within a partition. If this clock is wrong, set it. If the event's time "
            f"is wrong, `{topic.command(self._kafka, needed)}` lets the partition be written to, with that time on all "
            f"events until it is reached; then `{topic.command(self._kafka, usual)}` ends the exception"
        )
