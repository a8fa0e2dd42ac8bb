"""Ending the machines of the local provider: agent processes that outlive the supervisor by design.

The provider records each agent, leader of a session of its own, in var/machines/<mid>/agent.pid (process.py's
format); its zygote and replicas stay in that session. Called when the stack stops. Must never end a stranger.
"""

import os
import signal
from pathlib import Path

from infra.local.process import (
    end_session,
    is_alive,
    kill_session,
    read_pid_file,
    session_members,
    session_mentions,
    wait_until,
)


def end_machines(var: Path, *, grace_s: float = 10.0) -> list[str]:
    """End every recorded agent with all it started; ids of the machines that had something running.

    All are told at once (SIGTERM), have `grace_s` together, and are then killed.
    """
    ended = []
    agents = []
    for pid_file in sorted((var / "machines").glob("*/agent.pid")):
        identity = read_pid_file(pid_file)
        if identity is None:
            continue
        machine_id = pid_file.parent.name
        if is_alive(identity):
            agents.append((pid_file, identity))
            ended.append(machine_id)
            os.kill(identity.pid, signal.SIGTERM)
        else:
            if _kill_orphans(identity.pid, machine_id):
                ended.append(machine_id)
            pid_file.unlink(missing_ok=True)
    wait_until(lambda: not any(session_members(identity.pid) for _, identity in agents), grace_s)
    for pid_file, identity in agents:
        if not end_session(identity, stop_signal=signal.SIGKILL, grace_s=0.0):
            _kill_orphans(identity.pid, pid_file.parent.name)
        pid_file.unlink(missing_ok=True)
    return ended


def _kill_orphans(session: int, machine_id: str) -> bool:
    """Kill what a dead agent left in its session, if command or environment name the machine."""
    if session_mentions(session, machine_id):
        kill_session(session)
        return True
    return False
