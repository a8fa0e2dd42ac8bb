"""Virtual time: an event loop that never waits, processes that die between any two of their steps, clocks that lie.

The product's own coroutines run on this loop. When nothing is left to run now, time jumps to the next timer, so a
minute of protocol costs milliseconds and the same seed gives the same order of events. Every callback runs in the
context of a `Process`; those of a dead one are dropped, those of a stopped one wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import random
import selectors
import sys
import time as real_time
from asyncio import events
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import greenlet

MAX_EVENTS_AT_ONCE = 50_000
EPOCH_S = 1_800_000_000.0

_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Stuck(AssertionError):  # noqa: N818 - a verdict
    """Something waits for ever: nothing is scheduled, or the scenario did not come to rest in time."""


class Process:
    """One operating system process of the cell. `host`: what it shares its network link with; `skew_s`: how wrong
    its machine's wall clock is."""

    def __init__(self, loop: VirtualLoop, name: str, host: str = "", skew_s: float = 0.0) -> None:
        self.loop = loop
        self.name = name
        self.host = host or name
        self.skew_s = skew_s
        self.alive = True
        self.stopped = False
        self.on_death: list[Callable[[], None]] = []
        self._waiting: list[_Handle] = []

    def context(self) -> contextvars.Context:
        context = contextvars.Context()
        context.run(_current.set, self)
        return context

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of this process."""
        task = self.loop.create_task(work, context=self.context())
        self.loop.tasks.append(task)
        return task

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, from here on, in the middle of whatever it did."""
        if self.alive:
            self.alive = False
            self._waiting.clear()
            for hook in self.on_death:
                hook()

    def stop(self) -> None:
        """SIGSTOP, or a machine that is frozen: its callbacks wait."""
        self.stopped = True

    def resume(self) -> None:
        self.stopped = False
        waiting, self._waiting = self._waiting, []
        for handle in waiting:
            self.loop.put_back(handle)


class _Handle(events.Handle):
    """A callback that asks its process first."""

    def _run(self) -> None:
        self._loop.count()
        process = self._context.get(_current)
        if process is not None and not self._loop.closing_down:
            if not process.alive:
                for future in self._args or ():  # nobody is left to hear how it failed, nor to complain of it
                    if isinstance(future, asyncio.Future) and future.done() and not future.cancelled():
                        future.exception()
                return
            if process.stopped:
                process._waiting.append(self)
                return
        super()._run()


class _TimerHandle(_Handle, events.TimerHandle):
    """The loop runs timers up to its clock's resolution early; here nothing passes the rest of that time but us."""

    def _run(self) -> None:
        self._loop.now_s = max(self._loop.now_s, self._when)
        super()._run()


class _JumpingSelector(selectors.SelectSelector):
    """Nothing is ever ready from outside; waiting is jumping."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("every process waits and no timer is set")
        if timeout > 0:
            self.loop.jump()
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. Not thread-safe, like the other kind."""

    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.closing_down = False
        self._kept: list[asyncio.Task[Any]] = []
        self._n_since_jump = 0
        self.rng = random.Random(seed)
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[dict[str, Any]] = []
        self.connect: Callable[..., Any] | None = None  # set by the network
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        return self.now_s

    def count(self) -> None:
        self._n_since_jump += 1
        if self._n_since_jump > MAX_EVENTS_AT_ONCE:
            raise Stuck("something spins: time does not pass any more")

    def jump(self) -> None:
        self._n_since_jump = 0
        self.now_s = max(self.now_s, self._scheduled[0]._when)

    def put_back(self, handle: events.Handle) -> None:
        self._ready.append(handle)

    def _call_soon(self, callback: Any, args: Any, context: Any) -> events.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> events.TimerHandle:
        timer = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    async def create_connection(
        self, factory: Any, host: Any = None, port: Any = None, **options: Any
    ) -> Any:
        assert self.connect is not None
        return await self.connect(factory)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Tasks are kept: nothing else holds one of a process that died, and collecting it would run its end."""
        task = super().create_task(coro, **options)
        self._kept.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        raise AssertionError("no threads on a virtual clock")

    def shut_down(self) -> None:
        """Let everything unwind, the dead included: their connections are gone, so they can do no harm."""
        self.closing_down = True
        pending = [task for task in self._kept if not task.done()]
        for task in pending:
            task.cancel()
        if pending:
            self.run_until_complete(asyncio.wait(pending, timeout=60))
        for task in pending:
            if not task.done():  # it died between two steps, and nothing would ever wake it
                task._log_destroy_pending = False
                with suppress(RuntimeError, Exception):
                    task.get_coro().close()
        self.close()


class VirtualTime:
    """Stands in for the module `time` inside the product."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return 1000.0 + self._loop.now_s

    def time(self) -> float:
        process = _current.get()
        return EPOCH_S + self._loop.now_s + (process.skew_s if process is not None else 0.0)

    def time_ns(self) -> int:
        return int(self.time() * 1_000_000) * 1000

    def monotonic_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    perf_counter, perf_counter_ns = monotonic, monotonic_ns
    # CPU time is what was really computed: it is reported, nothing is decided by it.
    thread_time = staticmethod(real_time.thread_time)
    thread_time_ns = staticmethod(real_time.thread_time_ns)
    process_time = staticmethod(real_time.process_time)
    process_time_ns = staticmethod(real_time.process_time_ns)

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing sleeps on a virtual clock")


_OURS = ("workers.", "controlplane.gateway", "autoscaler.cell", "autoscaler.watch", "billing.intake")


@contextmanager
def installed(loop: VirtualLoop) -> Iterator[None]:
    """The product's modules see virtual time and seeded chance; restored afterwards."""
    shim, chance = VirtualTime(loop), random.Random(loop.rng.random())
    chance.Random = random.Random  # as in the module it stands in for
    undo: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith(_OURS):
            continue
        for attribute, real, virtual in (("time", real_time, shim), ("random", random, chance)):
            if getattr(module, attribute, None) is real:
                undo.append((module, attribute, real))
                setattr(module, attribute, virtual)
    try:
        yield
    finally:
        for module, attribute, real in undo:
            setattr(module, attribute, real)


def current_process() -> Process:
    process = _current.get()
    assert process is not None, "outside of any process"
    return process


# -- synchronous product code (watcher, intake) on the loop: it steps aside at every call to a server


async def stepping_aside(work: Callable[[], Any]) -> Any:
    """Run blocking code; where it calls `step_aside(awaitable)` the loop goes on, and others with it."""
    fiber = greenlet.greenlet(work)
    fiber.gr_context = contextvars.copy_context()
    result = fiber.switch()
    while not fiber.dead:
        try:
            value = await result
        except BaseException as error:
            result = fiber.throw(error)
        else:
            result = fiber.switch(value)
    return result


def step_aside(awaitable: Any) -> Any:
    """The value of an awaitable, from inside `stepping_aside`."""
    parent = greenlet.getcurrent().parent
    assert parent is not None
    return parent.switch(awaitable)
