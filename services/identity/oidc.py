"""Tokens of an OIDC issuer: its keys are found by discovery or in a file, and tokens are checked against them.

joserfc handles cryptography and the format of tokens. The policy, never the token, decides which algorithms are
accepted. Before the signature is verified, only a token's issuer is read, to choose the keys.

The keys are fetched when the first token needs them, again every few minutes, and when a token names an unknown key,
but then at most once in RETRY_SECONDS. While the issuer is unavailable, the known keys stay valid for STALE_SECONDS.
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from joserfc import jwk, jws, jwt
from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError, MissingClaimError, UnsupportedAlgorithmError

from artifact_store.errors import ArtifactStoreError, ConfigurationError, UnauthenticatedError, UnavailableError
from services.identity.policy import IssuerTable, check_issuer_url

MAX_TOKEN_BYTES = 16 << 10

LEEWAY_SECONDS = 30
"""How much the clocks of issuer and gateway may differ."""

FRESH_SECONDS = 300.0
"""Older keys are fetched again in the background, while requests still use them."""

STALE_SECONDS = 86_400.0
"""Older keys are no longer valid."""

RETRY_SECONDS = 10.0
"""Minimum time between two fetches, whatever tokens ask for."""

_FETCH_SECONDS = 5.0
_MAX_DOCUMENT_BYTES = 512 << 10
_MAX_KEYS = 100
_MODULUS_CHARACTERS = (342, 1366)
"""The lengths in base64 of RSA moduli of 2048 and 8192 bits: shorter keys are weak, longer ones are slow."""
_MAX_HEADER_BYTES = 4 << 10

_DISCOVERY = "/.well-known/openid-configuration"

_TYPES = frozenset({"", "jwt", "at+jwt"})
"""The types of tokens that are accepted if the policy names none: identity and access tokens (RFC 9068)."""

_KEY_TYPES = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}

_BROKEN = (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
"""What joserfc and the JSON parser raise for tokens and keys that are malformed on purpose."""

_log = logging.getLogger(__name__)

Claims = Mapping[str, Any]


class _Signatures(jws.JWSRegistry):
    """Exactly the algorithms of a policy. Unknown header parameters are ignored (RFC 7515 §4)."""

    max_header_length = _MAX_HEADER_BYTES
    max_payload_length = MAX_TOKEN_BYTES

    def __init__(self, algorithms: Sequence[str]) -> None:
        super().__init__(algorithms=algorithms, strict_check_header=False)

    def get_alg(self, name: str) -> Any:
        """The original method warns at each use of EdDSA, a name that RFC 9864 splits and that providers still send."""
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError("the algorithm is not accepted")
        return self.algorithms[name]


class _StrictJson(json.JSONDecoder):
    """Refuses duplicate names and invalid numbers: they make a token invalid instead of ambiguous."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, object_pairs_hook=_without_repeats, parse_constant=_refuse)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def invalid(detail: str) -> UnauthenticatedError:
    """The error for a token that is not accepted."""
    return UnauthenticatedError(detail, "invalid_token")


def unverified(token: str) -> tuple[Claims, Claims]:
    """Header and claims of a token, without checking its signature. Raises UnauthenticatedError."""
    if len(token) > MAX_TOKEN_BYTES:
        raise invalid(f"the token is longer than {MAX_TOKEN_BYTES >> 10} KiB")
    try:
        found = jws.extract_compact(token.encode("ascii"), None, _Signatures(()))
        header: object = found.headers()  # an attacker may send a list
        claims: object = json.loads(found.payload, cls=_StrictJson)
    except _BROKEN:
        raise invalid("the token is no JSON Web Token") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise invalid("the token is no JSON Web Token")
    return header, claims


class Keys:
    """The public keys of an issuer. Equal sets are one object, so that identity tells whether keys changed."""

    def __init__(self, keys: Sequence[jwk.Key]) -> None:
        self._keys = tuple(keys)
        self.thumbprints = frozenset((key.kid, key.thumbprint()) for key in self._keys)

    def find(self, key_id: str | None, algorithm: str) -> jwk.Key | None:
        """The key that a token names. If it names none, the only key that fits its algorithm."""
        fitting = [
            key
            for key in self._keys
            if key.key_type == _KEY_TYPES.get(algorithm[:2])
            and key.get("alg") in (None, algorithm)
            and key_id in (None, key.kid)
        ]
        return fitting[0] if len(fitting) == 1 else None


def read_keys(document: object, algorithms: Sequence[str]) -> Keys:
    """The usable keys of a JSON Web Key Set (RFC 7517): public, for signatures with these algorithms, not too short.

    Raises ValueError if there is no such key.
    """
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it is not a JSON Web Key Set: it has no list `keys`")
    found = list(_usable(listed[:_MAX_KEYS], algorithms))
    if not found:
        raise ValueError(f"it has no public key for {', '.join(algorithms)}")
    return Keys(found)


def _usable(listed: Sequence[object], algorithms: Sequence[str]) -> Iterator[jwk.Key]:
    types = [_KEY_TYPES[algorithm[:2]] for algorithm in algorithms]  # not a set: an entry may have a list as its type
    for entry in listed:
        if not isinstance(entry, dict) or entry.get("kty") not in types:
            continue
        if entry.get("use") not in (None, "sig") or entry.get("alg") not in (None, *algorithms):
            continue
        with suppress(*_BROKEN):
            if entry["kty"] == "RSA" and not _MODULUS_CHARACTERS[0] <= len(entry["n"]) <= _MODULUS_CHARACTERS[1]:
                continue
            yield jwk.import_key(_public(entry))


def _public(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Only the fields that verifying needs: if an issuer publishes a private key by mistake, we do not take it."""
    return {name: entry[name] for name in ("kty", "kid", "alg", "use", "n", "e", "crv", "x", "y") if name in entry}


class Issuer:
    """One issuer of a policy. Belongs to one event loop. Opening it sends no request."""

    def __init__(
        self,
        table: IssuerTable,
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
        failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`clock` gives seconds since 1970, `ticks` monotonic seconds. `failed` is called for each failed fetch.

        Raises ConfigurationError if the file of keys cannot be used.
        """
        self.table = table
        self.keys: Keys | None = None
        self._clock = clock
        self._ticks = ticks
        self._failed = failed
        self._fetched_at = self._tried_at = float("-inf")
        self._failure: str | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._tls: ssl.SSLContext | None = None
        self._signatures = _Signatures(table.algorithms)
        try:
            if table.jwks is not None:
                with table.jwks.open("rb") as file:
                    self.keys = read_keys(json.loads(file.read(_MAX_DOCUMENT_BYTES)), table.algorithms)
        except OSError as error:
            raise ConfigurationError(f"issuer {table.alias}: {table.jwks} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"issuer {table.alias}: {table.jwks} cannot be used: {error}") from None

    async def verify(self, token: str) -> Claims:
        """The claims of a token of this issuer, after checking everything about it.

        May wait some seconds for the issuer's keys. Raises UnauthenticatedError, and UnavailableError if the issuer's
        keys are needed but unavailable.
        """
        header, _ = unverified(token)
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self.table.algorithms:
            raise invalid(f"issuer {self.table.alias} signs by {', '.join(self.table.algorithms)} here, not as this")
        if "crit" in header:
            raise invalid("the token asks for an extension that is not known (crit)")
        self._check_type(header.get("typ"))
        if not isinstance(key_id, str | None):
            raise invalid("the token's key id is no text")
        key = await self._key(key_id, algorithm)
        try:
            found = jwt.decode(token, key, registry=self._signatures, decoder_cls=_StrictJson)
            self._claims_rules().validate(found.claims)
        except ExpiredTokenError:
            raise invalid("the token has expired") from None
        except MissingClaimError as error:
            raise invalid(f"the token lacks the claim {error.claim}") from None
        except InvalidClaimError as error:
            raise invalid(f"the token's claim {error.claim} is not accepted here") from None
        except _BROKEN:
            raise invalid("the token's signature is not valid") from None
        return found.claims

    def _check_type(self, found: object) -> None:
        kind = found.lower().removeprefix("application/") if isinstance(found, str) else "" if found is None else None
        if kind is None or (kind not in _TYPES if self.table.typ is None else kind != self.table.typ.lower()):
            raise invalid(f"tokens of issuer {self.table.alias} have another typ than this one")

    def _claims_rules(self) -> jwt.JWTClaimsRegistry:
        return jwt.JWTClaimsRegistry(
            now=int(self._clock()),
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": self.table.url},
            sub={"essential": True},
            aud={"essential": True, "values": list(self.table.audience)},
            exp={"essential": True},
        )

    async def _key(self, key_id: str | None, algorithm: str) -> jwk.Key:
        keys = await self.current_keys()
        key = keys.find(key_id, algorithm)
        if key is None and self._may_fetch:  # it may have been added since
            await self._fetch()
            keys = await self.current_keys()
            key = keys.find(key_id, algorithm)
        if key is None:
            if self._failure is not None:
                raise self._away()
            raise invalid(f"issuer {self.table.alias} has no such key as the token names")
        return key

    async def current_keys(self) -> Keys:
        """The valid keys. Fetches them if there are none; renews them in the background if they are old.

        Raises UnavailableError.
        """
        if self.table.jwks is None:
            age = self._ticks() - self._fetched_at
            if self.keys is None or age > STALE_SECONDS:
                if self._may_fetch:
                    await self._fetch()
                if self.keys is None or self._ticks() - self._fetched_at > STALE_SECONDS:
                    raise self._away()
            elif age > FRESH_SECONDS and self._may_fetch:
                self._begin_to_fetch()
        assert self.keys is not None  # noqa: S101 - read from the file or fetched
        return self.keys

    async def __aenter__(self) -> Issuer:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop fetching."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait([self._fetching])

    @property
    def fetching(self) -> bool:
        """Whether the keys are being fetched."""
        return self._fetching is not None and not self._fetching.done()

    @property
    def _may_fetch(self) -> bool:
        if self.table.jwks is not None:
            return False
        return self.fetching or self._ticks() - self._tried_at >= RETRY_SECONDS

    def _away(self) -> UnavailableError:
        error = UnavailableError(
            f"the keys of issuer {self.table.alias} cannot be had: {self._failure or 'nobody has asked for them yet'}"
        )
        error.retry_after = RETRY_SECONDS
        return error

    def _begin_to_fetch(self) -> asyncio.Task[None]:
        """Start one fetch for all waiting callers."""
        if self._fetching is None or not self.fetching:
            self._tried_at = self._ticks()
            self._fetching = asyncio.create_task(self._renew())
        return self._fetching

    async def _fetch(self) -> None:
        await asyncio.shield(self._begin_to_fetch())  # if one caller gives up, the fetch continues for the others

    async def _renew(self) -> None:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                found = await self._fetch_keys()
        except TimeoutError:
            self._note_failure(f"no answer within {_FETCH_SECONDS:g} s")
        except ArtifactStoreError as error:
            self._note_failure(error.detail)
        except (aiohttp.ClientError, OSError) as error:
            self._note_failure(f"{type(error).__name__}: {error}")
        else:
            self._failure, self._fetched_at = None, self._ticks()
            if self.keys is None or found.thumbprints != self.keys.thumbprints:
                _log.info("issuer %s has %d keys", self.table.alias, len(found.thumbprints))
                self.keys = found

    def _note_failure(self, cause: str) -> None:
        if self._failure != cause:
            _log.warning("the keys of issuer %s cannot be fetched: %s", self.table.alias, cause)
        self._failure = cause
        self._failed(self.table.alias)

    async def _fetch_keys(self) -> Keys:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
            if self._tls is None:
                self._tls = await asyncio.to_thread(ssl.create_default_context, cafile=self.table.ca)
            address = self.table.url.rstrip("/") + _DISCOVERY
            document = await self._document(session, address)
            if document.get("issuer") != self.table.url:
                raise UnavailableError(f"{address} is about another issuer than {self.table.url}")
            where = document.get("jwks_uri")
            try:
                where = check_issuer_url(where if isinstance(where, str) else "")
            except ValueError as error:
                raise UnavailableError(f"jwks_uri in {address}: {error}") from None
            try:
                return read_keys(await self._document(session, where), self.table.algorithms)
            except ValueError as error:
                raise UnavailableError(f"{where}: {error}") from None

    async def _document(self, session: aiohttp.ClientSession, address: str) -> dict[str, Any]:
        """The JSON object at this address. Raises UnavailableError, aiohttp.ClientError, OSError."""
        async with session.get(address, allow_redirects=False, ssl=self._tls or True) as response:
            if response.status != 200:
                raise UnavailableError(f"{address} answered with status {response.status}")
            body = await response.content.read(_MAX_DOCUMENT_BYTES + 1)
            while len(body) <= _MAX_DOCUMENT_BYTES and (more := await response.content.read(_MAX_DOCUMENT_BYTES)):
                body += more
        if len(body) > _MAX_DOCUMENT_BYTES:
            raise UnavailableError(f"{address} answered with more than {_MAX_DOCUMENT_BYTES >> 10} KiB")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise UnavailableError(f"{address} answered with something that is no JSON") from None
        if not isinstance(found, dict):
            raise UnavailableError(f"{address} did not answer with a JSON object")
        return found
