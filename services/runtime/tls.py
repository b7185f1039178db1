"""TLS contexts from files. They are read again when the files change, so certificates are renewed without a restart."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from artifact_store.errors import ConfigurationError

_log = logging.getLogger(__name__)

_Version = tuple[tuple[int, int, int], ...]


def ends(certificates: Path) -> float:
    """When the certificates in a file (PEM) expire, in seconds since 1970. Blocks.

    For a certificate with its chain, this is the earliest of their expiry times. For a file of authorities it is the
    latest, because one that is being replaced may expire. Raises ConfigurationError: the file cannot be read, or has no
    certificate.
    """
    from cryptography import x509  # takes longer to load than most commands run

    try:
        found = x509.load_pem_x509_certificates(certificates.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"the certificates in {certificates} cannot be read: {_why(error)}") from None
    times = [each.not_valid_after_utc.timestamp() for each in found]
    try:
        of_authorities = found[0].extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        of_authorities = False
    return max(times) if of_authorities else min(times)


def all_ends(files: Mapping[str, Path]) -> dict[str, float]:
    """As `ends`, by setting, for `Settings.certificates`; 0 for a file that cannot be read. Blocks."""
    found = {}
    for setting, path in files.items():
        try:
            found[setting] = ends(path)
        except ConfigurationError as error:
            _log.debug("%s: %s", setting, error.detail)
            found[setting] = 0.0
    return found


class ReloadedContext:
    """A context that is made again when its files change. New files that cannot be used are logged once and ignored."""

    def __init__(self, make: Callable[[], ssl.SSLContext], files: tuple[Path, ...], setting: str) -> None:
        """`make` reads the files; `setting` names them in errors. Blocks. Raises ConfigurationError."""
        self._make = make
        self._files = files
        self._setting = setting
        self._version = self._seen()
        try:
            self._context = make()
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{setting} cannot be used: {_why(error)}") from None

    def current(self) -> ssl.SSLContext:
        """The context of the present files. Blocks for checking their times and, if they changed, for reading them."""
        version = self._seen()
        if version != self._version:
            self._version = version
            try:
                self._context = self._make()
                _log.info("%s: the files changed and are used from now on", self._setting)
            except (OSError, ValueError) as error:
                _log.warning("%s: the files changed and cannot be used: %s", self._setting, _why(error))
        return self._context

    def _seen(self) -> _Version:
        found = []
        for path in self._files:
            try:
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_ino, about.st_size))
            except OSError:
                found.append((0, 0, 0))
        return tuple(found)


def serving(
    certificate: Path, key: Path, *, clients: Path | None = None, demanded: bool = True, setting: str
) -> ssl.SSLContext:
    """A context for a listener. Each handshake uses the present files. Blocks. Raises ConfigurationError.

    `clients` is a file of authorities for client certificates. Without `demanded`, clients may have no certificate.
    """

    def make() -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate, key, _no_password)
        if clients is not None:
            context.load_verify_locations(clients)
            context.verify_mode = ssl.CERT_REQUIRED if demanded else ssl.CERT_OPTIONAL
        return context

    reloaded = ReloadedContext(make, (certificate, key, *(() if clients is None else (clients,))), setting)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = reloaded.current()

    shown = make()
    shown.sni_callback = choose
    return shown


def asking(authorities: Path, certificate: Path | None, key: Path | None, *, setting: str) -> ReloadedContext:
    """A context for a client that trusts only these `authorities`. Blocks. Raises ConfigurationError."""

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(authorities))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            context.load_cert_chain(certificate, key, _no_password)
        return context

    files = tuple(path for path in (authorities, certificate, key) if path is not None)
    return ReloadedContext(make, files, setting)


def _no_password() -> str:
    """Refuse encrypted keys. Otherwise OpenSSL would ask for the password at the terminal, and a server would wait."""
    raise ValueError("the key is encrypted: store it without a password in a file that only its user can read")


def _why(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
