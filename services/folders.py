"""Folders whose names outlive a power cut: what lies in one that does not was lost with it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, and make their names durable. Blocks. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def secure_folder(folder: Path) -> None:
    """Make the names of a folder, and of those above it, durable although they are there. Blocks. Raises OSError.

    Whoever made one may not have come to that yet, or died before it.
    """
    folder = folder.resolve()
    while not folder.is_mount():  # what it is mounted on was there before
        folder = folder.parent
        with suppress(PermissionError):  # one that we may not read is not where we made anything
            sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Blocks. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
