"""The names of `artifact_store.events`, for importers that still name this place."""

from artifact_store.events import *  # noqa: F403
