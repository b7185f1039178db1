"""A package that is filled by one `PUT` after the other: the last ones cost the same as the first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import chain
from statistics import median
from uuid import UUID

import pytest

from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.processes import output_of

FILES = 100_000
TENTH = FILES // 10
AT_ONCE = 16
RATIO = 1.2


@pytest.mark.endurance
async def test_the_last_tenth_of_a_hundred_thousand_puts_takes_no_longer_than_the_first(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last tenth of one package goes beside the first tenth of another: so the machine is as busy with both."""
    await asyncio.to_thread(output_of, settings, "migrate")
    seconds: dict[UUID, list[float]] = {}
    async with running_gateway(settings) as gateway:
        for _ in range(2):
            done = await gateway.parts.registry.create("n", "p", "s", "scratch", "ada", {})
            seconds[done.package_id] = []
        large, small = seconds
        first = ((large, number) for number in range(FILES - TENTH))
        both = ((package_id, FILES - TENTH + number) for number in range(TENTH) for package_id in (large, small))
        files = chain(first, both)
        await asyncio.gather(*(put_all(gateway, files, seconds) for _ in range(AT_ONCE)))
        async with gateway.session.post(f"/v1/packages/{large}/finalize") as answer:
            assert answer.status == 200
    assert [len(found) for found in seconds.values()] == [FILES, TENTH]
    last, beside = median(seconds[large][-TENTH:]), median(seconds[small])
    with capsys.disabled():
        print(f"\nlast tenth {last * 1_000:.2f} ms, first tenth {beside * 1_000:.2f} ms")  # noqa: T201 - to be kept
    assert last <= RATIO * beside


async def put_all(gateway: RunningGateway, files: Iterator[tuple[UUID, int]], seconds: dict[UUID, list[float]]) -> None:
    """Put one file after the other; how long each took is noted as it ends."""
    for package_id, number in files:
        began = time.perf_counter()
        address = f"/v1/packages/{package_id}/files/{number // 1_000}/{number}.txt"
        async with gateway.session.put(address, data=b"%d" % number) as answer:
            assert answer.status == 201, await answer.text()
        seconds[package_id].append(time.perf_counter() - began)
