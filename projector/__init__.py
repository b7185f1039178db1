"""The projector: runs the folds of `services.views` on the log, and folds a view again from zero."""

from projector.rebuild import ReplayResult, replay
from projector.runner import run_projection, run_projectors

__all__ = ["ReplayResult", "replay", "run_projection", "run_projectors"]
