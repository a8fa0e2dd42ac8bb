"""What the agent and its zygote say to each other: JSON lines over a Unix socket.

Requests carry `seq` and get one answer with the same `seq`; `hello` and `exit` come unasked. Shared by both
ends and free of I/O, save for `short_address`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec


class ForkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A child to fork: `entry` ("module:function") is called with `argument` and returns an exit code or
    None.

    The child gets its own session, `env` on top of the zygote's, and stdout and stderr appended to `log`.
    `tag` names it to the agent (a replica id); a tag is alive at most once.
    """

    entry: str
    tag: str
    argument: dict[str, object] = {}
    env: dict[str, str] = {}
    log: str = "/dev/null"


class ChildInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A living child. `started_at_s` is wall-clock (time.time())."""

    pid: int
    tag: str
    started_at_s: float


class ChildExit(msgspec.Struct, frozen=True, kw_only=True):
    """A child that ended: by itself (`code`) or by a signal (`signum`)."""

    pid: int
    tag: str
    code: int | None
    signum: int | None
    max_rss_kb: int

    def describe(self) -> str:
        if self.signum is not None:
            try:
                return f"killed by {signal.Signals(self.signum).name}"
            except ValueError:  # real-time signals have no names
                return f"killed by signal {self.signum}"
        return f"exited with code {self.code}"


class Command(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Agent to zygote. `op` is `fork`, `kill`, `forget` (an exit has been noted) or `shutdown`."""

    op: str
    seq: int = 0
    spec: ForkSpec | None = None
    pid: int = 0
    signum: int = 0
    group: bool = False
    grace_s: float = 10.0


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Zygote to agent. `kind` is `hello`, `answer` or `exit`; an answer with `error` is a refusal."""

    kind: str
    seq: int = 0
    pid: int = 0
    error: str = ""
    engines: tuple[str, ...] = ()
    # Why an engine that was asked for could not be imported, by engine.
    missing: dict[str, str] = {}
    # Its fronts can load weights that are still being fetched. A zygote outlives the agent that started it.
    loads_arriving: bool = False
    children: tuple[ChildInfo, ...] = ()
    exit: ChildExit | None = None


encode = msgspec.json.Encoder().encode
decode_command = msgspec.json.Decoder(Command).decode
decode_event = msgspec.json.Decoder(Event).decode

# A line longer than this is a fault of the other side.
MAX_LINE_BYTES = 1 << 20


@contextlib.contextmanager
def short_address(socket_path: Path) -> Iterator[str]:
    """An address for bind/connect that stays below the 107 bytes of `sun_path`, however deep the directory."""
    directory = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{socket_path.name}"
    finally:
        os.close(directory)
