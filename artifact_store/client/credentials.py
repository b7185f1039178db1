"""The credentials of a client: a token in a file, or the login of a person.

A token is only sent over https or to a loopback address. It is never in a URL, an error or a `repr`.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from artifact_store.errors import ConfigurationError
from artifact_store.rules import is_loopback

TOKEN_FILE = "ARTIFACT_STORE_TOKEN_FILE"  # noqa: S105 - the name of a variable
CA = "ARTIFACT_STORE_CA"

_MAX_BYTES = 64 << 10

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 §2.1


class Credentials(Protocol):
    """A source of tokens. Belongs to one event loop."""

    async def token(self) -> str:
        """The token for the next request. May wait for one.

        Raises ConfigurationError, UnauthenticatedError, UnavailableError.
        """


class TokenFile:
    """A token in a file, which is read again when the file changes, as Kubernetes changes projected tokens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: object = None
        self._token = ""

    def __repr__(self) -> str:
        return f"TokenFile({str(self.path)!r})"

    async def token(self) -> str:
        """The token that the file has now. Blocks while it reads. Raises ConfigurationError."""
        try:
            about = self.path.stat()
            state = (about.st_ino, about.st_size, about.st_mtime_ns)
            if state != self._state:
                with self.path.open("rb") as file:
                    raw = file.read(_MAX_BYTES + 1)
                self._token, self._state = self._parse(raw), state
        except OSError as error:
            raise ConfigurationError(f"the token file {self.path} cannot be read: {error.strerror}") from None
        return self._token

    def _parse(self, raw: bytes) -> str:
        found = raw.decode("ascii", "replace").strip()
        if len(raw) > _MAX_BYTES or not _TOKEN.fullmatch(found):
            raise ConfigurationError(
                f"the file {self.path} does not hold a token: it must be one line of at most 64 KiB"
            )
        return found


def check_secure(url: str) -> None:
    """Raise ConfigurationError if a token that is sent to `url` could be read on the way."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ConfigurationError(f"{url} is not https: a token is sent only over https or to a loopback address")


async def trust(ca: Path | None = None) -> ssl.SSLContext:
    """A context that trusts the system's authorities and those in the PEM file `ca`, by default ARTIFACT_STORE_CA.

    Raises ConfigurationError.
    """
    named = ca or (Path(os.environ[CA]) if os.environ.get(CA) else None)
    context = await asyncio.to_thread(ssl.create_default_context)
    if named is not None:
        try:
            context.load_verify_locations(named)
        except OSError as error:  # including ssl.SSLError: the file is not PEM
            raise ConfigurationError(f"the authorities in {named} ({CA}) cannot be used: {error.strerror}") from None
    return context
