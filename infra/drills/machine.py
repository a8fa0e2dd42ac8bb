"""Drills on the machine's side: the replica front, its engine, the agent, the machine itself."""

from __future__ import annotations

import contextlib
import signal
import time

from infra.drills.scene import DrillError, Scene, ServingReplica, Strike
from workers.contract import ReplicaPhase, celery_message
from workers.engine.toy import SIGNAL_DIE, SIGNAL_HANG

# A replica is withdrawn after two seconds of silence; more than this much later something is wrong.
_NOTICED_WITHIN_S = 30.0
_REPLACED_WITHIN_S = 120.0
# What clouds give. A machine of the local provider is up in seconds, or a minute where the engine has to share cores.
NOTICE_S = 120.0


def kill_worker(scene: Scene, strike: Strike) -> None:
    """The front dies without a word, its engine with it."""
    replica = scene.serving()
    n_messages = scene.n_messages(replica)
    scene.signal(replica.front, signal.SIGKILL, machine=replica.machine)
    strike.done(f"SIGKILL to replica front, pid {replica.front.pid}, replica {replica.id[:8]}")
    strike.notes["messages"] = f"{n_messages} in its hands when it died"


def kill_engine(scene: Scene, strike: Strike) -> None:
    """The engine core dies, its front lives to tell; the toy, which has none, fails as if it had lost one."""
    replica = scene.serving()
    core = scene.core_of(replica)
    if core is None:
        scene.signal(replica.front, SIGNAL_DIE, machine=replica.machine)
        strike.done(f"death of the toy engine in replica front, pid {replica.front.pid}")
    else:
        scene.signal(core, signal.SIGKILL)
        strike.done(f"SIGKILL to engine core, pid {core.pid}, of replica front, pid {replica.front.pid}")
    _until_replaced(scene, replica)


def poison(scene: Scene, strike: Strike) -> None:
    """A request ends every engine that begins it: it is given up, and those that ran beside it are not."""
    if scene.engine != "toy":
        raise DrillError("only the toy engine has a word that ends it: leave --engine out")
    replica = scene.serving()
    strike.done("a request whose prompt ends the engine")
    status, code = scene.ask("<die> at once", timeout_s=_REPLACED_WITHIN_S)
    strike.notes["poison"] = f"answered {status} {code}, {time.monotonic() - (strike.at_s or 0):.1f} s later"
    strike.require(
        (status, code) == (500, "request_poison"),
        f"poison should end with request_poison, not {status} {code}",
    )
    _until_replaced(scene, replica)


def hang_engine(scene: Scene, strike: Strike) -> None:
    """The engine core stops in its tracks: no error, no end, only no step any more."""
    replica = scene.serving()
    core = scene.core_of(replica)
    if core is None:
        scene.signal(replica.front, SIGNAL_HANG, machine=replica.machine)
        strike.done(f"hang of the toy engine in replica front, pid {replica.front.pid}")
    else:
        scene.signal(core, signal.SIGSTOP)
        strike.done(f"SIGSTOP to engine core, pid {core.pid}, of replica front, pid {replica.front.pid}")
    _until_replaced(scene, replica)
    scene.wait(lambda: scene.end_of(replica.id), "its end is on record", _NOTICED_WITHIN_S)
    why = scene.end_of(replica.id)
    strike.notes["watchdog"] = why
    strike.require(why.startswith("engine_hung"), f"the watchdog should have seen it, but it ended by {why}")


def duplicate(scene: Scene, strike: Strike) -> None:
    """Every message delivered twice; then a worker cut off until it is withdrawn, which wakes and goes on writing."""
    replica = scene.serving()
    keys = scene.keys.machine(replica.machine)
    requests = scene.live_requests(replica)
    queue = keys.prefix + keys.queue_name(replica.id)
    n_twice = 0
    for request in requests:
        epoch = scene.redis.hget(keys.lease(request), "epoch")
        if epoch is not None:
            n_twice += 1
            scene.redis.lpush(queue, celery_message(request, int(epoch), replica.id))
    scene.wait(lambda: scene.redis.llen(queue) == 0, "the second deliveries were taken", _NOTICED_WITHIN_S)
    strike.notes["delivered twice"] = f"{n_twice} messages, all refused: their leases were held"
    strike.require(n_twice > 0, "no message could be delivered twice: nothing ran")

    scene.signal(replica.front, signal.SIGSTOP, machine=replica.machine)
    strike.done(f"SIGSTOP to replica front, pid {replica.front.pid}, until it was withdrawn; then SIGCONT")
    before = scene.heartbeat(replica)
    try:
        successor = _until_replaced(scene, replica)
        n_accepted = scene.n_served_before + sum(scene.n_journaled(request) for request in requests)
        scene.wait(
            lambda: (beat := scene.heartbeat(successor)) and beat.n_tokens_total > 0,
            "the new replica went on",
            _NOTICED_WITHIN_S,
        )
    finally:
        scene.signal(replica.front, signal.SIGCONT, machine=replica.machine)
    seq = before.seq if before else 0
    scene.wait(
        lambda: (beat := scene.heartbeat(replica)) and beat.seq > seq,
        "the fenced worker woke",
        _NOTICED_WITHIN_S,
    )
    scene.wait(lambda: scene.is_gone(replica), "the fenced worker was ended", _NOTICED_WITHIN_S)
    after = scene.heartbeat(replica)
    n_refused = after.n_tokens_total - n_accepted if after else 0
    strike.notes["fenced worker"] = f"woke and went on; {n_refused} tokens of its making were not accepted"
    strike.require(n_refused > 0, "the fenced worker made nothing after it was cut off: nothing was proved")


def kill_agent(scene: Scene, strike: Strike) -> None:
    """The machine's agent dies; what it started runs on, and its successor adopts it."""
    replica = scene.serving()
    agent = scene.agent_of(replica.machine)
    if agent is None:
        raise DrillError("the machine has no agent")
    scene.signal(agent, signal.SIGKILL, machine=replica.machine)
    strike.done(f"SIGKILL to agent, pid {agent.pid}")
    died_at_s = time.monotonic()
    scene.wait(
        lambda: (now := scene.agent_of(replica.machine)) and now != agent,
        "the agent was started again",
        _REPLACED_WITHIN_S,
    )
    back_s = time.monotonic() - died_at_s
    successor = scene.agent_of(replica.machine)
    scene.wait(
        lambda: (
            (beat := scene.agent_beat(replica.machine))
            and beat.phase is ReplicaPhase.READY
            and beat.n_running
        ),
        "the new agent adopted its replicas",
        _NOTICED_WITHIN_S,
    )
    strike.notes["agent"] = (
        f"started again after {back_s:.1f} s as pid {successor.pid if successor else '?'}, replicas adopted"
    )
    now = scene.serving()
    strike.require(now == replica, "the replica was replaced although it only lost its agent")


def kill_machine(scene: Scene, strike: Strike) -> None:
    """Power loss: nobody is left to report anything, only heartbeats that stand still."""
    replica = scene.serving()
    processes = scene.processes_of(replica.machine)
    agent = scene.agent_of(replica.machine)
    # The agent first: nothing it could still say may help.
    for process in sorted(processes, key=lambda p: p != agent):
        with contextlib.suppress(DrillError, ProcessLookupError):  # it died with its parent
            scene.signal(process, signal.SIGKILL)
    strike.done(f"SIGKILL to all {len(processes)} processes of machine {replica.machine[:8]}")
    _until_replaced(scene, replica)


def spot_notice(scene: Scene, strike: Strike) -> None:
    """The machine's provider says that it will take it away, and does. Its place in the pool goes to another."""
    _leave(scene, strike, centrally=False)


def spot_event(scene: Scene, strike: Strike) -> None:
    """The same, said only centrally: the machine itself hears nothing of its end."""
    _leave(scene, strike, centrally=True)


def quarantine(scene: Scene, strike: Strike) -> None:
    """An operator distrusts the machine: it leaves like one under notice, and who asks for it finds it no more."""
    replica = scene.serving()
    name = f"mch_{replica.machine}"
    told = scene.manage("quarantine", name, "--reason", "a drill")
    strike.done(f"`manage.py quarantine {name[:12]}`: {told['state']}, {told['reason']}")
    strike.require(told["state"] == "draining", f"the command left the machine {told['state']}")
    _see_off(scene, strike, replica)

    def is_off_the_list() -> bool:
        return name not in [row["machine"] for row in scene.manage("quarantine")]

    scene.wait(is_off_the_list, "the machine is off the list", _NOTICED_WITHIN_S)


def _leave(scene: Scene, strike: Strike, *, centrally: bool) -> None:
    replica = scene.serving()
    teller = scene.announce(replica.machine, NOTICE_S, centrally=centrally)
    strike.done(f"notice to machine {replica.machine[:8]} by {teller}: taken away in {NOTICE_S:g} s")
    _see_off(scene, strike, replica)


def _see_off(scene: Scene, strike: Strike, replica: ServingReplica) -> None:
    """Its replacement serves before it drains, and it is gone when its time is up."""
    ends_at_s = time.monotonic() + NOTICE_S
    scene.wait(lambda: scene.replica_state(replica) != "ready", "the replica was told to drain", NOTICE_S)
    drained_at_s = time.monotonic()
    successors = scene.routed()
    strike.require(bool(successors), "the replica was drained before a replacement served")
    scene.wait(lambda: scene.is_gone(replica), "the drained replica ended", NOTICE_S)
    gone_at_s = time.monotonic()
    scene.wait(lambda: scene.machine_ends(replica.machine), "the machine was given back", NOTICE_S)
    began_s = strike.at_s or drained_at_s
    word = "served" if successors else "did not serve"
    strike.notes["replacement"] = (
        f"{word} before the drain, which began {drained_at_s - began_s:.1f} s after the notice and took "
        f"{gone_at_s - drained_at_s:.1f} s"
    )
    strike.notes["machine"] = f"given back {time.monotonic() - began_s:.1f} s after the notice"
    strike.require(gone_at_s < ends_at_s, "the replica still ran when the machine was taken away")


def _until_replaced(scene: Scene, replica: ServingReplica) -> ServingReplica:
    """The replica that serves in the place of this one, which must have been withdrawn first."""

    def replaced() -> bool:
        try:
            return scene.serving().id != replica.id
        except DrillError:
            return False

    scene.wait(lambda: scene.replica_state(replica) in ("dead", ""), "it was withdrawn", _NOTICED_WITHIN_S)
    scene.wait(replaced, "another replica serves", _REPLACED_WITHIN_S)
    return scene.serving()
