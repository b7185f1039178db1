"""The projector: the process that feeds `services.views.engine` from Kafka's consumers, and replays.

Begin with `runner`: it joins a projection's group through `assignment` and applies what that reads. `rebuild` folds a
view again from the log's start, with `loading` for the long way, in this process or in several, each a `loader`.
`projection_metrics` shows Prometheus how it goes. May import `services` and what that may import; never the gateway.
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
