"""The authenticator: an `Authorization` header goes in, a principal comes out.

A verified token is remembered until it expires, or until the policy or its issuer's keys change. Changes of the policy
file and of the file of static tokens are noticed at the next request, at most once a second. If a file becomes invalid,
its previous content stays in force; this is logged, and a metric shows it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Gauge

from artifact_store.errors import ConfigurationError, UnauthenticatedError, UnavailableError
from services.config import Settings
from services.core.access import Grants, Principal, local_user
from services.identity.actors import actor_of, local_actor
from services.identity.oidc import MAX_TOKEN_BYTES, Issuer, Keys, invalid, unverified
from services.identity.policy import STATIC_ALIAS, IssuerTable, Policy, read_policy
from services.identity.static_tokens import NO_TOKENS, StaticToken, TokenSet, is_static, read_tokens
from services.runtime.addresses import ListenAddress

LOOK_SECONDS = 1.0
"""How often files are checked for changes."""

MAX_REMEMBERED = 4096
"""Maximum number of remembered tokens; the least recently used is forgotten first."""

_LAST_SECOND = 253_402_300_799.0
"""The end of the year 9999: later times cannot be written."""

_HEADER = re.compile(r"(?i:bearer) +([A-Za-z0-9._~+/-]+=*) *")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoginChoice:
    """An issuer at which people can log in."""

    alias: str
    url: str
    client_id: str


@dataclass(frozen=True, slots=True)
class _Remembered:
    principal: Principal
    issuer: Issuer
    keys: Keys


class Authenticator:
    """Identifies senders. Belongs to one event loop."""

    def __init__(
        self,
        *,
        policy: Path | None = None,
        tokens: Path | None = None,
        anyone: Principal | None = None,
        metrics: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """With neither `policy` nor `tokens`, everyone is `anyone`.

        `clock` gives seconds since 1970, `ticks` monotonic seconds. Blocks while it reads the files. Raises
        ConfigurationError if a file is invalid, or if nothing identifies senders.
        """
        if policy is None and tokens is None and anyone is None:
            raise ConfigurationError(
                "nothing says who may use this gateway: set ARTIFACT_STORE_POLICY or ARTIFACT_STORE_TOKENS"
            )
        self._anyone = anyone if policy is None and tokens is None else None
        self._clock = clock
        self._ticks = ticks
        registry = metrics or CollectorRegistry()
        self._outcomes = Counter(
            "artifact_store_authentications",
            "Tokens that were checked, by outcome; `unavailable` while the issuer's keys cannot be fetched",
            ("issuer", "outcome"),
            registry=registry,
        )
        self._fetch_failures = Counter(
            "artifact_store_issuer_failures",
            "Fetches of an issuer's keys that failed",
            ("issuer",),
            registry=registry,
        )
        self._stale = Gauge(
            "artifact_store_identity_file_invalid",
            "1 while a file is invalid or cannot be read, so that its previous content stays in force",
            ("file",),
            registry=registry,
        )
        self._issuers: dict[str, Issuer] = {}
        self._retired: list[Issuer] = []
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._policy = Policy()
        self._tokens: TokenSet = NO_TOKENS
        self._policy_file = None if policy is None else _Watched("policy", policy)
        self._tokens_file = None if tokens is None else _Watched("tokens", tokens)
        self._looked_at = self._ticks()
        if self._policy_file is not None:
            self._take_policy(self._policy_file)
        if self._tokens_file is not None:
            self._take_tokens(self._tokens_file)

    @classmethod
    def open(cls, settings: Settings, metrics: CollectorRegistry | None = None) -> Self:
        """The authenticator of these settings. Blocks while it reads files; sends no request to an issuer.

        Without policy and tokens everyone has all rights: on loopback as the local user, otherwise as `anonymous`, and
        then only if `settings.insecure` is set. Raises ConfigurationError.
        """
        anyone = None
        if _is_loopback(settings.listen):
            anyone = local_user(local_actor())
        elif settings.insecure:
            anyone = local_user("anonymous")
        return cls(policy=settings.policy, tokens=settings.tokens, anyone=anyone, metrics=metrics)

    async def authenticate(self, authorization: str | None) -> Principal:
        """The sender of a request. `authorization` is its `Authorization` header, None if it has none.

        Returns at once for known tokens; may wait some seconds for an issuer's keys. The principal is valid now: ask
        again during long operations.

        Raises:
            UnauthenticatedError: there is no token, or it is not accepted. Its text never contains the token.
            UnavailableError: the issuer's keys are unavailable, so the token cannot be checked; try again.
        """
        if self._anyone is not None:
            return self._anyone
        if self._ticks() - self._looked_at >= LOOK_SECONDS:
            self._look()
        if authorization is None:
            raise UnauthenticatedError("this needs a token: send it as `Authorization: Bearer TOKEN`")
        match = _HEADER.fullmatch(authorization) if len(authorization) <= 2 * MAX_TOKEN_BYTES else None
        if match is None:
            self._count(None, "refused")
            raise UnauthenticatedError("the Authorization header must be `Bearer TOKEN`", "invalid_token")
        return self._static(match[1]) if is_static(match[1]) else await self._verified(match[1])

    def grants_of(self, basis: Mapping[str, Any]) -> Grants:
        """The rights that a principal's `basis` gives now, perhaps long after the request; none if they are gone.

        A static token counts until it is revoked or expires. Claims of an issuer's token still count after the token
        has expired: the policy says what they give. A principal of a gateway without policy and tokens has rights only
        while there is still neither; then nobody else has any. Blocks while it reads changed files.
        """
        if self._anyone is not None:
            return () if basis else self._anyone.grants
        if self._ticks() - self._looked_at >= LOOK_SECONDS:
            self._look()
        if (token_id := basis.get("token")) is not None:
            found = next((token for token in self._tokens if token.id == token_id), None)
            return () if found is None or self._has_expired(found) else self._static_grants(found)
        if (alias := basis.get("issuer")) is not None:
            return self._policy.grants_of_token(alias, basis.get("claims", {}))
        return ()

    @property
    def logins(self) -> tuple[LoginChoice, ...]:
        """The issuers at which people can log in."""
        tables = (issuer.table for issuer in self._issuers.values())
        return tuple(LoginChoice(t.alias, t.url, t.client_id) for t in tables if t.client_id is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop fetching keys."""
        for issuer in (*self._issuers.values(), *self._retired):
            await issuer.__aexit__()

    def _static(self, token: str) -> Principal:
        found = self._tokens.find(token)
        if found is None or self._has_expired(found):
            self._count(STATIC_ALIAS, "refused")
            raise invalid("the token is not known: it was revoked, has expired, or is of another gateway")
        self._count(STATIC_ALIAS, "accepted")
        return Principal(
            actor_of(STATIC_ALIAS, found.name),
            self._static_grants(found),
            None if found.expires_at is None else float(found.expires_at),
            basis={"token": found.id},
        )

    def _has_expired(self, token: StaticToken) -> bool:
        return token.expires_at is not None and token.expires_at <= self._clock()

    def _static_grants(self, token: StaticToken) -> Grants:
        return (*token.grants, *self._policy.grants_of_name(token.name))

    async def _verified(self, token: str) -> Principal:
        digest = hashlib.sha256(token.encode()).digest()
        known = self._remembered.get(digest)
        policy, alias = self._policy, None
        try:
            if known is not None and (known.principal.expires_at or 0.0) > self._clock():
                alias = known.issuer.table.alias
                keys = await known.issuer.current_keys()
                if keys is known.keys and self._remembered.get(digest) is known:
                    self._remembered.move_to_end(digest)
                    self._count(alias, "accepted")
                    return known.principal
            issuer = self._issuer_of(token)
            alias = issuer.table.alias
            claims = await issuer.verify(token)
        except UnauthenticatedError:
            self._count(alias, "refused")
            raise
        except UnavailableError:
            self._count(alias, "unavailable")
            raise
        if policy is not self._policy:  # the policy changed while keys were fetched
            return await self._verified(token)
        self._count(alias, "accepted")
        principal = Principal(
            actor_of(alias, claims["sub"]),
            policy.grants_of_token(alias, claims),
            float(min(claims["exp"], _LAST_SECOND)),
            basis={
                "issuer": alias,
                "claims": {name: claims[name] for name in policy.claims_of(alias) if name in claims},
            },
        )
        if issuer.keys is not None:
            self._remembered[digest] = _Remembered(principal, issuer, issuer.keys)
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return principal

    def _issuer_of(self, token: str) -> Issuer:
        _, claims = unverified(token)
        name = claims.get("iss")
        found = self._issuers.get(name) if isinstance(name, str) else None
        if found is None:
            raise invalid("the token is of an issuer that is not trusted here")
        return found

    def _count(self, alias: str | None, outcome: str) -> None:
        self._outcomes.labels(alias or "none", outcome).inc()

    def _look(self) -> None:
        """Read files again that have changed."""
        self._looked_at = self._ticks()
        for file, take in ((self._policy_file, self._take_policy), (self._tokens_file, self._take_tokens)):
            if file is None or not (file.failure or file.changed()):
                continue
            try:
                take(file)
            except ConfigurationError as error:
                if file.failure != error.detail:
                    _log.error("%s; its previous content stays in force", error.detail)
                file.failure = error.detail
                self._stale.labels(file.name).set(1)
            else:
                file.failure = None
                _log.info("read the %s file %s again", file.name, file.path)

    def _take_policy(self, file: _Watched) -> None:
        file.note()
        policy = read_policy(file.path)
        issuers = {table.url: self._open_issuer(table, file) for table in policy.issuer}
        dropped = (issuer for issuer in self._issuers.values() if issuer not in issuers.values())
        self._retired = [issuer for issuer in (*self._retired, *dropped) if issuer.fetching]
        self._policy, self._issuers = policy, issuers
        self._remembered.clear()
        self._stale.labels(file.name).set(0)

    def _open_issuer(self, table: IssuerTable, file: _Watched) -> Issuer:
        """The issuer. Reuses the open one, with its keys, unless the policy has changed its entry."""
        for path in (table.ca, table.jwks):
            if path is not None:
                file.note(path)
        known = self._issuers.get(table.url)
        if known is not None and known.table == table and table.ca is None and table.jwks is None:
            return known
        return Issuer(
            table,
            clock=self._clock,
            ticks=self._ticks,
            failed=lambda alias: self._fetch_failures.labels(alias).inc(),
        )

    def _take_tokens(self, file: _Watched) -> None:
        file.note()
        self._tokens = read_tokens(file.path)
        self._stale.labels(file.name).set(0)


def _is_loopback(listen: str) -> bool:
    try:
        return ListenAddress.parse(listen).is_loopback
    except ValueError:
        return False


class _Watched:
    """A file and the files that it names, each with its state at the time of reading."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.failure: str | None = None
        """Why the last attempt failed: the file is read again until an attempt succeeds."""
        self._states: dict[Path, object] = {}

    def note(self, path: Path | None = None) -> None:
        """Note that `path` is read now. Without `path` it is the file itself, and the files that it named before are
        forgotten."""
        if path is None:
            self._states.clear()
        self._states[path or self.path] = _state_of(path or self.path)

    def changed(self) -> bool:
        """Whether any of the files has changed since it was read."""
        return any(_state_of(path) != state for path, state in self._states.items())


def _state_of(path: Path) -> object:
    """A state that differs if a file's content differs, found without reading the file. Follows links."""
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_size, found.st_mtime_ns
