"""Writing tar archives, always the same for the same files: no owners, fixed modes, one time for all entries."""

from __future__ import annotations

from services.tar.blocks import BLOCK, OCTAL_LIMIT, file_header, pax_header

END = bytes(2 * BLOCK)
"""What ends an archive."""

_NAME_BYTES = 100


def entry_header(relative_path: str, size_bytes: int, modified: int = 0) -> bytes:
    """What stands before a file's bytes; `modified` in seconds since 1970."""
    name = relative_path.encode()
    records = {}
    if len(name) > _NAME_BYTES:
        records["path"] = relative_path
        name = b"long-name"
    if size_bytes >= OCTAL_LIMIT:
        records["size"] = str(size_bytes)
    extension = pax_header(records) if records else b""
    return extension + file_header(name, 0 if "size" in records else size_bytes, modified)


def padding(size_bytes: int) -> bytes:
    """What stands behind a file's bytes."""
    return bytes(-size_bytes % BLOCK)
