"""The commands that the append benchmarks submit: packages of a laboratory's runs, made before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from uuid import UUID

from artifact_store.manifest import content_key
from schemas import identifiers
from schemas.runs import StoredFile
from services.core.decide import CreatePackage, FinalizePackage, IngestFiles

ACTOR = "pipeline@lab.example"
_STORED_AT = 1_900_000_000_000_000


@dataclass(frozen=True, slots=True)
class PackageCommands:
    """One package's life: its creation, the commands that bring its files, its finalization."""

    create: CreatePackage
    ingests: Sequence[IngestFiles]
    finalize: FinalizePackage

    @property
    def events(self) -> int:
        """How many events they become."""
        return 2 + sum(len(command.files) for command in self.ingests)


def package_commands(draw: Random, files: int, files_a_command: int = 1) -> PackageCommands:
    """A package with this many files. The same state of `draw` gives the same commands; digests look like real ones."""
    create_id = _command_id(draw)
    package_id = identifiers.package_id(ACTOR, create_id)
    run = draw.randrange(10**6)
    create = CreatePackage(
        package_id,
        create_id,
        ACTOR,
        name=f"run-{run:06}",
        producer="lab/spectrometer-3",
        subject=f"sample-{run % 1000}",
        retention_class="raw-evidence",
        metadata=f'{{"campaign":"c-{run % 50}","operator":"lab 7","temperature_kelvin":{270 + run % 40}}}',
    )
    stored = [_stored_file(draw, number) for number in range(files)]
    ingests = [
        IngestFiles(package_id, _command_id(draw), ACTOR, tuple(stored[start : start + files_a_command]))
        for start in range(0, files, files_a_command)
    ]
    return PackageCommands(create, ingests, FinalizePackage(package_id, _command_id(draw), ACTOR))


def _stored_file(draw: Random, number: int) -> StoredFile:
    digest = draw.randbytes(32)
    size = draw.randrange(1, 64 << 20)
    return StoredFile(
        relative_path=f"frames/{number // 16:03}/frame-{number:06}.bin",
        media_type="application/octet-stream",
        size_bytes=size,
        blake3=digest,
        sha256=draw.randbytes(32),
        backend_id="s3",
        key=content_key(digest),
        offset=0,
        length=size,
        stored_at=_STORED_AT + draw.randrange(10**9),
    )


def _command_id(draw: Random) -> UUID:
    return UUID(bytes=draw.randbytes(16), version=4)
