"""A package that is filled by one `PUT` after the other: the last ones cost what the first ones did."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from statistics import median
from uuid import UUID

import pytest

from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway

FILES = 100_000
AT_ONCE = 16
RATIO = 1.2


@pytest.mark.endurance
async def test_the_last_tenth_of_a_hundred_thousand_puts_takes_no_longer_than_the_first(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_gateway(settings) as gateway:
        done = await gateway.parts.registry.create("n", "p", "s", "scratch", "ada", {})
        seconds: list[float] = []
        numbers = iter(range(FILES))
        await asyncio.gather(*(put_all(gateway, done.package_id, numbers, seconds) for _ in range(AT_ONCE)))
        async with gateway.session.post(f"/v1/packages/{done.package_id}/finalize") as answer:
            assert answer.status == 200
    tenth = FILES // 10
    first, last = median(seconds[:tenth]), median(seconds[-tenth:])
    with capsys.disabled():
        print(f"\nfirst tenth {first * 1_000:.2f} ms, last tenth {last * 1_000:.2f} ms")  # noqa: T201 - a figure to keep
    assert len(seconds) == FILES
    assert last <= RATIO * first


async def put_all(gateway: RunningGateway, package_id: UUID, numbers: Iterator[int], seconds: list[float]) -> None:
    """Put one file after the other; how long each took is noted as it ends."""
    for number in numbers:
        began = time.perf_counter()
        address = f"/v1/packages/{package_id}/files/{number // 1_000}/{number}.txt"
        async with gateway.session.put(address, data=b"%d" % number) as answer:
            assert answer.status == 201, await answer.text()
        seconds.append(time.perf_counter() - began)
