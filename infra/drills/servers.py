"""Drills on the trusted side: a gateway, Redis with and without its log, Postgres.

Each hurts a process of the local stack's supervisor, which starts it again; nothing else is done by hand. What must be
true beside the streams (who was kept, who was told what) is noted and required here.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urlsplit

import redis

from infra.drills.scene import DrillError, Scene, ServingReplica, Strike
from infra.local import environment
from infra.local.hold import held
from infra.local.process import ProcessIdentity, is_alive
from infra.local.redis import EmbeddedRedis
from infra.local.rotation import KINDS, Rotation

POSTGRES_AWAY_S: Final = 10.0
LOST_LOG_S: Final = 1.0
KEPT_FOR_S: Final = 6.0  # a consumer that cannot come back ends within a second or two
_BACK_WITHIN_S: Final = 60.0
_ALL: Final = ("gateway-", "web", "control", "beat")
_ASK_EVERY_S: Final = 0.5


def kill_gateway(scene: Scene, strike: Strike) -> None:
    """One of the gateways dies with its half of the connections; clients come back to whoever listens."""
    before = scene.process("gateway-1")
    scene.signal(before, signal.SIGKILL)
    strike.done(f"SIGKILL to gateway-1, pid {before.pid}")
    _until_back(scene, strike, "gateway-1", before)


def kill_control(scene: Scene, strike: Strike) -> None:
    """The control worker dies: streams do not notice, and its successor adopts what runs instead of buying again."""
    replica, before = scene.serving(), scene.process("control")
    machines = _machines(scene)
    scene.signal(before, signal.SIGKILL)
    strike.done(f"SIGKILL to the control worker, pid {before.pid}")
    _until_back(scene, strike, "control", before)
    _require_kept(scene, strike, replica)
    strike.require(scene.serving() == replica, "another replica serves")
    strike.require(_machines(scene) == machines, "a machine was bought or given up")


def _machines(scene: Scene) -> list[str]:
    """Of which something runs."""
    names = sorted(path.name for path in (scene.var / "machines").iterdir())
    return [name for name in names if not scene.machine_ends(name)]


def rotate_secrets(scene: Scene, strike: Strike) -> None:
    """Pepper, secret key, logins of the database and Redis's password are replaced; every process learns of it."""
    before = {p.name: p.pid for p in scene.record().processes}
    rotation = Rotation(scene.var, scene.say)
    strike.done(f"rotating {', '.join(KINDS)}")
    started_s = time.monotonic()
    try:
        rotation.rotate(KINDS)
    except RuntimeError as error:
        raise DrillError(str(error)) from error
    finally:
        scene.renew(environment.load(scene.var)["CORRAL_REDIS_URL"])
    strike.notes["took_s"] = round(time.monotonic() - started_s, 1)
    after = {p.name: p.pid for p in scene.record().processes}
    restarted = sorted(name for name, pid in after.items() if pid != before.get(name))
    strike.notes["started again"] = ", ".join(restarted)
    strike.require("gateway-1" in restarted and "web" in restarted, "nothing was started again")
    strike.notes["keys of the former pepper"] = rotation.left().n_keys


def upgrade(scene: Scene, strike: Strike) -> None:
    """Every process of the stack goes over to another version, its machine by being replaced."""
    before = {p.name: p.pid for p in scene.record().processes}
    replica = scene.serving()
    strike.done("the other version's code in place, `manage.py upgrade`")
    strike.notes.update(scene.upgrade())
    strike.notes["took_s"] = round(_since(strike), 1)
    after = {p.name: p.pid for p in scene.record().processes}
    stayed = sorted(
        name for name in _ALL if any(p.startswith(name) and after[p] == before.get(p) for p in after)
    )
    strike.require(not stayed, f"not started again: {', '.join(stayed)}")
    strike.require(scene.serving().machine != replica.machine, "the machine was not replaced")
    strike.require(scene.is_gone(replica), "the replica of the other version still runs")


def kill_redis(scene: Scene, strike: Strike) -> None:
    """Redis dies and comes back with its append-only log."""
    replica, before = scene.serving(), scene.process("redis")
    scene.signal(before, signal.SIGKILL)
    strike.done(f"SIGKILL to Redis, pid {before.pid}")
    _until_back(scene, strike, "redis", before)
    _require_kept(scene, strike, replica)


def trim_redis(scene: Scene, strike: Strike) -> None:
    """Redis dies and comes back without the last second of its log: what a power cut may cost (fsync every second)."""
    log = scene.var / "redis" / "appendonly.aof"
    replica, before = scene.serving(), scene.process("redis")
    n_kept_bytes = log.stat().st_size
    time.sleep(LOST_LOG_S)
    with held(scene.var, "redis", _BACK_WITHIN_S):
        scene.signal(before, signal.SIGKILL)
        scene.wait(lambda: not is_alive(before), "Redis is dead", 5.0)
        n_lost_bytes = log.stat().st_size - n_kept_bytes
        if n_lost_bytes < 0:
            raise DrillError(
                "Redis rewrote its log just then, so that its last second cannot be told: run it again"
            )
        os.truncate(log, n_kept_bytes)
        strike.done(f"SIGKILL to Redis, pid {before.pid}, and the last {LOST_LOG_S:g} s of its log cut off")
    strike.notes["lost"] = f"{n_lost_bytes} bytes of log"
    strike.require(n_lost_bytes > 0, "nothing was written in that second")
    _until_back(scene, strike, "redis", before)
    _require_kept(scene, strike, replica)


def lose_redis(scene: Scene, strike: Strike) -> None:
    """Redis dies and comes back empty: no log, no machine users, no scripts."""
    replica = scene.serving()
    before = scene.process("redis")
    with held(scene.var, "redis", _BACK_WITHIN_S):
        scene.signal(before, signal.SIGKILL)
        scene.wait(lambda: not is_alive(before), "Redis is dead", 5.0)
        EmbeddedRedis(scene.var / "redis", port=before.pid).forget()  # its port does not matter here
        strike.done(f"SIGKILL to Redis, pid {before.pid}, and its log and users deleted")
    _until_back(scene, strike, "redis", before)
    scene.wait(lambda: scene.routed(), "a replica is routed to again", _BACK_WITHIN_S)
    strike.notes["routed again"] = f"{_since(strike):.2f} s after the fault"
    _require_kept(scene, strike, replica)


def promote_redis(scene: Scene, strike: Strike) -> None:
    """Redis dies for good, and its replica takes its place under the same address: with what was replicated in time,
    without machine users (they are not replicated) and without scripts."""
    replica, before = scene.serving(), scene.process("redis")
    with TemporaryDirectory(prefix="promote-", dir=scene.var) as directory:
        copy = EmbeddedRedis(Path(directory) / "redis")
        copy.start()
        try:
            copy.wait_ready()
            with copy.connect() as client:
                _follow(scene, client)
                with held(scene.var, "redis", _BACK_WITHIN_S):
                    scene.signal(before, signal.SIGKILL)
                    scene.wait(lambda: not is_alive(before), "Redis is dead", 5.0)
                    client.replicaof("NO", "ONE")
                    copy.stop()  # it leaves its log
                    EmbeddedRedis(
                        scene.var / "redis", port=before.pid
                    ).forget()  # its port does not matter here
                    shutil.copy(copy.base / "appendonly.aof", scene.var / "redis")
                    strike.done(f"SIGKILL to Redis, pid {before.pid}, and its replica's data in its place")
        finally:
            copy.destroy()
    _until_back(scene, strike, "redis", before)
    scene.wait(lambda: scene.routed(), "a replica is routed to", _BACK_WITHIN_S)
    _require_kept(scene, strike, replica)


def _follow(scene: Scene, client: redis.Redis) -> None:
    """Until this server has all that the cell's Redis has, and writes a log of it."""
    address = urlsplit(scene.redis_url)
    client.config_set("masteruser", str(address.username))
    client.config_set("masterauth", str(address.password))
    client.replicaof(str(address.hostname), str(address.port))

    def in_step() -> bool:
        link, log = client.info("replication"), client.info("persistence")
        return (
            link.get("master_link_status") == "up"
            and not (log["aof_rewrite_in_progress"] or log["aof_rewrite_scheduled"])
            and log["aof_enabled"] == 1
        )

    scene.wait(in_step, "the replica is in step", _BACK_WITHIN_S)


def kill_postgres(scene: Scene, strike: Strike) -> None:
    """Postgres dies and stays away: known keys are served, unknown ones get a 503, the console says why."""
    before = scene.process("postgres")
    with held(scene.var, "postgres", POSTGRES_AWAY_S + _BACK_WITHIN_S):
        scene.signal(before, signal.SIGKILL)
        strike.done(f"SIGKILL to Postgres, pid {before.pid}, and {POSTGRES_AWAY_S:g} s without it")
        # Its backends outlive it by a moment, and may answer.
        scene.wait(lambda: scene.is_down("postgres"), "all of Postgres is gone", 10.0)
        answers, pages = [], []
        while _since(strike) < POSTGRES_AWAY_S:
            answers.append(scene.ask_with_unseen_key())
            pages.append(scene.console_status())
            time.sleep(_ASK_EVERY_S)
    _until_back(scene, strike, "postgres", before)
    strike.notes["a key never seen"] = f"{answers.count(503)} of {len(answers)} requests got a 503 meanwhile"
    strike.require(set(answers) == {503}, f"a key never seen should get 503, and got {sorted(set(answers))}")
    strike.notes["console"] = f"answered {', '.join(map(str, sorted(set(pages))))} meanwhile"
    strike.require(set(pages) == {503}, f"the console should say 503, and said {sorted(set(pages))}")
    scene.wait(lambda: scene.ask_with_unseen_key() == 200, "the unseen key is served", _BACK_WITHIN_S)
    strike.notes["unseen key served"] = f"{_since(strike):.2f} s after the fault"
    scene.wait(lambda: scene.console_status() < 400, "the console is back", _BACK_WITHIN_S)
    strike.notes["console back"] = f"{_since(strike):.2f} s after the fault"


def _until_back(scene: Scene, strike: Strike, name: str, before: ProcessIdentity) -> None:
    """Until the supervisor calls it ready again."""

    def back() -> bool:
        try:
            return scene.process(name) != before and scene.is_ready(name)
        except DrillError:
            return False

    scene.wait(back, f"{name} runs again", _BACK_WITHIN_S)
    strike.notes[f"{name} back"] = f"{_since(strike):.2f} s after the fault"


def _require_kept(scene: Scene, strike: Strike, replica: ServingReplica) -> None:
    """The replica's process and the control worker live on: an outage of ours is nobody's death."""
    control = scene.process("control")
    until_s = time.monotonic() + KEPT_FOR_S
    while time.monotonic() < until_s and is_alive(replica.front) and is_alive(control):
        time.sleep(_ASK_EVERY_S)
    strike.require(is_alive(replica.front), "the replica should have been kept, and its process ended")
    strike.require(is_alive(control), "the control worker ended")


def _since(strike: Strike) -> float:
    return time.monotonic() - (strike.at_s or time.monotonic())
