"""`python -m tests.fuzz [NAME…] [--seconds N]`: try decoders, guided by the branches that inputs reach (Linux, x86-64).

Each decoder has a process of its own, in which atheris feeds it inputs. Those that reach a new branch are kept in
`var/fuzz/NAME/corpus` and are where the next run begins. An input that is mistaken, or takes longer than INPUT_SECONDS
or much memory, ends the run: it is printed, and lies beside the corpus. Once mended, it belongs into `decoders.py`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from services.config import PREFIX
from tests.services.shared import VAR

FOLDER = VAR / "fuzz"
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
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="decoders; without one: all")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for each")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.here:
        _fuzz_here(given.names[0], given.seconds)
    names = given.names or _names()
    failed = [name for name in names if not fuzz(name, given.seconds)]
    if failed:
        print(f"mistaken by {', '.join(failed)}")  # noqa: T201 - a tool for the terminal
    return 1 if failed else 0


def fuzz(name: str, seconds: int, folder: Path = FOLDER) -> bool:
    """Try one decoder for so long; whether it mistook nothing. Prints what was done. Blocks."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--here", "--seconds", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={key: value for key, value in os.environ.items() if not key.startswith(PREFIX)} | {_FOLDER: str(folder)},
        check=False,
    )
    done = _DONE.search(run.stdout)
    if run.returncode == 0 and done is not None:
        print(f"{name}: {int(done[1]):,} inputs reached {done[2]} branches", flush=True)  # noqa: T201
        return True
    print(run.stdout[-8_000:])  # noqa: T201
    for path in sorted(_folder_of(name, folder).glob("mistaken-*")):
        print(f"{name}: {path}: {path.read_bytes()[:_SHOWN_BYTES]!r}", flush=True)  # noqa: T201
    return False


_FOLDER = "FUZZ_FOLDER"


def _folder_of(name: str, folder: Path) -> Path:
    return folder / name.replace(" ", "-")


def _names() -> list[str]:
    from tests.fuzz.decoders import decoders

    return list(decoders(FOLDER))


def _fuzz_here(name: str, seconds: int) -> None:
    """Try the decoder in this process, which ends with that."""
    import atheris  # has no build for some systems

    with atheris.instrument_imports(include=_WATCHED):
        from tests.fuzz.decoders import PLANTED, decoders
    folder = _folder_of(name, Path(os.environ[_FOLDER]))
    corpus, seeds = folder / "corpus", folder / "seeds"
    for each in (corpus, seeds):
        each.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        decoder = PLANTED if name == "planted" else decoders(Path(scratch))[name]
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
        flags = [f"-{option}={value}" for option, value in options.items()]
        atheris.Setup(["fuzz", *flags, str(corpus), str(seeds)], decoder.attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
