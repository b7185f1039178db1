"""Large bodies under keys of their own that no event names: their command was refused, or it never came.

Only a whole log can tell: this asks the notes of everything that was read.
"""

from __future__ import annotations

import logging
from datetime import datetime

from artifact_store.errors import CorruptError
from services.blobs.port import BlobStore
from services.blobs.resumable.states import UploadStates
from services.verify.notes import Notes
from services.verify.report import Report

_log = logging.getLogger(__name__)


async def keys_to_come(blobs: BlobStore) -> frozenset[str] | None:
    """The keys that an event may come to name; None if nobody can tell. Raises UnavailableError.

    To be asked for before the log is read: what is completed meanwhile may be named behind the end that is read to, and
    an upload that began long before may look as old as that (Amazon S3 dates an object to the beginning of its upload).
    """
    try:
        return await blobs.fresh_uploads() | await UploadStates(blobs).blob_keys()
    except CorruptError as error:  # the state of an upload cannot be read: nobody can tell what it would have named
        _log.error("orphans are not looked for: %s", error.detail)
        return None


async def find_orphans(
    blobs: BlobStore,
    notes: Notes,
    report: Report,
    *,
    before: datetime,
    spared: frozenset[str] | None,
    remove: bool,
) -> None:
    """Count the orphans that were stored before that moment and, if they are to go, remove them.

    Nothing is said of a log in which anything is wrong: it may name what could not be read, and a command that waits
    for its retry may still come to name what was stored for it. Nor where `spared` is None: see `keys_to_come`.
    Raises UnavailableError.
    """
    if not report.clean or spared is None:
        return

    def orphaned(key: str) -> bool:
        if notes.is_claimed(key) or key in spared:
            return False
        report.orphans += 1
        return remove

    removed = await blobs.remove_uploads(before=before, orphaned=orphaned)
    report.removed = removed if remove else None
