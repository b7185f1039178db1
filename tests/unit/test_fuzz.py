"""Every decoder takes any bytes: it gives a value or raises the error that it promises, soon and without much memory.

Bytes are drawn at random, and made of valid ones (the corpus) by small changes, which come further. Every `make test`
tries some; `make endurance` tries each decoder for ten minutes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifact_store import manifest
from artifact_store.archives.bundle import SmallFile
from artifact_store.archives.tar import END, ArchiveLimits, TarReader, tar_of_small
from artifact_store.documents import http
from artifact_store.documents.shapes import CreatePackageRequest
from artifact_store.errors import ArtifactStoreError
from artifact_store.position import Position
from artifact_store.rules import check_path
from ingest_gateway.peers import forwarding
from ingest_gateway.protocol.json_body import parse_json
from schemas import codec
from services.config import Settings
from services.core import wire
from services.core.decide import acknowledge, decide
from services.core.limits import Limits
from services.identity.oidc import unverified
from services.identity.policy import parse_policy
from services.identity.static_tokens import read_tokens
from services.log.records import SkipRecord
from services.views.queries import read_cursor, write_cursor
from services.views.tables import artifact_packages
from tests import commands
from tests.unit.core.test_decide import after

GOLDEN = Path(__file__).parent / "schemas" / "golden"
TEN_MINUTES = 600.0
_ODD = (b"\x00" * 8, b"\xff" * 8, b"\x9f", b"\xbf", b"\x1b" + b"\xff" * 8, b"\xc3\x28", b"[" * 200, b"\\u0000", b"%00")


@dataclass(frozen=True)
class Decoder:
    """What is tried: its errors by design, and valid inputs."""

    decode: Callable[[bytes], object]
    corpus: tuple[bytes, ...]
    errors: tuple[type[Exception], ...] = (ArtifactStoreError,)


def of_text(decode: Callable[[str], object]) -> Callable[[bytes], object]:
    """The decoder of a header or a parameter: bytes come as aiohttp gives them."""
    return lambda data: decode(data.decode("utf-8", "surrogateescape"))


def read_archive(data: bytes) -> None:
    reader = TarReader(ArchiveLimits(max_files=10, max_file_bytes=10_000, whole_bytes=1_000))
    for start in range(0, len(data), 700):
        list(reader.feed(data[start : start + 700]))
    reader.close()


def read_env_file(folder: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path = folder / "settings.env"
        path.write_bytes(data)
        return Settings.from_env(env_file=path)

    return read


def read_token_file(folder: Path) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        path = folder / "tokens.json"
        path.write_bytes(data)
        path.chmod(0o600)
        return read_tokens(path)

    return read


def decoders(folder: Path) -> dict[str, Decoder]:
    """All decoders of what others send, by name."""
    created = commands.create()
    package = created.package_id
    ingested = commands.ingest(package, "a", "b/c")
    frozen = manifest_bytes()
    position = str(Position(UUID(int=7), {0: 5, 3: 1 << 40}))
    cursor = write_cursor("packages", 7, package)
    digests = f"sha-256=:{'A' * 43}=:, blake3=:{'A' * 43}=:"
    claims = "eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2kiLCJzdWIiOiJzIn0.c2ln"
    policy = (
        b'[[issuer]]\nalias = "ci"\nurl = "https://i.example"\naudience = ["a"]\n'
        b'[[rule]]\nissuer = "ci"\nclaims = { sub = "*" }\ncan = ["read"]\n'
    )
    body = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": {"k": [1.5, None]}}
    confirmed = forwarding.encode_confirmation(SkipRecord(0, 5, bytes(32), "ada", "why", commands.command_id("skip")))
    files = [SmallFile(path, "text/plain", bytes(600)) for path in ("a", "ä/" + "x" * 200)]
    return {
        "avro": Decoder(
            codec.decode,
            tuple(path.read_bytes() for path in sorted(GOLDEN.glob("*.avro"))),
            (codec.UndecodableEventError, ArtifactStoreError),
        ),
        "manifest": Decoder(manifest.decode, (frozen,)),
        "tar": Decoder(read_archive, (tar_of_small(files) + END,)),
        "position": Decoder(of_text(Position.parse), (position.encode(),)),
        "cursor": Decoder(
            of_text(lambda text: read_cursor(text, "packages", artifact_packages.c.created_at, artifact_packages.c.id)),
            (cursor.encode(),),
        ),
        "path": Decoder(of_text(lambda text: check_path(http.unquoted(text))), (b"a/b%20c/%C3%A4.txt",)),
        "digests": Decoder(of_text(http.parse_digests("Repr-Digest")), (digests.encode(),)),
        "json": Decoder(lambda data: parse_json(data, CreatePackageRequest), (json.dumps(body).encode(),)),
        "token": Decoder(of_text(unverified), (claims.encode(),)),
        "tokens file": Decoder(read_token_file(folder), (b'{"format": 1, "tokens": []}',)),
        "policy": Decoder(lambda data: parse_policy(data, folder / "policy.toml"), (policy,)),
        "settings": Decoder(
            read_env_file(folder),
            (b'ARTIFACT_STORE_KAFKA_OPTIONS=\'{"debug": "all"}\'\nARTIFACT_STORE_MAX_UPLOADS=7\n',),
        ),
        "command": Decoder(wire.decode_command, (wire.encode_command(created), wire.encode_command(ingested))),
        "acknowledgement": Decoder(wire.decode_acknowledgement, (acknowledged(),)),
        "forwarded error": Decoder(wire.decode_error, (wire.encode_error(ArtifactStoreError("why")),)),
        "end": Decoder(forwarding.decode_end, (b"\x1a\x00\x01\x00\x00",)),
        "status": Decoder(lambda data: forwarding.decode_status(data, "http://owner"), (b"\x80",)),
        "extent": Decoder(forwarding.decode_extent, (b"\x82\x1a\x00\x01\x00\x00\x05",)),
        "confirmation": Decoder(forwarding.decode_confirmation, (confirmed,)),
    }


def manifest_bytes() -> bytes:
    """The manifest of a package with two files."""
    package = commands.create().package_id
    state = after(commands.create(), commands.ingest(package, "a", "b/c"))
    (event,) = decide(state, commands.finalize(package), 2_000, Limits())
    found: bytes = event.payload.manifest  # type: ignore[union-attr,assignment]
    return found


def acknowledged() -> bytes:
    command = commands.ingest(commands.create().package_id, "a", "b/c")
    return wire.encode_acknowledgement(acknowledge(after(commands.create(), command), command))


NAMES = (
    *("avro", "manifest", "tar", "position", "cursor", "path", "digests", "json", "token", "tokens file", "policy"),
    *("settings", "command", "acknowledgement", "forwarded error", "end", "status", "extent", "confirmation"),
)


@st.composite
def changed(draw: Any, corpus: tuple[bytes, ...]) -> bytes:
    """A valid input with some bytes flipped, cut out, put in, doubled, or taken from another one."""
    data = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.integers(0, 5)):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = draw(st.one_of(st.sampled_from(_ODD), st.binary(max_size=12)))
            case 3:
                data[at:at] = data[at:end]
            case 4:
                other = draw(st.sampled_from(corpus))
                data[at:end] = other[at : at + draw(st.integers(0, 40))]
            case _:
                del data[at:]
    return bytes(data)


def fuzz(decoder: Decoder, examples: int) -> None:
    """Try so many inputs. Raises what the decoder raises and should not."""

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(changed(decoder.corpus), changed(decoder.corpus), st.binary(max_size=200)))
    def attempt(data: bytes) -> None:
        began = time.process_time()
        with suppress(*decoder.errors):
            decoder.decode(data)
        assert time.process_time() - began < 2.0

    attempt()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_decoded_or_refused_as_promised(name: str, tmp_path: Path) -> None:
    found = decoders(tmp_path)
    assert found.keys() == set(NAMES)
    fuzz(found[name], 60)


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_is_valid(name: str, tmp_path: Path) -> None:
    decoder = decoders(tmp_path)[name]
    for valid in decoder.corpus:
        decoder.decode(valid)


@pytest.mark.endurance
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_for_ten_minutes(name: str, tmp_path: Path) -> None:
    decoder, ends = decoders(tmp_path)[name], time.monotonic() + TEN_MINUTES
    while time.monotonic() < ends:
        fuzz(decoder, 5_000)
