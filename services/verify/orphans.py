"""Large bodies under keys of their own that no event names: their command was refused, or it never came.

Only a whole log can tell: this asks the notes of everything that was read.
"""

from __future__ import annotations

import logging
from datetime import datetime

from services.blobs.port import BlobStore
from services.blobs.upload_states import UploadStates
from services.errors import CorruptError
from services.verify.notes import Notes
from services.verify.report import Report

_log = logging.getLogger(__name__)


async def find_orphans(blobs: BlobStore, notes: Notes, report: Report, *, before: datetime, remove: bool) -> None:
    """Count the orphans that were stored before that moment and, if they are to go, remove them.

    Nothing is said of a log in which anything is wrong: it may name what could not be read, and a command that waits
    for its retry may still come to name what was stored for it. Nor while the state of an upload cannot be read.
    Raises UnavailableError.
    """
    if not report.clean:
        return

    try:
        alive = await UploadStates(blobs).blob_keys()
    except CorruptError as error:  # nobody can tell what it would have named
        _log.error("orphans are not looked for: %s", error.detail)
        return

    def orphaned(key: str) -> bool:
        if notes.is_claimed(key) or key in alive:
            return False
        report.orphans += 1
        return remove

    removed = await blobs.remove_uploads(before=before, orphaned=orphaned)
    report.removed = removed if remove else None
