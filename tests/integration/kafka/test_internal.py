"""The internal listener: who may use it, what it accepts, and the answer of a gateway that is not the owner."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest

from artifact_store.errors import (
    ConfigurationError,
    DuplicateRelativePathError,
    ForbiddenError,
    PushBackError,
    TooLargeError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement, IngestedFile
from ingest_gateway.peers import forwarding
from ingest_gateway.peers import internal_listener as internal
from ingest_gateway.peers.authentication import PeerCredentials
from ingest_gateway.peers.forwarding import (
    CHECKS_PATH,
    COMMANDS_PATH,
    CONFIRMATIONS_PATH,
    CONTENT_TYPE,
    WIRE_VERSION,
    HttpForwarder,
)
from ingest_gateway.peers.internal_listener import MAX_BODY_BYTES, InternalListener
from schemas.identifiers import file_id
from services.config import SecretStr, Settings
from services.core import wire
from services.core.access import EVERYTHING, Grant, Grants, Packages, Right
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestCheck
from services.core.wire import decode_error, encode_command
from services.identity.audit import Audit
from services.log.kafka.connection import INTERFACE
from services.log.port import PackageExtent, PartitionNotOwnedError, PartitionStatus
from services.log.records import AcceptLoss, Confirmation, SkipRecord
from tests.commands import create, finalize, ingest
from tests.integration.conditions import until
from tests.services.process import free_ports

SECRET = SecretStr("correct horse battery staple")


OWNED = (
    PartitionStatus(3, "this process", 1_000_000, 0.25, "file", None, 4),
    PartitionStatus(5, "this process", trouble="it stands", skipped=1, quarantined=2, bad_offset=9, bad_digest="ab"),
)


def answer_to(command: Command, manifest_digest: bytes = bytes(32)) -> Acknowledgement:
    """What the owner of a package answers once the events of the command are in the log, from number 7 on."""
    if isinstance(command, CreatePackage):
        return Acknowledgement(command.package_id, 1, bytes(32))
    if isinstance(command, FinalizePackage):
        return Acknowledgement(command.package_id, 7, bytes(32), manifest_digest=manifest_digest)
    files = tuple(
        IngestedFile(
            file_id(command.package_id, file.relative_path),
            file.relative_path,
            file.size_bytes,
            file.blake3,
            file.sha256,
            number,
            bytes(32),
        )
        for number, file in enumerate(command.files, 7)
    )
    return Acknowledgement(command.package_id, files[-1].sequence, bytes(32), files)


class Answering:
    """A writer that acknowledges every command, or raises."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.refusal: Exception | None = None
        self.unportable_count = 0
        self.extent: PackageExtent | None = None
        self.grants: Grants | None = None
        self.principal: str | None = None
        """Of the last question, like `grants`."""

    async def submit_here(self, command: Command) -> Acknowledgement:
        self.seen.append(command)
        if self.refusal is not None:
            raise self.refusal
        return replace(answer_to(command, b"m" * 32), unportable_count=self.unportable_count)

    async def check_ingest_here(self, asked: IngestCheck) -> str:
        self.seen.append((asked.package_id, list(asked.relative_paths), asked.command_id))
        self.grants, self.principal = asked.grants, asked.principal
        if self.refusal is not None:
            raise self.refusal
        return "raw-evidence"

    async def confirm_here(self, confirmation: Confirmation) -> Acknowledgement:
        self.seen.append(confirmation)
        if self.refusal is not None:
            raise self.refusal
        return Acknowledgement(UUID(int=1), 3, bytes(32))

    async def end_here(self, partition: int) -> int:
        self.seen.append(partition)
        if self.refusal is not None:
            raise self.refusal
        return 10 + partition

    async def extent_here(self, package_id: UUID) -> PackageExtent | None:
        self.seen.append(package_id)
        if self.refusal is not None:
            raise self.refusal
        return self.extent

    def status_here(self) -> list[PartitionStatus]:
        return list(OWNED)


@pytest.fixture
async def listener() -> AsyncIterator[InternalListener]:
    found = await InternalListener.open(Settings(internal_secret=SECRET), PeerCredentials(SECRET))
    yield found
    await found.close()


@pytest.fixture
def writer(listener: InternalListener) -> Answering:
    answering = Answering()
    listener.serve(answering)
    return answering


async def test_commands_and_questions_reach_the_owner_and_its_answer_comes_back(
    listener: InternalListener, writer: Answering
) -> None:
    command = ingest(create().package_id, "a", "b")
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        answer = await forwarder.submit(listener.url, command)
        assert (
            await forwarder.check_ingest(listener.url, IngestCheck(command.package_id, ["ä"], None)) == "raw-evidence"
        )
    assert answer == answer_to(command)
    assert writer.seen == [command, (command.package_id, ["ä"], None)]


TEAM = (Grant(frozenset({Right.WRITE}), Packages(("lab",))),)
ASKED = 40


class Peer:
    """A gateway that answers every request with an empty list, and that goes away."""

    def __init__(self) -> None:
        self._connections: list[asyncio.StreamWriter] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(writer)
        while await reader.read(1 << 16):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/cbor\r\nContent-Length: 1\r\n\r\n\x80")

    def go(self) -> None:
        """Close all connections, which clients hear of when they have been handed the next request to send."""
        for connection in self._connections:
            connection.close()


@pytest.mark.parametrize("command", [None, replace(ingest(create().package_id, "a"), grants=TEAM)])
async def test_a_peer_that_goes_away_leaves_no_error_that_nobody_hears(command: Command | None) -> None:
    """Connections that were kept from earlier questions close after the next request took them."""
    loop, peer, unheard = asyncio.get_running_loop(), Peer(), list[str]()
    loop.set_exception_handler(lambda _, context: unheard.append(context["message"]))
    server = await asyncio.start_server(peer.answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, HttpForwarder(PeerCredentials(SECRET)) as forwarder:

        async def ask() -> None:
            await (forwarder.status(url) if command is None else forwarder.submit(url, command))

        await asyncio.gather(*(forwarder.status(url) for _ in range(ASKED)))
        peer.go()
        await asyncio.sleep(0)  # now the sockets are closed, and the clients have not looked
        answers = await asyncio.gather(*(ask() for _ in range(ASKED)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {UnavailableError}
    gc.collect()
    assert unheard == []


async def test_a_package_s_extent_comes_from_the_owner_or_not_at_all(
    listener: InternalListener, writer: Answering
) -> None:
    package_id = create().package_id
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        for writer.extent in (None, PackageExtent(1_700_000_000_000_000, 7), PackageExtent(0)):
            assert await forwarder.extent(listener.url, package_id) == writer.extent
        writer.refusal = PartitionNotOwnedError("moved")
        with pytest.raises(PartitionNotOwnedError):
            await forwarder.extent(listener.url, package_id)
        with pytest.raises(UnavailableError):  # as a release that does not know the question answers
            await forwarder.extent(listener.url + "/older", package_id)
    assert writer.seen == [package_id] * 4


async def test_an_operators_confirmation_reaches_the_owner_also_below_the_path_of_its_release(
    listener: InternalListener, writer: Answering
) -> None:
    confirmation = SkipRecord(3, 41, b"d" * 32, "ada", "a stray producer", UUID(int=5))
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        for url in (listener.url, listener.url + INTERFACE):
            assert await forwarder.confirm(url, confirmation) == Acknowledgement(UUID(int=1), 3, bytes(32))
        await forwarder.submit(listener.url + INTERFACE, create())
    assert writer.seen[:2] == [confirmation, confirmation]


async def test_two_gateways_use_the_newest_version_that_both_know(
    listener: InternalListener, writer: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_ADDED", {("Acknowledgement", "unportable_count"): 2})
    for module, version in ((wire, 2), (forwarding, 2), (internal, 1)):
        monkeypatch.setattr(module, "VERSION", version)
    command = finalize(create().package_id)
    writer.unportable_count = 5
    second = replace(answer_to(command, b"m" * 32), unportable_count=5)
    first = replace(second, unportable_count=0)
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        assert [await forwarder.submit(listener.url, command) for _ in range(2)] == [first, first]
        monkeypatch.setattr(internal, "VERSION", 2)
        assert [await forwarder.submit(listener.url, command) for _ in range(2)] == [second, second]
        monkeypatch.setattr(internal, "VERSION", 1)  # a process of the release before has taken the address over
        assert [await forwarder.submit(listener.url, command) for _ in range(2)] == [first, first]


async def test_the_owner_learns_what_the_sender_may_do(listener: InternalListener, writer: Answering) -> None:
    command = replace(ingest(create().package_id, "a"), grants=TEAM)
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        await forwarder.check_ingest(listener.url, IngestCheck(command.package_id, ["a"], None, TEAM))
        assert writer.grants == TEAM
        await forwarder.submit(listener.url, command)
    assert writer.seen[-1] == command


async def test_an_owner_that_cannot_check_gets_no_command_that_it_would_have_to_check(
    listener: InternalListener, writer: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internal, "VERSION", wire.SAYS_GRANTS - 1)
    made = create()
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        for ask in (
            lambda: forwarder.submit(listener.url, replace(ingest(made.package_id, "a"), grants=TEAM)),
            lambda: forwarder.check_ingest(listener.url, IngestCheck(made.package_id, ["a"], None, TEAM)),
        ):
            with pytest.raises(PushBackError, match="upgrade all gateways"):
                await ask()
        with pytest.raises(ForbiddenError):
            await forwarder.submit(listener.url, replace(made, producer="another", grants=TEAM))
        assert writer.seen == []
        await forwarder.submit(listener.url, replace(made, producer="lab", grants=TEAM))  # the forwarder has checked it
    assert writer.seen == [replace(made, producer="lab")]


async def test_the_owner_learns_who_sends_a_command_in_the_name_of_another(
    listener: InternalListener, writer: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = replace(ingest(create().package_id, "a"), principal="ci:bot")
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        await forwarder.submit(listener.url, command)
        assert writer.seen == [command]
        await forwarder.check_ingest(listener.url, IngestCheck(command.package_id, ["a"], None, EVERYTHING, "ci:bot"))
        assert writer.principal == "ci:bot"
    writer.seen.clear()
    # An owner that would record the command without its sender gets none.
    monkeypatch.setattr(internal, "VERSION", wire.SAYS_PRINCIPAL - 1)
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        for delegated in (command, replace(create(), principal="ci:bot"), replace(command, grants=TEAM)):
            with pytest.raises(PushBackError, match="upgrade all gateways"):
                await forwarder.submit(listener.url, delegated)
        with pytest.raises(PushBackError, match="upgrade all gateways"):
            await forwarder.check_ingest(
                listener.url, IngestCheck(command.package_id, ["a"], None, EVERYTHING, "ci:bot")
            )
        assert writer.seen == []
        await forwarder.submit(listener.url, replace(command, principal=None))
    assert writer.seen == [replace(command, principal=None)]


async def test_a_message_of_a_version_that_is_not_known_is_for_later(
    listener: InternalListener, writer: Answering
) -> None:
    headers = {"Authorization": f"Bearer {SECRET.get_secret_value()}", "Content-Type": CONTENT_TYPE}
    body = encode_command(create())
    async with aiohttp.ClientSession(headers=headers) as session:
        for version in (str(wire.VERSION + 1), "0", "-1", "one", "٣", "9" * 5_000):
            named = {WIRE_VERSION: version}
            async with session.post(listener.url + COMMANDS_PATH, data=BytesIO(body), headers=named) as answer:
                assert answer.status == UnavailableError.status
                assert "different releases" in decode_error(await answer.read()).detail
    assert writer.seen == []


@pytest.mark.parametrize(
    "refusal",
    [
        DuplicateRelativePathError("it is there"),
        ForbiddenError("not there"),
        PushBackError("full", 3.0),
        PartitionNotOwnedError("moved"),
    ],
)
async def test_a_refusal_comes_back_as_what_it_was(
    listener: InternalListener, writer: Answering, refusal: Exception
) -> None:
    writer.refusal = refusal
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        for ask in (
            forwarder.submit(listener.url, create()),
            forwarder.check_ingest(listener.url, IngestCheck(create().package_id, ["a"], None)),
        ):
            with pytest.raises(type(refusal)) as refused:
                await ask
            assert refused.value.args == refusal.args


async def test_an_owner_says_how_its_partitions_are(listener: InternalListener, writer: Answering) -> None:
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        found = await forwarder.status(listener.url)
    assert found == [replace(status, owner=listener.url) for status in OWNED]
    async with HttpForwarder(PeerCredentials(SecretStr("wrong"))) as forwarder:
        with pytest.raises(UnavailableError, match="ARTIFACT_STORE_INTERNAL_SECRET"):
            await forwarder.status(listener.url)
    assert writer.seen == []


@pytest.mark.parametrize("secret", [SecretStr("wrong"), SecretStr("")])
async def test_without_the_secret_nothing_is_carried_out(
    listener: InternalListener, writer: Answering, secret: SecretStr
) -> None:
    async with HttpForwarder(PeerCredentials(secret)) as forwarder:
        with pytest.raises(UnavailableError, match="ARTIFACT_STORE_INTERNAL_SECRET"):
            await forwarder.submit(listener.url, create())
        with pytest.raises(UnavailableError, match="ARTIFACT_STORE_INTERNAL_SECRET"):
            await forwarder.check_ingest(listener.url, IngestCheck(create().package_id, ["a"], None))
    assert writer.seen == []


async def test_the_audit_stream_has_who_is_refused_and_what_operators_confirm(tmp_path: Path) -> None:
    file, settings = tmp_path / "audit.jsonl", Settings(internal_secret=SECRET)
    async with Audit(file) as audit:
        listener = await InternalListener.open(settings, PeerCredentials(SECRET), audit)
        writer = Answering()
        listener.serve(writer)
        about = (3, 41, b"d" * 32, "ada", "a stray producer", UUID(int=5))
        async with HttpForwarder(PeerCredentials(SecretStr("a guess"))) as stranger:
            with pytest.raises(UnavailableError):
                await stranger.submit(listener.url, create())
            with pytest.raises(UnavailableError):
                await stranger.confirm(listener.url, SkipRecord(*about))
        async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
            await forwarder.submit(listener.url, create())  # the gateway that it came to has recorded it
            for confirmation in (SkipRecord(*about), AcceptLoss(*about)):
                await forwarder.confirm(listener.url, confirmation)
            for writer.refusal in (PushBackError("its queue is full"), RuntimeError("a mistake")):
                with pytest.raises((PushBackError, UnavailableError)):
                    await forwarder.confirm(listener.url, SkipRecord(*about))
        await listener.close()
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(one["action"], one["allowed"], one["status"], one.get("actor"), one.get("target")) for one in found] == [
        (f"POST {COMMANDS_PATH}", False, 403, None, None),
        (f"POST {CONFIRMATIONS_PATH}", False, 403, None, None),
        ("log skip", True, 200, "ada", "3 41"),
        ("log accept-loss", True, 200, "ada", "3 41"),
        ("log skip", True, PushBackError.status, "ada", "3 41"),
        ("log skip", True, 500, "ada", "3 41"),
    ]
    assert {(one["principal"], one["client"]) for one in found} == {(None, "127.0.0.1")}


async def test_a_gateway_that_is_only_starting_owns_nothing(listener: InternalListener) -> None:
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        with pytest.raises(PartitionNotOwnedError):
            await forwarder.submit(listener.url, create())


async def test_a_body_that_is_no_command_of_this_release_is_for_later(
    listener: InternalListener, writer: Answering
) -> None:
    headers = {"Authorization": f"Bearer {SECRET.get_secret_value()}", "Content-Type": CONTENT_TYPE}
    async with aiohttp.ClientSession(headers=headers) as session:
        for path in (COMMANDS_PATH, CHECKS_PATH):
            async with session.post(listener.url + path, data=b"\xff") as answer:
                assert answer.status == UnavailableError.status
        async with session.post(listener.url + COMMANDS_PATH, data=BytesIO(bytes(MAX_BODY_BYTES + 1))) as answer:
            assert answer.status == TooLargeError.status
        async with session.get(listener.url + COMMANDS_PATH) as answer:
            assert answer.status == 405
    assert writer.seen == []


async def test_a_length_that_is_no_plain_number_is_refused(listener: InternalListener, writer: Answering) -> None:
    body = encode_command(create())
    head = (
        f"POST {COMMANDS_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET.get_secret_value()}\r\n"
        f"Content-Type: {CONTENT_TYPE}\r\nContent-Length: {'0' * 5_000}{len(body)}\r\n\r\n"
    )
    port = int(listener.url.rpartition(":")[2])
    reader, sender = await asyncio.open_connection("127.0.0.1", port)
    sender.write(head.encode() + body)
    assert (await reader.readline()).split()[1] == b"400"
    sender.close()
    assert writer.seen == []


async def test_an_error_for_a_version_that_is_no_number_is_written_in_the_oldest(
    listener: InternalListener, writer: Answering
) -> None:
    writer.refusal = ForbiddenError("not there")
    for reads in ("9" * 5_000, "one", "٣"):
        headers = {"Authorization": f"Bearer {SECRET.get_secret_value()}", forwarding.WIRE_READS: reads}
        async with (
            aiohttp.ClientSession(headers={"Content-Type": CONTENT_TYPE, **headers}) as session,
            session.post(listener.url + COMMANDS_PATH, data=BytesIO(encode_command(create(), 1))) as answer,
        ):
            assert type(decode_error(await answer.read())).__name__ == "RejectedError"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_what_a_page_in_a_browser_can_send_unasked_is_refused(kind: str | None) -> None:
    credentials, writer = PeerCredentials.of(Settings()), Answering()
    listener = await InternalListener.open(Settings(), credentials)
    listener.serve(writer)
    proof = credentials.for_request(listener.url)["headers"]
    async with aiohttp.ClientSession(skip_auto_headers=["Content-Type"]) as session:
        for sent, status in (({}, 403), (proof, 415)):
            headers = {**sent, **({} if kind is None else {"Content-Type": kind})}
            url, command = listener.url + COMMANDS_PATH, encode_command(create())
            async with session.post(url, data=command, headers=headers) as answer:
                assert answer.status == status
    await listener.close()
    assert writer.seen == []


async def test_the_largest_command_fits(listener: InternalListener, writer: Answering) -> None:
    paths = [f"{n:05}{'ä' * 509}" for n in range(10_000)]
    command = ingest(create().package_id, *paths)
    assert len(encode_command(command)) < MAX_BODY_BYTES
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        await forwarder.submit(listener.url, command)
    assert writer.seen == [command]


async def test_a_large_command_is_decoded_beside_the_event_loop(
    listener: InternalListener, writer: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def noted(body: bytes, *more: int) -> Command:
        threads.append(threading.current_thread())
        return wire.decode_command(body, *more)

    monkeypatch.setattr(internal, "decode_command", noted)
    package = create().package_id
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        await forwarder.submit(listener.url, ingest(package, "a"))
        await forwarder.submit(listener.url, ingest(package, *(f"{n}/{'x' * 500}" for n in range(1_000))))
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


async def test_a_gateway_asks_the_owner_where_a_partition_ends(listener: InternalListener, writer: Answering) -> None:
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        assert await forwarder.end(listener.url, 5) == 15
        assert writer.seen == [5]
        writer.refusal = PartitionNotOwnedError("it moved")
        with pytest.raises(PartitionNotOwnedError):
            await forwarder.end(listener.url, 5)


async def test_an_owner_of_the_previous_release_does_not_know_where_a_partition_ends(
    listener: InternalListener,
) -> None:
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        assert await forwarder.end(f"{listener.url}/other", 5) is None


class RequestQueue(Answering):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()

    async def submit_here(self, command: Command) -> Acknowledgement:
        answer = await super().submit_here(command)
        await self.answers.wait()
        return answer

    async def has_seen(self, count: int) -> None:
        async def seen() -> bool:
            return len(self.seen) == count

        await until(seen, 30, "the commands did not come")


async def test_a_process_that_does_not_answer_takes_no_more_than_half_of_what_may_be_on_its_way(
    listener: InternalListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "MAX_FORWARDED", 4)
    waiting = RequestQueue()
    listener.serve(waiting)
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        sent = [asyncio.ensure_future(forwarder.submit(listener.url, create(n))) for n in range(2)]
        await waiting.has_seen(2)
        with pytest.raises(PushBackError):
            await forwarder.submit(listener.url, create())
        with pytest.raises(PushBackError):
            await forwarder.check_ingest(listener.url, IngestCheck(create().package_id, ["a"], None))
        assert len(await forwarder.status(listener.url)) == len(OWNED)
        assert len(waiting.seen) == 2, "what is pushed back was not sent"
        with pytest.raises(UnavailableError):
            await forwarder.submit(f"http://127.0.0.1:{free_ports(1)[0]}", create())
        waiting.answers.set()
        await asyncio.gather(*sent)
        await forwarder.submit(listener.url, create())


async def test_a_listener_takes_so_many_commands_at_a_time_and_is_asked_how_it_is_all_the_same(
    listener: InternalListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internal, "MAX_TAKEN", 2)
    waiting = RequestQueue()
    listener.serve(waiting)
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        sent = [asyncio.ensure_future(forwarder.submit(listener.url, create(n))) for n in range(2)]
        await waiting.has_seen(2)
        with pytest.raises(PushBackError, match="too many commands are forwarded"):
            await forwarder.submit(listener.url, create())
        assert len(await forwarder.status(listener.url)) == len(OWNED)
        waiting.answers.set()
        await asyncio.gather(*sent)
        await forwarder.submit(listener.url, create())


async def test_an_owner_that_is_gone_leaves_the_outcome_unknown() -> None:
    async with HttpForwarder(PeerCredentials(SECRET)) as forwarder:
        with pytest.raises(UnavailableError, match="outcome is unknown"):
            await forwarder.submit(f"http://127.0.0.1:{free_ports(1)[0]}", create())


@pytest.mark.parametrize(
    ("settings", "mended"),
    [
        (Settings(internal_listen="0.0.0.0:0"), "ARTIFACT_STORE_INTERNAL_SECRET"),
        (Settings(internal_listen="[::]:0"), "ARTIFACT_STORE_INTERNAL_SECRET"),
        (Settings(internal_listen="gateway.example:1"), "ARTIFACT_STORE_INTERNAL_SECRET"),
        (Settings(internal_listen="0.0.0.0:0", internal_secret=SECRET), "ARTIFACT_STORE_INTERNAL_URL"),
        (Settings(internal_listen="nowhere"), "HOST:PORT"),
        (Settings(internal_listen="127.0.0.1:70000"), "HOST:PORT"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.internal_listen,
)
async def test_a_listener_that_others_could_misuse_or_not_reach_is_refused(settings: Settings, mended: str) -> None:
    with pytest.raises(ConfigurationError, match=mended):
        await InternalListener.open(settings, PeerCredentials.of(settings))


async def test_a_port_that_is_taken_is_a_clear_error(listener: InternalListener) -> None:
    taken = listener.url.removeprefix("http://")
    with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_INTERNAL_LISTEN"):
        await InternalListener.open(Settings(internal_listen=taken), PeerCredentials(SECRET))


async def test_the_address_that_others_use_can_be_another_than_the_one_that_is_bound() -> None:
    listener = await InternalListener.open(
        Settings(internal_url="http://gateway-1.example:9000/"), PeerCredentials(SECRET)
    )
    await listener.close()
    assert listener.url == "http://gateway-1.example:9000"
