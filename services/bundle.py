"""The names of `artifact_store.archives.bundle`, for importers that still name this place."""

from artifact_store.archives.bundle import *  # noqa: F403
