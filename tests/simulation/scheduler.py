"""Virtual time and threads: everything that waits, waits here, and one seed decides the order.

A simulated thread is a greenlet. Only one runs at a time, until it waits for something: a lock, an answer of Kafka, or
the time. Threads that can continue are put into one queue, ordered by virtual time; small random delays in it decide
the order of things that happen at the same time. Each entry taken from the queue is a step.

The product starts threads and reads the time by names of the standard library. `installed` replaces those names in the
product's modules by the simulated ones; the product does not notice.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import random
import secrets
import sys
import threading
import time as real_time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from heapq import heappop, heappush
from types import ModuleType
from typing import Any, TypeVar, cast

from greenlet import getcurrent, greenlet

_T = TypeVar("_T")

_SOON_SECONDS = 0.0005
"""How long it takes at most until a thread that may go on does."""

EPOCH_SECONDS = 1_750_000_000.0
"""The wall-clock time at which every simulation begins, in s since 1970."""


class Killed(BaseException):
    """The simulated process of this thread was killed. Not an Exception: nothing of the product may handle it."""


class Process:
    """A simulated process: its threads, its event loop, its clock. It can be frozen and killed."""

    def __init__(self, scheduler: Scheduler, name: str) -> None:
        self.name = name
        self.number = scheduler.next_number()
        self.nearest = self.number
        """Which broker it asks first, among those that there are."""
        self.alive = True
        self.frozen_until = 0.0
        self.clock_ahead = 0.0
        """How far its wall clock is ahead of the true time, in s."""
        self.threads: set[_Thread] = set()
        self._scheduler = scheduler
        self.loop: Any = Loop(scheduler, self)
        self.spawn(self.loop.run_forever, "loop")

    def spawn(self, work: Callable[[], object], name: str) -> _Thread:
        """Begin a thread."""
        thread = _Thread(self._scheduler, self, work, name)
        self.threads.add(thread)
        self._scheduler.wake(thread)
        return thread

    def freeze(self, seconds: float) -> None:
        """Let nothing of it run for some time, as SIGSTOP does."""
        self.frozen_until = max(self.frozen_until, self._scheduler.now + seconds)

    def kill(self) -> None:
        """End it, as SIGKILL does: what its threads do while they unwind reaches neither Kafka nor another process."""
        self.alive = False
        # Tasks that are dropped would run on into their `finally` whenever the garbage collector comes by.
        self._scheduler.buried += asyncio.all_tasks(self.loop)
        for thread in sorted(self.threads, key=lambda found: found.number):
            if not thread.dead and thread is not getcurrent():
                self._scheduler.unwind(thread)
        self.threads.clear()

    def wall_clock(self) -> int:
        """What its wall clock shows, in µs since 1970."""
        return int((EPOCH_SECONDS + self._scheduler.now + self.clock_ahead) * 1_000_000)


class _Thread(greenlet):  # type: ignore[misc] # the package has no types
    """A simulated thread."""

    def __init__(self, scheduler: Scheduler, process: Process, work: Callable[[], object], name: str) -> None:
        super().__init__(self._work, scheduler.hub)
        self.gr_context = contextvars.copy_context()
        self.process = process
        self.name = name
        self.number = scheduler.next_number()
        self.waits = 0
        """Which of its waits this is: what wakes it up from an earlier one comes too late."""
        self.woken = False
        self.ended = Signal(scheduler)
        self._scheduler = scheduler
        self._do = work

    def _work(self, *_: object) -> None:
        try:
            self._do()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - shown by the simulation as a failure of its own
            self._scheduler.crashed(self, error)
        finally:
            self.process.threads.discard(self)
            self.ended.notify()


class Scheduler:
    """The queue of what happens next. Everything random is drawn from `rng`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.hub = getcurrent()
        self.crashes: list[str] = []
        self.buried: list[asyncio.Task[Any]] = []
        """What was under way in processes that were killed."""
        self.over = False
        self.trace = 0
        """A digest of all that happened, in its order."""
        self._queue: list[tuple[float, int, Any, int]] = []
        self._number = 0

    def next_number(self) -> int:
        """Numbers that grow; they break ties."""
        self._number += 1
        return self._number

    @property
    def current(self) -> _Thread:
        """The thread that runs."""
        found = getcurrent()
        if self.over:
            raise Killed
        if not isinstance(found, _Thread):
            raise AssertionError("nothing of the simulation may wait outside of its threads")
        return found

    def crashed(self, thread: _Thread, error: BaseException) -> None:
        """A thread ended by an exception: the product must not let that happen."""
        self.crashes.append(f"{thread.process.name}/{thread.name}: {type(error).__name__}: {error}")

    def note(self, what: str) -> None:
        """Add to the digest of what happened."""
        self.trace = hash((self.trace, self.now, zlib.crc32(what.encode())))

    def at(self, when: float, act: Callable[[], object]) -> None:
        """Call `act` at this time, outside of all threads; it must not wait."""
        heappush(self._queue, (when, self.next_number(), act, 0))

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """As `at`, so many seconds from now."""
        self.at(self.now + seconds, act)

    def wake(self, thread: _Thread, wait: int | None = None) -> None:
        """Let a thread go on that waits, or begin it; with `wait`, only out of that one of its waits."""
        if not thread.process.alive or wait not in (None, thread.waits):
            return
        delay = self.rng.random() * _SOON_SECONDS
        heappush(self._queue, (self.now + delay, self.next_number(), thread, thread.waits))

    def wait(self, seconds: float | None) -> bool:
        """Block the current thread until it is woken, so many seconds at most; whether it was woken."""
        thread = self.current
        if not thread.process.alive:
            raise Killed
        thread.waits += 1
        thread.woken = True
        if seconds is not None:
            # A negative number marks the entry of a time that is over.
            heappush(self._queue, (self.now + max(0.0, seconds), self.next_number(), thread, -thread.waits))
        running = asyncio._get_running_loop()
        if running is not None:
            asyncio._set_running_loop(None)
        self.hub.switch()
        if running is not None:
            asyncio._set_running_loop(running)
        return thread.woken

    def sleep(self, seconds: float) -> None:
        """Block the current thread for so long."""
        self.wait(seconds)

    def unwind(self, thread: _Thread) -> None:
        """End a thread of a killed process."""
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        before = thread.parent
        thread.parent = getcurrent()
        try:
            thread.throw(Killed)
        except Killed:
            pass
        finally:
            if not thread.dead:
                thread.parent = before
            asyncio._set_running_loop(running)

    def end(self) -> None:
        """Unwind what is left of killed processes."""
        self.over = True
        self._queue.clear()
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                while self.buried:
                    with suppress(BaseException):
                        self.buried.pop().get_coro().close()
                gc.collect()
        finally:
            sys.unraisablehook = hook

    def step(self) -> bool:
        """Do the next thing; False when there is none."""
        while self._queue:
            when, _, what, token = heappop(self._queue)
            if isinstance(what, _Thread):
                process = what.process
                if what.dead or not process.alive or abs(token) != what.waits:
                    continue
                if process.frozen_until > when:
                    heappush(self._queue, (process.frozen_until, self.next_number(), what, token))
                    continue
                self.now = max(self.now, when)
                self.steps += 1
                what.waits += 1
                what.woken = token >= 0
                self.trace = hash((self.trace, self.now, what.number))
                what.switch()
                return True
            self.now = max(self.now, when)
            self.steps += 1
            what()
            return True
        return False


class Signal:
    """Wakes those that wait for the next thing to happen. A thread may wait for several at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiting: list[tuple[_Thread, int]] = []

    def await_here(self) -> None:
        """Let the next `Scheduler.wait` of this thread end with the next `notify`."""
        thread = self._scheduler.current
        if len(self._waiting) > 32:
            self._waiting = [found for found in self._waiting if found[0].waits == found[1]]
        self._waiting.append((thread, thread.waits + 1))

    def notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for thread, wait in waiting:
            self._scheduler.wake(thread, wait)


class Event:
    """As `threading.Event`."""

    def __init__(self) -> None:
        self._scheduler = _scheduler()
        self._set = False
        self._waiting: list[_Thread] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            self._scheduler.wake(thread)

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else self._scheduler.now + timeout
        while not self._set:
            left = None if deadline is None else deadline - self._scheduler.now
            if left is not None and left <= 0:
                break
            self._waiting.append(self._scheduler.current)
            try:
                self._scheduler.wait(left)
            finally:
                if self._scheduler.current in self._waiting:
                    self._waiting.remove(self._scheduler.current)
        return self._set


class Lock:
    """As `threading.Lock`."""

    def __init__(self) -> None:
        self._scheduler = _scheduler()
        self._held = False
        self._waiting: deque[_Thread] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        while self._held:
            if not blocking:
                return False
            current = self._scheduler.current
            self._waiting.append(current)
            try:
                woken = self._scheduler.wait(None if timeout < 0 else timeout)
            finally:
                if current in self._waiting:
                    self._waiting.remove(current)
            if not woken:
                return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("release unlocked lock")
        self._held = False
        if self._waiting:
            self._scheduler.wake(self._waiting.popleft())

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """As `threading.Condition`."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._scheduler = _scheduler()
        self._lock = lock or Lock()
        self._waiting: deque[_Thread] = deque()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        current = self._scheduler.current
        self._waiting.append(current)
        self._lock.release()
        try:
            return self._scheduler.wait(timeout)
        finally:
            if current in self._waiting:
                self._waiting.remove(current)
            if current.process.alive:
                self._lock.acquire()
            else:
                self._lock._held = True

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiting))):
            self._scheduler.wake(self._waiting.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Thread:
    """As `threading.Thread`: a thread of the process that starts it."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name or "thread"
        self.daemon = daemon
        self._target = target
        self._args = args
        self._kwargs = dict(kwargs or {})
        self._thread: _Thread | None = None

    @property
    def ident(self) -> int | None:
        return self._thread.number if self._thread is not None else None

    def start(self) -> None:
        target = self._target
        assert target is not None
        process = _scheduler().current.process
        self._thread = process.spawn(lambda: target(*self._args, **self._kwargs), self.name)

    def is_alive(self) -> bool:
        return self._thread is not None and not self._thread.dead

    def join(self, timeout: float | None = None) -> None:
        thread, scheduler = self._thread, _scheduler()
        assert thread is not None
        if thread.dead or (timeout is not None and timeout <= 0):
            return
        thread.ended.await_here()
        scheduler.wait(timeout)


class Future(concurrent.futures.Future[_T]):
    """As `concurrent.futures.Future`, which waits in virtual time."""

    def result(self, timeout: float | None = None) -> _T:
        self._await(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        if self.done():
            return
        done = Event()
        self.add_done_callback(lambda _: done.set())
        done.wait(timeout)


class ThreadPoolExecutor:
    """As `concurrent.futures.ThreadPoolExecutor`: threads of the process that submits."""

    def __init__(self, max_workers: int | None = None, thread_name_prefix: str = "", **_: object) -> None:
        self._most = max_workers or 8
        self._name = thread_name_prefix or "executor"
        self._running = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._closed = False
        self._idle = Event()

    def submit(self, work: Callable[..., _T], /, *args: object, **kwargs: object) -> Future[_T]:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(*args, **kwargs)
            except Killed:
                raise
            except BaseException as error:  # noqa: BLE001 - it is whoever asks for the result who hears of it
                future.set_exception(error)
            else:
                future.set_result(result)

        self._waiting.append(run)
        if self._running < self._most:
            self._running += 1
            _scheduler().current.process.spawn(self._work, self._name)
        return future

    def _work(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft()()
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            self._waiting.clear()
        if wait and self._running:
            self._idle.clear()
            self._idle.wait()

    def __enter__(self) -> ThreadPoolExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _wait(futures: Any, timeout: float | None = None, return_when: str = "ALL_COMPLETED") -> Any:
    """As `concurrent.futures.wait`."""
    scheduler, asked = _scheduler(), list(futures)
    some = Event()
    for future in asked:
        future.add_done_callback(lambda _: some.set())
    deadline = None if timeout is None else scheduler.now + timeout
    while True:
        done = {future for future in asked if future.done()}
        enough = len(done) == len(asked) or (done and return_when != "ALL_COMPLETED")
        left = None if deadline is None else deadline - scheduler.now
        if enough or (left is not None and left <= 0):
            return concurrent.futures._base.DoneAndNotDoneFutures(done, set(asked) - done)
        some.clear()
        some.wait(left)


class Loop:
    """The event loop of one process, in a thread of its own: what the product uses of `asyncio.AbstractEventLoop`."""

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        self._scheduler = scheduler
        self._process = process
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._thread: _Thread | None = None
        self._parked = False
        self._executor = ThreadPoolExecutor.__new__(ThreadPoolExecutor)
        self.closed = False

    def run_forever(self) -> None:
        self._thread = self._scheduler.current
        ThreadPoolExecutor.__init__(self._executor, 16, "to-thread")
        while True:
            timers, now = self._timers, self._scheduler.now
            while timers and (timers[0][0] <= now or timers[0][2].cancelled()):
                self._ready.append(heappop(timers)[2])
            if not self._ready:
                self._parked = True
                self._scheduler.wait(timers[0][0] - now if timers else None)
                self._parked = False
                continue
            asyncio._set_running_loop(cast("Any", self))
            try:
                for _ in range(len(self._ready)):
                    handle = self._ready.popleft()
                    if not handle.cancelled() and self._process.alive:
                        handle._run()
            finally:
                asyncio._set_running_loop(None)

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, cast("Any", self), context)
        self._ready.append(handle)
        self._stir()
        return handle

    def call_soon_threadsafe(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, cast("Any", self), context)
        heappush(self._timers, (when, self._scheduler.next_number(), handle))
        self._stir()
        return handle

    def _stir(self) -> None:
        if self._parked and self._thread is not None:
            self._parked = False
            self._scheduler.wake(self._thread)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Told by the handle; it is dropped when its time comes."""

    def time(self) -> float:
        return self._scheduler.now

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.closed

    def get_debug(self) -> bool:
        return False

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=cast("Any", self))

    def create_task(
        self, coro: Coroutine[Any, Any, _T], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[_T]:
        return asyncio.Task(coro, loop=cast("Any", self), name=name, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
        return asyncio.wrap_future((executor or self._executor).submit(func, *args), loop=cast("Any", self))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._process.alive:
            return
        error = context.get("exception")
        self._scheduler.crashes.append(f"{self._process.name}: {context['message']}: {error!r}")

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)


class _Time:
    """In place of the module `time`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(real_time, name)

    def monotonic(self) -> float:
        return _scheduler().now

    def time(self) -> float:
        return _scheduler().current.process.wall_clock() / 1_000_000

    def time_ns(self) -> int:
        return _scheduler().current.process.wall_clock() * 1_000

    def sleep(self, seconds: float) -> None:
        _scheduler().sleep(seconds)


class _Asyncio:
    """In place of the module `asyncio`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    def run_coroutine_threadsafe(coro: Coroutine[Any, Any, _T], loop: asyncio.AbstractEventLoop) -> Future[_T]:
        future: Future[_T] = Future()

        def begin() -> None:
            asyncio.futures._chain_future(asyncio.ensure_future(coro, loop=loop), future)  # type: ignore[attr-defined]

        loop.call_soon_threadsafe(begin)
        return future


class _Random:
    """In place of the module `random`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_scheduler().rng, name)


class _Secrets:
    """In place of the module `secrets`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(secrets, name)

    def token_hex(self, count: int) -> str:
        return _scheduler().rng.randbytes(count).hex()


_current: list[Scheduler] = []


def _scheduler() -> Scheduler:
    return _current[-1]


_STAND_INS: tuple[tuple[object, object], ...] = (
    (real_time, _Time()),
    (asyncio, _Asyncio()),
    (random, _Random()),
    (secrets, _Secrets()),
    (threading.Thread, Thread),
    (threading.Event, Event),
    (threading.Lock, Lock),
    (threading.Condition, Condition),
    (concurrent.futures.ThreadPoolExecutor, ThreadPoolExecutor),
    (concurrent.futures.wait, _wait),
)


@contextmanager
def installed(scheduler: Scheduler, product: tuple[str, ...], more: Mapping[object, object]) -> Iterator[None]:
    """Put the simulated names, and those of `more`, in place of the real ones in all modules of these packages."""
    stand_ins = {id(real): simulated for real, simulated in (*_STAND_INS, *more.items())}
    changed: list[tuple[ModuleType, str, object]] = []
    _current.append(scheduler)
    try:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in product:
                for attribute, value in list(vars(module).items()):
                    if id(value) in stand_ins:
                        changed.append((module, attribute, value))
                        setattr(module, attribute, stand_ins[id(value)])
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)
        _current.pop()
