"""Sits on the connections of a process to Postgres, Redis and EC2, and kills it at the n-th thing that it changes.

What changes something is told from the bytes that it sends. Killed before it is passed on, nothing of it happens;
killed after, it happens and the answer is never heard. The process is not told of any of this.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from dataclasses import dataclass, field

# A statement that writes, or the end of a transaction; a command of Redis's; an action of EC2's.
_WRITES = re.compile(
    rb"(INSERT INTO \"\w+\"|UPDATE \"\w+\"|DELETE FROM \"\w+\"|COMMIT)"
    rb"|\r\n(HSET|HDEL|HINCRBY|DEL|EVALSHA|PUBLISH|SETUSER|DELUSER|LPUSH|SADD|SREM)\r\n"
    rb"|Action=(CreateFleet|TerminateInstances|StopInstances|StartInstances|CreateLaunchTemplate)\b"
)
_CHUNK = 1 << 20
_ANSWERED_WITHIN_S = 10.0


@dataclass
class Strike:
    """The n-th change (0: none) or the first so called, before being passed on or after. `seen`: all of them."""

    at: int | str = 0
    before: bool = False
    pid: int = 0
    seen: list[str] = field(default_factory=list)
    struck: str = ""
    awaited: socket.socket | None = None  # whose answer means that it is done
    answered: threading.Event = field(default_factory=threading.Event)
    dead: threading.Event = field(default_factory=threading.Event)


class Wires:
    """`open` a port for each server; `strike` may be replaced between two processes."""

    def __init__(self) -> None:
        self.strike = Strike()
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []

    def open(self, host: str, port: int) -> int:
        """A port on loopback that leads there."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, (host, port)), daemon=True).start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _accept(self, listener: socket.socket, there: tuple[str, int]) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(there, timeout=10)
            far.settimeout(None)
            threading.Thread(target=self._carry, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, outward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if outward and not self._pass(data, sink):
                    break
                if not outward:
                    if self.strike.awaited is source:
                        self.strike.answered.set()
                        self.strike.dead.wait(_ANSWERED_WITHIN_S)
                        break  # it heard nothing of it, not even that the connection ended
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass(self, data: bytes, sink: socket.socket) -> bool:
        """Whether it was passed on, and more may come."""
        strike, found = self.strike, [m.group().strip().decode() for m in _WRITES.finditer(data)]
        with self._lock:
            if strike.struck:
                return False
            strike.seen += found[:1]
            strikes = bool(found) and strike.at in (len(strike.seen), found[0])
            if strikes:
                strike.struck = found[0]
                if not strike.before:
                    strike.awaited = sink
                    sink.sendall(data)
                    strike.answered.wait(_ANSWERED_WITHIN_S)
                os.kill(strike.pid, signal.SIGKILL)
                strike.dead.set()
                return False
            sink.sendall(data)
        return True
