"""Entries that the zygote's children run in tests; imported by the zygote's process, not by pytest."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def tell(argument: dict[str, Any]) -> int:
    """Write what this child is to the file named in the argument, and end with the code named there."""
    facts = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "sid": os.getsid(0),
        "env": os.environ.get("CORRAL_TEST"),
        "argument": argument,
        "default_signals": [
            signal.getsignal(s) == signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        ],
        # Inherited sockets would keep the agent's connection open after the zygote's end.
        "sockets": [fd for fd in _open_files() if fd.startswith("socket:")],
        "threads": threading.active_count(),
    }
    print("said on stdout")
    print("said on stderr", file=sys.stderr)
    Path(argument["file"]).write_text(json.dumps(facts))
    return int(argument.get("code", 0))


def wait(argument: dict[str, Any]) -> None:
    """Until killed.

    `stubborn` ignores SIGTERM; `family` also has a grandchild that ignores it and a pid file.
    """
    if argument.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if argument.get("family"):
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        grandchild = subprocess.Popen(command, start_new_session=argument["family"] == "strangers")
        Path(argument["file"]).write_text(str(grandchild.pid))
    elif "file" in argument:
        Path(argument["file"]).write_text(str(os.getpid()))
    time.sleep(600)


def fail(argument: dict[str, Any]) -> None:
    raise RuntimeError("this child was made to fail")


def _open_files() -> list[str]:
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(fd.readlink()))
        except OSError:
            continue
    return names
