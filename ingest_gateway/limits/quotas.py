"""Quotas: how much one principal may add to the registry in an hour, through one gateway process.

They are counted here, in memory: neither PostgreSQL nor another gateway is asked, so writes go on without either, and a
process that starts again counts from zero. With N processes a principal gets up to N times as much.

What is not used comes back over the hour. A body that has begun is never cut off for it: what it takes beyond is owed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from artifact_store.errors import PushBackError
from ingest_gateway.limits.admission import Refused

_HOUR_SECONDS = 3600.0
_MOST_KNOWN = 10_000
"""Principals whose use is remembered, beside those who owe: the rest has used nothing for an hour."""


class Quota(StrEnum):
    """What is counted."""

    PACKAGES = "packages"
    BYTES = "bytes"
    """Of request bodies."""
    METADATA_BYTES = "metadata bytes"
    RESUMABLE_UPLOADS = "resumable uploads"
    """That are begun: each may lie open for a day."""


class QuotaExceededError(PushBackError):
    """The principal used what it may use in an hour."""

    status = 429
    problem = "quota-exceeded"


@dataclass(slots=True)
class _Use:
    """How much of an hour's quota is used, at a time of the clock; it decays at the pace of the quota."""

    amount: float = 0.0
    at: float = 0.0


@dataclass(slots=True)
class Quotas:
    """The quotas of one gateway process, by kind, for an hour; a kind may have none. Belongs to one event loop."""

    limits: dict[Quota, int] = field(default_factory=dict)
    refused: Refused = lambda _, __: None
    clock: Callable[[], float] = time.monotonic
    _used: dict[tuple[Quota, str], _Use] = field(default_factory=dict)

    def require(self, quota: Quota, principal: str) -> None:
        """Raise QuotaExceededError while the principal has used all that it may."""
        limit = self.limits.get(quota)
        if limit is None:
            return
        used = self._now(quota, principal, limit)
        if used + 1 > limit:
            self.refused(f"quota of {quota}", 1)
            seconds = (used + 1 - limit) * _HOUR_SECONDS / limit
            raise QuotaExceededError(
                f"{principal} has used its quota of {limit:,} {quota} an hour at this gateway", math.ceil(seconds)
            )

    def count(self, quota: Quota, principal: str, amount: int) -> None:
        """Count what is used, also beyond the quota."""
        limit = self.limits.get(quota)
        if limit is None:
            return
        used = self._now(quota, principal, limit)
        if len(self._used) >= _MOST_KNOWN and (quota, principal) not in self._used:
            self._forget_unused()
        self._used[quota, principal] = _Use(used + amount, self.clock())

    def _now(self, quota: Quota, principal: str, limit: int) -> float:
        use = self._used.get((quota, principal))
        if use is None:
            return 0.0
        return max(0.0, use.amount - (self.clock() - use.at) * limit / _HOUR_SECONDS)

    def _forget_unused(self) -> None:
        for quota, principal in list(self._used):
            if not self._now(quota, principal, self.limits[quota]):
                del self._used[quota, principal]
