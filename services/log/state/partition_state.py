"""The state of one partition, as its writer holds it: every package, folded from the log up to an offset.

Packages that changed since the last save, and open ones that were used recently, are in memory; all others are in the
state file. Memory is never trusted beyond one take-over: it is discarded when a transaction's outcome is in doubt. The
file never runs ahead of the log: a save holds only what was read back.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from uuid import UUID

from blake3 import blake3

from artifact_store.events import Event, LossAccepted
from schemas.identifiers import partition_id
from services.core.decide import ANSWERS_KEPT_MICROS, MAX_IDLE_MICROS
from services.core.state import ABANDONED, CREATED, FINALIZED, PackageState, evolve, evolve_all, repeats
from services.log.port import PackageExtent
from services.log.records import AcceptedLoss, AdministrativeHead
from services.log.state.state_file import (
    Anchor,
    DiskFullError,
    Irregular,
    StateFile,
    StateFileError,
    Summary,
    UnusableStateError,
    remove,
)

SAVE_EVENTS = 10_000
"""A save is written after this many events, which a take-over reads again in less than half a second."""

SAVE_SECONDS = 5.0
"""A save is also written after this time, if there was any event."""

MAX_ENTRIES = 120_000
"""The most files, folders and commands of open packages in memory, at about 1 KiB each. A large package that was used
since the last save, and packages with background jobs, are not counted."""

LARGE = 2_000
"""A package with more events than this is not read back from the file while others wait; this many take about 20 ms."""

_MAX_ABSENT = 10_000

TIDY_SECONDS = 0.2
"""The pause between two turns in which commands of large finalized packages are turned into answers."""

PUT_AWAY_SECONDS = 5.0
"""The pause between two turns in which some packages are checked for whether they still accept commands."""

_LOG = logging.getLogger(__name__)


class PartitionState:
    """Packages by id, and the state's position in the log. Used by one thread; every method may block on the file.

    All raise StateFileError, after which the state must be closed.
    """

    def __init__(self, file: StateFile, *, max_entries: int = MAX_ENTRIES) -> None:
        """Continues from the content of the file, which it owns from now on."""
        self._file = file
        self._max_entries = max_entries
        self._packages: OrderedDict[UUID, PackageState] = OrderedDict()
        self._saved: dict[UUID, int] = {}
        """The sequence up to which the file has a package, for those in memory."""
        self._entries: dict[UUID, int] = {}
        self._held = 0
        self._absent: set[UUID] = set()
        """Packages that were not found, because a command that creates a package asks for it twice."""
        self._changed: set[UUID] = set()
        self._ahead = False
        self._unsaved = 0
        self._saved_at = self._tidied_at = time.monotonic()
        self._put_away_at = 0.0
        self._last_value: bytes | None = None
        self._used: set[UUID] = set()
        """Open packages that were asked for since the last save."""
        self.pinned: set[UUID] = set()
        """Packages that stay in memory."""
        self.memory_only: str | None = "the disk has no room for its file" if file.alone else None
        """Why the newest part of the state is only in memory, as it is on a full disk; None if it is in the file."""
        self.last_created_at = file.anchor.last_created_at
        self.next_offset = file.anchor.next_offset

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self._file.path

    @property
    def shared(self) -> bool:
        """Whether others can open the file, which copying it needs; not while the disk is full."""
        return not self._file.alone

    @property
    def irregular(self) -> Irregular:
        """The partition's records up to `next_offset` that are not the next event of a package."""
        return self._file.irregular

    @property
    def digest(self) -> bytes:
        """The digest of the record before `next_offset`, as it was when the state was saved."""
        return self._file.anchor.digest

    @property
    def anchor(self) -> Anchor:
        """The last record that was read from the log, which the next save will name."""
        if self._last_value is None:
            return self._file.anchor
        return Anchor(self.next_offset, value_digest(self._last_value), self.last_created_at)

    def package(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """The package; None if the partition has no event of it.

        For a finalized package, only the result of this command is certain to be known, and nothing after
        ANSWERS_KEPT_MICROS. For an open package, no commands are known once it accepts no more of them.
        """
        state = self._whole(package_id, command_id)
        return state.remains() if state is not None and self._is_over(state) else state

    def _whole(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """As much of the package as the state has."""
        state = self._packages.get(package_id)
        if state is None:
            if package_id in self._absent:
                return None
            state = self._file.load(package_id, command_id, self._kept_after())
            if state is not None and state.status == CREATED:
                self._hold(state)
            elif state is None:
                self._note_absent(package_id)
        else:
            self._packages.move_to_end(package_id)
            self._used.add(package_id)
        return state

    def _is_over(self, state: PackageState) -> bool:
        """Whether the package's commands are no longer answered, by the time of the partition's newest event."""
        if state.status == FINALIZED:
            return state.last_event_at <= self._kept_after()
        return state.last_event_at < self._idle_before()

    def away(self, package_id: UUID) -> bool:
        """Whether the package is open, large, and only in the file, so that `package` would take long.

        Smaller packages are read back here, because other partitions' writers wait while a batch is decided.
        """
        if self._file.alone or package_id in self._packages or package_id in self._absent:
            return False
        found = self._file.summary_of(package_id)
        if found is None:
            self._note_absent(package_id)
            return False
        if found.status != CREATED:
            return False
        if found.sequence > LARGE:
            return True
        self.package(package_id)
        return False

    def beside(self) -> StateFile:
        """Another connection to the file, from which another thread loads a package for `adopt`."""
        return self._file.beside()

    def loading(self, package_id: UUID) -> Callable[[], PackageState | None]:
        """A function that reads a package that is `away`, for another thread."""
        file = self.beside()

        def load() -> PackageState | None:
            with closing(file):
                return file.load(package_id, None, 0)

        return load

    def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, as far as the state knows; from any thread, while the state is open."""
        held = self._packages.get(package_id)
        if held is not None:
            return PackageExtent(held.created_at, held.sequence)
        if not self.shared:
            return None
        with closing(self._file.beside()) as file:
            found = file.summary_of(package_id)
        return None if found is None else PackageExtent(found.created_at, found.sequence)

    def adopt(self, package: PackageState) -> None:
        """Hold a package in memory that was loaded `beside`, if the file still has the same."""
        known = package.package_id in self._packages
        known_as = Summary(package.status, package.created_at, package.sequence, package.digest)
        if not known and package.status == CREATED and self._file.summary_of(package.package_id) == known_as:
            self._hold(package)

    def apply(self, event: Event) -> None:
        """Fold one more event in, ahead of the log until it is confirmed.

        An event that its package already has is skipped, and so is every event of a quarantined package. Raises
        CorruptError when the event contradicts the history of its package; the state is as it was.
        """
        package_id = event.package_id
        if package_id in self.irregular.quarantined:
            self._note_passed(event.created_at)
            return
        before = self._whole(package_id)
        if repeats(before, event):
            self.irregular.repeated += 1
            self._note_passed(event.created_at)
            return
        if before is not None and before.status == ABANDONED:
            # A release without this rule continued the package: only the whole log has its files.
            self._file.broken = True
            raise UnusableStateError(f"the state has put package {package_id} away, and an event of it followed")
        state = evolve(before, event)
        self._ahead = True
        self._note_change(state, new=before is None)
        self._unsaved += 1
        self.last_created_at = max(self.last_created_at, event.created_at)

    def quarantine(self, event: Event, cause: str) -> None:
        """Skip an event that contradicts its package's history, and all further events of the package."""
        self.irregular.quarantined[event.package_id] = cause
        self._note_passed(event.created_at)

    def fold(self, before: PackageState | None, events: Sequence[Event]) -> PackageState:
        """Fold in events that were just decided on `before`, ahead of the log until they are confirmed."""
        self._ahead = True
        state = evolve_all(before, events)
        self._note_change(state, new=before is None)
        self._unsaved += len(events)
        self.last_created_at = max(self.last_created_at, state.last_event_at)
        return state

    def note_administrative(self, event: Event) -> None:
        """Fold an administrative record in, which must be confirmed like an event."""
        if event.package_id == partition_id(self._file.origin.identity, self._file.origin.partition):
            self.irregular.administrative = AdministrativeHead.of(event)
            if isinstance(event.payload, LossAccepted):
                self.irregular.accepted.append(AcceptedLoss.of(event, event.payload))
        self._note_passed(event.created_at)

    def note_skipped(self) -> None:
        """Skip a record that is not an event; it must be confirmed like one."""
        self.irregular.skipped += 1
        self._note_passed(0)

    def _note_passed(self, created_at: int) -> None:
        self._ahead = True
        self._unsaved += 1
        self.last_created_at = max(self.last_created_at, created_at)

    def confirm(self, offset: int, value: bytes) -> None:
        """Note that everything applied was read from the log; the last of it is this record."""
        self._ahead = False
        self.next_offset = offset + 1
        self._last_value = value

    @property
    def save_due(self) -> bool:
        """Whether it is time for a save."""
        return self._unsaved >= SAVE_EVENTS or (self._unsaved > 0 and time.monotonic() > self._saved_at + SAVE_SECONDS)

    def save(self) -> None:
        """Write changes to the file, and drop what need not be in memory. Does nothing while ahead of the log.

        While the disk is full, changes stay in memory, up to `max_entries` files and commands; beyond that it raises.
        """
        if self._ahead or self._last_value is None:
            return
        anchor = self.anchor
        changed = [(self._packages[package_id], self._saved[package_id]) for package_id in self._changed]
        try:
            self._file.save(changed, anchor, self._kept_after())
        except DiskFullError as error:
            if sum(1 + state.entries for state, _ in changed) > self._max_entries:
                raise
            self._note_full(error)
            self._saved_at, self._unsaved = time.monotonic(), 1
            return
        for state, _ in changed:
            if state.status == FINALIZED:
                self._forget(state.package_id)
            else:
                self._keep(state, state.sequence)
        self._changed.clear()
        self._unsaved = 0
        self._saved_at = time.monotonic()
        self._last_value = None
        self._make_room()
        self._used.clear()
        self._share()

    def _note_full(self, error: StateFileError) -> None:
        if self.memory_only is None:
            _LOG.warning("what changes is kept in memory until there is room: %s", error.detail)
        self.memory_only = error.detail

    def _share(self) -> None:
        """After a save that had room: let others open the file again."""
        if self._file.alone:
            try:
                self._file = self._file.shared()
            except DiskFullError as error:
                self.memory_only = error.detail
                return
        if self.memory_only is not None and not self._file.alone:
            _LOG.warning("the state file %s is written again", self._file.path)
            self.memory_only = None

    @property
    def tidy_due(self) -> bool:
        """Whether it is time for a turn of `tidy`."""
        return self.untidy and not self._ahead and time.monotonic() > self._tidied_at + TIDY_SECONDS

    @property
    def untidy(self) -> bool:
        """Whether the file has commands of large finalized packages that are still to be turned into answers."""
        return self._file.untidy

    def tidy(self) -> None:
        """Turn some of them into answers."""
        try:
            self._file.tidy()
        except DiskFullError as error:
            self._note_full(error)
            self._tidied_at = time.monotonic() + SAVE_SECONDS
            return
        self._tidied_at = time.monotonic()

    def put_away(self) -> None:
        """Keep only what is needed to refuse commands of open packages that accept no more; some packages at a time.

        Call it while the state has the whole log, because an older release may have continued such a package.
        """
        if self._ahead or self._unsaved or time.monotonic() < self._put_away_at + PUT_AWAY_SECONDS:
            return
        try:
            gone = self._file.put_away(self._idle_before())
        except DiskFullError as error:
            self._note_full(error)
            gone = set()
        for package_id in gone & self._packages.keys():
            self._forget(package_id)
        self._put_away_at = time.monotonic()

    def close(self) -> bool:
        """Save what is confirmed and close the file; a broken file is deleted.

        Never raises, because another state comes next. Returns whether the file has everything that was read from the
        log.
        """
        saved = False
        try:
            if not self._file.broken:
                self.save()
                saved = not self._ahead and self.memory_only is None
        except StateFileError as error:
            _LOG.warning("the last save was not written: %s", error.detail)
        self._end(discard=self._file.broken)
        return saved

    def discard(self) -> None:
        """Close the file and delete it, because it does not agree with the log. Never raises, as `close`."""
        self._end(discard=True)

    def _end(self, *, discard: bool) -> None:
        self._packages.clear()
        try:
            self._file.close()
            if discard:
                remove(self._file.path)
        except StateFileError as error:
            _LOG.warning("a state file was not closed: %s", error.detail)

    def _idle_before(self) -> int:
        return self.last_created_at - MAX_IDLE_MICROS

    def _kept_after(self) -> int:
        return self.last_created_at - ANSWERS_KEPT_MICROS

    def _make_room(self, *held: UUID) -> None:
        """Drop the least recently used open packages if there are too many files and commands in memory.

        Packages in `held` are kept. So are large packages in use, which would take seconds to read back each time.
        """
        if self._held <= self._max_entries:
            return
        large = [package_id for package_id in self._used if self._entries.get(package_id, 0) > LARGE]
        stay = {*self.pinned, *self._changed, *held}
        if large:
            stay.add(max(large, key=lambda package_id: self._entries[package_id]))
        entries = self._held - sum(self._entries.get(package_id, 0) for package_id in stay)
        for package_id in [package_id for package_id in self._packages if package_id not in stay]:
            if entries <= self._max_entries:
                return
            entries -= self._entries[package_id]
            self._forget(package_id)

    def _hold(self, state: PackageState) -> None:
        """Keep a package that was just read from the file and is about to be used.

        More packages may be read than changed between two saves, so this also makes room.
        """
        self._keep(state, state.sequence)
        self._used.add(state.package_id)
        if self._held > 2 * self._max_entries:
            self._make_room(state.package_id)

    def _note_absent(self, package_id: UUID) -> None:
        if len(self._absent) >= _MAX_ABSENT:
            self._absent.clear()
        self._absent.add(package_id)

    def _note_change(self, state: PackageState, *, new: bool) -> None:
        """Let the next save write the package, which is held from now on if it is new."""
        if new:
            self._keep(state, 0)
            self._absent.discard(state.package_id)
        self._changed.add(state.package_id)

    def _keep(self, state: PackageState, saved: int) -> None:
        entries = 1 + state.entries
        self._held += entries - self._entries.get(state.package_id, 0)
        self._entries[state.package_id] = entries
        self._packages[state.package_id] = state
        self._saved[state.package_id] = saved

    def _forget(self, package_id: UUID) -> None:
        del self._packages[package_id], self._saved[package_id]
        self._held -= self._entries.pop(package_id)


def value_digest(value: bytes) -> bytes:
    """The digest by which a state recognises its last record."""
    return blake3(value).digest()
