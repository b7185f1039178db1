"""The names of `artifact_store.canonical`, for importers that still name this place."""

from artifact_store.canonical import *  # noqa: F403
