"""Incoming bytes are counted, hashed and checked, however they are split."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.errors import ContentMismatchError, TooLargeError
from artifact_store.models import Declared
from services.blobs.intake import PIECE_BYTES, Intake


async def chunked(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def intake_of(chunks: Iterable[bytes], said: Declared | None = None, max_bytes: int = 1 << 30) -> Intake:
    return Intake(chunked(chunks), declared=said or Declared(), max_bytes=max_bytes)


@given(chunks=st.lists(st.binary(max_size=50)), limits=st.lists(st.integers(1, 60), min_size=1))
async def test_pieces_have_just_the_size_asked_for_until_the_body_ends(chunks: list[bytes], limits: list[int]) -> None:
    intake = intake_of(chunks)
    whole = b"".join(chunks)
    taken = b""
    for turn in range(len(whole) + 1):
        limit = limits[turn % len(limits)]
        piece = await intake.take(limit)
        assert len(piece) == min(limit, len(whole) - len(taken))
        taken += piece
        if not piece:
            break
    assert taken == whole
    found = await intake.digests()
    assert (found.length, found.blake3, found.sha256) == (
        len(whole),
        blake3(whole).digest(),
        hashlib.sha256(whole).digest(),
    )


async def test_large_chunks_are_handed_on_in_bounded_pieces_and_hashed_in_order() -> None:
    whole = bytes(range(256)) * 20_000
    intake = intake_of([whole[:-1], whole[-1:]])
    pieces = []
    while piece := await intake.take(len(whole)):
        pieces.append(piece)
    assert max(map(len, pieces)) == PIECE_BYTES
    assert b"".join(pieces) == whole
    assert (await intake.digests()).blake3 == blake3(whole).digest()


async def test_a_body_that_grows_too_long_is_refused_before_its_end() -> None:
    def endless() -> Iterable[bytes]:
        while True:
            yield bytes(1000)

    for said, limit, error in (
        (Declared(), 10_000, TooLargeError),
        (Declared(size_bytes=9_999), 10_000, ContentMismatchError),
    ):
        intake = intake_of(endless(), said, limit)
        for _ in range(3):
            assert len(await intake.take(3_000)) == 3_000
        with pytest.raises(error):
            await intake.take(3_000)


async def test_digests_are_not_given_before_the_end() -> None:
    intake = intake_of([b"one", b"two"])
    await intake.take(3)
    with pytest.raises(RuntimeError):
        await intake.digests()
