"""The names of `artifact_store.byte_streams`, for importers that still name this place."""

from artifact_store.byte_streams import *  # noqa: F403
