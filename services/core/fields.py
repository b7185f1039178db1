"""The names of `artifact_store.rules`, for importers that still name this place."""

from artifact_store.rules import *  # noqa: F403
