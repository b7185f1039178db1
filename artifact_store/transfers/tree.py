"""The files below a folder that a push sends, checked before anything is sent.

Only files are kept, so empty folders are not. A symbolic link to a regular file inside the tree is pushed as that file.
These are refused: links that leave the tree or lead to a folder or to nothing, pipes, sockets, devices, unreadable
files, and names that are not valid relative paths of the registry.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from artifact_store.client.bodies import FileStamp
from artifact_store.errors import InvalidPathError, InvalidRequestError
from artifact_store.media_types import guess_media_type
from artifact_store.rules import check_path

_MOST_FAULTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class TreeFile:
    """One file to push. Its bytes are read from `path`, in which links are resolved."""

    relative_path: str
    path: str
    stamp: FileStamp

    @property
    def media_type(self) -> str:
        """The media type, guessed from the name."""
        return guess_media_type(self.relative_path)


def walk(path: Path) -> list[TreeFile]:
    """The files at or below `path`, sorted by the UTF-8 bytes of their relative paths. Blocks while it reads folders.

    The relative path of a single file is its name. `path` itself may be a link.

    Raises:
        InvalidPathError: names that are not valid relative paths; the text lists them.
        InvalidRequestError: there is nothing at `path`, or something below it cannot be pushed; the text lists it.
    """
    try:
        root = path.resolve(strict=True)
    except (FileNotFoundError, RuntimeError):  # RuntimeError: links in a circle
        raise InvalidRequestError(f"there is nothing to push at {_shown(path)}") from None
    except OSError as error:
        raise InvalidRequestError(f"{_shown(path)} cannot be pushed: {error.strerror}") from None
    found: list[TreeFile] = []
    bad_names: list[str] = []
    bad_files: list[str] = []
    alone = not root.is_dir()
    # If the user names a link, the link's own name is kept.
    entries = iter([(path.name or root.name, str(root), False)]) if alone else _below(root, bad_files)
    for relative_path, entry, link in entries:
        try:
            check_path(relative_path)
        except InvalidPathError as error:
            bad_names.append(f"{_shown(entry)}: {error.detail}")
            continue
        try:
            found.append(_file(relative_path, entry, None if alone else root, link=link))
        except OSError as error:
            bad_files.append(f"{_shown(entry)}: {error.strerror}")
        except InvalidRequestError as error:
            bad_files.append(f"{_shown(entry)}: {error.detail}")
    if bad_names:
        raise InvalidPathError(_listed("names that a package cannot hold", bad_names))
    if bad_files:
        raise InvalidRequestError(_listed("things that cannot be pushed", bad_files))
    return sorted(found, key=lambda file: file.relative_path.encode())


def _below(folder: Path, faults: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Relative path, path, and whether it is a link, of everything below except folders."""
    waiting = [(str(folder), "")]
    while waiting:
        current, below = waiting.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((entry.path, f"{below}{entry.name}/"))
                    else:
                        yield below + entry.name, entry.path, entry.is_symlink()
        except OSError as error:
            faults.append(f"{_shown(current)}: {error.strerror}")


def _file(relative_path: str, path: str, root: Path | None, *, link: bool) -> TreeFile:
    # Texts and plain system calls, because a tree may have a hundred thousand files.
    if link:
        path = str(_target(Path(path), root))
    found = os.stat(path)  # noqa: PTH116 - see above
    if not stat.S_ISREG(found.st_mode):
        raise InvalidRequestError("not a regular file")
    if not os.access(path, os.R_OK):
        raise InvalidRequestError("it cannot be read")
    return TreeFile(relative_path, path, FileStamp.of(found))


def _target(link: Path, root: Path | None) -> Path:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InvalidRequestError("a link to nothing") from None
    if root is not None and not target.is_relative_to(root):
        raise InvalidRequestError("a link that leaves the tree")
    if target.is_dir():
        raise InvalidRequestError("a link to a folder")
    return target


def _listed(what: str, faults: list[str]) -> str:
    more = len(faults) - _MOST_FAULTS_SHOWN
    lines = faults[:_MOST_FAULTS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return f"nothing was created; {what}:\n  " + "\n  ".join(lines)


def _shown(path: Path | str) -> str:
    """The path for a message: printable, whatever bytes it contains."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
