"""Access: the rights of a principal, and the producers and subjects of the packages for which they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any
from uuid import UUID

from artifact_store.errors import ForbiddenError, PackageNotFoundError


class Right(StrEnum):
    """What a rule can allow."""

    READ = "read"
    WRITE = "write"
    """Create packages, ingest files, finalize."""
    DELEGATE = "delegate"
    """Write in another actor's name."""
    DISPOSE = "dispose"
    """Hold, release, expire, restore."""
    SUBSCRIBE = "subscribe"
    OPERATE = "operate"


def matches(pattern: str, value: str) -> bool:
    """Whether `value` matches `pattern`: `*` matches any text, every other character only itself."""
    return _compiled(pattern).fullmatch(value) is not None


@lru_cache(maxsize=4_096)
def _compiled(pattern: str) -> re.Pattern[str]:
    first, *others = map(re.escape, pattern.split("*"))
    if not others:
        return re.compile(first)
    *between, last = others
    # It is enough to match each text between two stars at its first occurrence. Atomic groups never backtrack, which
    # would take polynomial time in the length of the value.
    return re.compile(first + "".join(f"(?>.*?{text})" for text in between) + ".*" + last, re.DOTALL)


@dataclass(frozen=True, slots=True)
class Packages:
    """The set of packages whose producer matches one of `producers` and whose subject matches one of `subjects`."""

    producers: tuple[str, ...] = ("*",)
    subjects: tuple[str, ...] = ("*",)

    def include(self, producer: str, subject: str) -> bool:
        """Whether a package of this producer and subject is in the set."""
        return any(matches(pattern, producer) for pattern in self.producers) and any(
            matches(pattern, subject) for pattern in self.subjects
        )


@dataclass(frozen=True, slots=True)
class Grant:
    """Rights on some packages."""

    rights: frozenset[Right]
    packages: Packages = Packages()


@dataclass(frozen=True, slots=True)
class Scope:
    """The packages for which one right holds: those that any of `packages` includes. An empty scope has none."""

    packages: tuple[Packages, ...]

    def includes(self, producer: str, subject: str) -> bool:
        """Whether the right holds for a package of this producer and subject."""
        return any(packages.include(producer, subject) for packages in self.packages)

    @property
    def everywhere(self) -> bool:
        """Whether the right holds for every possible package."""
        return any("*" in packages.producers and "*" in packages.subjects for packages in self.packages)

    def __bool__(self) -> bool:
        return bool(self.packages)


EVERYWHERE = Scope((Packages(),))

Grants = tuple[Grant, ...]
EVERYTHING: Grants = (Grant(frozenset(Right)),)
"""All rights on all packages."""


def scope(grants: Grants, right: Right) -> Scope:
    """The packages for which these grants give the right."""
    return Scope(tuple(grant.packages for grant in grants if right in grant.rights))


def require(grants: Grants, right: Right, package_id: UUID, origin: tuple[str, str] | None) -> None:
    """Raise unless the grants give the right on the package.

    `origin` is its producer and subject; None if there is no such package.

    Raises:
        PackageNotFoundError: there is no such package, or the caller may not even read it.
        ForbiddenError: the caller may read the package, but lacks the right.
    """
    if origin is not None and scope(grants, right).includes(*origin):
        return
    if origin is None or not scope(grants, Right.READ).includes(*origin):
        raise no_package(package_id)
    raise ForbiddenError(f"the right to {right} does not hold for package {package_id}")


def no_package(package_id: UUID) -> PackageNotFoundError:
    """The error for a package that does not exist, and for one that the caller may not know of."""
    return PackageNotFoundError(f"there is no package {package_id}")


@dataclass(frozen=True, slots=True)
class Principal:
    """The sender of a request, with their grants. `expires_at` is when their token expires, in seconds since 1970."""

    actor: str
    """Their name in events: the alias of their issuer, a colon, and their subject at that issuer."""
    grants: Grants
    expires_at: float | None = None
    local: bool = False
    """Whether they are an unauthenticated user of this machine, who may act under any name."""
    basis: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What their rights were derived from; nothing secret. `Authenticator.grants_of` finds their rights by it later."""

    def may(self, right: Right) -> bool:
        """Whether they have the right for any package at all."""
        return any(right in grant.rights for grant in self.grants)

    def scope(self, right: Right) -> Scope:
        """The packages for which they have the right."""
        return scope(self.grants, right)


def all_rights(actor: str, rights: Iterable[Right] = Right) -> Principal:
    """A principal with these rights, all of them by default, on every package."""
    return Principal(actor, (Grant(frozenset(rights)),))


def local_user(actor: str) -> Principal:
    """The principal for a user of this machine: they have all rights, and may act under any name."""
    return Principal(actor, EVERYTHING, local=True)
