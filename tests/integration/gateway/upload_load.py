"""Load on a gateway from a separate process.

Start it with `python -m tests.integration.gateway.upload_load URL PACKAGE UPLOADS BYTES`.

It runs UPLOADS uploads at a time, each of BYTES bytes from an empty sparse file, which costs this side almost nothing.
An upload that is pushed back tries again when it was told to. Ends with exit code 0 when all are stored.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

_BUSY = (429, 503)


def main() -> None:
    """Load as the command line says."""
    url, package, uploads, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(uploads) as threads:
        file.truncate(size)
        paths = [f"/v1/packages/{package}/files/{n}" for n in range(uploads)]
        for done in [threads.submit(_stored, url, path, file.fileno(), size) for path in paths]:
            done.result()


def _stored(url: str, path: str, file: int, size: int) -> None:
    while (pause := _attempt(url, path, file, size)) is not None:
        time.sleep(pause)  # as the answer asked


def _attempt(url: str, path: str, file: int, size: int) -> float | None:
    """Upload once; None when it is stored, else after how many seconds to come again."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"PUT {path} HTTP/1.1\r\nHost: [::1]\r\nExpect: 100-continue\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        status, headers = _head(connection)
        if status == 100:
            sent = 0
            while sent < size:
                sent += os.sendfile(connection.fileno(), file, sent, size - sent)
            status, headers = _head(connection)
    if status == 201:
        return None
    if status not in _BUSY:
        raise SystemExit(f"{path}: {status} {headers}")
    return float(headers["retry-after"])


def _head(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and headers of the next answer; what may follow is not read."""
    text = b""
    while not text.endswith(b"\r\n\r\n"):
        more = connection.recv(1)
        if not more:
            raise SystemExit(f"the gateway closed the connection after {text!r}")
        text += more
    status, *lines = text.decode().strip().split("\r\n")
    return int(status.split()[1]), {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}


if __name__ == "__main__":
    main()
