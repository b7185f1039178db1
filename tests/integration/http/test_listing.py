"""Listing packages over HTTP and by the client: filtered by any fields, page by page while others are created."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from yarl import URL

from artifact_store import Client
from artifact_store.models import PackageFilter
from services.config import Settings
from tests.integration.http_gateway import RunningGateway, running_gateway


async def create(gateway: RunningGateway, producer: str, subject: str, retention_class: str) -> str:
    wanted = {"name": "n", "producer": producer, "subject": subject, "retention_class": retention_class}
    async with gateway.session.post("/v1/packages", json=wanted) as answer:
        assert answer.status == 201
        return str((await answer.json())["package_id"])


async def get(gateway: RunningGateway, path: str) -> Any:
    async with gateway.session.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    """A gateway that has packages of two producers, three subjects and two classes; every other one is finalized."""
    async with running_gateway(embedded_settings) as running:
        for number in range(12):
            kind = ("scratch", "report")[number // 6]
            package_id = await create(running, "pq"[number % 2], f"run/ä {number % 3}", kind)
            if number % 4 < 2:
                async with running.session.post(f"/v1/packages/{package_id}/finalize") as answer:
                    assert answer.status == 200
        yield running


@pytest.mark.parametrize(
    "wanted",
    [
        {"producer": "p"},
        {"subject": "run/ä 2"},
        {"status": "finalized"},
        {"status": "created"},
        {"retention_class": "report"},
        {"producer": "q", "status": "created", "retention_class": "scratch"},
        {"producer": "p", "subject": "run/ä 0", "status": "finalized", "retention_class": "scratch"},
        {"producer": "nobody"},
    ],
)
async def test_filters_choose_what_has_all_their_values(gateway: RunningGateway, wanted: dict[str, Any]) -> None:
    everything = (await get(gateway, "/v1/packages"))["items"]
    assert len(everything) == 12
    async with gateway.session.get("/v1/packages", params=wanted) as answer:
        found = (await answer.json())["items"]
    assert found == [item for item in everything if all(item[name] == value for name, value in wanted.items())]
    assert found or wanted == {"producer": "nobody"}
    async with Client(gateway.url) as client:
        page = await client.list_packages(PackageFilter(**wanted))
    assert [str(package.package_id) for package in page.items] == [item["package_id"] for item in found]


async def test_pages_of_a_filter_neither_repeat_nor_miss_while_others_are_created(gateway: RunningGateway) -> None:
    before = [item["package_id"] for item in (await get(gateway, "/v1/packages?producer=p"))["items"]]
    seen: list[str] = []
    path: str | None = "/v1/packages?producer=p&limit=2"
    while path is not None:
        async with gateway.session.get(path) as answer:
            page, links = await answer.json(), answer.links
        seen += [item["package_id"] for item in page["items"]]
        await create(gateway, "p", "newcomer", "report")
        path = str(URL(links["next"]["url"]).relative()) if "next" in links else None
    assert seen == before
