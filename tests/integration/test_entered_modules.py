"""The number of modules that a request, and an event on its way into a view, pass through.

Each module on the way is a name, a file and a hand-over that a reader has to follow.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from ingest_gateway import server
from services.config import Settings
from services.registry import direct
from services.views.database import Views
from services.views.projections import PROJECTIONS
from services.wiring import open_log
from tests.integration.conditions import until
from tests.integration.entered_modules import EnteredModules
from tests.integration.processes import ProductProcess, output_of
from tests.integration.projector_stage import covers, projecting

_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}

MOST_FOR_A_PUT = 39
MOST_OF_THE_GATEWAY_FOR_A_PUT = 6
MOST_FOR_AN_EVENT = 16

pytestmark = pytest.mark.services


async def _create(session: aiohttp.ClientSession) -> str:
    async with session.post("/v1/packages", json=_PACKAGE) as answer:
        assert answer.status == 201, await answer.text()
        return str((await answer.json())["package_id"])


async def _put(session: aiohttp.ClientSession, package_id: str, name: str) -> None:
    async with session.put(f"/v1/packages/{package_id}/files/{name}", data=b"t,v\n0,1\n") as answer:
        assert answer.status == 201, await answer.text()


async def _is_ready(session: aiohttp.ClientSession) -> bool:
    async with session.get("/readyz") as answer:
        return answer.status == 200


async def test_a_put_enters_few_modules_from_socket_to_answer(
    real_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first PUT asks for the log's end, as one does each second. On a busy machine the second one would ask again.
    monkeypatch.setattr(direct, "FRESH_SECONDS", 3600.0)
    await asyncio.to_thread(output_of, real_settings, "migrate")
    entered = EnteredModules()
    stop, url = asyncio.Event(), asyncio.get_running_loop().create_future()
    with entered.installed():
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run(real_settings, stop=stop, ready=url.set_result))
            async with aiohttp.ClientSession(await url) as session:
                # Whoever takes a partition over enters modules that no request does.
                await until(lambda: _is_ready(session), 60, "the gateway does not own all partitions")
                package_id = await _create(session)
                await _put(session, package_id, "first.csv")
                with entered.recorded() as found:
                    await _put(session, package_id, "second.csv")
            stop.set()
    assert "services.core.decide" in found
    assert len(found) <= MOST_FOR_A_PUT, sorted(found)
    of_the_gateway = sorted(name for name in found if name.startswith("ingest_gateway."))
    assert len(of_the_gateway) <= MOST_OF_THE_GATEWAY_FOR_A_PUT, of_the_gateway


async def test_an_event_enters_few_modules_from_record_to_commit(real_settings: Settings, tmp_path: Path) -> None:
    await asyncio.to_thread(output_of, real_settings, "migrate")
    entered, projection = EnteredModules(), PROJECTIONS["registry"]
    views, log = Views(real_settings.views_url), open_log(real_settings)
    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as gateway, entered.installed():
        async with aiohttp.ClientSession(gateway.endpoint) as session:
            package_id = await _create(session)
            async with projecting(views, log, projection):
                await covers(views, projection, await log.end())
                with entered.recorded() as found:
                    await _put(session, package_id, "a.csv")
                    await covers(views, projection, await log.end())
    await views.close()
    await log.close()
    assert "services.views.projections.registry_fold" in found
    assert len(found) <= MOST_FOR_AN_EVENT, "\n".join(sorted(found))
