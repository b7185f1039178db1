"""The guard that holds while a process writes: nothing is appended to a topic that could lose it.

One process looks at the topic's settings every few seconds for all of its writers, which ask the guard before each
batch. That nobody answers is no reason to stop: the settings are then what they were.
"""

from __future__ import annotations

import logging

from services.errors import ConfigurationError, PushBackError, UnavailableError
from services.log.kafka import topic
from services.log.kafka.cluster import Cluster
from services.log.kafka.settings import KafkaSettings

RETRY_SECONDS = 10.0
"""When callers are told to come again; somebody has to mend the topic first."""

_LOG = logging.getLogger(__name__)


class HeldError(PushBackError):
    """The guard keeps the partition from being written to. Nothing was recorded; the text says what mends it."""


class Guard:
    """Belongs to one process. `look` is for one thread at a time, all else for any."""

    def __init__(self, kafka: KafkaSettings, cluster: Cluster) -> None:
        self._kafka = kafka
        self._cluster = cluster
        self._trouble: str | None = None

    @property
    def trouble(self) -> str | None:
        """Why nothing may be written, and what mends it; None when nothing is wrong."""
        return self._trouble

    def look(self) -> None:
        """Look at the topic again; keeps what was known when the cluster does not say. Blocks. Never raises."""
        try:
            troubles = topic.hazards(self._kafka, self._cluster)
        except (UnavailableError, ConfigurationError) as error:
            _LOG.debug("the topic's settings could not be looked at: %s", error.detail)
            return
        except Exception:  # noqa: BLE001 - the process goes on writing, and the cause is logged whole
            _LOG.exception("the topic's settings could not be looked at")
            return
        self._trouble = topic.unfit(self._kafka, troubles) if troubles else None

    def require(self) -> None:
        """Return if events may be appended now. Does not block. Raises HeldError."""
        if (trouble := self._trouble) is not None:
            raise HeldError(trouble, RETRY_SECONDS)
