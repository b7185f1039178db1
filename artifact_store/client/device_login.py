"""The login of a person: the device flow (RFC 8628) with an issuer of the gateway, and the tokens from it.

The gateway says at which issuers people can log in (`GET /v1/login`). The rest is between this client and the issuer.
Requests carry the ID token: its audience is the client's id, which the gateway's policy names. It is renewed by the
refresh token shortly before it expires.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from artifact_store.client.credentials import TOKEN_FILE, Credentials, TokenFile, check_secure, trust
from artifact_store.errors import ConfigurationError, UnauthenticatedError, UnavailableError
from artifact_store.user_files import replace_privately, state_folder

if TYPE_CHECKING:
    from artifact_store.documents.shapes import LoginIssuer

_DISCOVERY = "/.well-known/openid-configuration"
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_SCOPE = "openid offline_access"  # offline_access: a refresh token
_MAX_DOCUMENT_BYTES = 512 << 10
_SECONDS = 10.0
_RENEW_SECONDS = 60.0
_SLOWER_SECONDS = 5.0  # RFC 8628 §3.5


@dataclass(frozen=True, slots=True)
class Prompt:
    """Instructions for a person: open the address and type in the code. `complete` is an address with the code."""

    address: str
    code: str
    complete: str | None
    seconds: float
    """How long the code is valid."""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a login. The names are those in its file."""

    url: str
    issuer: str
    client_id: str
    token_endpoint: str
    expires_at: float
    id_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)


class Login:
    """A login that is stored in a file. Processes may share it: one renews it, and the others use the new token."""

    def __init__(self, path: Path, ca: Path | None = None) -> None:
        self._path = path
        self._ca = ca
        self._tokens: _Tokens | None = None
        self._renewing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Login({str(self._path)!r})"

    async def token(self) -> str:
        """The ID token, renewed if it is about to expire.

        Raises UnauthenticatedError: the login has ended; UnavailableError: the issuer cannot be asked for a new token.
        """
        tokens = self._tokens or _read(self._path)
        if tokens.expires_at - time.time() < _RENEW_SECONDS:
            async with self._renewing:
                tokens = await self._renewed()
        self._tokens = tokens
        return tokens.id_token

    async def _renewed(self) -> _Tokens:
        async with _locked(self._path):
            tokens = _read(self._path)  # another process may have renewed it
            left = tokens.expires_at - time.time()
            if left >= _RENEW_SECONDS:
                return tokens
            if tokens.refresh_token is None:
                if left > 0:
                    return tokens
                raise _ended(tokens.url)
            form = {
                "grant_type": "refresh_token",
                "refresh_token": tokens.refresh_token,
                "client_id": tokens.client_id,
            }
            try:
                async with _session(self._ca) as session:
                    status, answer = await _post(session, tokens.token_endpoint, form)
            except UnavailableError:
                if left > 0:
                    return tokens
                raise
            if status != 200:
                if left > 0:
                    return tokens
                raise _ended(tokens.url)
            renewed = _tokens_of(
                answer, tokens.url, tokens.issuer, tokens.client_id, tokens.token_endpoint, tokens.refresh_token
            )
            _write(self._path, renewed)
            return renewed


def find_credentials(url: str, token_file: Path | None = None, ca: Path | None = None) -> Credentials | None:
    """This user's credentials for the gateway at `url`: the token file, or the login of `artifact-store login`.

    Without `token_file`, ARTIFACT_STORE_TOKEN_FILE names the file. A login is renewed with trust in `ca`. None if there
    is neither.
    """
    if token_file is not None:
        return TokenFile(token_file)
    if named := os.environ.get(TOKEN_FILE):
        return TokenFile(Path(named))
    return stored_login(url, ca)


def stored_login(url: str, ca: Path | None = None) -> Login | None:
    """The login at the gateway with this URL; None if nobody has logged in there."""
    path = _file_of(url)
    return Login(path, ca) if path is not None and path.exists() else None


def forget_login(url: str) -> bool:
    """Remove the login at the gateway with this URL. Returns whether there was one. Raises OSError."""
    path = _file_of(url)
    if path is None or not path.exists():
        return False
    path.unlink()
    with suppress(OSError):
        path.with_suffix(".lock").unlink()
    return True


async def log_in(url: str, issuer: LoginIssuer, show: Callable[[Prompt], None], *, ca: Path | None = None) -> Login:
    """Log a person in at one of the gateway's issuers, and store the login for this URL. Waits until they are done.

    `show` is called once, with their instructions. Raises UnauthenticatedError: they refused, or took too long;
    UnavailableError, ConfigurationError.
    """
    check_secure(url)
    path = _file_of(url)
    if path is None:
        raise ConfigurationError("there is no home folder to store the login in: set XDG_STATE_HOME")
    async with _session(ca) as session:
        endpoints = await _endpoints(session, issuer.url)
        device = await _begin(session, endpoints["device_authorization_endpoint"], issuer.client_id)
        seconds = _number(device, "expires_in", 600.0)
        complete = device.get("verification_uri_complete")
        show(
            Prompt(
                _web_address(_text(device, "verification_uri")),
                _text(device, "user_code"),
                _web_address(complete) if isinstance(complete, str) else None,
                seconds,
            )
        )
        form = {"grant_type": _DEVICE_GRANT, "device_code": _text(device, "device_code"), "client_id": issuer.client_id}
        answer = await _poll(session, endpoints["token_endpoint"], form, _number(device, "interval", 5.0), seconds)
    tokens = _tokens_of(answer, url.rstrip("/"), issuer.url, issuer.client_id, endpoints["token_endpoint"], None)
    _write(path, tokens)
    return Login(path, ca)


async def _endpoints(session: aiohttp.ClientSession, issuer: str) -> dict[str, str]:
    check_secure(issuer)
    address = issuer.rstrip("/") + _DISCOVERY
    status, document = await _ask(session, "GET", address)
    if status != 200:
        raise ConfigurationError(f"{address} answered with status {status}")
    if document.get("issuer") != issuer:
        raise ConfigurationError(f"{address} is about another issuer than {issuer}")
    found = {name: document.get(name) for name in ("device_authorization_endpoint", "token_endpoint")}
    for name, endpoint in found.items():
        if not isinstance(endpoint, str):
            raise ConfigurationError(f"the issuer {issuer} has no {name}, so people cannot log in there from a device")
        check_secure(endpoint)
    return {name: str(endpoint) for name, endpoint in found.items()}


async def _begin(session: aiohttp.ClientSession, endpoint: str, client_id: str) -> Mapping[str, Any]:
    for scope in (_SCOPE, "openid"):  # some issuers refuse to give refresh tokens to this client
        status, answer = await _post(session, endpoint, {"client_id": client_id, "scope": scope})
        if status == 200:
            return answer
        if answer.get("error") != "invalid_scope":
            break
    raise ConfigurationError(f"{endpoint} refused to begin a login: {_reason(answer, status)}")


async def _poll(
    session: aiohttp.ClientSession, endpoint: str, form: Mapping[str, str], pause: float, seconds: float
) -> Mapping[str, Any]:
    """Ask until the person has answered (RFC 8628 §3.4)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        await asyncio.sleep(pause)
        try:
            status, answer = await _post(session, endpoint, form)
        except UnavailableError:
            pause += _SLOWER_SECONDS
            continue
        if status == 200:
            return answer
        match answer.get("error"):
            case "authorization_pending":
                pass
            case "slow_down":
                pause += _SLOWER_SECONDS
            case "access_denied":
                raise UnauthenticatedError("the login was refused")
            case "expired_token":
                break
            case _:
                raise ConfigurationError(f"{endpoint} refused the login: {_reason(answer, status)}")
    raise UnauthenticatedError("nobody confirmed the login in time; run `artifact-store login` again")


def _tokens_of(
    answer: Mapping[str, Any], url: str, issuer: str, client_id: str, endpoint: str, refresh_token: str | None
) -> _Tokens:
    token = _text(answer, "id_token")
    renewed = answer.get("refresh_token")
    refresh_token = renewed if isinstance(renewed, str) else refresh_token
    return _Tokens(url, issuer, client_id, endpoint, _expiry(token), token, refresh_token)


def _expiry(token: str) -> float:
    """When an ID token expires. It came from the issuer over TLS, so it is not verified here."""
    with suppress(ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
        body = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"])
    raise UnavailableError("the issuer gave an ID token that is not a JSON Web Token")


def _ended(url: str) -> UnauthenticatedError:
    return UnauthenticatedError(f"the login has ended; run `artifact-store login --url {url}`")


def _reason(answer: Mapping[str, Any], status: int) -> str:
    reason = answer.get("error_description") or answer.get("error") or f"status {status}"
    return str(reason)[:200]


def _web_address(address: str) -> str:
    if urlsplit(address).scheme not in ("https", "http"):
        raise ConfigurationError("the issuer's address for the login is not a web page")
    return address


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not value:
        raise UnavailableError(f"the issuer's answer lacks {name}")
    return value


def _number(document: Mapping[str, Any], name: str, default: float) -> float:
    value = document.get(name, default)
    return float(value) if isinstance(value, int | float) and 0 <= value <= 86_400 else default


@asynccontextmanager
async def _session(ca: Path | None) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=await trust(ca)),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=_SECONDS),
    ) as session:
        yield session


async def _post(session: aiohttp.ClientSession, address: str, form: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
    return await _ask(session, "POST", address, data=dict(form))


async def _ask(session: aiohttp.ClientSession, method: str, address: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON object of an answer; an empty object if it has none. Raises UnavailableError."""
    try:
        async with session.request(
            method, address, allow_redirects=False, headers={"Accept": "application/json"}, **options
        ) as response:
            body = b""
            while len(body) <= _MAX_DOCUMENT_BYTES and (chunk := await response.content.read(_MAX_DOCUMENT_BYTES)):
                body += chunk
    except (aiohttp.ClientError, TimeoutError) as error:
        # Without the cause, because it may contain the request and therefore the tokens.
        raise UnavailableError(f"{address} cannot be asked: {type(error).__name__}") from None
    if response.status >= 500 or response.status == 429:
        raise UnavailableError(f"{address} answered with status {response.status}")
    with suppress(ValueError, RecursionError):
        found = json.loads(body)
        if isinstance(found, dict):
            return response.status, found
    return response.status, {}


# --- the file ---


def _file_of(url: str) -> Path | None:
    """The path of the login at this gateway; None if the user has no home."""
    folder = state_folder("logins")
    name = hashlib.sha256(url.rstrip("/").encode(errors="surrogatepass")).hexdigest()[:32]
    return None if folder is None else folder / f"{name}.json"


def _read(path: Path) -> _Tokens:
    try:
        found = json.loads(path.read_bytes())
        return _Tokens(**found)
    except FileNotFoundError:
        raise UnauthenticatedError("nobody is logged in; run `artifact-store login`") from None
    except OSError as error:
        raise ConfigurationError(f"the login in {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigurationError(f"the login in {path} is damaged; run `artifact-store login` again") from None


def _write(path: Path, tokens: _Tokens) -> None:
    """Store the login. Raises ConfigurationError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        replace_privately(path, json.dumps(asdict(tokens)).encode())
    except OSError as error:
        raise ConfigurationError(f"the login cannot be stored in {path}: {error.strerror}") from None


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    """Lock the login among processes, because a refresh token may be valid for only one use. Waits in a thread."""
    try:
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigurationError(f"the login in {path} cannot be locked: {error.strerror}") from None
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
