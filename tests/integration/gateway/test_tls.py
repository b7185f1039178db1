"""TLS of a gateway, client certificates, and metrics with a separate listener."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from artifact_store.errors import ConfigurationError
from ingest_gateway import server
from services.config import Settings
from services.runtime.addresses import ListenAddress
from tests.certificates import Authority
from tests.services.process import free_ports


@asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[str]:
    """A gateway in this process; yields its URL."""
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    running = asyncio.create_task(server.run(settings, stop=stop, ready=ready.set_result))
    await asyncio.wait([running, ready], return_when=asyncio.FIRST_COMPLETED)
    try:
        if running.done():
            await running
        yield await ready
    finally:
        stop.set()
        await running


async def status(url: str, context: ssl.SSLContext | None = None, host: str | None = None) -> int:
    headers = {} if host is None else {"Host": host}
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context or True, headers=headers) as answer:
        return answer.status


def trusting(authority: Authority, certificate: tuple[Path, Path] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    if certificate is not None:
        context.load_cert_chain(*certificate)
    return context


async def test_a_gateway_speaks_tls_and_takes_a_new_certificate_without_a_restart(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    ours, next_one = Authority(tmp_path / "one"), Authority(tmp_path / "two")
    cert, key = ours.issue("gateway", "127.0.0.1")
    async with gateway(replace(embedded_settings, tls_cert=cert, tls_key=key)) as url:
        assert url.startswith("https://")
        assert await status(f"{url}/healthz", trusting(ours)) == 200
        with pytest.raises(aiohttp.ClientError):
            await status(f"{url}/healthz".replace("https", "http"))
        for source, target in zip(next_one.issue("gateway", "127.0.0.1"), (cert, key), strict=True):
            shutil.copy(source, target)
        assert await status(f"{url}/healthz", trusting(next_one)) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status(f"{url}/healthz", trusting(ours))
        key.write_text("half of")  # nothing is lost by files that are being written
        assert await status(f"{url}/healthz", trusting(next_one)) == 200


async def test_with_an_authority_of_clients_each_needs_a_certificate(
    embedded_settings: Settings, tmp_path: Path
) -> None:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    cert, key = ours.issue("gateway", "127.0.0.1")
    settings = replace(embedded_settings, tls_cert=cert, tls_key=key, tls_client_ca=ours.certificate)
    async with gateway(settings) as url:
        assert await status(f"{url}/healthz", trusting(ours, ours.issue("client", "c"))) == 200
        for context in (trusting(ours), trusting(ours, other.issue("client", "c"))):
            with pytest.raises((aiohttp.ClientError, ssl.SSLError, OSError)):
                await status(f"{url}/healthz", context)


async def test_metrics_have_a_listener_of_their_own(embedded_settings: Settings) -> None:
    at = ListenAddress("127.0.0.1", *free_ports(1))
    async with gateway(replace(embedded_settings, metrics_listen=at)) as url:
        found = {
            path: (await status(url + path), await status(f"http://{at}{path}"))
            for path in ("/metrics", "/healthz", "/readyz", "/v1/packages", "/openapi.json")
        }
        # A page whose name resolves to this machine names itself as the host.
        assert await status(f"http://{at}/metrics", host="page.example") == 421
    assert found == {
        "/metrics": (404, 200),
        "/healthz": (200, 200),
        "/readyz": (200, 200),
        "/v1/packages": (200, 404),
        "/openapi.json": (200, 404),
    }


async def test_settings_that_cannot_work_are_named(embedded_settings: Settings, tmp_path: Path) -> None:
    cert, _ = Authority(tmp_path).issue("gateway", "127.0.0.1")
    for wrong, named in (
        (replace(embedded_settings, tls_cert=cert), "ARTIFACT_STORE_TLS_KEY"),
        (replace(embedded_settings, tls_cert=cert, tls_key=tmp_path / "missing"), "ARTIFACT_STORE_TLS_CERT"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            async with gateway(wrong):
                pass
    with pytest.raises(ConfigurationError, match="METRICS_LISTEN: it must be HOST:PORT"):
        Settings(metrics_listen="9464")
