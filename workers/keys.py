"""Every Redis key and channel of a cell: its name, type, owner and life.

Both sides of the wire import this module and nothing else builds key names. A cell is one Redis primary; all of
its keys start with the cell's name. Keys under `<cell>:m:<machine>:` are the only ones that a machine's Redis
user may touch (`acl_rules`); everything else belongs to the trusted side (gateways, control worker, intake).

| key after the cell | type | owner | life |
|---|---|---|---|
| `req:<id>` | hash | trusted | request record (records.py): admission until settle + 15 min |
| `idem:<project>:<digest>` | string | trusted | idempotency key: its request and when it was taken; timeout + 15 min |
| `body:<id>`, `jrn:<id>` | string, list | trusted | body and journal while no replica holds the request |
| `dep:<dep>:q` | zset of request ids | trusted | what waits for the deployment, bounded at admission |
| `dep:<dep>:o:…` `p:…` `k:…` `r:…` | zsets | trusted | waiting flows and their requests: lua/lib_flows.lua |
| `dep:<dep>:v` | hash | trusted | virtual counters of the flows; swept by the watcher |
| `dep:<dep>:reps` | set of replica ids | trusted | replicas that may receive work |
| `dep:<dep>:ovf` | set of replica ids | trusted | endpoints elsewhere that take what would wait too long |
| `dep:<dep>:stage` | hash | trusted | what a waiting client is told: stage, eta_ms, detail; and starts |
| `rep:<rid>` | hash | trusted | machine, deployment, state, slots, used, KV tokens, pace, why the slots changed last |
| `rep:<rid>:live` | set of request ids | trusted | requests bound to the replica |
| `rep:<rid>:px` | zset of prefix hashes | trusted | what its cache probably holds, bounded |
| `failed` | set of request ids | trusted | given up; until their gateways and holds were told |
| `born` | string | trusted | since when limits count here: 0 from the start, else when this Redis was found empty |
| `lim:<scope>:<id>` | hash | trusted | counters and holds of an end customer (for 7 h), key, project or organization |
| `bud:<budget>`, `bud:<budget>:b` | hashes | trusted | a budget's window, its buckets: lua/lib_windows.lua |
| `decisions` | stream | trusted | what gateways decided, until intake has kept it; bounded |
| `shadows` | stream | trusted | what copies of requests came to, until intake has kept it; bounded |
| `usage:bad` | list | trusted | usage entries that intake put aside, newest first, bounded |
| `lock:intake` | string | trusted | which control process books usage now; expires |
| `lock:webhooks` | string | trusted | which control process sends webhooks now; expires |
| `lock:watcher` | string | trusted | which control worker's watcher is active; expires |
| `lock:look` | string | trusted | the provider was asked a moment ago about machines that are being stopped; expires |
| `m:<mid>:req:<id>` | hash | machine | lease of a bound request: epoch, state, reader, offset, up to which token |
| `m:<mid>:body:<id>`, `m:<mid>:jrn:<id>` | string, list | machine | moved here by bind, moved away by rebind |
| `m:<mid>:replica.<rid>`, `unacked…`, `_kombu…` | Celery's | machine | broker keys of the replica's consumer |
| `m:<mid>:usage` | stream | machine | finished requests, until intake has booked them |
| `m:<mid>:ack:<rid>` | list | machine | ids of that replica's requests that intake has booked |
| `m:<mid>:hb:<rid>` | string | machine | heartbeat (JSON) of a replica; `m:<mid>:hb` of the agent |
| `m:<mid>:run:<rid>` | string | machine | ids of the requests a replica serves now (`ServingReport`, JSON) |
| `m:<mid>:desired`, `m:<mid>:bell` | hash, list | machine | replicas that should run here; doorbell for the agent |
| `m:<mid>:models` | string | machine | model versions it holds, and how siblings reach them (`ModelShelf`, JSON) |
| `m:<mid>:prefetch` | hash | machine | model versions to fetch when it is idle (`PrefetchSpec`, JSON), by digest |
| `m:<mid>:adapters` | hash | machine | LoRA adapters that replicas here may be asked for (`AdapterSpec`, JSON) |
| `m:<mid>:pw` | string | machine | its next password, sealed for its agent, until that takes it; expires |
| `m:<mid>:actual` | hash | machine | what the agent runs, with phase and reason |
"""

from __future__ import annotations

from typing import Final

WIRE_VERSION: Final = 1
DEFAULT_CELL: Final = "c0"

# Garbage collection only; expiry that matters is a stored field compared with now_ms.
RETENTION_MS: Final = 15 * 60 * 1000
LEASE_GC_MS: Final = 6 * 60 * 60 * 1000
USAGE_STREAM_MAX: Final = 200_000
# Batches of decisions, each of a gateway's second and at most some 500 KB; what nobody reads is dropped.
DECISIONS_STREAM_MAX: Final = 200
SHADOWS_STREAM_MAX: Final = 200  # likewise, of some 100 KB at most

SCOPES: Final = ("end", "key", "prj", "org")

# Commands a machine's Redis user may run: what the consumer, the journal, the heartbeat and the agent need. Scripts
# only by name: with EVAL or SCRIPT LOAD a hostile machine could run an endless loop inside Redis. The trusted side
# loads the machine scripts (gateways and watcher, on every connection).
MACHINE_COMMANDS: Final = (
    "+ping +hello +auth +client|setname +client|setinfo +client|id +select +info +time +command "
    "+evalsha +script|exists +multi +exec +discard +watch +unwatch "
    "+get +set +mget +del +unlink +exists +expire +pexpire +rename +type "
    "+hget +hset +hsetnx +hmget +hgetall +hkeys +hdel +hincrby +hlen +hexists "
    "+lpush +rpush +lpop +rpop +brpop +blpop +blmove +lmove +lrange +llen +ltrim +lrem "
    "+sadd +srem +smembers +scard +sismember "
    "+zadd +zrem +zrevrangebyscore +zrangebyscore +zrange +zscore +zcard "
    "+xadd +xlen +xrange +xtrim "
    "+publish +subscribe +unsubscribe +psubscribe +punsubscribe"
)


class CellKeys:
    """Key names of the trusted side of one cell."""

    __slots__ = ("cell", "prefix")

    def __init__(self, cell: str = DEFAULT_CELL) -> None:
        if not cell or ":" in cell or "*" in cell:
            raise ValueError(f"cell: {cell!r} must be a non-empty name without ':' or '*'")
        self.cell = cell
        self.prefix = f"{cell}:"

    def machine(self, machine_id: str) -> MachineKeys:
        return MachineKeys(self.cell, machine_id)

    def request(self, request_id: str) -> str:
        return f"{self.prefix}req:{request_id}"

    def body(self, request_id: str) -> str:
        return f"{self.prefix}body:{request_id}"

    def journal(self, request_id: str) -> str:
        """The journal while no replica holds the request."""
        return f"{self.prefix}jrn:{request_id}"

    def idempotency(self, project_id: str, digest: str) -> str:
        return f"{self.prefix}idem:{project_id}:{digest}"

    def queue(self, deployment_id: str) -> str:
        """Its length is the number of requests that wait."""
        return f"{self.prefix}dep:{deployment_id}:q"

    def replicas(self, deployment_id: str) -> str:
        return f"{self.prefix}dep:{deployment_id}:reps"

    def overflow(self, deployment_id: str) -> str:
        """Replicas that take only what would wait too long for the others."""
        return f"{self.prefix}dep:{deployment_id}:ovf"

    def stage(self, deployment_id: str) -> str:
        return f"{self.prefix}dep:{deployment_id}:stage"

    def replica_prefixes(self, replica_id: str) -> str:
        return f"{self.prefix}rep:{replica_id}:px"

    def replica(self, replica_id: str) -> str:
        return f"{self.prefix}rep:{replica_id}"

    def replica_live(self, replica_id: str) -> str:
        return f"{self.prefix}rep:{replica_id}:live"

    def limits(self, scope: str, scope_id: str) -> str:
        if scope not in SCOPES:
            raise ValueError(f"scope: {scope!r} is none of {SCOPES}")
        return f"{self.prefix}lim:{scope}:{scope_id}"

    def budget(self, budget_id: str) -> str:
        return f"{self.prefix}bud:{budget_id}"

    @property
    def failed(self) -> str:
        return f"{self.prefix}failed"

    @property
    def born(self) -> str:
        return f"{self.prefix}born"

    @property
    def usage_bad(self) -> str:
        return f"{self.prefix}usage:bad"

    @property
    def decisions(self) -> str:
        return f"{self.prefix}decisions"

    @property
    def shadows(self) -> str:
        return f"{self.prefix}shadows"

    @property
    def intake_lock(self) -> str:
        return f"{self.prefix}lock:intake"

    @property
    def webhooks_lock(self) -> str:
        return f"{self.prefix}lock:webhooks"

    @property
    def watcher_lock(self) -> str:
        return f"{self.prefix}lock:watcher"

    @property
    def look_lock(self) -> str:
        return f"{self.prefix}lock:look"

    @property
    def usage_pattern(self) -> str:
        """Pattern of the usage streams of all machines."""
        return f"{self.prefix}m:*:usage"

    @property
    def wake_channel(self) -> str:
        """PUBLISH of a deployment id: requests wait and nothing serves them."""
        return f"{self.prefix}wake"

    @property
    def route_channel(self) -> str:
        """PUBLISH of a deployment id: its set of replicas changed."""
        return f"{self.prefix}route"

    @property
    def placed_channel(self) -> str:
        """PUBLISH of one gateway's latest placements to the others (controlplane/gateway/placements.py)."""
        return f"{self.prefix}placed"

    @property
    def stage_channel(self) -> str:
        """PUBLISH of `Stage` (JSON): what to tell clients that wait for a deployment."""
        return f"{self.prefix}stage"

    @property
    def invalidate_channel(self) -> str:
        """PUBLISH of `key:<lookup>`, `dep:<id>`, `prj:<id>` or `org:<id>`: forget what was cached of it."""
        return f"{self.prefix}inval"

    def notice_channel(self, gateway_id: str) -> str:
        """PUBLISH of `Notice` (msgpack) by the trusted side: a request of this gateway ended without a replica."""
        return f"{self.prefix}g:{gateway_id}"

    def gateway_pattern(self, gateway_id: str) -> str:
        """Pattern of the channels on which machines send frames to this gateway."""
        return f"{self.prefix}m:*:g:{gateway_id}"

    @property
    def event_pattern(self) -> str:
        """Pattern of the channels on which agents and replicas announce a change of phase."""
        return f"{self.prefix}m:*:event"

    def machine_of_channel(self, channel: bytes) -> str:
        """Machine id in a channel matched by one of the patterns above; `''` if it has another shape."""
        parts = channel.decode("ascii", "replace").split(":")
        return parts[2] if len(parts) >= 4 and parts[0] == self.cell and parts[1] == "m" else ""


class MachineKeys:
    """Key names under one machine's prefix, the only ones its Redis user reaches."""

    __slots__ = ("cell", "machine_id", "prefix")

    def __init__(self, cell: str, machine_id: str) -> None:
        if not machine_id or ":" in machine_id or "*" in machine_id:
            raise ValueError(f"machine_id: {machine_id!r} must be a non-empty id without ':' or '*'")
        self.cell = cell
        self.machine_id = machine_id
        self.prefix = f"{cell}:m:{machine_id}:"

    @property
    def redis_user(self) -> str:
        return f"m-{self.machine_id}"

    @staticmethod
    def queue_name(replica_id: str) -> str:
        """Celery queue of a replica; its Redis key is `prefix + queue_name`."""
        return f"replica.{replica_id}"

    def unacked(self, replica_id: str) -> tuple[str, str]:
        """Hash and index of the messages that a replica's consumer was handed and has not acknowledged."""
        return f"{self.prefix}unacked.{replica_id}", f"{self.prefix}unacked_index.{replica_id}"

    def lease(self, request_id: str) -> str:
        return f"{self.prefix}req:{request_id}"

    def body(self, request_id: str) -> str:
        return f"{self.prefix}body:{request_id}"

    def journal(self, request_id: str) -> str:
        return f"{self.prefix}jrn:{request_id}"

    @property
    def usage(self) -> str:
        return f"{self.prefix}usage"

    def ack(self, replica_id: str) -> str:
        """Booked request ids, RPUSHed by intake (with a PEXPIRE) for the replica named in the usage event.

        Read by whoever owns that replica's spool: its front while it lives, then the machine's agent.
        """
        return f"{self.prefix}ack:{replica_id}"

    def heartbeat(self, replica_id: str | None = None) -> str:
        return f"{self.prefix}hb:{replica_id}" if replica_id else f"{self.prefix}hb"

    def serving(self, replica_id: str) -> str:
        return f"{self.prefix}run:{replica_id}"

    @property
    def desired(self) -> str:
        return f"{self.prefix}desired"

    @property
    def models(self) -> str:
        return f"{self.prefix}models"

    @property
    def prefetch(self) -> str:
        return f"{self.prefix}prefetch"

    @property
    def adapters(self) -> str:
        return f"{self.prefix}adapters"

    @property
    def bell(self) -> str:
        return f"{self.prefix}bell"

    @property
    def password(self) -> str:
        """Its next password, in a box that only its agent opens; the agent deletes it."""
        return f"{self.prefix}pw"

    @property
    def actual(self) -> str:
        return f"{self.prefix}actual"

    @property
    def event_channel(self) -> str:
        return f"{self.prefix}event"

    def gateway_channel(self, gateway_id: str) -> str:
        return f"{self.prefix}g:{gateway_id}"

    def control_channel(self, replica_id: str) -> str:
        """PUBLISH by the trusted side of a request id (cancel it) or `@<request id>` (its client reads elsewhere)."""
        return f"{self.prefix}ctl:{replica_id}"

    def acl_rules(self, *passwords_sha256_hex: str) -> list[str]:
        """Arguments of ACL SETUSER for this machine: its own keys and channels, and a command list.

        Digests, so that a password itself is stored nowhere on the trusted side; two while one is being replaced.
        """
        return [
            "reset",
            "on",
            *(f"#{digest}" for digest in passwords_sha256_hex),
            f"~{self.prefix}*",
            "resetchannels",
            f"&{self.prefix}*",
            "-@all",
            *MACHINE_COMMANDS.split(),
        ]
