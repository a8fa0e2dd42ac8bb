"""The agent's side of the zygote: start or adopt it, fork replicas, hear of their ends.

Asyncio, one per machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from workers.agent.zygote_protocol import (
    MAX_LINE_BYTES,
    ChildExit,
    ChildInfo,
    Command,
    Event,
    ForkSpec,
    decode_event,
    encode,
    short_address,
)

_ANSWER_S = 10.0


class ZygoteGone(RuntimeError):  # noqa: N818
    """The zygote has ended, and every replica with it, or it does not answer. Start another."""


class ZygoteRefused(RuntimeError):  # noqa: N818
    """The zygote will not do that; the message says why."""


class Zygote:
    """A connection to a living zygote. `engines` is what it can fork, `missing` why not the rest, `adopted`
    the children that already ran when we connected."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: Event) -> None:
        self.pid = hello.pid
        self.engines = hello.engines
        self.missing = hello.missing
        self.loads_arriving = hello.loads_arriving
        self.adopted: tuple[ChildInfo, ...] = hello.children
        self._reader, self._writer = reader, writer
        self._seq = 0
        self._answers: dict[int, asyncio.Future[Event]] = {}
        self._exits: asyncio.Queue[ChildExit | None] = asyncio.Queue()  # bounded by the number of children
        self._process: subprocess.Popen[bytes] | None = None  # when it is our own child
        self._task = asyncio.create_task(self._listen(), name="zygote")

    @classmethod
    async def start(
        cls,
        socket_path: Path,
        *,
        log: Path,
        engines: tuple[str, ...] = ("vllm", "toy"),
        preimport: tuple[str, ...] = (),
        orphan_s: float = 120.0,
        timeout_s: float = 180.0,
    ) -> Zygote:
        """Adopt the zygote that listens at `socket_path`, or start one and wait until it has imported
        everything.

        Raises ZygoteGone with the end of its log when it does not come up within `timeout_s`.
        """
        with contextlib.suppress(OSError, ZygoteGone, TimeoutError):
            return await cls.connect(socket_path, timeout_s)
        _make_room(socket_path)
        with log.open("ab") as sink:
            # Not asyncio's: the zygote outlives this loop, and us.
            process = subprocess.Popen(  # noqa: ASYNC220 - a fork and an exec, once per machine
                (
                    *(sys.executable, "-m", "workers.agent.zygote", "--socket", str(socket_path)),
                    *("--engines", ",".join(engines), "--preimport", ",".join(preimport)),
                    *("--orphan-s", str(orphan_s)),
                ),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(timeout_s):
                while process.poll() is None:
                    with contextlib.suppress(OSError):  # not listening yet
                        zygote = await cls.connect(socket_path, timeout_s)
                        zygote._process = process
                        return zygote
                    await asyncio.sleep(0.02)
        except (TimeoutError, ZygoteGone):
            pass
        process.kill()
        process.wait()
        raise ZygoteGone(f"the zygote did not come up within {timeout_s} s; its log ends:\n{_tail(log)}")

    @classmethod
    async def connect(cls, socket_path: Path, timeout_s: float = 10.0) -> Zygote:
        """Adopt a running zygote. OSError when none listens, ZygoteGone when it ends before it greets."""
        async with asyncio.timeout(timeout_s):
            with short_address(socket_path) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=MAX_LINE_BYTES)
            line = await reader.readline()
        if not line:
            writer.close()
            raise ZygoteGone("the zygote ended while it was importing")
        return cls(reader, writer, decode_event(line))

    async def fork(self, spec: ForkSpec) -> int:
        """Fork a child; its pid. ZygoteRefused when it will not, ZygoteGone when it cannot."""
        return (await self._ask(Command(op="fork", spec=spec))).pid

    async def kill(self, pid: int, signum: int = signal.SIGTERM, *, group: bool = False) -> None:
        """Signal a child (or its whole session). ZygoteRefused when it has already ended."""
        await self._ask(Command(op="kill", pid=pid, signum=int(signum), group=group))

    async def exits(self) -> AsyncGenerator[ChildExit, None]:
        """Every child's end, those from before we connected included, each until consumed once.

        Raises ZygoteGone at the end: the children are gone too.
        """
        while (ended := await self._exits.get()) is not None:
            yield ended
            with contextlib.suppress(ZygoteGone, ZygoteRefused):
                await self._ask(Command(op="forget", pid=ended.pid))
        self._exits.put_nowait(None)
        raise ZygoteGone("the zygote has ended")

    async def shutdown(self, grace_s: float = 10.0) -> None:
        """SIGTERM to every replica, SIGKILL after the grace, then the zygote's own end."""
        await self._ask(Command(op="shutdown", grace_s=grace_s))
        await asyncio.wait({self._task}, timeout=grace_s + _ANSWER_S)
        await self.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)

    async def close(self) -> None:
        """Leave; the zygote and its replicas live on for the next agent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()

    async def _ask(self, command: Command) -> Event:
        if self._task.done():
            raise ZygoteGone("the zygote has ended")
        self._seq += 1
        command.seq = self._seq
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._answers[command.seq] = answer
        try:
            self._writer.write(encode(command) + b"\n")
            async with asyncio.timeout(_ANSWER_S):
                event = await answer
        except TimeoutError:
            raise ZygoteGone(f"the zygote has not answered for {_ANSWER_S} s") from None
        finally:
            self._answers.pop(command.seq, None)
        if event.error:
            raise ZygoteRefused(event.error)
        return event

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                event = decode_event(line)
                if event.kind == "exit" and event.exit is not None:
                    self._exits.put_nowait(event.exit)
                elif (answer := self._answers.get(event.seq)) is not None and not answer.done():
                    answer.set_result(event)
        except (OSError, ValueError):
            pass
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(ZygoteGone("the zygote has ended"))
            self._exits.put_nowait(None)


def _make_room(socket_path: Path) -> None:
    """A directory for the socket, and no stale socket in it (nobody answered on it)."""
    socket_path.parent.mkdir(parents=True, exist_ok=True)
    socket_path.unlink(missing_ok=True)


def _tail(log: Path) -> str:
    return log.read_bytes()[-2000:].decode(errors="replace")
