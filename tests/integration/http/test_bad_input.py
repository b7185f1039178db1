"""Bad input over HTTP: each kind gets its documented status and problem type, and records nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from blake3 import blake3

from artifact_store.documents.problem_details import TYPE_PREFIX
from artifact_store.position import Position
from ingest_gateway.protocol.json_body import MAX_FAULTS
from services.config import Settings
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import exchange, send_and_leave

_PACKAGE: dict[str, Any] = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
_BODY = b"some bytes of a file"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(folder: Path) -> AsyncIterator[RunningGateway]:
    settings = Settings(
        log_url=f"sqlite:///{folder}/log.db",
        blobs_url=f"file:{folder}/blobs",
        views_url=f"sqlite+aiosqlite:///{folder}/views.db",
        state_dir=folder / "state",
    )
    async with running_gateway(settings, wait_seconds=0.2) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def package(gateway: RunningGateway) -> str:
    async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
        assert answer.status == 201
        return str((await answer.json())["package_id"])


@asynccontextmanager
async def nothing_recorded(gateway: RunningGateway) -> AsyncIterator[None]:
    before = await gateway.events()
    yield
    assert await gateway.events() == before


async def refused(
    gateway: RunningGateway, method: str, path: str, status: int, problem: str, **request: Any
) -> dict[str, Any]:
    """Send the request; it must be refused in this way and leave nothing on the log. Returns the problem."""
    async with nothing_recorded(gateway), gateway.session.request(method, path, **request) as answer:
        body = await answer.read()
        assert (answer.status, answer.content_type) == (status, "application/problem+json"), body
        found: dict[str, Any] = json.loads(body)
    assert found["type"] == TYPE_PREFIX + problem, found
    assert found["status"] == status
    assert found["detail"]
    return found


def _json(**changes: Any) -> bytes:
    fields = {**_PACKAGE, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


_METADATA = _json(metadata={})[:-3]  # what stands before the object


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "UTF-8"),
        (b"[]", "body"),
        (b"null", "body"),
        (_json()[:-1] + b',"name":"other"}', "twice"),
        (_METADATA + b'{"a":1,"a":2}}', "twice"),
        (_METADATA + b'{"a":NaN}}', "NaN"),
        (_METADATA + b'{"a":-Infinity}}', "Infinity"),
        (_METADATA + b'{"a":1e999}}', "finite"),
        (_METADATA + b'{"a":' + b"9" * 5000 + b"}}", "number"),
        (_METADATA + b'{"a":9007199254740993}}', "2^53"),
        (_METADATA + b'{"a":"\\ud800"}}', "surrogate"),
        (_METADATA + b'{"\\udfff":1}}', "metadata"),
        (_METADATA + b'{"a":' + b"[" * 100 + b"]" * 100 + b"}}", "levels"),
        (_METADATA + b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "deep"),
        (_json(name="\ud800"), "name"),
        (_json(name=...), "name"),
        (_json(retention_class=...), "retention_class"),
        (_json(extra=1), "extra"),
        (_json(name=1), "name"),
        (_json(name=None), "name"),
        (_json(metadata=None), "metadata"),
        (_json(metadata=[]), "metadata"),
        (_json(metadata="{}"), "metadata"),
        (_json(name=""), "name"),
        (_json(name="x" * 257), "name"),
        (_json(producer="x" * 257), "producer"),
        (_json(subject="x" * 257), "subject"),
        (_json(name="a\x00b"), "name"),
        (_json(name="a\nb"), "name"),
        (_json(subject="a\x7fb"), "subject"),
    ],
)
async def test_a_body_that_breaks_a_rule_is_refused_with_the_rule(
    gateway: RunningGateway, body: bytes, fragment: str
) -> None:
    headers = {"Content-Type": "application/json"}
    found = await refused(gateway, "POST", "/v1/packages", 400, "invalid-request", data=body, headers=headers)
    assert fragment in found["detail"]


async def test_every_faulty_field_is_named(gateway: RunningGateway) -> None:
    body = {"name": 1, "producer": "p", "retention_class": "scratch", "colour": "red"}
    found = await refused(gateway, "POST", "/v1/packages", 400, "invalid-request", json=body)
    assert {fault["field"] for fault in found["errors"]} == {"name", "subject", "colour"}


async def test_thousands_of_faulty_fields_are_counted_and_the_first_are_named(
    gateway: RunningGateway, package: str
) -> None:
    many = f"/v1/packages/{package}/files"
    body = {"files": [{"relative_path": str(n), "mediatype": "text/plain"} for n in range(MAX_FAULTS)]}
    found = await refused(gateway, "POST", many, 400, "invalid-request", json=body)
    assert "256 fields" in found["detail"]
    assert "files.0.media_type: Field required" in found["detail"]

    worse = {"files": [{f"unknown {n}": 0 for n in range(20)} for _ in range(2000)]}
    found = await refused(gateway, "POST", many, 400, "invalid-request", json=worse)
    assert "48,000 fields" in found["detail"]
    assert len(found["detail"]) < 1000
    assert "errors" not in found


async def test_json_must_say_that_it_is_json(gateway: RunningGateway) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"):
        headers = {"Content-Type": content_type}
        await refused(gateway, "POST", "/v1/packages", 415, "unsupported-media-type", data=_json(), headers=headers)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    await refused(gateway, "POST", "/v1/packages", 415, "unsupported-media-type", data=_json(), headers=headers)


async def test_metadata_and_json_bodies_are_bounded(gateway: RunningGateway) -> None:
    metadata = {"a": "x" * 64 * 1024}
    await refused(gateway, "POST", "/v1/packages", 413, "too-large", json={**_PACKAGE, "metadata": metadata})

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    headers = {"Content-Type": "application/json"}
    await refused(gateway, "POST", "/v1/packages", 413, "too-large", data=chunks(), headers=headers)
    head = (
        b"POST /v1/packages HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999\r\n\r\n"
    )
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, head)
    assert (answer.status, answer.problem()["type"]) == (413, TYPE_PREFIX + "too-large")


async def test_an_unknown_retention_class_is_named(gateway: RunningGateway) -> None:
    found = await refused(
        gateway,
        "POST",
        "/v1/packages",
        422,
        "unknown-retention-class",
        json={**_PACKAGE, "retention_class": "eternal"},
    )
    assert "unknown retention class" in found["detail"]
    assert "scratch" in found["detail"]


@pytest.mark.parametrize(
    "target",
    [
        "../x",
        "a/../x",
        "%2e%2e/x",
        "a/%2E%2e",
        "./x",
        "a/.",
        "",
        "/etc/passwd",
        "a//b",
        "a/",
        "a%2Fb",
        "a%2fb",
        "%2Fetc",
        "a%00b",
        "a%0Ab",
        "a%7F",
        "e%CC%81",
        "%ff",
        "%C0%AF",
        "%ED%A0%80",
        "a%",
        "a%zz",
        "x" * 1025,
        "%C3%A9" * 513,
    ],
)
@pytest.mark.parametrize("method", ["PUT", "GET"])
async def test_a_hostile_path_is_refused_as_it_came(
    gateway: RunningGateway, package: str, target: str, method: str
) -> None:
    request = (
        f"{method} /v1/packages/{package}/files/{target} HTTP/1.1\r\nHost: [::1]\r\n"
        f"Content-Length: {len(_BODY)}\r\n\r\n"
    )
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, request.encode() + _BODY)
    assert answer.status == 400
    assert answer.problem()["type"] == TYPE_PREFIX + "invalid-path"


async def test_a_path_of_raw_bytes_that_are_no_utf8_is_refused(gateway: RunningGateway, package: str) -> None:
    request = b"PUT /v1/packages/%b/files/a\xff HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 0\r\n\r\n" % package.encode()
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, request)
    assert answer.status == 400


async def test_the_longest_path_and_odd_but_lawful_ones_are_taken(gateway: RunningGateway, package: str) -> None:
    for target in ("x" * 1024, "...", "a..b/c", "%25", "a%252Fb", "a+b", "%F0%9F%93%A6", "a;b=c", "~", "a%5Cb"):
        request = (
            f"PUT /v1/packages/{package}/files/{target} HTTP/1.1\r\nHost: [::1]\r\nContent-Length: {len(_BODY)}\r\n\r\n"
        )
        answer = await exchange(gateway.port, request.encode() + _BODY)
        assert answer.status == 201, target
        again = await exchange(
            gateway.port, f"GET {answer.headers['location']} HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode()
        )
        assert again.status == 200
        assert json.loads(again.body)["file_id"] == json.loads(answer.body)["file_id"]


_OTHER = b"other bytes"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Content-Address": f"blake3:{blake3(_OTHER).hexdigest()}"},
        {"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(_OTHER).digest()).decode()}:"},
        {
            "X-Content-Address": f"blake3:{blake3(_BODY).hexdigest()}",
            "Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(_OTHER).digest()).decode()}:",
        },
    ],
)
async def test_bytes_that_are_not_what_was_declared_are_refused(
    gateway: RunningGateway, package: str, headers: dict[str, str]
) -> None:
    path = f"/v1/packages/{package}/files/a"
    await refused(gateway, "PUT", path, 422, "content-mismatch", data=_BODY, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Content-Address": "blake3:00"},
        {"X-Content-Address": blake3(_BODY).hexdigest()},
        {"X-Content-Address": f"blake3:{blake3(_BODY).hexdigest().upper()}"},
        {"Repr-Digest": "sha-256=abc"},
        {"Repr-Digest": "sha-256=:AAAA:"},
        {"Repr-Digest": ""},
        {"Idempotency-Key": "1"},
        {"Idempotency-Key": ""},
        {"Idempotency-Key": "{6f1d7c1e-54a4-5d0b-9a53-6d3f0a4c2b11}"},
        {"X-Actor": ""},
        {"X-Actor": "x" * 257},
        {"X-Actor": "a\tb"},
        {"Content-Type": "x" * 257},
        {"Content-Type": ""},
    ],
)
async def test_a_header_that_breaks_its_rule_is_named(
    gateway: RunningGateway, package: str, headers: dict[str, str]
) -> None:
    path = f"/v1/packages/{package}/files/a"
    found = await refused(gateway, "PUT", path, 400, "invalid-request", data=_BODY, headers=headers)
    assert next(iter(headers)) in found["detail"]


@pytest.mark.parametrize(
    "line", [b"X-Actor: \xff\xfe", b"X-Actor: a\xed\xa0\x80", b"X-Actor: a\x00b", b"X-Actor: a\x01b", b"X-Actor: a\x7f"]
)
async def test_control_characters_and_bytes_that_are_no_text_do_not_pass_in_headers(
    gateway: RunningGateway, package: str, line: bytes
) -> None:
    request = b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\n%b\r\nContent-Length: 0\r\n\r\n"
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, request % (package.encode(), line))
    assert answer.status == 400
    assert answer.problem()["type"] in (TYPE_PREFIX + "invalid-request", TYPE_PREFIX + "malformed-http")


async def test_a_header_that_may_come_once_is_refused_twice(gateway: RunningGateway, package: str) -> None:
    lines = b"X-Actor: a\r\nX-Actor: b\r\nContent-Length: 0"
    request = b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\n%b\r\n\r\n" % (package.encode(), lines)
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, request)
    assert (answer.status, answer.problem()["type"]) == (400, TYPE_PREFIX + "invalid-request")


@pytest.mark.parametrize(
    ("framing", "sent"),
    [
        (b"Content-Length: 1000", b"x" * 10),
        (b"Content-Length: 4000000", b"x" * 3_000_000),
        (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
        (b"Transfer-Encoding: chunked", b"5\r\nhel"),
        (b"Transfer-Encoding: chunked", b"2dc6c0\r\n" + b"x" * 3_000_000 + b"\r\n"),
    ],
)
async def test_a_body_that_breaks_off_leaves_nothing_behind(
    gateway: RunningGateway, package: str, folder: Path, framing: bytes, sent: bytes
) -> None:
    head = b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\n%b\r\n\r\n" % (package.encode(), framing)
    blobs = _files(folder / "blobs")
    ended = await _uploads_refused(gateway)

    async def noticed() -> bool:
        return await _uploads_refused(gateway) > ended

    async with nothing_recorded(gateway):
        await send_and_leave(gateway.port, head + sent)
        await until(noticed, 20, "the gateway did not notice that the client went away")
    assert _files(folder / "blobs") == blobs
    async with gateway.session.put(f"/v1/packages/{package}/files/a", data=_BODY) as answer:
        assert answer.status == 201


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


async def _uploads_refused(gateway: RunningGateway) -> float:
    """How many uploads have ended in a 400, whether or not anybody was there to read it."""
    async with gateway.session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    label = 'method="PUT",route="/v1/packages/{package_id}/files/{relative_path}",status="400"'
    return sum(float(line.rpartition(" ")[2]) for line in lines if f"requests_total{{{label}}}" in line)


@pytest.mark.parametrize(
    "sent", [b"zz\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloworld\r\n0\r\n\r\n"]
)
async def test_broken_chunks_are_refused(gateway: RunningGateway, package: str, sent: bytes) -> None:
    head = (
        b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\n" % package.encode()
    )
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, head + sent)
    assert (answer.status, answer.problem()["type"]) == (400, TYPE_PREFIX + "malformed-http")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\nHost: [::1]\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n",
        b"PUT /v1/packages HTTP/1.1\r\nHost: [::1]\r\nContent-Length: -1\r\n\r\n",
        b"PUT /v1/packages HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"PUT /v1/packages HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /healthz#fragment HTTP/1.1\r\nHost: [::1]\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_answered_with_a_problem(gateway: RunningGateway, request_bytes: bytes) -> None:
    answer = await exchange(gateway.port, request_bytes)
    assert (answer.status, answer.problem()["type"]) == (400, TYPE_PREFIX + "malformed-http")


async def test_a_coded_body_is_refused_rather_than_decoded(gateway: RunningGateway, package: str) -> None:
    path = f"/v1/packages/{package}/files/a"
    headers = {"Content-Encoding": "gzip"}
    await refused(gateway, "PUT", path, 415, "unsupported-media-type", data=_BODY, headers=headers)


async def test_a_transfer_coding_beside_chunked_is_refused_rather_than_stored(
    gateway: RunningGateway, package: str
) -> None:
    head = b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    async with nothing_recorded(gateway):
        answer = await exchange(gateway.port, head % package.encode() + b"5\r\nhello\r\n0\r\n\r\n")
    assert (answer.status, answer.problem()["type"]) == (415, TYPE_PREFIX + "unsupported-media-type")


async def test_a_body_that_stands_still_is_given_up(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings, body_idle_seconds=0.2) as gateway:
        async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
            package = (await answer.json())["package_id"]
        head = f"PUT /v1/packages/{package}/files/a HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 100\r\n\r\nsome".encode()
        async with nothing_recorded(gateway):
            slow = await exchange(gateway.port, head)
    assert (slow.status, slow.problem()["type"]) == (408, TYPE_PREFIX + "body-timeout")


@pytest.mark.parametrize("enough", [False, True])
async def test_a_body_that_trickles_is_given_up_unless_it_comes_at_the_least_pace(
    embedded_settings: Settings, enough: bool
) -> None:
    pace = 1.0 if enough else 10_000.0
    async with running_gateway(embedded_settings, body_idle_seconds=0.2, body_bytes_per_second=pace) as gateway:
        async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
            package = (await answer.json())["package_id"]
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = f"PUT /v1/packages/{package}/files/a HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 40\r\n\r\n"
        writer.write(head.encode())
        answered = asyncio.create_task(reader.readline())
        for _ in range(40):
            writer.write(b"x")
            await asyncio.wait({answered}, timeout=0.02)
            if answered.done():
                break
        assert (await answered).split()[1] == (b"201" if enough else b"408")
        writer.close()
        await writer.wait_closed()


async def test_a_file_above_the_limit_is_refused_declared_or_not(embedded_settings: Settings) -> None:
    settings = replace(embedded_settings, max_file_bytes=1000)
    async with running_gateway(settings) as gateway:
        async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
            path = f"/v1/packages/{(await answer.json())['package_id']}/files/a"
        await refused(gateway, "PUT", path, 413, "too-large", data=b"x" * 1001)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b"x" * 100

        await refused(gateway, "PUT", path, 413, "too-large", data=chunks())


async def test_ids_have_one_form_and_unknown_ones_are_not_found(gateway: RunningGateway, package: str) -> None:
    for bad in ("1", package.upper(), package.replace("-", ""), f"{package}%20", "%00"):
        await refused(gateway, "GET", f"/v1/packages/{bad}", 400, "invalid-request")
        await refused(gateway, "GET", f"/v1/files/{bad}", 400, "invalid-request")
        await refused(gateway, "PUT", f"/v1/packages/{bad}/files/a", 400, "invalid-request", data=b"")
        await refused(gateway, "POST", f"/v1/packages/{bad}/finalize", 400, "invalid-request")
    unknown = uuid4()
    await refused(gateway, "GET", f"/v1/packages/{unknown}", 404, "package-not-found")
    await refused(gateway, "GET", f"/v1/packages/{unknown}/files", 404, "package-not-found")
    await refused(gateway, "GET", f"/v1/packages/{unknown}/files/a", 404, "package-not-found")
    await refused(gateway, "GET", f"/v1/packages/{unknown}/manifest", 404, "package-not-found")
    await refused(gateway, "PUT", f"/v1/packages/{unknown}/files/a", 404, "package-not-found", data=_BODY)
    await refused(gateway, "POST", f"/v1/packages/{unknown}/finalize", 404, "package-not-found")
    await refused(gateway, "GET", f"/v1/packages/{package}/files/a", 404, "file-not-found")
    await refused(gateway, "GET", f"/v1/files/{unknown}", 404, "file-not-found")
    await refused(gateway, "GET", f"/v1/files/{unknown}/content", 404, "file-not-found")


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=1.0",
        "limit=x",
        "limit=",
        "limit=%D9%A1",
        "cursor=",
        "cursor=nonsense",
        "cursor=%00",
        "cursor=%ff",
        "status=open",
        "producer=",
        "producer=%00",
        "producer=" + "x" * 257,
        "manifest_digest=1",
        "colour=red",
        "limit=1&limit=2",
        "limit",
        "&",
        "=1",
        "&".join(f"a{i}=1" for i in range(40)),
    ],
)
async def test_a_query_that_breaks_a_rule_is_refused(gateway: RunningGateway, package: str, query: str) -> None:
    answer = await exchange(gateway.port, f"GET /v1/packages?{query} HTTP/1.1\r\nHost: [::1]\r\n\r\n".encode())
    assert (answer.status, answer.problem()["type"]) == (400, TYPE_PREFIX + "invalid-request")


async def test_a_wait_is_bounded_and_its_number_is_one(gateway: RunningGateway, package: str) -> None:
    for path in (f"/v1/packages/{package}", f"/v1/packages/{package}/files", f"/v1/packages/{package}/manifest"):
        for bad in ("0", "-1", "x", str(2**63), "1e3"):
            await refused(gateway, "GET", f"{path}?wait_sequence={bad}", 400, "invalid-request")
        await refused(gateway, "GET", f"{path}?wait_sequence=1000", 409, "sequence-beyond-log")
    await refused(gateway, "GET", f"/v1/packages/{uuid4()}?wait_sequence=1", 404, "package-not-found")


async def test_positions_that_mean_nothing_here_are_refused(gateway: RunningGateway, package: str) -> None:
    foreign = Position(uuid4(), {0: 1})
    identity = (await gateway.parts.log.end()).log
    beyond = Position(identity, {0: 1_000_000})
    for follow in ("false", "true"):
        for bad in ("nonsense", "", "%00", "AAAA", str(foreign)[:-2]):
            path = f"/v1/events?since={bad}&follow={follow}"
            await refused(gateway, "GET", path, 400, "invalid-position")
        await refused(gateway, "GET", f"/v1/events?since={foreign}&follow={follow}", 400, "foreign-log")
        await refused(gateway, "GET", f"/v1/events?since={beyond}&follow={follow}", 400, "invalid-position")
        headers = {"Last-Event-ID": str(foreign), "Accept": "text/event-stream"}
        await refused(gateway, "GET", f"/v1/events?follow={follow}", 400, "foreign-log", headers=headers)
    await refused(gateway, "GET", "/v1/events?follow=yes", 400, "invalid-request")
    await refused(gateway, "GET", "/v1/events?package_id=1", 400, "invalid-request")


async def test_a_range_outside_the_file_is_not_satisfiable(gateway: RunningGateway, package: str) -> None:
    path = await _content_of(gateway, package, _BODY)
    for value in ("bytes=20-", "bytes=20-30", "bytes=-0", "bytes=9999999999999999999-"):
        async with gateway.session.get(path, headers={"Range": value}) as answer:
            assert answer.status == 416
            assert answer.headers["Content-Range"] == f"bytes */{len(_BODY)}"
            found = json.loads(await answer.read())
        assert found["type"] == TYPE_PREFIX + "range-not-satisfiable"
        assert found["size"] == len(_BODY)
    empty = await _content_of(gateway, package, b"")
    await refused(gateway, "GET", empty, 416, "range-not-satisfiable", headers={"Range": "bytes=0-0"})


async def _content_of(gateway: RunningGateway, package: str, body: bytes) -> str:
    async with gateway.session.put(f"/v1/packages/{package}/files/f{len(body)}", data=body) as answer:
        assert answer.status == 201
        return f"/v1/files/{(await answer.json())['file_id']}/content"


async def test_a_representation_that_there_is_not_is_not_acceptable(gateway: RunningGateway, package: str) -> None:
    for accept in ("text/html", "application/cbor;q=0, application/json;q=0", "nonsense"):
        headers = {"Accept": accept}
        await refused(gateway, "GET", f"/v1/packages/{package}/manifest", 406, "not-acceptable", headers=headers)
        await refused(gateway, "GET", "/v1/events", 406, "not-acceptable", headers=headers)


async def test_a_key_that_was_used_for_another_request_is_refused(gateway: RunningGateway, package: str) -> None:
    key = {"Idempotency-Key": str(uuid4())}
    async with gateway.session.post("/v1/packages", json=_PACKAGE, headers=key) as answer:
        assert answer.status == 201
    other = {**_PACKAGE, "name": "other"}
    await refused(gateway, "POST", "/v1/packages", 422, "command-reused", json=other, headers=key)
    path = f"/v1/packages/{package}/files"
    async with gateway.session.put(f"{path}/a", data=_BODY, headers=key) as answer:
        assert answer.status == 201
    await refused(gateway, "PUT", f"{path}/b", 422, "command-reused", data=_BODY, headers=key)
    await refused(gateway, "PUT", f"{path}/a", 422, "command-reused", data=b"other", headers=key)
    await refused(gateway, "POST", f"/v1/packages/{package}/finalize", 422, "command-reused", headers=key)


async def test_a_path_is_taken_once_and_a_package_finalized_once(gateway: RunningGateway, package: str) -> None:
    path = f"/v1/packages/{package}"
    await refused(gateway, "GET", f"{path}/manifest", 409, "illegal-package-state")
    async with gateway.session.put(f"{path}/files/a", data=_BODY) as answer:
        assert answer.status == 201
    await refused(gateway, "PUT", f"{path}/files/a", 409, "duplicate-relative-path", data=_BODY)
    async with gateway.session.post(f"{path}/finalize") as answer:
        assert answer.status == 200
    await refused(gateway, "POST", f"{path}/finalize", 409, "illegal-package-state")
    await refused(gateway, "PUT", f"{path}/files/b", 409, "illegal-package-state", data=_BODY)


async def test_finalize_takes_no_fields(gateway: RunningGateway, package: str) -> None:
    path = f"/v1/packages/{package}/finalize"
    await refused(gateway, "POST", path, 400, "invalid-request", json={"force": True})
    async with gateway.session.post(path, json={}) as answer:
        assert answer.status == 200


async def test_unknown_resources_and_methods_are_problems_too(gateway: RunningGateway, package: str) -> None:
    for path in ("/", "/v1", "/v1/packages/", "/v2/packages", "/v1/packages/x/y"):
        await refused(gateway, "GET", path, 404, "unknown-resource")
    for target in (b"/v1/packages/../packages", b"//v1/packages", b"/v1/p%61ckages"):
        raw = await exchange(gateway.port, b"GET %b HTTP/1.1\r\nHost: [::1]\r\n\r\n" % target)
        assert (raw.status, raw.problem()["type"]) == (404, TYPE_PREFIX + "unknown-resource")
    for method, path, allow in (
        ("DELETE", "/v1/packages", "GET, HEAD, POST"),
        ("POST", f"/v1/packages/{package}/files/a", "GET, HEAD, PUT"),
        ("GET", f"/v1/packages/{package}/finalize", "POST"),
        ("OPTIONS", "/healthz", "GET, HEAD"),
        ("PATCH", "/v1/events", "GET, HEAD"),
    ):
        async with gateway.session.request(method, path) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, allow)
            assert json.loads(await answer.read())["type"] == TYPE_PREFIX + "method-not-allowed"


async def test_who_waits_for_100_continue_is_spared_the_upload(gateway: RunningGateway, package: str) -> None:
    async with gateway.session.put(f"/v1/packages/{package}/files/a", data=_BODY, expect100=True) as answer:
        assert answer.status == 201
    lines = b"Expect: 100-continue\r\nContent-Length: 5000000"
    head = b"PUT /v1/packages/%b/files/a HTTP/1.1\r\nHost: [::1]\r\n%b\r\n\r\n" % (package.encode(), lines)
    async with nothing_recorded(gateway):
        early = await exchange(gateway.port, head)
    assert (early.status, early.headers["connection"]) == (409, "close")
    early = await exchange(gateway.port, head.replace(b"100-continue", b"the-unexpected"))
    assert (early.status, early.problem()["type"]) == (417, TYPE_PREFIX + "expectation-failed")


async def test_many_connections_of_another_protocol_leave_the_gateway_well(gateway: RunningGateway) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n"  # the beginning of a TLS handshake
    answers = await asyncio.gather(*(exchange(gateway.port, hello) for _ in range(50)))
    assert {answer.status for answer in answers} == {400}
    async with gateway.session.get("/readyz") as answer:
        assert answer.status == 200
