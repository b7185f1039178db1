"""The projector: runs the folds of `services.views` on the log, and folds a view again from zero."""

from projector.rebuild import ReplayResult, abandon, replay
from projector.rebuild_beside import DigestMismatchError, RebuildOptions
from projector.runner import run_projection, run_projectors

__all__ = [
    "DigestMismatchError",
    "RebuildOptions",
    "ReplayResult",
    "abandon",
    "replay",
    "run_projection",
    "run_projectors",
]
