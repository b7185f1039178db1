"""Gateways among each other: who is admitted, and what a rogue member of the writers' group gets."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from artifact_store.errors import ConfigurationError, UnavailableError
from artifact_store.models import Acknowledgement
from ingest_gateway.peers.authentication import PEER_NAME, PeerCredentials
from ingest_gateway.peers.forwarding import COMMANDS_PATH, CONTENT_TYPE, HttpForwarder
from ingest_gateway.peers.internal_listener import InternalListener
from services.config import Settings
from services.core.wire import encode_acknowledgement, encode_command
from services.runtime import tls
from tests.certificates import Authority
from tests.commands import create
from tests.integration.kafka.test_internal import Answering

SECRET = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


@dataclass(frozen=True)
class Authorities:
    ours: Authority
    other: Authority
    ca: Path


@pytest.fixture
def authorities(tmp_path: Path) -> Authorities:
    ours, other = Authority(tmp_path / "ours"), Authority(tmp_path / "other")
    return Authorities(ours, other, ours.certificate)


def certified(authorities: Authorities, **more: object) -> Settings:
    """The settings of a gateway with a certificate."""
    cert, key = authorities.ours.issue("gateway", PEER_NAME)
    return Settings(peer_cert=cert, peer_key=key, peer_ca=authorities.ca, **more)


@asynccontextmanager
async def owner(settings: Settings) -> AsyncIterator[tuple[str, Answering]]:
    """The URL of a gateway that owns every partition, and its writer."""
    listener, writer = await InternalListener.open(settings, PeerCredentials.of(settings)), Answering()
    listener.serve(writer)
    try:
        yield listener.url, writer
    finally:
        await listener.close()


@dataclass
class Rogue:
    """A member of the group that is no gateway: it takes down what it is told, and answers in the owner's name."""

    url: str
    heard: list[str]


@asynccontextmanager
async def rogue(context: ssl.SSLContext | None) -> AsyncIterator[Rogue]:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        found.heard.append(str(dict(request.headers)))
        forged = encode_acknowledgement(Acknowledgement(create().package_id, 1, bytes(32)), 1)
        return web.Response(body=forged, content_type=CONTENT_TYPE)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    found = Rogue(f"{'http' if context is None else 'https'}://127.0.0.1:{port}/v2", [])
    try:
        yield found
    finally:
        await runner.cleanup()


async def status_of(url: str, headers: dict[str, str]) -> int:
    """What a command with these headers is answered."""
    body = BytesIO(encode_command(create()))
    async with (
        aiohttp.ClientSession(headers={"Content-Type": CONTENT_TYPE, **headers}) as session,
        session.post(url + COMMANDS_PATH, data=body) as answer,
    ):
        return answer.status


async def test_gateways_with_certificates_need_no_secret(authorities: Authorities) -> None:
    settings = certified(authorities)
    async with owner(settings) as (url, writer), HttpForwarder(PeerCredentials.of(settings)) as forwarder:
        assert url.startswith("https://")
        command = create()
        assert (await forwarder.submit(url, command)).sequence == 7
        assert writer.seen == [command]


async def test_a_rogue_member_is_told_no_secret_and_cannot_answer(authorities: Authorities) -> None:
    settings = certified(authorities)
    cert, key = authorities.other.issue("rogue", PEER_NAME, "127.0.0.1")
    contexts = [None, tls.serving(cert, key, setting="x")]
    named = authorities.ours.issue("elsewhere", "127.0.0.1")  # of our authority, for something that is no gateway
    contexts.append(tls.serving(*named, setting="x"))
    for context in contexts:
        async with rogue(context) as stranger, HttpForwarder(PeerCredentials.of(settings)) as forwarder:
            with pytest.raises(UnavailableError):
                await forwarder.submit(stranger.url, create())
            assert stranger.heard == []


async def test_a_rogue_member_gets_no_command_accepted(authorities: Authorities) -> None:
    async with owner(certified(authorities)) as (url, writer):
        for authority, name in ((authorities.other, PEER_NAME), (authorities.ours, "127.0.0.1"), (None, "")):
            context = ssl.create_default_context(cafile=str(authorities.ca))
            if authority is not None:
                context.load_cert_chain(*authority.issue("client", name))
            async with aiohttp.ClientSession() as session:
                try:
                    async with session.post(
                        url + COMMANDS_PATH,
                        data=BytesIO(encode_command(create())),
                        headers={"Content-Type": CONTENT_TYPE, "Authorization": f"Bearer {SECRET}"},
                        ssl=context,
                        server_hostname=PEER_NAME,
                    ) as answer:
                        assert answer.status == 403
                except (aiohttp.ClientError, OSError):
                    pass  # the handshake was refused
        assert writer.seen == []


async def test_a_gateway_without_a_certificate_is_admitted_by_the_secret_until_that_goes(
    authorities: Authorities,
) -> None:
    secret_alone = Settings(internal_secret=SECRET, peer_ca=authorities.ca)
    both = certified(authorities, internal_secret=SECRET)
    async with owner(both) as (url, writer), HttpForwarder(PeerCredentials.of(secret_alone)) as forwarder:
        await forwarder.submit(url, create())
        assert len(writer.seen) == 1
    async with owner(secret_alone) as (url, writer), HttpForwarder(PeerCredentials.of(both)) as forwarder:
        await forwarder.submit(url, create())
        assert len(writer.seen) == 1
    async with owner(certified(authorities)) as (url, writer):
        async with HttpForwarder(PeerCredentials.of(secret_alone)) as forwarder:
            with pytest.raises(UnavailableError):
                await forwarder.submit(url, create())
        assert writer.seen == []


async def test_a_new_certificate_is_used_without_a_restart(authorities: Authorities, tmp_path: Path) -> None:
    settings = certified(authorities)
    async with owner(settings) as (url, _), HttpForwarder(PeerCredentials.of(settings)) as forwarder:
        await forwarder.submit(url, create())
        fresh = Authority(tmp_path / "fresh")
        cert, key = fresh.issue("gateway", PEER_NAME)
        assert settings.peer_cert is not None
        assert settings.peer_key is not None
        for source, target in (
            (cert, settings.peer_cert),
            (key, settings.peer_key),
            (fresh.certificate, authorities.ca),
        ):
            shutil.copy(source, target)
        await forwarder.submit(url, create())
        old = ssl.create_default_context(cafile=str(authorities.other.certificate))
        new = ssl.create_default_context(cafile=str(fresh.certificate))
        for context, trusted in ((new, True), (old, False)):
            port = int(url.rpartition(":")[2].partition("/")[0])
            try:
                _, stream = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=PEER_NAME)
                stream.close()
            except ssl.SSLError:
                assert not trusted


async def test_on_loopback_gateways_of_one_user_share_a_secret_that_nobody_else_can_read(tmp_path: Path) -> None:
    kept = tmp_path / "home" / "artifact-store" / "internal-secret"
    settings = Settings(state_dir=tmp_path / "state")
    async with owner(settings) as (url, writer):
        assert await status_of(url, {}) == 403
        async with HttpForwarder(PeerCredentials.of(replace(settings, state_dir=tmp_path / "other"))) as forwarder:
            await forwarder.submit(url, create())
        assert len(writer.seen) == 1
    assert kept.stat().st_mode & 0o777 == 0o600
    async with HttpForwarder(PeerCredentials.of(settings)) as forwarder:
        with pytest.raises(UnavailableError, match="has no certificate"):
            await forwarder.submit("http://192.0.2.1:1", create())


async def test_a_secret_that_others_can_read_or_chose_is_not_used(tmp_path: Path) -> None:
    kept = tmp_path / "home" / "artifact-store" / "internal-secret"
    kept.parent.mkdir(parents=True)
    kept.write_text("chosen by others")
    kept.chmod(0o644)
    settings = Settings(state_dir=tmp_path / "state")
    async with owner(settings) as (url, writer):
        async with HttpForwarder(PeerCredentials(local_secret=None)) as forwarder:
            with pytest.raises(UnavailableError):
                await forwarder.submit(url, create())
        assert await status_of(url, {"Authorization": "Bearer chosen by others"}) == 403
        assert writer.seen == []


def test_settings_of_certificates_that_cannot_work_are_refused(authorities: Authorities, tmp_path: Path) -> None:
    cert, key = authorities.ours.issue("gateway", PEER_NAME)
    for wrong in (
        {"peer_cert": cert},
        {"peer_cert": cert, "peer_key": key},
        {"peer_cert": cert, "peer_key": key, "peer_ca": tmp_path / "missing"},
        {"peer_cert": cert, "peer_key": authorities.other.issue("x", "y")[1], "peer_ca": authorities.ca},
    ):
        with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_PEER"):
            PeerCredentials.of(Settings(**wrong))
