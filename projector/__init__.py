"""The projector: the process that feeds `services.views.engine` from consumers, and replays.

Begin with `runner`: it joins a projection's group and applies what it reads there. `rebuild` folds a view again from
the log's start. Most of that is `loading`, in this process or in several, each of which runs `loader`.
`projection_metrics` shows the progress to Prometheus. The projector may import `services` and what that may import, but
never the gateway.
"""

from projector.rebuild import DigestMismatchError, RebuildOptions, ReplayResult, abandon, replay
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
