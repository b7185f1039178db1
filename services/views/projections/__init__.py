"""The projections: one file each. `PROJECTIONS` has them by name.

Begin with `port`, which says what a projection is, then read `retention_fold`, the shortest. They write through
`services.views.bulk` and check the order of events through `port`; they know nothing of the log or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from artifact_store.errors import InvalidRequestError
from services.views.projections.port import Projection, Tables
from services.views.projections.registry_fold import RegistryProjection
from services.views.projections.retention_fold import RetentionProjection
from services.views.projections.usage_fold import UsageProjection

__all__ = ["PROJECTIONS", "Projection", "Tables", "projection_named"]

PROJECTIONS: Mapping[str, Projection] = {
    p.name: p for p in (RegistryProjection(), RetentionProjection(), UsageProjection())
}


def projection_named(name: str) -> Projection:
    """The projection with this name. Raises InvalidRequestError, which lists the known ones."""
    found = PROJECTIONS.get(name)
    if found is None:
        raise InvalidRequestError(f"there is no projection {name[:64]!a}; known: {', '.join(PROJECTIONS)}")
    return found
