"""The cell's Redis as the autoscaler sees it: load, heartbeats, desired replicas, routing, machine users.

Used by the tick, reconcile, enrolment and the watcher, on the trusted side and synchronously; every call
waits 2 s at most and is not retried here (redis.RedisError passes through). Postgres has the facts; what
is written here can always be written again from them. Must never be given a machine's credentials.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.retry import Retry

from workers.contract import (
    Heartbeat,
    Notice,
    ReplicaSpec,
    ReplicaStatus,
    ServingReport,
    Stage,
    WireError,
    decode_error,
)
from workers.contract import encode as encode_wire
from workers.keys import RETENTION_MS, CellKeys, MachineKeys
from workers.scripts import ENROL, MACHINE_SCRIPTS, RESIZE, SETTLE, SHORTEN, SWEEP, WITHDRAW, Script

TIMEOUT_S = 2.0
DEATHS_ALLOWED = 1  # a request that killed two replicas is poison
MAX_FAILED = 256  # requests given up, told a call
BOUND_PER_CALL = 256  # what the scripts bind at once (lib_queue.lua)
MAX_ENROL_CALLS = 16  # an engine batches 4,096 at most
MAX_WITHDRAW_CALLS = 64  # of 512 requests each: more than a replica's slots
MAX_MESSAGES_SEEN = 2048  # of a replica's queue; its slots bound what lies there
MAX_LOST = 512  # a call
# What waits for a gateway that is gone is kept for as long as its client may come back for it.
ABANDONED_AFTER_MS = RETENTION_MS
MAX_ABANDONED = 64  # of a band, a look
N_BANDS, BAND_SPAN = 4, 10**13  # as in lua/lib_flows.lua
BELL_MAX = 16
SCANNED_PER_CALL = 2000  # keys; some 0.3 ms of Redis
# A field of `desired` beside the replica ids: without it the hash was lost, and means nothing.
GENERATION_FIELD = "generation"
_json = msgspec.json.Encoder()
_decode_heartbeat = msgspec.json.Decoder(Heartbeat).decode
_decode_status = msgspec.json.Decoder(ReplicaStatus).decode
_decode_serving = msgspec.json.Decoder(ServingReport).decode

ABANDONED = WireError(status=504, code="timeout", message="the request waited too long for a free replica")
POISON = WireError(
    status=500,
    code="request_poison",
    message="this request ended every replica that tried to serve it and is not tried again",
)


@dataclass(frozen=True, slots=True)
class ReplicaReading:
    """What Redis holds of one replica. `state` '' : the cell does not know it; `beat` None: none came."""

    state: str = ""
    slots: int = 0
    used: int = 0
    is_routed: bool = False
    beat: Heartbeat | None = None


@dataclass(frozen=True, slots=True)
class DeploymentReading:
    """What Redis holds of one deployment."""

    n_queued: int = 0
    n_routed: int = 0


class Cell:
    """One cell. Safe to share between threads (redis-py's connection pool is)."""

    def __init__(self, url: str, keys: CellKeys) -> None:
        self.keys = keys
        self.redis = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=16,
            client_name="autoscaler",
        )

    # -- reading

    def read_replicas(self, replicas: Sequence[tuple[str, str, str]]) -> dict[str, ReplicaReading]:
        """By replica id, for (replica, machine, deployment) triples. One round trip."""
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid, did in replicas:
            pipeline.hmget(self.keys.replica(rid), "state", "slots", "used")
            pipeline.sismember(self.keys.replicas(did), rid)
            pipeline.get(self.keys.machine(mid).heartbeat(rid))
        answers = pipeline.execute() if replicas else []
        found = {}
        for i, (rid, mid, _) in enumerate(replicas):
            (state, slots, used), is_routed, beat = answers[3 * i : 3 * i + 3]
            found[rid] = ReplicaReading(
                state=(state or b"").decode(),
                slots=int(slots or 0),
                used=max(int(used or 0), 0),
                is_routed=bool(is_routed),
                beat=_beat_of(beat, mid, rid),
            )
        return found

    def read_deployments(self, deployment_ids: Sequence[str]) -> dict[str, DeploymentReading]:
        """Queue depth and routed replicas by deployment id. One round trip."""
        pipeline = self.redis.pipeline(transaction=False)
        for did in deployment_ids:
            pipeline.zcard(self.keys.queue(did))
            pipeline.scard(self.keys.replicas(did))
        answers = pipeline.execute() if deployment_ids else []
        return {
            did: DeploymentReading(int(answers[2 * i]), int(answers[2 * i + 1]))
            for i, did in enumerate(deployment_ids)
        }

    def read_agents(self, machine_ids: Sequence[str]) -> dict[str, Heartbeat | None]:
        """The agents' heartbeats by machine id. One round trip."""
        if not machine_ids:
            return {}
        beats = cast(list[bytes | None], self.redis.mget([self._machine(m).heartbeat() for m in machine_ids]))
        return {mid: _beat_of(beat, mid, "") for mid, beat in zip(machine_ids, beats, strict=True)}

    def read_actual(self, replicas: Sequence[tuple[str, str]]) -> dict[str, ReplicaStatus]:
        """What the agents say of these (replica, machine) pairs, by replica id, as far as it parses.

        Asked for by name: a machine may have filled its hash with anything. One round trip.
        """
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid in replicas:
            pipeline.hget(self._machine(mid).actual, rid)
        answers = pipeline.execute() if replicas else []
        found = {}
        for (rid, _), payload in zip(replicas, answers, strict=True):
            status = parse_status(payload) if payload is not None else None
            if status is not None and status.replica == rid:
                found[rid] = status
        return found

    # -- routing

    def enrol(self, *, replica: str, machine: str, deployment: str, slots: int) -> int:
        """The replica takes requests; answers how many waiting ones were given out. Safe to repeat."""
        n_bound = n = int(self._run(ENROL, replica, machine, deployment, slots))
        for _ in range(MAX_ENROL_CALLS):
            if n < BOUND_PER_CALL:
                break
            n = int(self._run(ENROL, replica, machine, deployment, slots))
            n_bound += n
        return n_bound

    def resize(self, replica: str, *, was: int, slots: int, why: str) -> int:
        """The replica runs so many requests at once from now on; answers how many waiting ones it was given, -1
        when it drains or has other slots than `was`.
        """
        return int(self._run(RESIZE, replica, was, slots, why))

    def drain(self, replica: str) -> None:
        """The replica gets nothing new. Safe to repeat."""
        self._withdraw(replica, "drain")

    def withdraw_dead(self, replica: str) -> int:
        """What the replica ran goes back to the queue, or fails as poison; how many went back. Repeatable."""
        n_requeued = 0
        for _ in range(MAX_WITHDRAW_CALLS):
            n, n_left, n_given_up = self._withdraw(replica, "dead")
            n_requeued += n
            if n_given_up:
                self.finish_failed()
            if n_left == 0:
                break
        return n_requeued

    def _withdraw(self, replica: str, mode: str, *requests: str) -> tuple[int, int, int]:
        """(put back into the queue, still bound to the replica, given up)."""
        answer = self._run(WITHDRAW, replica, mode, DEATHS_ALLOWED, encode_wire(POISON), *requests)
        n_requeued, n_left, n_given_up = cast(list[int], answer)
        return n_requeued, n_left, n_given_up

    def sweep_counters(self, deployment: str, cursor: str, n_fields: int) -> tuple[str, int]:
        """One step of forgetting what the fair queue need not know: (next cursor, '0' = done; n forgotten)."""
        cursor_after, n = cast(tuple[bytes, int], self._run(SWEEP, deployment, cursor, n_fields))
        return cursor_after.decode(), int(n)

    def finish_failed(self) -> int:
        """Tell the gateways of requests that were given up, settle those at nothing; how many there were.

        Whoever gave them up may have died before. Bounded; safe to repeat: a request leaves the set last.
        """
        failed = cast(list[bytes], self.redis.srandmember(self.keys.failed, MAX_FAILED))
        for request in (raw.decode() for raw in failed):
            fields = self.redis.hmget(self.keys.request(request), "gw", "error")
            gateway, error = cast(list[bytes | None], fields)
            if gateway is not None and error:
                notice = encode_wire(Notice(request=request, error=decode_error(error)))
                self.redis.publish(self.keys.notice_channel(gateway.decode()), notice)
            self._run(SETTLE, request, 0, 0, 0, RETENTION_MS, 0)
            self.redis.srem(self.keys.failed, request)
        return len(failed)

    def abandoned(self, deployment: str, now_ms: int) -> set[str]:
        """Requests that have waited for `ABANDONED_AFTER_MS` for a gateway that nobody hears any more.

        A live gateway ends its own in time. Three round trips at most.
        """
        queue, before_ms = self.keys.queue(deployment), now_ms - ABANDONED_AFTER_MS
        pipeline = self.redis.pipeline(transaction=False)
        for band in range(-1, N_BANDS):  # -1: those that ran before
            least = band * BAND_SPAN
            pipeline.zrangebyscore(queue, least, least + before_ms, start=0, num=MAX_ABANDONED)
        old = [request.decode() for found in pipeline.execute() for request in found]
        for request in old:
            pipeline.hget(self.keys.request(request), "gw")
        gateway_of = {r: gw.decode() for r, gw in zip(old, pipeline.execute(), strict=True) if gw is not None}
        channels = sorted({self.keys.notice_channel(gateway) for gateway in gateway_of.values()})
        if not channels:
            return set()
        n_heard = {channel.decode(): n for channel, n in cast(Any, self.redis).pubsub_numsub(*channels)}
        return {r for r, gateway in gateway_of.items() if not n_heard.get(self.keys.notice_channel(gateway))}

    def give_up(self, requests: Iterable[str], error: WireError) -> None:
        """Nobody will serve them: their gateways are told `error`, and they are settled at nothing."""
        pipeline = self.redis.pipeline(transaction=True)
        for request in requests:
            pipeline.hset(self.keys.request(request), "error", encode_wire(error))
            pipeline.sadd(self.keys.failed, request)
        pipeline.execute()
        self.finish_failed()

    def read_serving(
        self, replicas: Sequence[tuple[str, str]]
    ) -> dict[str, tuple[set[str], ServingReport | None]]:
        """By replica id, for (replica, machine) pairs: the requests bound to it, and those it says it has.

        One round trip.
        """
        pipeline = self.redis.pipeline(transaction=False)
        for rid, mid in replicas:
            pipeline.smembers(self.keys.replica_live(rid))
            pipeline.get(self._machine(mid).serving(rid))
        answers = pipeline.execute() if replicas else []
        return {
            rid: ({member.decode() for member in answers[2 * i]}, _serving_of(answers[2 * i + 1]))
            for i, (rid, _) in enumerate(replicas)
        }

    def bind_again(self, replica: str, machine: str, requests: Sequence[str]) -> int:
        """Requests bound to a live replica that never got to it go back to the queue; how many did.

        Those whose message still lies in the replica's queue are left alone. Safe to repeat.
        """
        queue = self._machine(machine).prefix + MachineKeys.queue_name(replica)
        messages = cast(list[bytes], self.redis.lrange(queue, 0, MAX_MESSAGES_SEEN - 1))
        lost = [r for r in requests if not any(r.encode() in message for message in messages)]
        if not lost:
            return 0
        return self._withdraw(replica, "lost", *lost[:MAX_LOST])[0]

    def routed(self, deployment: str) -> list[UUID]:
        """Replicas that the cell gives this deployment's requests to."""
        members = cast(set[bytes], self.redis.smembers(self.keys.replicas(deployment)))
        return [UUID(hex=member.decode()) for member in sorted(members)]

    # -- watching

    def hold_watch(self, owner: str, life_ms: int) -> bool:
        """Whether `owner` is the active watcher: takes the lock if nobody has it, renews its own."""
        if self.redis.set(self.keys.watcher_lock, owner, nx=True, px=life_ms):
            return True
        if self.redis.get(self.keys.watcher_lock) != owner.encode():
            return False
        return bool(self.redis.pexpire(self.keys.watcher_lock, life_ms))

    def pubsub(self) -> PubSub:
        """A connection that hears the agents' events, requests that wait for a first replica, and changes."""
        pubsub = cast(PubSub, cast(Any, self.redis).pubsub(ignore_subscribe_messages=True))
        pubsub.psubscribe(self.keys.event_pattern)
        pubsub.subscribe(self.keys.wake_channel, self.keys.invalidate_channel)
        return pubsub

    def leave_watch(self, owner: str) -> None:
        if self.redis.get(self.keys.watcher_lock) == owner.encode():
            self.redis.delete(self.keys.watcher_lock)

    # -- desired state

    def set_desired(self, machine: str, spec: ReplicaSpec) -> None:
        """The agent of this machine should run this replica as specified."""
        self._change_desired(machine, {spec.replica: _json.encode(spec)}, ())

    def drop_desired(self, machine: str, *replicas: str) -> None:
        """The agent of this machine should not run these replicas."""
        self._change_desired(machine, {}, replicas)

    def restore_desired(self, machine: str, wanted: dict[str, ReplicaSpec], seen: dict[str, bool]) -> bool:
        """Make the hash agree with rows read AFTER `seen` was (see read_desired); True if it did not.

        Only a field that is missing, one too many, or one that must drain is touched: a change made meanwhile
        is never undone.
        """
        put = {
            rid: _json.encode(spec)
            for rid, spec in wanted.items()
            if rid not in seen or (spec.drain and not seen[rid])
        }
        drop = [rid for rid in seen if rid not in wanted and rid != GENERATION_FIELD]
        if not put and not drop and GENERATION_FIELD in seen:
            return False
        self._change_desired(machine, put, drop)
        return True

    def read_desired(self, machine: str) -> dict[str, bool]:
        """Replica id -> whether it is told to drain; plus GENERATION_FIELD unless the hash was lost."""
        fields = cast(dict[bytes, bytes], self.redis.hgetall(self._machine(machine).desired))
        return {name.decode(): b'"drain":true' in value for name, value in fields.items()}

    def _change_desired(self, machine: str, put: dict[str, bytes], drop: Iterable[str]) -> None:
        keys = self._machine(machine)
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.hincrby(keys.desired, GENERATION_FIELD, 1)
        if put:
            pipeline.hset(keys.desired, mapping=cast(dict[Any, Any], put))
        if drop := list(drop):
            pipeline.hdel(keys.desired, *drop)
        pipeline.lpush(keys.bell, "1")
        pipeline.ltrim(keys.bell, 0, BELL_MAX - 1)
        pipeline.execute()

    # -- memory

    def memory_used_ratio(self) -> float:
        """Of what Redis may use; 0.0 where it has no bound."""
        info = self.redis.info("memory")
        most = int(info.get("maxmemory", 0))
        return int(info["used_memory"]) / most if most else 0.0

    def shorten_journals(self, cursor: int, life_ms: int) -> tuple[int, int]:
        """Keep journals of ended requests no longer than `life_ms` from now; looks at some thousand keys from `cursor`.

        (cursor to go on from, 0 = all were seen; how many were shortened).
        """
        found = self.redis.scan(cursor, match=f"{self.keys.prefix}m:*:jrn:*", count=SCANNED_PER_CALL)
        cursor, journals = cast(tuple[int, list[bytes]], found)
        if not journals:
            return cursor, 0
        return cursor, int(self._run_bare(SHORTEN, life_ms, RETENTION_MS, *journals))

    # -- stages

    def publish_stage(self, stage: Stage) -> None:
        """Tell waiting clients, and whoever begins to wait later."""
        key = self.keys.stage(stage.deployment)
        fields = {
            "stage": stage.stage,
            "eta_ms": "" if stage.eta_ms is None else stage.eta_ms,
            "code": stage.code,
            "message": stage.message,
            "retry_after_s": "" if stage.retry_after_s is None else stage.retry_after_s,
            "at_ms": stage.at_ms,
        }
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.hset(key, mapping=cast(dict[Any, Any], fields))
        pipeline.pexpire(key, RETENTION_MS)
        pipeline.publish(self.keys.stage_channel, _json.encode(stage))
        pipeline.execute()

    def last_stage(self, deployment: str) -> tuple[str, str]:
        """(stage, code) as last published; ('', '') when there is none."""
        stage, code = cast(list[bytes | None], self.redis.hmget(self.keys.stage(deployment), "stage", "code"))
        return (stage or b"").decode(), (code or b"").decode()

    def forget_stage(self, deployment: str) -> None:
        self.redis.delete(self.keys.stage(deployment))

    # -- machine users

    def set_user(self, machine: str, password_sha256_hex: str) -> None:
        """Make (or make again) the machine's user, and save the list where the server keeps one."""
        keys = self._machine(machine)
        self._acl("SETUSER", keys.redis_user, *keys.acl_rules(password_sha256_hex))
        self._save_users()

    def has_user(self, machine: str) -> bool:
        return self._acl("GETUSER", self._machine(machine).redis_user) is not None

    def delete_machine(self, machine: str) -> None:
        """Its user goes, with all its connections, and what control and agent told each other.

        Usage that was not booked yet stays.
        """
        keys = self._machine(machine)
        self._acl("DELUSER", keys.redis_user)
        self._save_users()
        self.redis.delete(keys.desired, keys.bell, keys.actual, keys.heartbeat())

    def _save_users(self) -> None:
        # A server without an ACL file refuses; the digests in Postgres make the users again.
        with contextlib.suppress(redis.ResponseError):
            self._acl("SAVE")

    # -- plumbing

    def run_id(self) -> str:
        """Changes when the server was restarted or replaced."""
        return str(self.redis.info("server")["run_id"])

    def load_machine_scripts(self) -> None:
        """Machines run scripts by name only and may not load any: somebody trusted must, after every start of Redis."""
        for script in MACHINE_SCRIPTS:
            self.redis.script_load(script.source)

    def _machine(self, machine: str) -> MachineKeys:
        return self.keys.machine(machine)

    def _acl(self, *args: str) -> Any:
        return cast(Any, self.redis).execute_command("ACL", *args)

    def _run(self, script: Script, *args: str | int | bytes) -> Any:
        return self._run_bare(script, self.keys.prefix, time.time_ns() // 1_000_000, *args)

    def _run_bare(self, script: Script, *arguments: str | int | bytes) -> Any:
        try:
            return self.redis.evalsha(script.sha, 0, *arguments)
        except redis.exceptions.NoScriptError:
            return self.redis.eval(script.source, 0, *arguments)


def parse_status(payload: bytes) -> ReplicaStatus | None:
    """None for anything that is no status: machines are not trusted to speak well."""
    try:
        return _decode_status(payload)
    except msgspec.DecodeError:
        return None


def _serving_of(payload: bytes | None) -> ServingReport | None:
    try:
        return None if payload is None else _decode_serving(payload)
    except msgspec.DecodeError:
        return None


def _beat_of(payload: bytes | None, machine: str, replica: str) -> Heartbeat | None:
    if payload is None:
        return None
    try:
        beat = _decode_heartbeat(payload)
    except msgspec.DecodeError:
        return None
    return beat if (beat.machine, beat.replica) == (machine, replica) else None
