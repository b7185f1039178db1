"""The previous release, whose processes share a cluster with those of this one during an upgrade."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.integration.processes import ProductProcess

PREVIOUS = "0b69710ae021cc0eb57e8449875e6fdcbd79d122"
"""The commit that this release must be able to share a cluster with."""

_UNKNOWN = ("ARTIFACT_STORE_LOG_FORMAT", "ARTIFACT_STORE_LOG_LEVEL")
"""Settings that the previous release refuses."""

_PRODUCT = ("schemas", "services", "ingest_gateway", "projector")
_ROOT = Path(__file__).parents[2]


class PreviousRelease:
    """Its code, taken out of the repository's history into a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises RuntimeError when the history is not there: clone without `--depth`."""
        done = subprocess.run(["git", "archive", PREVIOUS, *_PRODUCT], cwd=_ROOT, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the previous release, commit {PREVIOUS}, is not in this clone's history (clone without --depth): "
                f"{done.stderr.decode()}"
            )
        subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)
        self.environment = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


class AnyRelease(ProductProcess):
    """A process that runs the code of `released` when it is started, and this release's without one."""

    released: PreviousRelease | None = None

    def environment(self) -> dict[str, str]:
        given = super().environment()
        if self.released is None:
            return given
        return {name: value for name, value in given.items() if name not in _UNKNOWN} | self.released.environment
