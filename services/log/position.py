"""The names of `artifact_store.position`, for importers that still name this place."""

from artifact_store.position import *  # noqa: F403
