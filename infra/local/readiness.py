"""When a process of the stack is ready, asked of the process itself.

Called by the supervisor; 2 s at most each.
"""

import http.client
from collections.abc import Callable
from pathlib import Path

from infra.local.process import listens_on

Ready = Callable[[int], bool]


def answers_readyz(port: int) -> Ready:
    """That very process listens on `port` (several may share it), and GET /readyz there says 200."""

    def _ready(pid: int) -> bool:
        if not listens_on(pid, port):
            return False
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return _ready


def wrote_its_pid(path: Path) -> Ready:
    """The process has written its pid to `path`, which it does once it works."""

    def _ready(pid: int) -> bool:
        try:
            return path.read_text(encoding="utf-8").strip() == str(pid)
        except OSError:
            return False

    return _ready
