"""Trees of files, for comparing."""

from __future__ import annotations

from pathlib import Path


def read(folder: Path) -> dict[str, bytes]:
    """The content of every file below the folder, by its path in it."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}
