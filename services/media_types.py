"""The names of `artifact_store.media_types`, for importers that still name this place."""

from artifact_store.media_types import *  # noqa: F403
