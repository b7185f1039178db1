"""The oracle: reads log, blobs and views, and names every broken invariant.

It shares the language (`schemas`), the ports and the folds with what it checks, but no code that writes the log.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

from services.blobs.port import IDLE_SECONDS, BlobStore
from services.log.port import Log
from services.verify.check_blobs import BlobCheck, find_orphans, keys_to_come
from services.verify.check_log import LogCheck, Progress
from services.verify.check_views import check_view
from services.verify.notes import Notes
from services.verify.report import KINDS, Report, Violation
from services.views.database import Views
from services.views.projections import PROJECTIONS

__all__ = ["KINDS", "Progress", "Report", "Violation", "verify"]


async def verify(
    log: Log,
    blobs: BlobStore,
    views: Views,
    *,
    check_bytes: bool = False,
    remove_orphans: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Check every invariant on these parts. With `check_bytes`, read and hash every blob, and set damaged ones aside.

    Memory does not depend on the length of the log: temporary files hold what must be remembered. May run beside
    writers and projectors: the log is read up to its end at the time of the call, and each view is compared with a
    fresh fold of the log up to the view's position. With `remove_orphans`, removes large bodies that were stored a day
    ago or earlier and that no event names, unless anything is wrong with the log. Without these two options, nothing is
    changed.

    Raises UnavailableError, ConfigurationError: a part cannot be reached; CorruptError: the log has no readable
    identity. Everything else that is wrong is in the report.
    """
    report = Report()
    notify = progress or (lambda _: None)
    # An event is appended seconds after its body was stored. The log is read from now on, so events had a day's time.
    before = await blobs.now() - timedelta(seconds=IDLE_SECONDS)
    spared = await keys_to_come(blobs)
    with Notes() as notes:
        await LogCheck(log, notes, report, backend_id=blobs.backend_id, progress=notify).run()
        await find_orphans(blobs, notes, report, before=before, spared=spared, remove=remove_orphans)
        await BlobCheck(blobs, notes, report, check_bytes=check_bytes, progress=notify).run()
    with tempfile.TemporaryDirectory(prefix="artifact-store-verify-") as folder:
        fresh = Views(f"sqlite+aiosqlite:///{Path(folder) / 'views.db'}")
        try:
            await fresh.migrate()
            for projection in PROJECTIONS.values():
                await check_view(log, views, fresh, projection, report)
                notify(report)
        finally:
            await fresh.close()
    return report
