"""Drills on the machine's side: the replica front, its engine, the agent, the machine itself."""

from __future__ import annotations

import signal

from infra.drills.scene import Scene, Strike


def kill_worker(scene: Scene, strike: Strike) -> None:
    """The front dies without a word, its engine with it."""
    replica = scene.serving()
    scene.signal(replica.front, signal.SIGKILL, machine=replica.machine)
    strike.done(f"SIGKILL to replica front, pid {replica.front.pid}, replica {replica.id[:8]}")
