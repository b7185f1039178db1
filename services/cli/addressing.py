"""How a command line names a package: by its id, or by the content address of its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import click

from artifact_store.errors import InvalidRequestError
from artifact_store.manifest import ContentAddress
from artifact_store.registry import Registry, find_frozen

if TYPE_CHECKING:
    from services.views.projections import Projection


@contextmanager
def as_usage() -> Iterator[None]:
    """What an argument breaks a rule with is wrong usage: raises click.BadParameter for InvalidRequestError."""
    try:
        yield
    except InvalidRequestError as error:
        raise click.BadParameter(error.detail) from None


def package_or_address(text: str) -> UUID | ContentAddress:
    """Read either. Raises click.BadParameter."""
    if text.startswith("blake3:"):
        with as_usage():
            return ContentAddress.parse(text)
    return package_id(text)


def package_id(text: str) -> UUID:
    """Read an id. Raises click.BadParameter."""
    try:
        return UUID(text)
    except ValueError:
        raise click.BadParameter(f"{text[:80]!r} is no package id; `artifact-store packages` lists them") from None


async def find_package(registry: Registry, text: str) -> UUID:
    """The id of the package that is named. Raises PackageNotFoundError, click.BadParameter."""
    which = package_or_address(text)
    if isinstance(which, UUID):
        return which
    return await find_frozen(registry, which)


def known_projection(name: str) -> Projection:
    """The projection of this name. Raises click.BadParameter, which lists the known ones."""
    from services.views.projections import projection_named  # loads SQLAlchemy, which clients of a gateway do without

    with as_usage():
        return projection_named(name)
