"""The projections: one file each. `PROJECTIONS` knows them by their names."""

from __future__ import annotations

from collections.abc import Mapping

from services.errors import InvalidRequestError
from services.views.projections.port import Projection, Tables
from services.views.projections.registry import RegistryProjection
from services.views.projections.retention import RetentionProjection
from services.views.projections.usage import UsageProjection

__all__ = ["PROJECTIONS", "Projection", "Tables", "projection_named"]

PROJECTIONS: Mapping[str, Projection] = {
    p.name: p for p in (RegistryProjection(), RetentionProjection(), UsageProjection())
}


def projection_named(name: str) -> Projection:
    """The projection of this name. Raises InvalidRequestError, which lists the known ones."""
    found = PROJECTIONS.get(name)
    if found is None:
        raise InvalidRequestError(f"there is no projection {name[:64]!a}; known: {', '.join(PROJECTIONS)}")
    return found
