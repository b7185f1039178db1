"""The names of `artifact_store.errors`, for importers that still name this place."""

from artifact_store.errors import *  # noqa: F403
