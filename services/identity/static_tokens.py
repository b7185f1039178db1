"""Static tokens: created by `artifact-store tokens create`, kept as hashes in a file, and looked up by their hash.

A token is 256 random bits. SHA-256 without salt or stretching is sufficient: nobody can search 2^256 values, however
fast the hash is, and no two tokens are equal. (Passwords, which people choose, would need a slow hash.) A reader of the
file learns who has which rights, but no token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from artifact_store.errors import ConfigurationError, InvalidRequestError, NotFoundError, UnavailableError
from artifact_store.user_files import replace_privately, sync_folder
from services.core.access import Grant, Packages, Right
from services.identity.policy import check_name, check_pattern, read_trusted
from services.runtime.file_system import FileLock

PREFIX = "artst_"
"""The prefix of every static token; 64 hex digits follow. It lets secret scanners recognise tokens."""

_TOKEN = re.compile(PREFIX + "[0-9a-f]{64}")

MAX_FILE_BYTES = 8 << 20

_FORMAT = 1

_LOCK_SECONDS = 10.0

_DAY = 86_400


class StaticToken(BaseModel):
    """One token, as stored in the file. Times are seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: str = Field(pattern="^[0-9a-f]{12}$")
    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    can: tuple[Right, ...]
    producers: tuple[str, ...] = ("*",)
    subjects: tuple[str, ...] = ("*",)
    created_at: int
    expires_at: int | None = None

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("producers", "subjects")
    @classmethod
    def _sound_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_pattern, patterns))

    @property
    def grants(self) -> tuple[Grant, ...]:
        """The rights in the token's entry."""
        return (Grant(frozenset(self.can), Packages(self.producers, self.subjects)),) if self.can else ()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    format: int
    tokens: tuple[StaticToken, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenSet:
    """The tokens that the file held when it was read."""

    by_digest: dict[bytes, StaticToken]

    def find(self, token: str) -> StaticToken | None:
        """The token's entry, whether it has expired or not; None if it is unknown.

        The time this takes reveals nothing about existing tokens: hashes are compared, and nobody can choose a token by
        its hash.
        """
        digest = hashlib.sha256(token.encode()).digest()
        found = self.by_digest.get(digest)
        if found is None or not hmac.compare_digest(bytes.fromhex(found.sha256), digest):
            return None
        return found

    def __iter__(self) -> Iterator[StaticToken]:
        return iter(self.by_digest.values())


NO_TOKENS = TokenSet({})


def is_static(token: str) -> bool:
    """Whether the token has the form of a static token."""
    return _TOKEN.fullmatch(token) is not None


def read_tokens(path: Path) -> TokenSet:
    """The tokens in the file; none if there is no file. Blocks. Raises ConfigurationError."""
    try:
        raw = read_trusted(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        return NO_TOKENS
    except OSError as error:
        raise ConfigurationError(f"the tokens file {path} cannot be read: {error.strerror}") from None
    try:
        found = _File.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ConfigurationError(f"the tokens file {path} is invalid: {place}: {first['msg']}") from None
    if found.format != _FORMAT:
        raise ConfigurationError(f"the tokens file {path} has format {found.format}; this release reads {_FORMAT}")
    return TokenSet({bytes.fromhex(token.sha256): token for token in found.tokens})


def create_token(
    path: Path,
    name: str,
    can: Iterable[Right],
    *,
    producers: Iterable[str] = ("*",),
    subjects: Iterable[str] = ("*",),
    days: float | None = None,
    now: float,
) -> tuple[StaticToken, str]:
    """Add a token to the file, which is created if it is missing. Returns its entry and the token itself.

    `now` is in seconds since 1970; the token expires after `days`. Blocks. Raises InvalidRequestError,
    ConfigurationError, and UnavailableError if another process holds the file's lock.
    """
    token = PREFIX + secrets.token_hex(32)
    try:
        made = StaticToken(
            id=uuid4().hex[:12],
            name=name,
            sha256=hashlib.sha256(token.encode()).hexdigest(),
            can=tuple(dict.fromkeys(can)),
            producers=tuple(producers),
            subjects=tuple(subjects),
            created_at=int(now),
            expires_at=None if days is None else int(now + days * _DAY),
        )
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{'.'.join(map(str, first['loc']))}: {message}") from None
    _change(path, lambda tokens: [*tokens, made])
    return made, token


def revoke_tokens(path: Path, which: str) -> tuple[StaticToken, ...]:
    """Remove the token of this id, or all tokens of this name, and return them. Blocks.

    Raises NotFoundError, ConfigurationError, and UnavailableError if another process holds the file's lock.
    """
    revoked: list[StaticToken] = []

    def without(tokens: list[StaticToken]) -> list[StaticToken]:
        revoked.extend(token for token in tokens if which in (token.id, token.name))
        if not revoked:
            raise NotFoundError(f"there is no token {which[:80]!r}; `artifact-store tokens list` shows them")
        return [token for token in tokens if token not in revoked]

    _change(path, without)
    return tuple(revoked)


def _change(path: Path, change: Callable[[list[StaticToken]], list[StaticToken]]) -> None:
    try:
        path = path.resolve()  # a link is kept; its target is replaced
        with _locked(path):
            tokens = change(list(read_tokens(path)))
            content = _File(format=_FORMAT, tokens=tuple(tokens)).model_dump_json(indent=1).encode()
            replace_privately(path, content + b"\n")
            sync_folder(path.parent)
    except OSError as error:
        raise ConfigurationError(f"the tokens file {path} cannot be written: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    if not lock.take(_LOCK_SECONDS):
        raise UnavailableError(f"another process has been changing {path} for {_LOCK_SECONDS:g} s; try again")
    try:
        yield
    finally:
        lock.release()
