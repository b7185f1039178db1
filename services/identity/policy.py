"""The policy file: which issuers are trusted, and which rights their tokens give on which packages.

    [[issuer]]
    alias = "ci"
    url = "https://issuer.example"
    audience = ["artifact-store"]

    [[rule]]
    issuer = "ci"
    claims = { repository = "team/*" }
    can = ["read", "write"]
    producers = ["team-*"]

    [[principal]]
    name = "backup"
    can = ["read"]

A rule gives rights to the tokens of an issuer if their claims match. A principal gives rights to the static tokens of
that name. Rights add up; nothing takes one away. Every key is checked: an unknown or mistyped one makes the whole file
invalid.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from artifact_store.errors import ConfigurationError
from artifact_store.rules import is_loopback
from services.core.access import Grant, Packages, Right, matches

MAX_POLICY_BYTES = 1 << 18

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""The signature algorithms that a policy may name. All are asymmetric, so that nobody can sign with a public key."""

DEFAULT_ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA")

STATIC_ALIAS = "token"
"""The alias of static tokens."""

_RESERVED = frozenset({STATIC_ALIAS, "local"})

_ALIAS = re.compile(r"[a-z][a-z0-9-]{0,31}")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_MAX_STARS = 8
"""Each `*` in a pattern multiplies the cost of comparing an unfavourable text."""

Claims = Mapping[str, Any]


def check_name(name: str) -> str:
    """The name of a static token, unchanged. Raises ValueError if it is invalid."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with a letter or digit"
        )
    return name


def check_pattern(pattern: str) -> str:
    """A pattern, unchanged. Raises ValueError if it is invalid."""
    if not pattern:
        raise ValueError("an empty pattern matches nothing; '*' matches everything")
    if pattern.count("*") > _MAX_STARS:
        raise ValueError(f"a pattern may have at most {_MAX_STARS} '*'")
    return pattern


def check_issuer_url(url: str) -> str:
    """An issuer's URL, unchanged. Raises ValueError unless it is https, or http on loopback."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("it is no URL") from None
    if not host or parts.query or parts.fragment or parts.username is not None or not url.isprintable() or " " in url:
        raise ValueError("it must have the form https://host[:port][/path]")
    if parts.scheme == "http" and is_loopback(host):
        return url
    if parts.scheme != "https":
        raise ValueError("it must be https; http is accepted only on loopback")
    return url


Pattern = Annotated[str, AfterValidator(check_pattern)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class IssuerTable(_Table):
    """One `[[issuer]]`: whose tokens are trusted, and how they are checked."""

    alias: str
    """The prefix of this issuer's actors. It must not change once events contain it."""
    url: str
    """The issuer as its tokens name it (`iss`). OIDC discovery finds its keys from this URL."""
    audience: tuple[str, ...] = Field(min_length=1)
    """A token must be meant for one of these (`aud`)."""
    client_id: str | None = Field(None, min_length=1)
    """The client with which `artifact-store login` logs in at this issuer; None: nobody logs in there."""
    algorithms: tuple[str, ...] = Field(DEFAULT_ALGORITHMS, min_length=1)
    typ: str | None = Field(None, min_length=1)
    """The `typ` that the token's header must have, compared without case; None: one of the usual types."""
    ca: Path | None = None
    """A PEM file with the certificate authorities of the issuer; None: the system's."""
    jwks: Path | None = None
    """A file with the issuer's public keys (RFC 7517). With it, no request is sent to the issuer."""

    @field_validator("audience", "algorithms", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("ca", "jwks", mode="before")
    @classmethod
    def _as_path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) and value else value

    @field_validator("alias")
    @classmethod
    def _plain_alias(cls, alias: str) -> str:
        if not _ALIAS.fullmatch(alias):
            raise ValueError("an alias has 1 to 32 lower-case letters, digits and hyphens, and begins with a letter")
        if alias in _RESERVED:
            raise ValueError(f"{', '.join(sorted(_RESERVED))} are reserved aliases")
        return alias

    @field_validator("url")
    @classmethod
    def _secure_url(cls, url: str) -> str:
        return check_issuer_url(url)

    @field_validator("algorithms")
    @classmethod
    def _asymmetric(cls, algorithms: tuple[str, ...]) -> tuple[str, ...]:
        for name in algorithms:
            if name not in ALGORITHMS:
                raise ValueError(f"{name!r} is not accepted; known are {', '.join(ALGORITHMS)}")
        return algorithms

    @model_validator(mode="after")
    def _login_is_for_us(self) -> IssuerTable:
        if self.client_id is not None and self.client_id not in self.audience:
            raise ValueError("client_id must be one of audience: `login` sends ID tokens, whose audience it is")
        return self


class _GrantTable(_Table):
    can: tuple[Right, ...] = Field(min_length=1)
    producers: tuple[Pattern, ...] = Field(("*",), min_length=1)
    subjects: tuple[Pattern, ...] = Field(("*",), min_length=1)

    @field_validator("producers", "subjects", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("can", mode="before")
    @classmethod
    def _known_rights(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        for name in value:
            if name not in list(Right):
                raise ValueError(f"{name!r} is no right; known are {', '.join(Right)}")
        return tuple(Right(name) for name in value)

    @property
    def grant(self) -> Grant:
        """The grant of this table."""
        return Grant(frozenset(self.can), Packages(self.producers, self.subjects))


class RuleTable(_GrantTable):
    """One `[[rule]]`: rights for tokens of an issuer whose claims all match."""

    issuer: str
    claims: dict[str, Any] = Field(min_length=1)
    """Patterns by claim: a text, several texts of which one must match, or a table for a claim that is an object."""

    @field_validator("claims")
    @classmethod
    def _sound_patterns(cls, claims: dict[str, Any]) -> dict[str, Any]:
        _check_claims(claims)
        return claims

    def mismatch(self, claims: Claims) -> str | None:
        """The first claim that does not match; None if all do."""
        return _mismatch(self.claims, claims)


class PrincipalTable(_GrantTable):
    """One `[[principal]]`: rights for the static tokens of a name."""

    name: Annotated[str, AfterValidator(check_name)]


class Policy(_Table):
    """A whole policy file."""

    issuer: tuple[IssuerTable, ...] = ()
    rule: tuple[RuleTable, ...] = ()
    principal: tuple[PrincipalTable, ...] = ()

    @field_validator("issuer", "rule", "principal", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def grants_of_token(self, alias: str, claims: Claims) -> tuple[Grant, ...]:
        """The rights of a token of this issuer with these claims, which must have been verified."""
        return tuple(rule.grant for rule in self.rule if rule.issuer == alias and rule.mismatch(claims) is None)

    def claims_of(self, alias: str) -> frozenset[str]:
        """The names of the claims by which rules distinguish this issuer's tokens."""
        return frozenset(name for rule in self.rule if rule.issuer == alias for name in rule.claims)

    def grants_of_name(self, name: str) -> tuple[Grant, ...]:
        """The rights that the policy adds to the static tokens of this name."""
        return tuple(principal.grant for principal in self.principal if principal.name == name)


def read_policy(path: Path) -> Policy:
    """Read a policy file. Blocks.

    Relative paths in it are relative to its folder. Raises ConfigurationError, which names the place in the file.
    """
    try:
        raw = read_trusted(path, MAX_POLICY_BYTES)
    except OSError as error:
        raise ConfigurationError(f"the policy {path} cannot be read: {error.strerror}") from None
    return parse_policy(raw, path)


def read_trusted(path: Path, max_bytes: int) -> bytes:
    """The content of a file that gives rights. Blocks.

    Raises ConfigurationError if every user of the machine may write it or it is too large, and OSError.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
            raise ConfigurationError(f"others may write {path}: chmod o-w {path}")
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ConfigurationError(f"{path} is larger than {max_bytes >> 10} KiB")
    return raw


def parse_policy(raw: bytes, path: Path) -> Policy:
    """As `read_policy`, for a file's content; messages name `path`. Reads the files that the policy names."""
    fault = partial(_fault, path)
    try:
        text = raw.decode("utf-8")
        tables = tomllib.loads(text)
    except UnicodeDecodeError:
        raise fault("it is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: an integer of more digits than `int` takes
        raise fault(f"it is not TOML: {error}") from None
    try:
        found = Policy.model_validate(tables)
    except ValidationError as error:
        raise fault("; ".join(_explained(error, text))) from None
    except RecursionError:
        raise fault("its tables are nested too deeply") from None
    _check_names(found, text, fault)
    issuers = tuple(
        issuer.model_copy(
            update={
                name: path.parent / value for name in ("ca", "jwks") if (value := getattr(issuer, name)) is not None
            }
        )
        for issuer in found.issuer
    )
    for number, issuer in enumerate(issuers, 1):
        _check_ca(issuer, f"[[issuer]] {number}{_line(text, 'issuer', number)}", fault)
    return found.model_copy(update={"issuer": issuers})


def _check_names(policy: Policy, text: str, fault: Any) -> None:
    """Raise for duplicate aliases and URLs, and for rules of an issuer that does not exist."""
    for key in ("alias", "url"):
        seen: set[str] = set()
        for number, issuer in enumerate(policy.issuer, 1):
            value = getattr(issuer, key)
            if value in seen:
                raise fault(f"[[issuer]] {number}{_line(text, 'issuer', number)}: {key} {value!r} comes twice")
            seen.add(value)
    aliases = {issuer.alias for issuer in policy.issuer}
    for number, rule in enumerate(policy.rule, 1):
        if rule.issuer not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise fault(
                f"[[rule]] {number}{_line(text, 'rule', number)}: there is no issuer {rule.issuer!r}; known are {known}"
            )


def _check_ca(issuer: IssuerTable, place: str, fault: Any) -> None:
    if issuer.ca is None:
        return
    try:
        ssl.create_default_context(cafile=issuer.ca)
    except OSError as error:  # ssl.SSLError is one: the file is not PEM
        raise fault(f"{place}: ca {issuer.ca} cannot be used: {error.strerror or error}") from None


def _fault(path: Path, detail: str) -> ConfigurationError:
    return ConfigurationError(f"the policy {path} is invalid: {detail}")


def _explained(error: ValidationError, text: str) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False):
        place = _place(fault["loc"], text)
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = "there is no such key"
        elif fault["type"] == "missing":
            message = "this key is missing"
        yield f"{place}: {message}"


def _place(location: Sequence[str | int], text: str) -> str:
    """`("rule", 1, "claims")` as `[[rule]] 2 (line 9), claims`."""
    table, *rest = location
    if not rest or not isinstance(rest[0], int):
        return str(table)
    number, keys = rest[0], rest[1:]
    shown = ".".join(str(key + 1) if isinstance(key, int) else key for key in keys)
    return f"[[{table}]] {number + 1}{_line(text, str(table), number + 1)}" + (f", {shown}" if shown else "")


def _line(text: str, table: str, number: int) -> str:
    """Where the table begins, if each table in the file has a header."""
    header = re.compile(rf"\s*\[\[\s*{table}\s*\]\]\s*(#.*)?")
    lines = [count for count, line in enumerate(text.splitlines(), 1) if header.fullmatch(line)]
    return f" (line {lines[number - 1]})" if number <= len(lines) else ""


def _check_claims(patterns: Mapping[str, Any], above: str = "") -> None:
    for name, pattern in patterns.items():
        if isinstance(pattern, dict):
            _check_claims(pattern, f"{above}{name}.")
            continue
        for one in pattern if isinstance(pattern, list) and pattern else [pattern]:
            if not isinstance(one, str):
                raise ValueError(f"{above}{name} must be a text, a list of texts or a table")
            try:
                check_pattern(one)
            except ValueError as error:
                raise ValueError(f"{above}{name}: {error}") from None


def _mismatch(patterns: Mapping[str, Any], claims: object, above: str = "") -> str | None:
    for name, pattern in patterns.items():
        value = claims.get(name) if isinstance(claims, Mapping) else None
        if isinstance(pattern, dict):
            if (found := _mismatch(pattern, value, f"{above}{name}.")) is not None:
                return found
        else:
            allowed = [pattern] if isinstance(pattern, str) else pattern
            if not any(matches(one, text) for one in allowed for text in _texts(value)):
                return above + name
    return None


def _texts(value: object) -> Iterator[str]:
    """The texts that patterns are compared with: the members of a list; none for an object."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, list):
        for member in value:
            if not isinstance(member, list):
                yield from _texts(member)
