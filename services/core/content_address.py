"""The names of `artifact_store.manifest`, for importers that still name this place."""

from artifact_store.manifest import *  # noqa: F403
