"""`python -m tests.fuzz [NAME…] [--seconds N]`: try decoders, guided by the branches that inputs reach (Linux, x86-64).

Each decoder runs in a separate process, in which atheris feeds it inputs. Inputs that reach a new branch are kept in
`var/fuzz/NAME/corpus`, where the next run begins. The run ends at an input that raises the wrong error, or takes longer
than INPUT_SECONDS or much memory: it is printed, and stored beside the corpus. Once the decoder is mended, add the
input to `decoders.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from services.config import PREFIX
from tests.services.shared import VAR

if TYPE_CHECKING:
    from tests.fuzz.decoders import Decoder

SECONDS = 60
INPUT_SECONDS = 10
INPUT_BYTES = 8192
MEMORY_MIB = 2048

_WATCHED = ["artifact_store", "schemas", "services", "ingest_gateway", "tests", "joserfc", "tomllib", "email", "json"]
"""Packages whose branches count."""

_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+)")
_SHOWN_BYTES = 500


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 no decoder mistook anything, 1 one did, 2 wrong usage."""
    import atheris  # has no build for some systems

    with atheris.instrument_imports(include=_WATCHED):
        from tests.fuzz.decoders import PLANTED, decoders
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="decoders; without one: all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each")
    parser.add_argument("--folder", type=Path, default=VAR / "fuzz", help="for what is kept")
    given = parser.parse_args(arguments)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    with TemporaryDirectory() as scratch:
        known = decoders(Path(scratch))
        if unknown := [name for name in given.names if name not in (*known, "planted")]:
            parser.error(f"there is no decoder {', '.join(unknown)}; there are {', '.join(known)}")
        failed = [
            name
            for name in given.names or known
            if not _fuzz(known.get(name, PLANTED), name, given.folder / name.replace(" ", "-"), given.seconds)
        ]
    return 1 if failed else 0


def _fuzz(decoder: Decoder, name: str, folder: Path, seconds: int) -> bool:
    """Try the decoder for so long; whether it mistook nothing. Prints what was done. Blocks."""
    corpus, seeds, log = folder / "corpus", folder / "seeds", folder / "log"
    for each in (corpus, seeds):
        each.mkdir(parents=True, exist_ok=True)
    for seed in (*decoder.corpus, *decoder.mistaken):
        if len(seed) <= INPUT_BYTES:
            (seeds / sha256(seed).hexdigest()[:16]).write_bytes(seed)
    options = {
        "max_total_time": seconds,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": MEMORY_MIB,
        "max_len": INPUT_BYTES,
        "artifact_prefix": f"{folder}/mistaken-",
    }
    child = os.fork()
    if not child:
        _run_fuzzer([f"-{name}={value}" for name, value in options.items()], [corpus, seeds], decoder.attempt, log)
    _, status = os.waitpid(child, 0)
    shown = log.read_text(errors="replace")
    done = _DONE.search(shown)
    if status == 0 and done is not None:
        print(f"{name}: {int(done[1]):,} inputs reached {done[2]} branches", flush=True)  # noqa: T201 - a tool
        return True
    print(f"{shown[-8_000:]}\n{name} was mistaken; exit status {status}")  # noqa: T201
    for path in sorted(folder.glob("mistaken-*")):
        print(f"{path}: {path.read_bytes()[:_SHOWN_BYTES]!r}", flush=True)  # noqa: T201
    return False


def _run_fuzzer(flags: list[str], folders: list[Path], attempt: Callable[[bytes], None], log: Path) -> None:
    """Feed the decoder in this process, which ends with that."""
    import atheris

    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    atheris.Setup(["fuzz", *flags, *map(str, folders)], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
