"""Gateways among each other: who is admitted, and what a rogue member of the writers' group can get."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from uuid import UUID

import aiohttp
import cbor2
import pytest
from aiohttp import web

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from artifact_store.models import Acknowledgement
from artifact_store.rules import PathPair
from ingest_gateway.peers import forwarding
from ingest_gateway.peers.authentication import PEER_NAME, PeerCredentials
from ingest_gateway.peers.forwarding import COMMANDS_PATH, CONTENT_TYPE, WIRE_VERSION, HttpForwarder
from ingest_gateway.peers.internal_listener import InternalListener
from ingest_gateway.protocol.http_errors import answer_of
from ingest_gateway.protocol.request import held
from services.config import SecretStr, Settings
from services.core.decide import Command, IngestCheck
from services.core.wire import VERSION, decode_acknowledgement, encode_acknowledgement, encode_command
from services.runtime import tls
from tests.certificates import Authority
from tests.commands import create, finalize, ingest
from tests.integration.kafka.test_internal import Answering, answer_to

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


@dataclass
class Liar:
    """A gateway that others trust, and that answers what it likes."""

    url: str = ""
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    endless: bool = False
    sent: int = 0
    """Bytes of endless answers that went out."""
    cut_off: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if not self.endless:
            return web.Response(body=self.body, status=self.status, content_type=CONTENT_TYPE, headers=self.headers)
        response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE})
        await response.prepare(request)
        try:
            while self.sent < 256 << 20:
                await response.write(bytes(1 << 20))
                self.sent += 1 << 20
        finally:
            self.cut_off.set()
        return response


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    found = Liar()
    runner = web.ServerRunner(web.Server(found.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


@pytest.fixture
async def forwarder() -> AsyncIterator[HttpForwarder]:
    async with HttpForwarder(PeerCredentials(SecretStr(SECRET))) as made:
        yield made


PACKAGE = create().package_id
MADE, FILLED, FROZEN = create(), ingest(PACKAGE, "a", "b"), finalize(PACKAGE)
RIGHT: dict[Command, Acknowledgement] = {command: answer_to(command) for command in (MADE, FILLED, FROZEN)}


def changed_file(**changes: object) -> Acknowledgement:
    first, second = RIGHT[FILLED].files
    return replace(RIGHT[FILLED], files=(first._replace(**changes), second))  # type: ignore[arg-type]


LIES: list[tuple[Command, Acknowledgement]] = [
    *((command, replace(answer, package_id=UUID(int=7))) for command, answer in RIGHT.items()),
    *((command, replace(answer, event_digest=b"short")) for command, answer in RIGHT.items()),
    *((command, replace(answer, sequence=0)) for command, answer in RIGHT.items()),
    *((command, replace(answer, sequence=1 << 70)) for command, answer in RIGHT.items()),
    (MADE, RIGHT[FILLED]),
    (MADE, RIGHT[FROZEN]),
    (FILLED, RIGHT[MADE]),
    (FILLED, RIGHT[FROZEN]),
    (FROZEN, RIGHT[MADE]),
    (FILLED, replace(RIGHT[FILLED], files=RIGHT[FILLED].files[:1])),
    (FILLED, replace(RIGHT[FILLED], files=RIGHT[FILLED].files[::-1])),
    (FILLED, changed_file(file_id=UUID(int=7))),
    (FILLED, changed_file(relative_path="c")),
    (FILLED, changed_file(size_bytes=7)),
    (FILLED, changed_file(blake3=bytes(32))),
    (FILLED, changed_file(sha256=bytes(32))),
    (FILLED, changed_file(sequence=9)),
    (FILLED, changed_file(event_digest=b"")),
    (FROZEN, replace(RIGHT[FROZEN], manifest_digest=b"short")),
    (FROZEN, replace(RIGHT[FROZEN], unportable_count=-1)),
    (FROZEN, replace(RIGHT[FROZEN], unportable_count=99, unportable_paths=(PathPair("a", "A"),) * 11)),
]


async def test_a_peer_cannot_acknowledge_what_is_not_the_command(liar: Liar, forwarder: HttpForwarder) -> None:
    liar.headers = {WIRE_VERSION: str(VERSION)}
    for command, answer in RIGHT.items():
        liar.body = encode_acknowledgement(answer)
        assert await forwarder.submit(liar.url, command) == answer
    for command, lie in LIES:
        liar.body = encode_acknowledgement(lie)
        with pytest.raises(UnavailableError):
            await forwarder.submit(liar.url, command)


async def test_an_answer_without_end_is_cut_off(liar: Liar, forwarder: HttpForwarder) -> None:
    for ask in (
        lambda: forwarder.submit(liar.url, FILLED),
        lambda: forwarder.check_ingest(liar.url, IngestCheck(PACKAGE, ["a"], None)),
        lambda: forwarder.status(liar.url),
        lambda: forwarder.end(liar.url, 1),
        lambda: forwarder.extent(liar.url, PACKAGE),
    ):
        liar.endless, liar.sent = True, 0
        liar.cut_off.clear()
        with pytest.raises(UnavailableError):
            await ask()
        await liar.cut_off.wait()
        assert liar.sent < 64 << 20


@pytest.mark.parametrize("packed", [True, False])
async def test_a_packed_answer_is_not_unpacked(liar: Liar, forwarder: HttpForwarder, packed: bool) -> None:
    answer = encode_acknowledgement(RIGHT[MADE], 1)
    liar.body, liar.headers = gzip.compress(answer) if packed else answer, {"Content-Encoding": "gzip"}
    with pytest.raises(UnavailableError, match="cannot be read"):
        await forwarder.submit(liar.url, MADE)


async def test_a_peer_cannot_send_a_command_elsewhere(liar: Liar, forwarder: HttpForwarder) -> None:
    async with rogue(None) as elsewhere:
        liar.status, liar.headers = 307, {"Location": elsewhere.url}
        with pytest.raises(UnavailableError):
            await forwarder.submit(liar.url, MADE)
        assert elsewhere.heard == []


@pytest.mark.parametrize(
    "said",
    [
        ["push-back", "why", float("inf"), None],
        ["push-back", "why", float("nan"), None],
        ["push-back", "why", -1, None],
        ["push-back", "why", "soon", None],
        ["range-not-satisfiable", "why", None, "x"],
        ["range-not-satisfiable", "why", None, -1],
        ["range-not-satisfiable", "why", None, 1 << 70],
        ["answer-expired", "why", None, None, {"finalized_at": 1 << 70}],
        ["answer-expired", "why", None, None, {"finalized_at": "x", "package_id": [], 7: 7, "detail": "x", "size": 1}],
        ["conflict", ["why"], None, None],
        [["conflict"], "why", None, None],
        ["conflict", "why" * 100_000, None, None],
        [],
    ],
    ids=str,
)
async def test_whatever_a_peer_says_of_an_error_can_be_told_to_the_client(
    liar: Liar, forwarder: HttpForwarder, said: object
) -> None:
    liar.body, liar.status = cbor2.dumps(said)[: 60 << 10], 503
    with pytest.raises(ArtifactStoreError) as refused:
        await forwarder.submit(liar.url, MADE)
    answer = answer_of(refused.value)
    assert 400 <= answer.status <= 503
    assert len(held(answer)) < 10_000


@pytest.mark.parametrize("answer", [-1, 1 << 70, True, "7", None, [7], 7.5])
async def test_an_end_that_is_none_is_not_believed(liar: Liar, forwarder: HttpForwarder, answer: object) -> None:
    liar.body = cbor2.dumps(answer)
    with pytest.raises(UnavailableError):
        await forwarder.end(liar.url, 3)


@pytest.mark.parametrize("answer", [[-1, 1], [1 << 70, 1], [1, 0], [1, 1 << 70], [1], ["1", 1], 7, [[]]])
async def test_an_extent_that_is_none_is_not_believed(liar: Liar, forwarder: HttpForwarder, answer: object) -> None:
    liar.body = cbor2.dumps(answer)
    with pytest.raises(UnavailableError):
        await forwarder.extent(liar.url, PACKAGE)


@pytest.mark.parametrize("answer", [b"x" * 257, b"a\nb", b"\xff"])
async def test_a_retention_class_that_is_none_is_not_believed(
    liar: Liar, forwarder: HttpForwarder, answer: bytes
) -> None:
    liar.body = answer
    with pytest.raises(UnavailableError):
        await forwarder.check_ingest(liar.url, IngestCheck(PACKAGE, ["a"], None))


@pytest.mark.parametrize("answer", [7, [7], [["x"]], [[{}]], [[3, "since"]], [[3, 1, 1, "file", [1]]]])
async def test_a_state_of_partitions_that_is_none_is_not_believed(
    liar: Liar, forwarder: HttpForwarder, answer: object
) -> None:
    liar.body = cbor2.dumps(answer)
    with pytest.raises(UnavailableError):
        await forwarder.status(liar.url)


async def test_a_long_answer_is_read_beside_the_event_loop(
    liar: Liar, forwarder: HttpForwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def decode(data: bytes, version: int) -> Acknowledgement:
        threads.append(threading.get_ident())
        return decode_acknowledgement(data, version)

    monkeypatch.setattr(forwarding, "decode_acknowledgement", decode)
    for command in (ingest(PACKAGE, *(f"{number:05}" for number in range(1_000))), MADE):
        liar.body = encode_acknowledgement(answer_to(command), 1)
        assert await forwarder.submit(liar.url, command) == answer_to(command)
    assert [thread == threading.get_ident() for thread in threads] == [False, True]


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
        assert await forwarder.submit(url, command) == answer_to(command)
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


@pytest.mark.parametrize("why", ["others can read it", "it is of another user", "it is a link"])
async def test_a_secret_that_others_can_read_or_chose_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    kept = tmp_path / "home" / "artifact-store" / "internal-secret"
    kept.parent.mkdir(parents=True)
    chosen = tmp_path / "chosen" if why == "it is a link" else kept
    chosen.write_text("chosen by others")
    chosen.chmod(0o644 if why == "others can read it" else 0o600)
    if chosen != kept:
        kept.symlink_to(chosen)
    if why == "it is of another user":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
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
