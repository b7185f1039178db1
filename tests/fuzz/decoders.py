"""The decoders to fuzz, with the errors that they promise, valid inputs, and inputs that they once got wrong."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import sys
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from uuid import UUID

import cbor2
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import HttpRequestParser
from blake3 import blake3

from artifact_store import manifest
from artifact_store.archives.bundle import SmallFile
from artifact_store.archives.tar import END, ArchiveLimits, TarReader, tar_of_small
from artifact_store.client.device_login import _expiry
from artifact_store.documents import http, resumable_uploads
from artifact_store.documents.event_lines import event_line, parse_event
from artifact_store.documents.problem_details import error_of_answer, retry_after
from artifact_store.documents.shapes import CreatePackageRequest, IngestNamedRequest
from artifact_store.errors import AnswerExpiredError, ArtifactStoreError
from artifact_store.events import PackageCreated, RecordedEvent
from artifact_store.position import Position
from artifact_store.rules import check_path
from ingest_gateway.admission import Room
from ingest_gateway.peers import forwarding
from ingest_gateway.protocol.codings import _Decoding
from ingest_gateway.protocol.connections import HEADER_BYTES, AllowedHosts, _BoundedParser
from ingest_gateway.protocol.http_errors import answer_of
from ingest_gateway.protocol.json_body import parse_json
from ingest_gateway.protocol.negotiation import choose, not_modified, requested
from ingest_gateway.protocol.request import _query, held
from schemas import codec
from schemas.codec import schema_fingerprint
from schemas.runs import entry_of, read_entry
from services.archive import Archive, check_archive
from services.archive.archive_file import MAGIC, ArchivedRecord, ArchiveWriter, BlobPiece, Contents
from services.blobs.resumable.states import UploadState, _read
from services.blobs.s3 import multipart, requests
from services.config import Settings
from services.core import wire
from services.core.decide import IngestCheck, Limits, acknowledge, decide
from services.identity.oidc import read_keys, unverified
from services.identity.policy import parse_policy
from services.identity.static_tokens import read_tokens
from services.log.port import PackageExtent, PartitionStatus
from services.log.records import SkipRecord
from services.log.state.snapshots import SnapshotError, _tag, read_index
from services.runtime.addresses import ListenAddress
from services.views.queries import read_cursor, write_cursor
from services.views.tables import artifact_packages
from tests import commands
from tests.unit.core.test_decide import after
from tests.views_history import History

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GOLDEN = Path(__file__).parents[1] / "unit" / "schemas" / "golden"

_DEEP = 100_000
_DIGITS = b"9" * 5_000
"""More than `int` reads."""


@dataclass(frozen=True)
class Decoder:
    """What is tried: its errors by design, valid inputs, and inputs that it once mistook."""

    decode: Callable[[bytes], object]
    corpus: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (ArtifactStoreError,)
    mistaken: tuple[bytes, ...] = ()

    def attempt(self, data: bytes) -> None:
        """Decode. Raises what the decoder should not raise."""
        try:
            self.decode(data)
        except self.errors as error:
            if isinstance(error, ArtifactStoreError):
                answer_of(error)


def _of_text(decode: Callable[[str], object]) -> Callable[[bytes], object]:
    """The decoder of a header or a parameter: bytes come as aiohttp gives them."""
    return lambda data: decode(data.decode("utf-8", "surrogateescape"))


def _read_archive(data: bytes) -> None:
    reader = TarReader(ArchiveLimits(max_files=10, max_file_bytes=10_000, whole_bytes=1_000))
    for start in range(0, len(data), 700):
        list(reader.feed(data[start : start + 700]))
    reader.close()


@cache
def _log_archive() -> dict[bytes, bytes]:
    """The blocks of a whole archive of a log, by their kinds."""
    events, blob = History(1).fill(packages=1, files=1).events, b"bytes of a file"
    about = {schema_fingerprint(event.event_type): (event.event_type, 1) for event in events}
    contents = Contents(UUID(int=1), 1, {0: 9}, backend="local", schemas=about, package_count=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.archive"
        with ArchiveWriter(path, contents, {}) as archive:
            for offset, event in enumerate(events):
                key, found = str(event.package_id).encode(), (("event_type", event.event_type.encode()),)
                archive.add(ArchivedRecord(0, offset, event.created_at, key, codec.encode(event), found))
            archive.add_piece(BlobPiece(blake3(blob).digest(), len(blob), 0, blob))
            archive.finish()
        data, at, blocks = path.read_bytes(), len(MAGIC), dict[bytes, bytes]()
    while at < len(data) - 16:
        kind, stored, _ = struct.unpack_from("<cII", data, at)
        blocks[kind] = zstd.decompress(data[at + 9 : at + 9 + stored])
        at += 9 + stored + 32
    return blocks


def _read_log_archive(path: Path) -> Callable[[bytes], object]:
    """Puts the input, whose first byte names a block, in the block's place, with the digests that it then has."""

    def read(data: bytes) -> None:
        written, digest, at = MAGIC, bytes(32), 0
        for kind, valid in _log_archive().items():
            content = data[1:] if kind == data[:1] else valid
            at, stored = len(written), zstd.compress(content)
            head = struct.pack("<cII", kind, len(stored), len(content))
            digest = blake3(digest + head + stored).digest()
            written += head + stored + digest
        path.write_bytes(written + struct.pack("<Q", at) + b"ASLOGEND")
        with Archive(path) as archive:
            asyncio.run(check_archive(archive))

    return read


def _read_coded(coding: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> None:
        decoding = _Decoding(coding)
        for start in range(0, len(data), 700):
            decoding.take(data[start : start + 700])
            while decoding.give():
                pass
        decoding.close()

    return read


def _read_heads() -> Callable[[bytes], object]:
    loop = asyncio.new_event_loop()
    loop.close()  # nothing runs on it, the parser only notes it

    def read(data: bytes) -> None:
        protocol = BaseProtocol(loop)
        parser = HttpRequestParser(
            protocol,
            loop,
            65_536,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            auto_decompress=False,
        )
        room = Room("heads", 1 << 20)
        bounded = _BoundedParser(parser, room, "client", lambda: True)
        for start in range(0, len(data), 700):
            for message, _ in bounded.feed_data(data[start : start + 700])[0]:
                _query(message.path.partition("?")[2], {"limit", "type"}, {"type"})
                AllowedHosts(("store.example",)).check(message.headers.getall("Host", ()), ())

    return read


def _read_env_file(folder: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path = folder / "settings.env"
        path.write_bytes(data)
        return Settings.from_env(env_file=path)

    return read


def _read_token_file(folder: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path = folder / "tokens.json"
        path.write_bytes(data)
        path.chmod(0o600)
        return read_tokens(path)

    return read


def _read_record(data: bytes) -> None:
    """Both readers of a record must take the same ones, and find the same in them."""
    try:
        plain: object = entry_of(codec.decode(data))
    except codec.UndecodableEventError:
        plain = None
    try:
        quick: object = read_entry(data)
    except codec.UndecodableEventError:
        # The quick one refuses more: times before 1970, and metadata that nobody could be shown.
        return
    assert quick == plain


def decoders(folder: Path) -> dict[str, Decoder]:
    """All decoders of what others send, by name. Some write the input to a file in the folder."""
    created = commands.create()
    package = created.package_id
    ingested = commands.ingest(package, "a", "b/c")
    checked = wire.encode_check(IngestCheck(package, ["a", "b/c"], created.command_id, ()))
    body = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": {"k": [1.5, None]}}
    address = "blake3:" + "ab" * 32
    named = {"relative_path": "a", "media_type": "x/y", "size_bytes": 5, "content_address": address, "blob": address}
    confirmed = forwarding.encode_confirmation(SkipRecord(0, 5, bytes(32), "ada", "why", commands.command_id("skip")))
    files = [SmallFile(path, "text/plain", bytes(600)) for path in ("a", "ä/" + "x" * 200)]
    golden = tuple(path.read_bytes() for path in sorted(GOLDEN.glob("*.avro")))
    expired = wire.encode_error(AnswerExpiredError("why", facts={"package_id": str(package), "finalized_at": 7}))
    state = PartitionStatus(3, "", 1_000_000, 0.25, "file", None, 4)
    at = "2026-01-31T12:00:00+01:00"
    index = {"format": 1, "size": 7, "parts": [{"blake3": "ab"}]}
    packed, framed = gzip.compress(b"some text" * 9), zstd.compress(b"some text" * 9)
    keys = {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "A" * 43, "kid": "k", "use": "sig", "alg": "Ed25519"}]}
    return {
        "avro": Decoder(codec.decode, golden, (codec.UndecodableEventError, ArtifactStoreError)),
        "record": Decoder(_read_record, golden),
        "manifest": Decoder(manifest.decode, (_manifest(), manifest.to_json(_manifest())), mistaken=(_deep(b"{"),)),
        "log archive": Decoder(
            _read_log_archive(folder / "log.archive"), tuple(kind + block for kind, block in _log_archive().items())
        ),
        "tar": Decoder(_read_archive, (tar_of_small(files) + END,)),
        "gzip": Decoder(_read_coded("gzip"), (packed, packed * 2)),
        "zstd": Decoder(_read_coded("zstd"), (framed, framed * 2)),
        "heads": Decoder(
            _read_heads(),
            (
                b"PUT /v1/packages/x/files/a%20b?limit=5 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n12345",
                b"POST / HTTP/1.1\r\nHost: store.example:80\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
                b"GET http://[::1]/healthz HTTP/1.1\r\nHost: [::1]\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            ),
            (ArtifactStoreError, BadHttpMessage),
            (
                b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"0" * 5_000 + b"5\r\n\r\n12345",
                b"GET http://[::1]@/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
            ),
        ),
        "position": Decoder(_of_text(Position.parse), (str(Position(UUID(int=7), {0: 5, 3: 1 << 40})).encode(),)),
        "cursor": Decoder(
            _of_text(
                lambda text: read_cursor(text, "packages", artifact_packages.c.created_at, artifact_packages.c.id)
            ),
            (write_cursor("packages", 7, package).encode(),),
        ),
        "path": Decoder(_of_text(lambda text: check_path(http.unquoted(text))), (b"a/b%20c/%C3%A4.txt",)),
        "id": Decoder(_of_text(lambda text: http.parse_id("id", text)), (str(package).encode(),)),
        "digests": Decoder(
            _of_text(http.parse_digests("Repr-Digest")),
            (f"sha-256=:{'A' * 43}=:, blake3=:{'A' * 43}=:".encode(),),
        ),
        "content md5": Decoder(_of_text(http.parse_content_md5), (b"A" * 22 + b"==",), mistaken=(("ä" * 24).encode(),)),
        "checksum": Decoder(
            _of_text(resumable_uploads.parse_checksum), (b"sha1 AAAA",), mistaken=("sha1 ää==".encode(),)
        ),
        "upload metadata": Decoder(
            _of_text(resumable_uploads.decode_metadata), (b"relative_path Yi9j,media_type dGV4dC9wbGFpbg==,empty",)
        ),
        "range": Decoder(_of_text(lambda text: requested(text, None, "tag", 100)), (b"bytes=0-4", b"bytes=-7")),
        "tags": Decoder(_of_text(lambda text: not_modified(text, text, "tag")), (b'W/"a", "tag"', b"*")),
        "accept": Decoder(
            _of_text(lambda text: choose(text, ("a/b", "text/event-stream"))), (b"text/*;q=0.5, a/b;q=0.1;v=1",)
        ),
        "retry after": Decoder(_of_text(retry_after), (b"17", b"Wed, 21 Oct 2015 07:28:00 GMT")),
        "address": Decoder(_of_text(ListenAddress.parse), (b"[::1]:9464", b"localhost:0"), (ValueError,)),
        "json": Decoder(lambda data: parse_json(data, CreatePackageRequest), (json.dumps(body).encode(),)),
        "named files": Decoder(
            lambda data: parse_json(data, IngestNamedRequest).to_files(), (json.dumps({"files": [named] * 2}).encode(),)
        ),
        "event line": Decoder(parse_event, (event_line(_event()),)),
        "problem": Decoder(
            lambda data: answer_of(error_of_answer(409, {}, data)),
            (held(answer_of(AnswerExpiredError("why", facts={"package_id": str(package), "finalized_at": 7}))),),
        ),
        "token": Decoder(
            _of_text(unverified),
            (b"eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2kiLCJzdWIiOiJzIn0.c2ln",),
        ),
        "own token": Decoder(
            _of_text(_expiry),
            (b"e30.eyJleHAiOjcuNX0.c2ln",),
            mistaken=(b"e30." + urlsafe_b64encode(b'{"exp": 1%b}' % (b"0" * 400)) + b".c2ln",),
        ),
        "keys": Decoder(
            lambda data: read_keys(json.loads(data), ("RS256", "ES256", "Ed25519")),
            (json.dumps(keys).encode(),),
            (ValueError, RecursionError),
        ),
        "tokens file": Decoder(_read_token_file(folder), (b'{"format": 1, "tokens": []}',)),
        "policy": Decoder(
            lambda data: parse_policy(data, folder / "policy.toml"), (_POLICY,), mistaken=(b"a = " + _DIGITS,)
        ),
        "settings": Decoder(
            _read_env_file(folder),
            (b'ARTIFACT_STORE_KAFKA_OPTIONS=\'{"debug": "all"}\'\nARTIFACT_STORE_MAX_UPLOADS=7\n',),
            mistaken=(b"ARTIFACT_STORE_KAFKA_OPTIONS='" + b"[" * _DEEP + b"'\n",),
        ),
        "command": Decoder(wire.decode_command, (wire.encode_command(created), wire.encode_command(ingested))),
        "question": Decoder(wire.decode_check, (checked,)),
        "acknowledgement": Decoder(wire.decode_acknowledgement, (_acknowledged(),)),
        "forwarded error": Decoder(
            lambda data: answer_of(wire.decode_error(data)),
            (expired,),
            mistaken=(
                cbor2.dumps(["push-back", "why", float("inf"), None]),
                cbor2.dumps(["rejected", "why", None, None, {"finalized_at": 1 << 70}]),
            ),
        ),
        "class": Decoder(forwarding.decode_class, (b"raw-evidence",), mistaken=(b"\xff", b"a\nb")),
        "end": Decoder(forwarding.decode_end, (b"\x1a\x00\x01\x00\x00",)),
        "status": Decoder(
            lambda data: forwarding.decode_status(data, "http://owner"), (forwarding.encode_status([state]),)
        ),
        "extent": Decoder(forwarding.decode_extent, (forwarding.encode_extent(PackageExtent(7_000_000, 5)),)),
        "confirmation": Decoder(forwarding.decode_confirmation, (confirmed,)),
        "snapshot index": Decoder(
            lambda data: read_index(data, {"format": 1}, bytes(32)),
            (json.dumps({**index, "tag": _tag(bytes(32), index)}).encode(),),
            (SnapshotError,),
            (b'{"format": 1, "tag": "\xc3\xa4"}', _deep(b'{"format": 1, "x":')),
        ),
        "upload state": Decoder(lambda data: _read(data, 1), (_upload_state(),)),
        "upload record": Decoder(
            multipart.UploadRecord.decode,
            (json.dumps({"key": "k", "upload_id": "u", "started_at": at, "active_at": at}).encode(),),
            mistaken=(_deep(b""),),
        ),
        "store answer": Decoder(
            lambda data: requests.Answer(400, {}, data).code,
            (b"<?xml version='1.0'?><Error xmlns='x'><Code>SlowDown</Code></Error>",),
            mistaken=(b"<?xml version='1.0' encoding='x'?><a/>", b"<?xml version='1.0' encoding='utf-32'?><a/>"),
        ),
    }


def _deep(before: bytes) -> bytes:
    """JSON that is nested more deeply than any parser follows."""
    return before + (b'"x":' if before == b"{" else b"") + b"[" * _DEEP


def _manifest() -> bytes:
    """The manifest of a package with two files."""
    package = commands.create().package_id
    state = after(commands.create(), commands.ingest(package, "a", "b/c"))
    (event,) = decide(state, commands.finalize(package), 2_000, Limits())
    found: bytes = event.payload.manifest  # type: ignore[union-attr,assignment]
    return found


def _acknowledged() -> bytes:
    command = commands.ingest(commands.create().package_id, "a", "b/c")
    return wire.encode_acknowledgement(acknowledge(after(commands.create(), command), command))


def _event() -> RecordedEvent:
    payload = PackageCreated("n", "p", "s", "scratch", 7, '{"k":1.5}')
    ids, digests = (UUID(int=1), UUID(int=2), UUID(int=3)), (bytes(32), bytes(32))
    position = Position(UUID(int=7), {0: 5})
    return RecordedEvent(
        event_id=ids[0],
        event_type="v1.package.created",
        package_id=ids[1],
        sequence=1,
        created_at=1_767_225_600_123_456,
        actor="ada",
        command_id=ids[2],
        command_index=0,
        command_count=1,
        payload_digest=digests[0],
        previous_digest=digests[1],
        payload=payload,
        position=position,
    )


def _upload_state() -> bytes:
    at = datetime(2026, 1, 31, tzinfo=UTC)
    state = UploadState(
        upload_id=UUID(int=1),
        package_id=UUID(int=2),
        relative_path="a/b",
        media_type="text/plain",
        actor="ada",
        command_id=UUID(int=3),
        length=7,
        blake3="ab" * 32,
        sha256=None,
        metadata="relative_path YS9i",
        token="t",
        part_bytes=5 << 20,
        created_at=at,
        active_at=at,
    )
    return state.model_dump_json().encode()


_POLICY = (
    b'[[issuer]]\nalias = "ci"\nurl = "https://i.example"\naudience = ["a"]\n'
    b'[[rule]]\nissuer = "ci"\nclaims = { sub = "*" }\ncan = ["read"]\n'
)


def _fails_at_a_word(data: bytes) -> None:
    if data[:1] == b"s" and data[1:2] == b"e" and data[2:3] == b"c" and data[3:4] == b"r" and data[4:5] == b"e":
        raise AssertionError("the word was found")


PLANTED = Decoder(_fails_at_a_word, (b"word",))
"""By which the fuzzer itself is tried."""
