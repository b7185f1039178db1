"""Quotas: what one principal may add in an hour, without harm to others or the process."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest

from artifact_store.errors import UnavailableError
from ingest_gateway.admission import _MOST_KNOWN, OpenUploads, Quota, QuotaExceededError, Quotas
from services.blobs.port import IDLE_SECONDS


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


class Store:
    """Tells which uploads are open."""

    def __init__(self) -> None:
        self.ended: set[UUID] = set()
        self.asked: list[UUID] = []
        self.away = False

    async def is_open(self, upload_id: UUID) -> bool:
        self.asked.append(upload_id)
        if self.away:
            raise UnavailableError("the store is away")
        return upload_id not in self.ended


async def test_a_principal_holds_so_many_uploads_open_and_no_more() -> None:
    clock, store, refused = Clock(), Store(), list[tuple[str, int]]()
    uploads = OpenUploads(2, lambda what, times: refused.append((what, times)), clock)
    first, second, third = uuid4(), uuid4(), uuid4()
    for upload in (first, second, first):  # a repeat is no further one
        await uploads.take("ci:a", upload, store.is_open)
    with pytest.raises(QuotaExceededError, match="ci:a holds 2 resumable uploads open") as told:
        await uploads.take("ci:a", third, store.is_open)
    assert told.value.retry_after
    assert refused == [("quota of open uploads", 1)]
    assert store.asked == [first, second]
    await uploads.take("ci:b", third, store.is_open)
    uploads.end("ci:a", first)
    await uploads.take("ci:a", third, store.is_open)


async def test_an_upload_that_ended_elsewhere_or_was_swept_makes_room() -> None:
    clock, store = Clock(), Store()
    uploads = OpenUploads(2, clock=clock)
    held = [uuid4(), uuid4()]
    for upload in held:
        await uploads.take("ci:a", upload, store.is_open)
    store.away = True
    with pytest.raises(QuotaExceededError):
        await uploads.take("ci:a", uuid4(), store.is_open)
    store.away, store.ended = False, {held[1]}
    await uploads.take("ci:a", uuid4(), store.is_open)
    with pytest.raises(QuotaExceededError):
        await uploads.take("ci:a", uuid4(), store.is_open)
    clock.now += IDLE_SECONDS
    uploads.touch("ci:a", held[0])  # which got bytes now
    await uploads.take("ci:a", uuid4(), store.is_open)


async def test_who_holds_no_upload_is_forgotten_and_without_a_limit_nobody_is_known() -> None:
    store = Store()
    for limit in (1, None):
        uploads = OpenUploads(limit)
        for number in range(3):
            upload = uuid4()
            await uploads.take(f"ci:{number}", upload, store.is_open)
            uploads.touch(f"ci:{number}", upload)
            assert len(uploads._held) == (limit or 0)
            uploads.end(f"ci:{number}", upload)
        assert uploads._held == {}
