"""Ports of the local stack: the preferred one when free, another when not, the same again next time.

Called by stack.py and the embedded servers. A stack claims its ports before it starts anything and holds the claims
while it runs: gateways share theirs (SO_REUSEPORT), so two stacks that start at the same instant could else share it,
too, and answer each other's clients. A port that a program of another kind takes meanwhile is lost, and its server
fails by name.
"""

import contextlib
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra.local.privatefile import read_json, write_private_json

HOST = "127.0.0.1"


def is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str = HOST) -> int:
    """A port the kernel says is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def claimed_ports(preferred: Mapping[str, int | None], record: Path) -> Iterator[dict[str, int]]:
    """Name → port, all different, and no other stack's inside. What `record` says, else the preference, else any;
    stored in `record`.

    A preference of None means any free port. A recorded port that is taken by now is given up.
    """
    remembered = read_json(record) or {}
    with contextlib.ExitStack() as claims:
        chosen: dict[str, int] = {}
        for name, wish in preferred.items():
            for candidate in (remembered.get(name), wish):
                if candidate and _claim(int(candidate), claims):
                    chosen[name] = int(candidate)
                    break
            else:
                chosen[name] = _another(claims)
        write_private_json(record, chosen)
        yield chosen


def _claim(port: int, claims: contextlib.ExitStack) -> bool:
    """Take a port for as long as `claims` is open; False when somebody has it.

    The claim is an abstract socket's name, of which the kernel gives out one per network namespace, as of ports, and
    which ends with the process that holds it. Elsewhere than on Linux there are none, and the ports' own check must do.
    """
    if sys.platform == "linux":
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0corral-port-{port}")
        except OSError:
            claim.close()
            return False
        if is_free(port):
            claims.enter_context(claim)
            return True
        claim.close()
        return False
    return is_free(port)


def _another(claims: contextlib.ExitStack) -> int:
    for _ in range(100):
        port = free_port()
        if _claim(port, claims):
            return port
    raise RuntimeError("no free port on 127.0.0.1 in 100 tries")
