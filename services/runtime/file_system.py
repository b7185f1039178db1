"""Locks between processes, folders whose names survive a power cut, and files that only their owner can read.

The modes do not depend on the umask, which is for files that the process writes for its user, such as those of a pull.
The system releases a lock however its holder ends. If a folder's own name was not synced, a power cut can lose it with
everything in it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from artifact_store.user_files import sync_folder

PRIVATE_FOLDER = 0o700
"""The mode of the product's own folders."""

PRIVATE_FILE = 0o600
"""The mode of the product's own files."""

_POLL_SECONDS = 0.002


class FileLock:
    """An exclusive lock on an empty file that is never deleted (the lock on a deleted file could be held twice).

    Two instances exclude each other within one process too, because flock(2) locks belong to the open file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this instance holds the lock."""
        return self._descriptor is not None

    def take(self, timeout_seconds: float = 0.0) -> bool:
        """Take the lock; blocks for at most `timeout_seconds`. False if another holds it. Raises OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        deadline = time.monotonic() + timeout_seconds
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        return False
                    time.sleep(_POLL_SECONDS)
                else:
                    self._descriptor = descriptor
                    return True
        finally:
            if self._descriptor != descriptor:
                os.close(descriptor)

    def release(self) -> None:
        """Release the lock; does nothing if it is not held. Only for the process that took it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked process has the file open as well
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder, and those above it, and make their names durable. Blocks. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(PRIVATE_FOLDER, exist_ok=True)
    sync_folder(folder.parent)


def private_file(path: Path) -> Path:
    """Create an empty file, and its folder, unless they exist. Returns the path. Blocks. Raises OSError.

    The files that SQLite keeps beside a database get the mode of the database.
    """
    if not path.exists():
        path.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE))
    return path


def only_we_write(path: Path) -> bool:
    """Whether only this process's user, its group and root may change a file or folder. Blocks. Raises OSError.

    The group counts as ours, because Kubernetes lets the group of a pod write to its volumes (`fsGroup`).
    """
    about = path.stat()
    by_others = about.st_mode & stat.S_IWOTH
    by_a_group = about.st_mode & stat.S_IWGRP and about.st_gid != os.getegid()
    return about.st_uid in (0, os.geteuid()) and not by_others and not by_a_group


def secure_folder(folder: Path) -> None:
    """Make the names of an existing folder, and of those above it, durable. Blocks. Raises OSError.

    The process that created one may not have synced it yet, or may have died before that.
    """
    folder = folder.resolve()
    while not folder.is_mount():  # a mount point existed before
        folder = folder.parent
        with suppress(PermissionError):  # we created nothing in a folder that we may not read
            sync_folder(folder)
