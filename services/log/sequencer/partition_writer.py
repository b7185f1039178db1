"""The writer of one partition: a thread that takes waiting commands, decides them and appends their events.

A transaction may fail at any point. The writer then always does the same: it gives up lease and state, takes the
partition over again, and decides the same commands on the state that it reads from the log. It recognises commands that
the log already holds by their ids, and appends the others. It never guesses.

Read it from the outside in: `_run` holds one lease after another, `_hold` serves one lease, `_serve` one batch.
Below it, `_answers` decides and appends a batch, `_decide_run` a run, `_decide` one request. `_recover` handles every
failure.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event as Flag
from threading import Lock, Thread
from types import TracebackType
from typing import Any
from uuid import UUID

from artifact_store.errors import (
    ArtifactStoreError,
    CorruptError,
    LogIdentityError,
    PushBackError,
    RejectedError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from schemas.identifiers import partition_id
from schemas.runs import encode_all, first_of
from services.core.decide import (
    Command,
    IngestCheck,
    IngestFiles,
    IngestTogether,
    Limits,
    acknowledge,
    check_ingest,
    claim_check,
    decide,
    require_write,
)
from services.log.port import (
    HeldError,
    NotAppendedError,
    PackageExtent,
    PartitionNotOwnedError,
    PartitionStatus,
    PutManifest,
)
from services.log.records import BadRecord, Confirmation
from services.log.sequencer.background import BackgroundJobs
from services.log.sequencer.driver import Driver, Lease, Staged, State
from services.log.sequencer.queue import (
    CHECK_SECONDS,
    FAILURES_BEFORE_ALONE,
    MAX_BATCH_BYTES,
    Counts,
    Deadlines,
    EndQuestion,
    Outcome,
    Request,
    RequestQueue,
    given_up,
    in_doubt,
    lost,
    quarantined,
    refused,
    runs_of,
    told,
    unrecorded,
)
from services.log.state.loss import Loss
from services.log.state.state_file import Irregular, StateFileError
from services.runtime import tracing
from services.runtime.clock import Clock
from services.runtime.logs import Repeats
from services.runtime.tracing import TRACEPARENT, Tracer

_IDLE_SECONDS = 5.0
_ASK_SECONDS = 0.2
_RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0)

_SLOW_SECONDS = 3.0
"""`trouble` mentions a transaction that takes longer than this."""

_GIVE_WAY_SECONDS = 20.0
"""After this long without success, leave the partition to other processes. Electing a leader takes half as long."""

_ASSIGNED = "it is assigned to this process, which reads its state"

_LOG = logging.getLogger(__name__)


class PartitionWriter:
    """The writer of one partition. `start` begins its thread, `stop` asks it to end, `join` waits for that."""

    def __init__(self, partition: int, context: WriterContext) -> None:
        self.partition = partition
        self.since: int | None = None
        """When its lease began to serve (µs since 1970); None while it has none."""
        self.takeover_seconds: float | None = None
        """How long the last take-over took."""
        self.restored_from: str | None = None
        """What the last take-over restored the state from: see `Lease`."""
        self.disowned = False
        """Whether it has ended because the group has given its partition to another process."""
        self.leave_to_others: str | None = None
        """Why another process should write to the partition. Set after failures that this process may have caused. The
        reader that acts on it resets it to None."""
        self._trouble: str | None = _ASSIGNED
        self._repeats = Repeats()
        self._memory_only: str | None = None
        self._state: State | None = None
        """The state, which other threads may ask for extents while commands are served."""
        self._serving_since: float | None = None
        """When the batch that is being served began, on the monotonic clock (s); None between batches."""
        self._failed = 0
        """How many take-overs in a row have failed."""
        self._last_success = time.monotonic()
        """When something last succeeded: a lease, or a step of a long take-over."""
        self._last_created_at = 0
        """The time (µs since 1970) of the last event that was read from the partition; 0 before any was."""
        self._context = context
        self._queue = RequestQueue()
        self._unproven: list[Request] = []
        """Requests that were refused without a proof: every batch decides them again, until there is one."""
        self._confirmations: deque[tuple[Confirmation, asyncio.Future[Acknowledgement]]] = deque()
        self._bad: BadRecord | None = None
        """The record that is not an event and that stops the partition."""
        self._losses: Sequence[Loss] = ()
        """Acknowledged records that the partition lost."""
        self._irregular = Irregular()
        self._deadlines = Deadlines(context.submit_seconds, self._late)
        self._checks = Deadlines(min(CHECK_SECONDS, context.submit_seconds), self._late_check)
        self._stop = Flag()
        # A daemon, because a thread that hangs in a call to a frozen broker must not keep the process alive. The next
        # writer's fence protects the log.
        self._thread = Thread(target=self._run, name=f"log-write-{partition}", daemon=True)

    @property
    def helpless(self) -> bool:
        """Whether the last take-over failed."""
        return self._failed > 0

    @property
    def ended(self) -> bool:
        """Whether it takes no more requests, because the partition goes to another process."""
        return self.disowned or self._stop.is_set()

    @property
    def trouble(self) -> str | None:
        """Why it cannot write now; None if it can."""
        began = self._serving_since
        if self._trouble is None and began is not None and (since := time.monotonic() - began) > _SLOW_SECONDS:
            return f"the log has not confirmed a transaction for {since:.0f} s"
        return self._trouble

    def start(self) -> None:
        """Begin to take over. Does not block."""
        self._thread.start()

    def submit(self, asked: Command | IngestCheck, deadline: float = math.inf) -> asyncio.Future[Acknowledgement | str]:
        """Put a request into the queue. For the event loop; does not block.

        Raises PushBackError, PartitionNotOwnedError.

        A command that has no answer in time, or by `deadline` on the event loop's clock (s), gets UnavailableError; a
        question gets PushBackError. If the partition moves to another process meanwhile, the answer is
        PartitionNotOwnedError, or UnavailableError if a transaction with the command has failed before, so that the log
        may hold it.
        """
        answer: asyncio.Future[Acknowledgement | str] = self._context.loop.create_future()
        try:
            self._queue.put(Request(asked, answer, TRACEPARENT.get()))
        except PushBackError as error:
            self._context.counts.pushed_back += 1
            trouble = self.trouble
            raise error if trouble is None else PushBackError(f"{error.detail}: {trouble}", error.retry_after) from None
        deadlines = self._checks if isinstance(asked, IngestCheck) else self._deadlines
        deadlines.watch(answer, deadline)
        return answer

    def announce(self) -> None:
        """Say that a command is about to be submitted. For the event loop; does not block."""
        self._queue.announce(1)

    def confirm(self, confirmation: Confirmation) -> asyncio.Future[Acknowledgement]:
        """Record an operator's confirmation. For the event loop; does not block.

        The future is done once the record is in the log and folded. A confirmation waits while the partition is being
        taken over. It is recorded although commands are refused, if it is what the partition waits for.

        Awaiting it raises ConflictError, InvalidRequestError: nothing is recorded; PartitionNotOwnedError,
        PushBackError: nothing is recorded now, ask again; any other error of our tree: the outcome is unknown.
        """
        answer: asyncio.Future[Acknowledgement] = self._context.loop.create_future()
        self._confirmations.append((confirmation, answer))
        if self.ended:  # nobody may come to take it
            self._refuse_confirmations(_moved())
        else:
            self._queue.wake()
        return answer

    def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie; None if that is not known now. Blocks for a look into the state file."""
        state = self._state
        try:
            return None if state is None else state.extent(package_id)
        except StateFileError as error:
            _LOG.info("partition %d: %s", self.partition, error.detail)
            return None

    def unanswered(self) -> list[asyncio.Future[Any]]:
        """Futures of requests that have no answer yet. For the event loop."""
        return [*self._deadlines.unanswered(), *self._checks.unanswered()]

    def status(self, owner: str) -> PartitionStatus:
        """The partition's status for operators, with this process named `owner`."""
        irregular, bad, lost = self._irregular, self._bad, next(iter(self._losses), None)
        return PartitionStatus(
            self.partition,
            owner,
            self.since,
            self.takeover_seconds,
            self.restored_from,
            self.trouble,
            len(self._queue),
            self._memory_only,
            irregular.skipped,
            irregular.repeated,
            len(irregular.quarantined),
            None if bad is None else bad.offset,
            None if bad is None else bad.digest.hex(),
            None if lost is None else lost.offset,
            None if lost is None else lost.digest.hex(),
        )

    def stop(self) -> None:
        """End after the current transaction. Does not block. Waiting requests are answered as `submit` says."""
        self._stop.set()
        self._let_go()

    def join(self, timeout: float) -> bool:
        """Block until the writer has ended, for at most `timeout` seconds. Returns whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._hold()
                except PartitionNotOwnedError:
                    self.disowned = not self._stop.is_set()
                    return
                # Taking over again is the remedy for every failure: the log then shows what has happened.
                except Exception as error:  # noqa: BLE001 - see above; the cause is shown in `trouble` and logged
                    self._recover(error)
                finally:
                    self.since = None
        finally:
            self._let_go()

    def _recover(self, error: Exception) -> None:
        """Handle a failed lease or take-over; returns when it is time for the next one."""
        served, self.since = self.since is not None, None
        error = self._context.driver.refusal(error) or error
        self._context.counts.failed_takeovers += served or not isinstance(error, HeldError)
        self._note(error)
        if isinstance(error, HeldError) and error.own_clock and not self._stop.is_set():
            self._complain()
        # A log that contradicts a lease that has served may have lost events. The next take-over finds out which, or
        # raises the same error again.
        contradicted = isinstance(error, CorruptError) and not isinstance(error, LogIdentityError)
        if (answer := refused(error)) is not None and not (served and contradicted):
            self._refuse_all(*answer)
            self._succeeded()
        elif served:
            self._succeeded()
        else:
            self._failed += 1
            if not self._stop.is_set() and time.monotonic() - self._last_success > _GIVE_WAY_SECONDS:
                self._complain()
            self._stop.wait(_RETRY_SECONDS[min(self._failed, len(_RETRY_SECONDS)) - 1])

    def _complain(self) -> None:
        """Ask that another process takes the partition."""
        self.leave_to_others = f"partition {self.partition} cannot be written to: {self._trouble}"

    def _succeeded(self) -> None:
        self._last_success = time.monotonic()

    def _let_go(self) -> None:
        """Close the queue and answer waiting requests at once, because the current transaction may take long."""
        self._queue.close()
        self._deliver([(request, _moved()) for request in self._queue.drain()])
        self._refuse_confirmations(_moved())

    def _hold(self) -> None:
        """One lease: take over, then serve until told to stop."""
        context, began = self._context, time.monotonic()
        context.driver.require(self.partition, self._last_created_at)
        if self._trouble == _ASSIGNED:
            _LOG.info("partition %d: taking it over, because it is assigned to this process", self.partition)
        lease = context.driver.take_over(
            self.partition, is_ours=self._is_ours, stopping=self._stop.is_set, progressed=self._succeeded
        )
        jobs = BackgroundJobs(
            lease.state,
            exclusive=lease.exclusive,
            limits=context.limits,
            clock=context.clock,
            put_manifest=context.put_manifest,
            loop=context.loop,
            wake=self._queue.wake,
        )
        try:
            self._irregular = lease.state.irregular
            self._last_created_at = lease.state.last_created_at
            self.takeover_seconds = time.monotonic() - began
            self.restored_from = lease.restored_from
            context.counts.takeovers[lease.restored_from] += 1
            context.counts.takeover_seconds += self.takeover_seconds
            self._failed = 0
            self.leave_to_others = None
            if not self._await_confirmations(lease):
                return
            context.driver.require(self.partition, self._last_created_at)
            self.since = context.clock()
            self._trouble, self._repeats = None, Repeats()
            self._state = lease.state
            _LOG.info(
                "partition %d: taken over in %.2f s with the state from the %s",
                self.partition,
                self.takeover_seconds,
                self.restored_from,
            )
            pause = _IDLE_SECONDS
            self._memory_only = lease.state.memory_only
            while (batch := self._queue.take(pause)) is not None:
                batch, self._unproven = [*self._unproven, *batch], []
                self._last_created_at = lease.state.last_created_at
                self._require_guard(batch)
                if batch:
                    self._serve(lease, jobs, batch)
                else:
                    lease.idle()
                self._record(lease)
                pause = min(_IDLE_SECONDS, lease.tidy())
                self._memory_only = lease.state.memory_only
                self._queue.put_back(jobs.settle())
                jobs.begin()
                if self._unproven:
                    pause = max(0.0, lease.proof_due - time.monotonic())
            _LOG.info("partition %d: given up after %.0f s", self.partition, time.monotonic() - began)
        finally:
            self._queue.put_back([*self._unproven, *jobs.cancel()])
            self._unproven = []
            self._state = None
            lease.close()

    def _require_guard(self, batch: Sequence[Request]) -> None:
        """Raise HeldError when nothing may be appended. The batch goes back to the queue, to be refused from there."""
        try:
            self._context.driver.require(self.partition, self._last_created_at)
        except HeldError:
            self._queue.put_back(batch)
            raise

    def _await_confirmations(self, lease: Lease) -> bool:
        """Wait for an operator's confirmation if the partition needs one, and refuse all requests meanwhile.

        It needs one if the state ends before a record that is not an event, or if the log lost acknowledged events.
        Returns True when the partition no longer needs one; False when the writer has to stop.
        """
        while lease.stopped is not None or lease.losses:
            self._bad, self._losses = lease.stopped, lease.losses
            bad = [] if self._bad is None else [self._bad.error]
            trouble = "; ".join([*(error.detail for error in bad), *(loss.detail for loss in self._losses)])
            if self._trouble != trouble:
                _LOG.error("partition %d cannot be written to: %s", self.partition, trouble)
            self._trouble = trouble
            batch = self._queue.take(_IDLE_SECONDS)
            if batch is None:
                return False
            refused = bad[0] if bad else lost(self.partition)
            self._deliver([(request, refused) for request in batch])
            self._record(lease)
            lease.idle()
            lease.save_if_due()
        self._bad, self._losses = None, ()
        return True

    def _record(self, lease: Lease) -> None:
        """Record the operators' confirmations for the partition, and answer them."""
        while (found := self._next_confirmation()) is not None:
            confirmation, answer = found
            outcome: Outcome
            try:
                recorded = lease.record(confirmation, self._context.clock(), self._require_recordable)
                outcome = Acknowledgement(partition_id(self._context.driver.identity, self.partition), *recorded)
            except (RejectedError, PushBackError) as error:
                outcome = unrecorded(self.partition, error)
            except Exception as error:
                # It may have been recorded. An operator who confirms it again is told.
                cause = self._context.driver.cause(error)
                unknown = error if isinstance(error, ArtifactStoreError) else in_doubt(cause)
                self._settle([(answer, unknown)])
                raise
            self._settle([(answer, outcome)])

    def _next_confirmation(self) -> tuple[Confirmation, asyncio.Future[Acknowledgement]] | None:
        """Take the oldest confirmation whose caller still waits; None if there is none. For any thread."""
        with suppress(IndexError):
            while True:
                confirmation, answer = self._confirmations.popleft()
                if not answer.done():
                    return confirmation, answer
        return None

    def _refuse_confirmations(self, error: Exception) -> None:
        """Answer all waiting confirmations with `error`: nothing is recorded."""
        while (found := self._next_confirmation()) is not None:
            self._settle([(found[1], error)])

    def _require_recordable(self) -> None:
        self._context.driver.require(self.partition, self._last_created_at)
        self._context.driver.require_readers()

    def _is_ours(self) -> bool:
        """Ask the driver until it knows whether the partition is ours. Also returns False if the writer is to stop."""
        while not self._stop.is_set():
            try:
                answer = self._context.driver.holds(self.partition)
            except UnavailableError as error:
                self._note(error)
                answer = None
            if answer is not None:
                return answer
            self._stop.wait(_ASK_SECONDS)
        return False

    def _serve(self, lease: Lease, jobs: BackgroundJobs, batch: list[Request]) -> None:
        """Decide a batch, append its events, and answer. On a failure, the whole batch goes back to the queue."""
        if not lease.exclusive:
            appends = not all(isinstance(request.asked, IngestCheck) for request in batch)
            try:
                lease.begin_batch({request.asked.package_id for request in batch}, appends=appends)
            except ArtifactStoreError as error:  # nothing was tried
                self._deliver([(request, error) for request in batch])
                return
        self._serving_since = time.monotonic()
        try:
            runs = runs_of(self._without_held(jobs, batch))
            batch = [request for run in runs for request in run]
            answers, proven = self._answers(lease, jobs, runs)
        except Exception as error:
            driver = self._context.driver
            for request in batch:
                # Not the exception itself: its traceback keeps this batch alive.
                request.failed(driver.cause(error), spoiled=driver.spoiled_by_record(error))
            held = [request for request in jobs.cancel() if request not in batch]
            self._queue.put_back([*batch, *held])
            raise
        finally:
            self._serving_since = None
            if not lease.exclusive:
                lease.end_batch()
        self._queue.put_back(batch[len(answers) :])
        self._queue.announce(sum(isinstance(answer, str) for answer in answers))
        answered = list(zip(batch, answers, strict=False))
        if not proven:
            self._unproven = [request for request, outcome in answered if _needs_proof(outcome)]
            answered = [(request, outcome) for request, outcome in answered if not _needs_proof(outcome)]
        self._deliver(answered)

    def _without_held(self, jobs: BackgroundJobs, batch: Sequence[Request]) -> list[Request]:
        """The requests of the batch that can be decided now, because no background job holds them."""
        now: list[Request] = []
        refused: list[tuple[Request, Outcome]] = []
        for request in batch:
            try:
                if not jobs.holds(request):
                    now.append(request)
            except (PushBackError, CorruptError) as error:
                self._context.counts.pushed_back += isinstance(error, PushBackError)
                refused.append((request, error))
        self._deliver(refused)
        return now

    def _answers(
        self, lease: Lease, jobs: BackgroundJobs, runs: Sequence[Sequence[Request]]
    ) -> tuple[list[Outcome], bool]:
        """Decide the requests and append their events. Returns the answers, and whether refusals among them are proven.

        A refusal is wrong if another process has taken the partition over and appended something, so it needs a proof
        that the state was current. A commit is such a proof, and so is `Lease.prove`, which is called only from time to
        time and then serves all waiting refusals. If one transaction cannot hold all events, only the first requests
        get answers; `_serve` puts the others back.
        """
        staged: list[Staged] = []
        with self._context.fair_lock:
            now, size, outcomes = jobs.now(), 0, list[Outcome]()
            for run in runs:
                decided = len(staged)
                outcomes += self._decide_run(lease.state, jobs, run, now, staged)
                # How large manifests are is known only now.
                size += sum(sum(map(len, each.values)) for each in staged[decided:])
                if size > MAX_BATCH_BYTES:
                    break
            values = lease.hand_over(staged) if staged else []
        if staged:
            tracer = tracing.tracer
            began = 0 if tracer is None else time.time_ns()
            lease.commit(values)
            if tracer is not None:
                _end_spans(tracer, runs, began, lease.committed_at)
            counts = self._context.counts
            counts.appended += len(values)
            counts.transactions += 1
            self._place(outcomes, lease, staged)
            return outcomes, True
        self._place(outcomes, lease)
        if time.monotonic() < lease.proof_due:
            return outcomes, False
        if any(map(_needs_proof, outcomes)):
            lease.prove()
        return outcomes, True

    def _place(self, outcomes: Sequence[Outcome], lease: Lease, staged: Sequence[Staged] = ()) -> None:
        """Set the positions of acknowledgements, after `staged` was committed.

        Nothing lies among the records of a transaction: its fence keeps other writers out.
        """
        first = lease.state.next_offset - sum(len(each.values) for each in staged)
        runs: dict[UUID, list[tuple[int, int, int]]] = {}
        for each in staged:
            start = first_of(each.events)
            runs.setdefault(start.package_id, []).append((start.sequence, start.sequence + len(each.values), first))
            first += len(each.values)
        identity = self._context.driver.identity
        for done in outcomes:
            if not isinstance(done, Acknowledgement):
                continue
            for begin, end, offset in runs.get(done.package_id, ()):
                if begin <= done.sequence < end:
                    done.position = Position(identity, {self.partition: offset + done.sequence - begin + 1})
                    break
            else:
                known = lease.offset_of(done.package_id, done.sequence)
                done.position = None if known is None else Position(identity, {self.partition: known + 1})

    def _decide_run(
        self, state: State, jobs: BackgroundJobs, run: Sequence[Request], now: int, staged: list[Staged]
    ) -> list[Outcome]:
        """Decide a run and stage its events. Several commands are decided together, or one by one if that fails."""
        commands = tuple(request.asked for request in run if isinstance(request.asked, IngestFiles))
        package = None
        if len(commands) > 1:
            with suppress(CorruptError):
                package = state.package(run[0].asked.package_id)
        if package is not None and package.package_id not in state.irregular.quarantined:
            # If this fails because one of them is refused, each is decided by itself, which shows which one.
            try:
                events = decide(package, IngestTogether(package.package_id, commands), now, self._context.limits)
                values = encode_all(events)
            except ArtifactStoreError:
                pass
            except Exception:  # noqa: BLE001 - see above; the traceback is logged
                _LOG.exception("commands of package %s cannot be decided together", package.package_id)
            else:
                package = state.fold(package, events)
                staged.append(Staged(events, values, self._traceparents(run, len(events)), package.created))
                return [acknowledge(package, command) for command in commands]
        return [self._decide(state, jobs, request, now, staged) for request in run]

    def _decide(self, state: State, jobs: BackgroundJobs, request: Request, now: int, staged: list[Staged]) -> Outcome:
        """Decide one request and stage its events. Returns its answer, which holds once they are appended."""
        asked, limits = request.asked, self._context.limits
        if isinstance(asked, EndQuestion):
            return state.next_offset
        try:
            package = state.package(asked.package_id, asked.command_id)
        except CorruptError as error:
            return error
        contradicted = state.irregular.quarantined.get(asked.package_id)
        try:
            require_write(package, asked)  # before anything that reveals something about the package
            if contradicted is not None and (package is None or isinstance(asked, IngestCheck)):
                raise quarantined(contradicted)
            if isinstance(asked, IngestCheck):
                return check_ingest(package, asked.package_id, asked.relative_paths, asked.command_id, now, limits)
            events, manifest = jobs.events(asked), None
            if not events:
                events = decide(package, asked, now, limits)
                manifest = None if package is None else claim_check(package, events)
            if events and request.failures > FAILURES_BEFORE_ALONE:
                return given_up(request, events[0].command_index)
            if events and contradicted is not None:
                raise quarantined(contradicted)
            values = encode_all(events)
            if manifest is not None:
                jobs.store(manifest)
        except ArtifactStoreError as error:
            return error
        except (MemoryError, OSError) as error:  # it may pass
            cause = type(error).__name__
            return UnavailableError(f"the command cannot be decided now ({cause}); retry with the same command id")
        # Nothing was appended. One command that breaks this code must not stop the partition.
        except Exception as error:  # noqa: BLE001 - see above; the traceback is logged
            _LOG.exception("a command of package %s cannot be decided", asked.package_id)
            return RejectedError(f"the command cannot be carried out: {type(error).__name__}")
        if events:
            package = state.fold(package, events)
            staged.append(Staged(events, values, self._traceparents([request], len(events)), package.created))
        elif package is None:
            return UnavailableError("the package's state was lost; retry with the same command id")
        return acknowledge(package, asked)

    def _traceparents(self, run: Sequence[Request], events: int) -> list[str | None]:
        """The trace contexts for the records of these commands, which become this many events together."""
        if (tracer := tracing.tracer) is None:
            return [request.traceparent for request in run]
        for request in run:
            if request.traceparent is not None and tracing.sampled(request.traceparent):
                self._begin_span(tracer, request, request.traceparent, events if len(run) == 1 else request.events)
        return [request.traceparent if request.span is None else request.span.traceparent for request in run]

    def _begin_span(self, tracer: Tracer, request: Request, parent: str, events: int) -> None:
        """Begin the span of appending, and record a span for the time that the command waited in the queue."""
        since = tracing.since_1970(request.came)
        tracer.begin("queue", "internal", parent, since=since).end()
        topic = self._context.driver.topic
        if topic is None:
            request.span = tracer.begin("append", "internal", parent)
            return
        attributes: dict[str, str | int] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
            "messaging.destination.partition.id": str(self.partition),
            "messaging.kafka.message.key": str(request.asked.package_id),
            "messaging.batch.message_count": events,
        }
        request.span = tracer.begin(f"send {topic}", "producer", parent, attributes)

    def _late(self) -> Exception:
        return in_doubt(f"partition {self.partition}: {self.trouble or 'its writer gave no answer in time'}")

    def _late_check(self) -> Exception:
        self._context.counts.pushed_back += 1
        return PushBackError(f"partition {self.partition}: {self.trouble or 'its writer is busy'}", 2.0)

    def _refuse_all(self, error: ArtifactStoreError, seconds: float) -> None:
        """Answer every request with `error`, for this many seconds or until `stop`.

        Confirmations are refused as well, because without a lease nothing can be recorded.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._refuse_confirmations(unrecorded(self.partition, error))
            batch = self._queue.take(min(left, _IDLE_SECONDS))
            if batch is None:
                return
            self._context.counts.pushed_back += len(batch) * isinstance(error, HeldError)
            self._deliver([(request, error) for request in batch])

    def _note(self, error: Exception) -> None:
        text = self._context.driver.cause(error)
        self._repeats.warn(_LOG, f"partition {self.partition} of the log is taken over again: {text}", text)
        self._trouble = text

    def _deliver(self, answers: Sequence[tuple[Request, Outcome]]) -> None:
        """Hand all answers to the event loop at once."""
        self._settle([(request.answer, told(request, outcome)) for request, outcome in answers])

    def _settle(self, answers: Sequence[tuple[asyncio.Future[Any], Outcome]]) -> None:
        """Set these futures on the event loop, except those whose callers have given up meanwhile."""

        def settle() -> None:
            for answer, outcome in answers:
                if answer.done():
                    continue
                if isinstance(outcome, Exception):
                    answer.set_exception(outcome)
                else:
                    answer.set_result(outcome)

        if answers and not self._context.loop.is_closed():
            self._context.loop.call_soon_threadsafe(settle)


def _moved() -> PartitionNotOwnedError:
    return PartitionNotOwnedError("this process no longer writes to the package's partition")


def _end_spans(tracer: Tracer, runs: Sequence[Sequence[Request]], began: int, committed: int | None) -> None:
    """End the spans of commands whose events are in the log, after spans for the steps of their transaction.

    `began` and `committed` are in ns since 1970. The steps are the same for all commands of the transaction.
    """
    now = time.time_ns()
    for run in runs:
        for request in run:
            span, request.span = request.span, None
            if span is not None:
                tracer.begin("commit", "internal", span.traceparent, since=began).end(at=committed or now)
                if committed is not None:
                    tracer.begin("read back", "internal", span.traceparent, since=committed).end(at=now)
                span.end(at=now)


def _needs_proof(outcome: Outcome) -> bool:
    """Whether the answer rests only on the state, so that it is wrong if another process has appended something."""
    return isinstance(outcome, RejectedError | NotAppendedError | int)


@dataclass(frozen=True, slots=True)
class WriterContext:
    """The things that the writers of a process share."""

    driver: Driver
    limits: Limits
    put_manifest: PutManifest
    clock: Clock
    loop: asyncio.AbstractEventLoop
    submit_seconds: float
    """How long a request may wait for its answer."""
    counts: Counts
    fair_lock: FairLock


class FairLock:
    """A lock that threads get in the order in which they asked for it, unlike `threading.Lock`. Not reentrant.

    Writers hold it while they decide a batch and hand it to the client, but not while they wait for brokers. Python
    runs one thread at a time anyway, but busy threads take the interpreter's lock from each other every 5 ms, and the
    Kafka client needs that lock once for every delivered record. With six busy writers, this took a fifth of their time
    (docs/benchmarks.md).
    """

    def __init__(self) -> None:
        self._guard = Lock()
        self._taken = False
        self._waiting: deque[Lock] = deque()

    @property
    def waiting(self) -> int:
        """How many threads wait for their turn."""
        return len(self._waiting)

    def __enter__(self) -> None:
        """Block until it is the caller's turn."""
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            ours = Lock()
            ours.acquire()
            self._waiting.append(ours)
        ours.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False
