"""Ports of the local stack: the preferred one when free, another when not, the same again next time.

Called by stack.py and the embedded servers. A port found free is not reserved: whoever listens late may still
lose it, and then fails by name.
"""

import socket
from collections.abc import Mapping
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


def choose_ports(preferred: Mapping[str, int | None], record: Path) -> dict[str, int]:
    """Name → port, all different. What `record` says, else the preference, else any; stored in `record`.

    A preference of None means any free port. A recorded port that is taken by now is given up.
    """
    remembered = read_json(record) or {}
    chosen: dict[str, int] = {}
    for name, wish in preferred.items():
        for candidate in (remembered.get(name), wish):
            if candidate and candidate not in chosen.values() and is_free(int(candidate)):
                chosen[name] = int(candidate)
                break
        else:
            chosen[name] = _another(set(chosen.values()))
    write_private_json(record, chosen)
    return chosen


def _another(taken: set[int]) -> int:
    for _ in range(100):
        port = free_port()
        if port not in taken:
            return port
    raise RuntimeError("no free port on 127.0.0.1 in 100 tries")
