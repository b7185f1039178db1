"""Digests that a client declares: checked on every route that takes bytes, or refused."""

from __future__ import annotations

import gzip
import hashlib
import io
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from artifact_store.documents.resumable_uploads import encode_metadata
from ingest_gateway.app import ROUTES
from ingest_gateway.protocol.parameters import (
    CONTENT_DIGEST,
    CONTENT_MD5,
    FILE_DIGEST,
    REPR_DIGEST,
)
from services.config import Settings
from tests.contract.blobs_stage import some_bytes
from tests.integration.http.test_archive import tar_of
from tests.integration.http_gateway import RunningGateway, running_gateway

CREATE = b'{"name":"n","producer":"p","subject":"s","retention_class":"scratch"}'
TUS = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}
FILE = some_bytes(200_000)
ARCHIVE = tar_of({"a": b"a", "b": some_bytes(100_000)})


@dataclass(frozen=True)
class Write:
    """A request that brings bytes, to a path below the package or to one that says PACKAGES, and its success."""

    method: str
    path: str
    body: bytes
    status: int
    headers: Mapping[str, str]


JSON = {"Content-Type": "application/json"}
PACKAGES = "/v1/packages"
WRITES = {
    "create": Write("POST", PACKAGES, CREATE, 201, JSON),
    "put": Write("PUT", "/files/a", FILE, 201, {}),
    "put nothing": Write("PUT", "/files/a", b"", 201, {}),
    "archive": Write("POST", "/files", ARCHIVE, 201, {"Content-Type": "application/x-tar"}),
    "coded archive": Write(
        "POST", "/files", gzip.compress(ARCHIVE), 201, {"Content-Type": "application/x-tar", "Content-Encoding": "gzip"}
    ),
    "first bytes": Write(
        "POST",
        "/uploads",
        FILE[:-1],
        201,
        {**TUS, "Upload-Length": str(len(FILE)), "Upload-Metadata": encode_metadata({"relative_path": "a"})},
    ),
    "more bytes": Write("PATCH", "/uploads/ID", FILE[:-1], 204, {**TUS, "Upload-Offset": "0"}),
    "last bytes": Write("PATCH", "/uploads/ID", FILE, 204, {**TUS, "Upload-Offset": "0"}),
    "finalize": Write("POST", "/finalize", b"{}", 200, JSON),
    "finalize bare": Write("POST", "/finalize", b"", 200, {}),
    "known": Write("POST", "/v1/blobs/known", b'{"addresses":[]}', 200, JSON),
}
EVERY = pytest.mark.parametrize("name", WRITES)


def digest(algorithm: str, data: bytes) -> str:
    """A member of a header's dictionary."""
    return f"{algorithm}=:{b64encode(hashlib.new(algorithm.replace('-', ''), data).digest()).decode()}:"


def md5(data: bytes) -> str:
    return b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings) as running:
        yield running


async def prepared(gateway: RunningGateway, write: Write) -> str:
    """The path of the request, after a package and, where it needs one, an upload were made."""
    if write.path.startswith("/v1"):
        return write.path
    async with gateway.session.post(PACKAGES, data=CREATE, headers=JSON) as answer:
        path = answer.headers["Location"]
    if "ID" not in write.path:
        return path + write.path
    begin = WRITES["first bytes"].headers
    async with gateway.session.post(f"{path}/uploads", headers=begin) as answer:
        assert answer.status == 201
        return answer.headers["Location"]


async def sent(gateway: RunningGateway, write: Write, path: str, **more: str) -> tuple[int, dict[str, Any]]:
    async with gateway.session.request(
        write.method, path, data=io.BytesIO(write.body), headers={**write.headers, **more}
    ) as answer:
        problem = await answer.json(content_type=None) if answer.status >= 400 else {}
        return answer.status, problem


@asynccontextmanager
async def nothing_added(gateway: RunningGateway, path: str) -> AsyncIterator[None]:
    async def seen() -> tuple[int, str | None]:
        if "/uploads/" not in path:
            return await gateway.events(), None
        async with gateway.session.head(path, headers=TUS) as answer:
            return await gateway.events(), answer.headers["Upload-Offset"]

    before = await seen()
    yield
    assert await seen() == before


@EVERY
async def test_digests_that_are_right_are_taken(gateway: RunningGateway, name: str) -> None:
    write = WRITES[name]
    right = {
        "Content-Digest": f"{digest('sha-256', write.body)}, {digest('sha-512', write.body)}, md5=:AAAA:",
        "Content-MD5": md5(write.body),
    }
    whole = FILE if name == "first bytes" else write.body
    right["Repr-Digest"] = f"{digest('sha-256', whole)}, unixsum=:AAAA:"
    assert await sent(gateway, write, await prepared(gateway, write), **right) == (write.status, {})


@EVERY
@pytest.mark.parametrize(
    "wrong",
    [
        {"Content-Digest": digest("sha-256", b"other")},
        {"Content-Digest": digest("sha-512", b"other")},
        {"Content-MD5": md5(b"other")},
        {"Repr-Digest": digest("sha-256", b"other")},
        {"Repr-Digest": digest("sha-512", b"other")},
    ],
    ids=["content-256", "content-512", "md5", "repr-256", "repr-512"],
)
async def test_bytes_that_are_not_those_of_the_digest_are_refused_and_nothing_is_recorded(
    gateway: RunningGateway, name: str, wrong: dict[str, str]
) -> None:
    write = WRITES[name]
    path = await prepared(gateway, write)
    async with nothing_added(gateway, path):
        status, problem = await sent(gateway, write, path, **wrong)
    if name == "first bytes" and "sha-512" in wrong.get("Repr-Digest", ""):
        assert status == 400
        assert "checked by sha-256 alone" in problem["detail"]
    elif name == "first bytes" and "Repr-Digest" in wrong:
        assert status == 201, "it is that of the whole file, whose last byte is missing"
    else:
        assert (status, problem["type"].rpartition(":")[2]) == (422, "content-mismatch")


async def test_one_wrong_digest_among_right_ones_is_enough(gateway: RunningGateway) -> None:
    write = WRITES["put"]
    path = await prepared(gateway, write)
    for more in (
        {"Content-Digest": f"{digest('sha-256', FILE)}, {digest('sha-512', b'other')}"},
        {"Content-Digest": digest("sha-256", FILE), "Content-MD5": md5(b"other")},
        {"Content-Digest": digest("sha-256", FILE), "Repr-Digest": digest("sha-256", b"other")},
    ):
        async with nothing_added(gateway, path):
            status, problem = await sent(gateway, write, path, **more)
        assert (status, problem["type"].rpartition(":")[2]) == (422, "content-mismatch")


async def test_the_digest_of_a_whole_file_holds_when_its_last_byte_comes(gateway: RunningGateway) -> None:
    write = WRITES["first bytes"]
    path = await prepared(gateway, write)
    wrong = {**write.headers, "Repr-Digest": digest("sha-256", b"other")}
    async with gateway.session.post(path, data=io.BytesIO(write.body), headers=wrong) as answer:
        assert answer.status == 201
        upload = answer.headers["Location"]
    last = Write("PATCH", upload, FILE[-1:], 204, {**TUS, "Upload-Offset": str(len(FILE) - 1)})
    events = await gateway.events()
    status, problem = await sent(gateway, last, upload)
    assert (status, problem["type"].rpartition(":")[2]) == (422, "content-mismatch")
    assert await gateway.events() == events


@EVERY
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Content-Digest": "md5=:AAAA:"}, "Content-Digest names no supported algorithm"),
        ({"Content-Digest": "sha=:AAAA:, x=:AA==:"}, "Content-Digest names no supported algorithm"),
        ({"Content-Digest": "sha-256"}, "Content-Digest must be a dictionary"),
        ({"Content-Digest": "sha-512=:AAAA:"}, "Content-Digest: sha-512 must have 64 bytes"),
        ({"Repr-Digest": "crc32c=:AAAA:"}, "Repr-Digest names no supported algorithm"),
        ({"Content-MD5": "AAAA"}, "Content-MD5 must have 16 bytes"),
        ({"Digest": "SHA-256=AAAA"}, "Digest (RFC 3230) is obsolete"),
        ({"Trailer": "Content-Digest"}, "Content-Digest is not read from a trailer"),
    ],
)
async def test_digests_that_cannot_be_checked_are_refused(
    gateway: RunningGateway, name: str, headers: dict[str, str], named: str
) -> None:
    write = WRITES[name]
    path = await prepared(gateway, write)
    async with nothing_added(gateway, path):
        status, problem = await sent(gateway, write, path, **headers)
    assert status == 400
    assert named in problem["detail"]


async def test_bytes_that_an_upload_does_not_take_are_not_acknowledged_with_a_digest(gateway: RunningGateway) -> None:
    write = WRITES["first bytes"]
    untyped = {**write.headers, "Content-Type": "application/octet-stream"}
    path = await prepared(gateway, write)
    right = {**untyped, "Content-Digest": digest("sha-256", write.body)}
    async with gateway.session.post(path, data=io.BytesIO(write.body), headers=right) as answer:
        assert answer.status == 415


def test_every_route_with_a_body_names_the_digests_in_the_document() -> None:
    for route in ROUTES:
        if route.body is not None:
            assert CONTENT_DIGEST in route.parameters, route.operation_id
            assert CONTENT_MD5 in route.parameters, route.operation_id
            assert (REPR_DIGEST in route.parameters) != (FILE_DIGEST in route.parameters), route.operation_id
