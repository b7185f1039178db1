"""Valid URLs of a gateway, and the errors for connections and answers that do not come in time."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest
from aiohttp import web

from artifact_store import RetryPolicy
from artifact_store.client.transport import Transport
from artifact_store.errors import ConfigurationError, InvalidRequestError, UnavailableError
from tests.unit.artifact_store.client.failing_gateway import FailingGateway, client_of, failing_gateway


@pytest.mark.parametrize(
    "url",
    [
        "localhost:80",
        "ftp://host",
        "http://user:pw@host",
        "http://host?x=1",
        "http://",
        "http://a..b:1",
        "http://.",
        f"http://{'a' * 64}.b",
        "http://\udcff",
        "http://exa mple",
    ],
)
async def test_a_url_of_another_form_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await client_of(FailingGateway([], url=url)).__aenter__()
    assert "pw" not in str(caught.value)


async def test_a_connection_that_does_not_come_about_in_time_is_told_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as stack:
        for _ in range(4):  # more than the queue takes: the kernel answers none of those that follow
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        async with Transport(url, RetryPolicy(connect_seconds=0.2)) as transport:
            with pytest.raises(UnavailableError, match=r"cannot reach .* within 0\.2 s") as caught:
                await transport.attempt("POST", "/v1/packages")
    assert "unknown" not in caught.value.detail


async def test_the_time_that_was_waited_for_an_answer_is_the_one_that_is_told() -> None:
    async def keeps_still(_request: web.Request, _body: bytes) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    policy = RetryPolicy(idle_seconds=0.1)
    async with failing_gateway(keeps_still) as gateway, Transport(gateway.url, policy) as transport:
        with pytest.raises(UnavailableError, match=r"within 0\.3 s"):
            await transport.attempt("GET", "/", answer_seconds=0.3)


async def test_metadata_that_no_gateway_takes_is_refused_before_it_is_sent() -> None:
    metadata: dict[str, object] = {}
    for _ in range(2_000):
        metadata = {"a": metadata}
    gateway = FailingGateway([], url="http://127.0.0.1:9")
    async with client_of(gateway) as registry:
        with pytest.raises(InvalidRequestError, match="64 levels deep"):
            await registry.create_package("n", "p", "s", "scratch", metadata=metadata)
