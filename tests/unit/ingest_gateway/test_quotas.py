"""Quotas: what one principal may add in an hour, and that others and the process do not suffer for it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ingest_gateway.limits.admission import _MOST_KNOWN, Quota, QuotaExceededError, Quotas


@dataclass
class Clock:
    now: float = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_principal_that_used_its_quota_waits_for_what_comes_back_and_others_do_not() -> None:
    clock, refused = Clock(), list[tuple[str, int]]()
    quotas = Quotas({Quota.PACKAGES: 60}, lambda what, times: refused.append((what, times)), clock)
    for _ in range(60):
        quotas.require(Quota.PACKAGES, "ci:a")
        quotas.count(Quota.PACKAGES, "ci:a", 1)
    with pytest.raises(QuotaExceededError, match="ci:a has used its quota of 60 packages an hour") as told:
        quotas.require(Quota.PACKAGES, "ci:a")
    assert refused == [("quota of packages", 1)]
    quotas.require(Quota.PACKAGES, "ci:b")
    quotas.require(Quota.BYTES, "ci:a")
    clock.now += told.value.retry_after
    quotas.require(Quota.PACKAGES, "ci:a")


def test_what_is_taken_beyond_the_quota_is_owed() -> None:
    clock = Clock()
    quotas = Quotas({Quota.BYTES: 3_600}, clock=clock)
    quotas.require(Quota.BYTES, "ci:a")
    quotas.count(Quota.BYTES, "ci:a", 2 * 3_600)
    clock.now += 3_590
    with pytest.raises(QuotaExceededError):
        quotas.require(Quota.BYTES, "ci:a")
    clock.now += 11
    quotas.require(Quota.BYTES, "ci:a")


def test_who_uses_nothing_is_forgotten() -> None:
    clock = Clock()
    quotas = Quotas({Quota.PACKAGES: 10}, clock=clock)
    for number in range(_MOST_KNOWN):
        quotas.count(Quota.PACKAGES, f"ci:{number}", 1)
    clock.now += 3_600
    quotas.count(Quota.PACKAGES, "ci:new", 10)
    assert len(quotas._used) == 1
    with pytest.raises(QuotaExceededError):
        quotas.require(Quota.PACKAGES, "ci:new")
