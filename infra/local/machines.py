"""Ending the machines of the local provider: agent processes that outlive the supervisor by design.

The provider keeps a directory per machine with agent.pid, and puts the machine's id into the environment of
every process of the machine, which may have sessions of their own. Machines are ended, not terminated: the
next start finds their directories and starts their agents again. Called when the stack stops. Must never
end a stranger.
"""

import contextlib
import os
import signal
from pathlib import Path

from infra.local.process import find_marked, is_alive, kill_marked, wait_until
from infra.providers.external import DIRECTORY as EXTERNAL
from infra.providers.local import MARK, read_agent_pid


def end_machines(var: Path, *, grace_s: float = 10.0) -> list[str]:
    """End all processes of all local machines; ids of the machines that had something running.

    Every agent is told at once (SIGTERM); they have `grace_s` together, what is left is killed.
    """
    directories = {path.name: path for path in machine_directories(var)}
    marks = {name: f"{MARK}={name}" for name in directories}
    alive = [machine_id for machine_id, mark in marks.items() if find_marked(mark)]
    for machine_id in alive:
        agent = read_agent_pid(directories[machine_id] / "agent.pid")
        if agent is not None and is_alive(agent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)
    wait_until(lambda: not any(find_marked(marks[machine_id]) for machine_id in alive), grace_s)
    for machine_id in alive:
        kill_marked(marks[machine_id])
    return alive


def machine_directories(var: Path) -> list[Path]:
    """Of the pool's machines, then of the one that calls endpoints elsewhere."""
    found = [*sorted((var / "machines").glob("*")), *sorted((var / EXTERNAL).glob("*"))]
    return [path for path in found if path.is_dir()]
