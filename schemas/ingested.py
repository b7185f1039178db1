"""`v1.file.ingested` in every form that a writer needs: record value, digests, and the file's items of the manifest.

Nearly every event is one, and all its forms are made of the same pieces, so they are made together, each piece once,
from templates of their constant bytes. That takes a tenth of the time of making an event object and giving it to the
general ways (`codec`, `digests`, `services.core.freezing`); a test holds both to the same bytes.
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Protocol
from uuid import UUID

from blake3 import blake3

from artifact_store.canonical import cbor_integer, cbor_text
from artifact_store.events import FILE_INGESTED
from schemas import identifiers
from schemas.avro import avro_long, avro_text
from schemas.codec import EncodedEvents, framing
from schemas.digests import DIGEST_BYTES

_PIECE = b"%b"
_IDENTIFIER = cbor_text(b"x" * 36)[:2] + _PIECE
_HEX_DIGEST = cbor_text(b"x" * 64)[:2] + _PIECE
_DIGEST_CBOR = b"\x58\x20"
_DIGEST = _DIGEST_CBOR + _PIECE


def _map(**values: bytes) -> bytes:
    """The template of a CBOR map, in canonical order: the order in which the pieces are to be given."""
    keys = sorted((cbor_text(key.encode()), value) for key, value in values.items())
    return bytes([0xA0 + len(keys)]) + b"".join(key + value for key, value in keys)


_PAYLOAD = _map(
    file_id=_IDENTIFIER,
    relative_path=_PIECE,
    media_type=_PIECE,
    size_bytes=_PIECE,
    blake3=_DIGEST,
    sha256=_DIGEST,
    receipt=_map(
        location_id=_IDENTIFIER, backend_id=_PIECE, key=_PIECE, offset=_PIECE, length=_PIECE, stored_at=_PIECE
    ),
)
_MANIFEST_ITEM = _map(
    file_id=_IDENTIFIER,
    relative_path=_PIECE,
    media_type=_PIECE,
    size_bytes=_PIECE,
    blake3=_HEX_DIGEST,
    sha256=_HEX_DIGEST,
)
_RECEIPT_ITEM = _map(
    file_id=_IDENTIFIER,
    location_id=_IDENTIFIER,
    backend_id=_PIECE,
    key=_PIECE,
    offset=_PIECE,
    length=_PIECE,
    stored_at=_PIECE,
)

_CACHED = 1_024
_TOGETHER = 4
"""For so many files it is faster to make all identifiers at once than one after the other."""

_EVENT_TYPE = FILE_INGESTED.encode()
_IDENTIFIER_AVRO = b"\x48"
_FRAMING = framing(FILE_INGESTED) + _IDENTIFIER_AVRO


class File(Protocol):
    """What a command says of a file; see `FileIngested`."""

    @property
    def relative_path(self) -> str: ...
    @property
    def media_type(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def blake3(self) -> bytes: ...
    @property
    def sha256(self) -> bytes: ...
    @property
    def backend_id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def stored_at(self) -> int: ...


class PackagePieces:
    """What all events of a package share."""

    __slots__ = ("avro", "chain", "namespace", "text")

    def __init__(self, package_id: UUID) -> None:
        self.text = text = str(package_id).encode()
        self.namespace = package_id.bytes
        self.avro = avro_text(_EVENT_TYPE) + avro_text(text)
        self.chain = b"\x88" + cbor_text(_EVENT_TYPE) + cbor_text(text)


@dataclass(slots=True)
class EncodedIngested(EncodedEvents):
    """With the files' items in the manifest, in canonical CBOR."""

    manifest_items: Sequence[bytes]
    receipt_items: Sequence[bytes]


CommandFiles = tuple[bytes, str, Sequence[File], int]
"""Of a command that ingests files: its id as text, its actor, its last files, how many files it has in all."""


def ingested(
    package: PackagePieces, commands: Sequence[CommandFiles], *, created_at: int, sequence: int, digest: bytes
) -> EncodedIngested:
    """The events of commands of one package, one after the other, each event linked to the one before it.

    `sequence` and `digest` are those of the package's last event. Raises ValueError for a digest of another length, a
    number that is no Avro long, a text with a surrogate.
    """
    created_avro, created_cbor = _time(created_at)
    package_avro, package_chain = package.avro, package.chain
    everything = [file for _, _, files, _ in commands for file in files]
    paths = [file.relative_path.encode() for file in everything]
    keys = [file.key.encode() for file in everything]
    identify = _identifiers if len(everything) >= _TOGETHER else _identifiers_singly
    event_ids, file_ids, location_ids = identify(package.namespace, sequence, everything, paths, keys)
    found = EncodedIngested(sequence + 1, event_ids, values := [], digests := [], items := [], receipts := [])
    rows = zip(everything, paths, keys, event_ids, file_ids, location_ids, strict=True)
    # One hasher again and again: making one takes as long as hashing so few bytes.
    hasher = blake3()
    reset, update, hashed = hasher.reset, hasher.update, hasher.digest
    media_type = backend_id = None
    for command_id, actor, files, count in commands:
        actor_avro, actor_cbor, _ = _text(actor)
        command_avro = b"%b%b\x48%b" % (created_avro, actor_avro, command_id)
        command_chain = b"%b%b\x78\x24%b\x58\x20" % (created_cbor, actor_cbor, command_id)
        index, count_avro = count - len(files), avro_long(count)
        for file, path, key, event_id, file_id, location_id in islice(rows, len(files)):
            blake3_digest, sha256_digest = file.blake3, file.sha256
            if not len(blake3_digest) == len(sha256_digest) == len(digest) == DIGEST_BYTES:
                raise ValueError("a digest has not 32 bytes")
            size, offset, length, stored_at = file.size_bytes, file.offset, file.length, file.stored_at
            # Mostly those of the file before.
            if file.media_type != media_type:
                media_type = file.media_type
                media_avro, media, _ = _text(media_type)
            if file.backend_id != backend_id:
                backend_id = file.backend_id
                backend_avro, backend, _ = _text(backend_id)
            sequence += 1
            path_cbor, key_cbor, size_cbor = cbor_text(path), cbor_text(key), cbor_integer(size)
            offset_cbor, stored_cbor, size_avro = cbor_integer(offset), cbor_integer(stored_at), avro_long(size)
            # The same number for every file that is not packed with others.
            length_cbor, length_avro = (
                (size_cbor, size_avro) if length == size else (cbor_integer(length), avro_long(length))
            )
            reset()
            update(
                _PAYLOAD
                % (
                    blake3_digest,
                    sha256_digest,
                    file_id,
                    key_cbor,
                    length_cbor,
                    offset_cbor,
                    stored_cbor,
                    backend,
                    location_id,
                    media,
                    size_cbor,
                    path_cbor,
                )
            )
            payload_digest = hashed()
            values.append(
                b"".join(
                    (
                        _FRAMING,
                        event_id,
                        package_avro,
                        avro_long(sequence),
                        command_avro,
                        avro_long(index),
                        count_avro,
                        payload_digest,
                        digest,
                        _IDENTIFIER_AVRO,
                        file_id,
                        avro_text(path),
                        media_avro,
                        size_avro,
                        blake3_digest,
                        sha256_digest,
                        _IDENTIFIER_AVRO,
                        location_id,
                        backend_avro,
                        avro_text(key),
                        avro_long(offset),
                        length_avro,
                        avro_long(stored_at),
                    )
                )
            )
            link = (package_chain, cbor_integer(sequence), command_chain, payload_digest, _DIGEST_CBOR, digest)
            reset()
            update(b"".join(link))
            digest = hashed()
            digests.append(digest)
            items.append(
                _MANIFEST_ITEM % (hexlify(blake3_digest), hexlify(sha256_digest), file_id, media, size_cbor, path_cbor)
            )
            receipts.append(
                _RECEIPT_ITEM % (key_cbor, length_cbor, offset_cbor, file_id, stored_cbor, backend, location_id)
            )
            index += 1
    return found


_Identifiers = tuple[list[bytes], list[bytes], list[bytes]]
"""The texts of the identifiers of events, files and locations; see `schemas.identifiers`."""


def _identifiers(
    namespace: bytes, sequence: int, files: Sequence[File], paths: Sequence[bytes], keys: Sequence[bytes]
) -> _Identifiers:
    count = len(files)
    names = [b"%bfile:%b" % (namespace, path) for path in paths]
    names += [b"%b%d" % (namespace, number) for number in range(sequence + 1, sequence + 1 + count)]
    numbers, texts = identifiers.derived_all(names)
    _, locations = identifiers.derived_all(
        [
            b"%blocation:%b:%b:%d:%d"
            % (numbers[at : at + 16], _text(file.backend_id)[2], key, file.offset, file.length)
            for at, file, key in zip(range(0, len(numbers), identifiers.DERIVED_BYTES), files, keys, strict=False)
        ]
    )
    return texts[count:], texts[:count], locations


def _identifiers_singly(
    namespace: bytes, sequence: int, files: Sequence[File], paths: Sequence[bytes], keys: Sequence[bytes]
) -> _Identifiers:
    file_ids = [identifiers.file_text(namespace, path) for path in paths]
    return (
        [identifiers.event_text(namespace, number) for number in range(sequence + 1, sequence + 1 + len(files))],
        file_ids,
        [
            identifiers.location_text(file_id, _text(file.backend_id)[2], key, file.offset, file.length)
            for file_id, file, key in zip(file_ids, files, keys, strict=True)
        ],
    )


@lru_cache(_CACHED)
def _text(text: str) -> tuple[bytes, bytes, bytes]:
    """A text that comes again and again, in Avro, in CBOR, and as it is."""
    encoded = text.encode()
    return avro_text(encoded), cbor_text(encoded), encoded


@lru_cache(8)
def _time(micros: int) -> tuple[bytes, bytes]:
    """A batch's time in Avro and CBOR."""
    return avro_long(micros), cbor_integer(micros)
