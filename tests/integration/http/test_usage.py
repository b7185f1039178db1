"""Usage over HTTP: the totals page by page, filtered by producer and class, and the same through the client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from artifact_store import Client
from artifact_store.documents.times import day_to_text
from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    """A gateway that has taken packages of three producers, each with a file of as many bytes as its number."""
    async with running_gateway(embedded_settings) as running:
        for number, producer in enumerate("abc", start=1):
            wanted = {"name": "n", "producer": producer, "subject": "s", "retention_class": "scratch"}
            async with running.session.post("/v1/packages", json=wanted) as answer:
                package_id = (await answer.json())["package_id"]
            async with running.session.put(f"/v1/packages/{package_id}/files/f", data=bytes(number)) as answer:
                assert answer.status == 201
        yield running


async def get(gateway: RunningGateway, path: str) -> Any:
    async with gateway.session.get(path) as answer:
        return await answer.json()


async def test_totals_come_page_by_page(gateway: RunningGateway) -> None:
    first = await get(gateway, "/v1/usage?limit=2")
    second = await get(gateway, f"/v1/usage?limit=2&cursor={first['next']}")
    totals = first["items"] + second["items"]
    assert [(t["producer"], t["packages"], t["files"], t["bytes"]) for t in totals] == [
        ("a", 1, 1, 1),
        ("b", 1, 1, 2),
        ("c", 1, 1, 3),
    ]
    assert second["next"] is None


async def test_totals_are_chosen_by_producer_and_class(gateway: RunningGateway) -> None:
    assert [t["bytes"] for t in (await get(gateway, "/v1/usage?producer=b&retention_class=scratch"))["items"]] == [2]
    assert (await get(gateway, "/v1/usage?retention_class=report"))["items"] == []


@pytest.mark.parametrize("query", ["cursor=x", "limit=0", "day=1", "producer="])
async def test_a_bad_question_is_refused(gateway: RunningGateway, query: str) -> None:
    async with gateway.session.get(f"/v1/usage?{query}") as answer:
        assert answer.status == 400


async def test_the_client_reads_the_same(gateway: RunningGateway) -> None:
    async with Client(gateway.url) as client:
        page = await client.list_usage("c")
    (shown,) = (await get(gateway, "/v1/usage?producer=c"))["items"]
    (total,) = page.items
    assert (total.packages, total.files, total.bytes) == (1, 1, 3)
    assert shown["day"] == day_to_text(total.day)
