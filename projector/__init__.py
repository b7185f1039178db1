"""The projector: the process that feeds `services.views.engine` from Kafka's consumers, and replays.

Begin with `runner`: it joins a projection's group and applies what it reads there. `rebuild` folds a view again from
the log's start, with `loading` for most of it, in this process or in several, each a `loader`. `projection_metrics`
shows Prometheus how it goes. The projector may import `services` and what that may import; never the gateway.
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
