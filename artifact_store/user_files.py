"""Files of one user: where the client keeps them, how one is replaced privately, and how names become durable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def state_folder(name: str) -> Path | None:
    """`artifact-store/NAME` in the user's state folder (XDG Base Directory 0.8); None if the user has no home."""
    named = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(named) if named.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return state / "artifact-store" / name


def replace_privately(path: Path, content: bytes) -> None:
    """Create or replace the file atomically. It keeps its owner, and only the owner can read it. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # only the owner can read it
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists() and (before := path.stat()).st_uid != os.geteuid():
                os.fchown(descriptor, before.st_uid, before.st_gid)  # so that root can replace another user's file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Blocks. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
