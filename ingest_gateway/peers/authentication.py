"""How the gateways of one deployment authenticate each other: by certificates, or by a shared secret.

Certificates authenticate both sides. A secret authenticates the client but not the server: anybody who joins the group
of writers can advertise their own address, and other gateways then send the secret there. Use a secret on loopback, or
until every gateway has a certificate. On loopback, gateways of one user share a secret that the first of them creates.
"""

from __future__ import annotations

import hmac
import os
import secrets
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from aiohttp import web

from artifact_store.errors import ConfigurationError, UnavailableError
from artifact_store.rules import is_loopback
from services.config import SecretStr, Settings
from services.runtime import tls

PEER_NAME = "artifact-store-gateway"
"""The DNS name that the certificate of every gateway has, whatever its host is called."""

_FILES = "ARTIFACT_STORE_PEER_CERT, ARTIFACT_STORE_PEER_KEY or ARTIFACT_STORE_PEER_CA"


class PeerCredentials:
    """The credentials of a gateway or an operator's command, and the credentials that it accepts."""

    def __init__(
        self,
        secret: SecretStr | None = None,
        *,
        local_secret: SecretStr | None = None,
        asks: tls.ReloadedContext | None = None,
        serves: ssl.SSLContext | None = None,
    ) -> None:
        """`secret` may be sent anywhere, `local_secret` only on loopback. `asks` and `serves` use the certificates."""
        self._secret = secret
        self._local_secret = local_secret
        self._asks = asks
        self.server_context = serves
        """For the internal listener; None without certificates."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The credentials in the settings. Blocks on files. Raises ConfigurationError."""
        cert, key, ca = settings.peer_cert, settings.peer_key, settings.peer_ca
        if (cert is None) != (key is None) or (cert is not None and ca is None):
            raise ConfigurationError(
                "ARTIFACT_STORE_PEER_CERT and ARTIFACT_STORE_PEER_KEY go together and need ARTIFACT_STORE_PEER_CA"
            )
        asks = None if ca is None else tls.asking(ca, cert, key, setting=_FILES)
        if cert is not None and key is not None:
            serves = tls.serving(cert, key, clients=ca, demanded=settings.internal_secret is None, setting=_FILES)
            return cls(settings.internal_secret, asks=asks, serves=serves)
        if settings.internal_secret is not None:
            return cls(settings.internal_secret, asks=asks)
        return cls(local_secret=_local_secret(settings.state_dir), asks=asks)

    @property
    def for_loopback_alone(self) -> bool:
        """Whether gateways on other machines do not accept them."""
        return self._secret is None and self.server_context is None

    def admits(self, request: web.Request) -> bool:
        """Whether the sender of a request is a gateway, or an operator with its credentials."""
        connection = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
        certificate = None if connection is None else connection.getpeercert()
        if certificate and ("DNS", PEER_NAME) in certificate.get("subjectAltName", ()):
            return True
        secret = self._secret or self._local_secret
        if secret is None:
            return False
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, _bearer(secret).encode())

    def for_request(self, url: str) -> dict[str, Any]:
        """Arguments for aiohttp's request to the process at this URL. Raises UnavailableError if it accepts none."""
        parts = urlsplit(url)
        secret = self._secret
        if secret is None and is_loopback(parts.hostname or ""):
            secret = self._local_secret
        headers = {} if secret is None else {"Authorization": _bearer(secret)}
        if parts.scheme == "https":
            if self._asks is None:
                raise UnavailableError("the owner of the partition has a certificate: set ARTIFACT_STORE_PEER_CA")
            return {"headers": headers, "ssl": self._asks.current(), "server_hostname": PEER_NAME}
        if secret is None:
            raise UnavailableError(
                "the owner of the partition has no certificate: give every gateway ARTIFACT_STORE_PEER_CERT, or keep "
                "ARTIFACT_STORE_INTERNAL_SECRET until they have one"
            )
        return {"headers": headers}


def _bearer(secret: SecretStr) -> str:
    return f"Bearer {secret.get_secret_value()}"


def _local_secret(state_dir: Path) -> SecretStr:
    """The secret of this user's gateways on this machine; created if it is missing."""
    home = os.environ.get("XDG_STATE_HOME")
    with suppress(OSError, RuntimeError):  # there is no home folder, or it cannot be written to
        folder = Path(home) if home else Path("~/.local/state").expanduser()
        return SecretStr(_kept(folder / "artifact-store" / "internal-secret"))
    with suppress(OSError):
        return SecretStr(_kept(state_dir / "internal-secret"))
    return SecretStr(secrets.token_hex(32))  # it cannot be stored, so this gateway works without others


def _kept(path: Path) -> str:
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        return _read(path)
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(fresh, path)  # atomic, and the first process wins
    finally:
        fresh.unlink(missing_ok=True)
    return _read(path)


def _read(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        about = os.fstat(file.fileno())
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise PermissionError(f"{path} is not this user's alone")
        return file.read()
