"""Every decoder takes any bytes: it gives a value or a promised error, quickly and without much memory.

Bytes are random, or made from valid ones (the corpus) by small changes, which get further. Every `make test` tries
some. `make endurance` tries each decoder for ten minutes, or FUZZ_SECONDS, guided by the branches that inputs reach if
atheris is available (`tests/fuzz`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.decoders import Decoder, decoders

SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))
EXAMPLES = 25
_ODD = (b"\x00" * 8, b"\xff" * 8, b"\x9f", b"\xbf", b"\x1b" + b"\xff" * 8, b"\xc3\x28", b"[" * 200, b"\\u0000", b"%00")

NAMES = tuple(decoders(Path()))


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the guided fuzzer, and return what it says."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments], capture_output=True, text=True, errors="replace", check=False
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


def attempt(decoder: Decoder, data: bytes) -> None:
    """Decode. Raises what the decoder should not raise, and AssertionError when it takes long."""
    began = time.process_time()
    decoder.attempt(data)
    assert time.process_time() - began < 2.0


def try_random(decoder: Decoder, examples: int) -> None:
    """Try so many inputs. Raises as `attempt`."""

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(changed(decoder.corpus), changed(decoder.corpus), st.binary(max_size=200)))
    def one(data: bytes) -> None:
        attempt(decoder, data)

    one()


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_are_decoded_or_refused_as_promised(name: str, tmp_path: Path) -> None:
    decoder = decoders(tmp_path)[name]
    for valid in decoder.corpus:
        decoder.decode(valid)
    for mistaken in decoder.mistaken:
        attempt(decoder, mistaken)
    try_random(decoder, EXAMPLES)


@pytest.mark.endurance
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_for_ten_minutes(name: str, tmp_path: Path) -> None:
    if find_spec("atheris") is not None:
        guided = fuzz(name, "--seconds", str(SECONDS))
        assert guided.returncode == 0, guided.stdout
        return
    decoder, ends = decoders(tmp_path)[name], time.monotonic() + SECONDS
    while time.monotonic() < ends:
        try_random(decoder, 5_000)


@pytest.mark.endurance
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has no build for this system")
def test_the_guided_fuzzer_finds_what_chance_would_not(tmp_path: Path) -> None:
    guided = fuzz("planted", "--seconds", "120", "--folder", str(tmp_path))
    assert guided.returncode == 1, guided.stdout
    (found,) = (tmp_path / "planted").glob("mistaken-crash-*")
    assert found.read_bytes().startswith(b"secre")
