"""What must hold of a world: after every event (`now`), and once it has come to rest (`everything`).

Reads Redis directly; changes nothing. Each check says in one sentence what it found.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from controlplane.gateway.identity import Note
from tests.protocol.surface import Answer, reference
from workers.contract import JournalEntry, decode_journal_entry

if TYPE_CHECKING:
    from tests.protocol.world import World


def records(world: World) -> dict[str, dict[bytes, bytes]]:
    """Every request record of the cell, by id."""
    prefix = f"{world.keys.prefix}req:"
    keys = sorted(key.decode() for key in world.r.keys(f"{prefix}*"))
    return {key.removeprefix(prefix): world.r.hgetall(key) for key in keys}


def journal(world: World, request: str) -> list[JournalEntry]:
    """The request's journal, wherever it lies; offsets checked."""
    keys = [
        world.keys.prefix + f"jrn:{request}",
        *(world.keys.machine(m).journal(request) for m in world.machines),
    ]
    found = [key for key in keys if world.r.exists(key)]
    assert len(found) <= 1, f"{request}: journals at {found}"
    entries = [decode_journal_entry(raw) for raw in world.r.lrange(found[0], 0, -1)] if found else []
    at = 0
    for entry in entries:
        assert entry.offset == at, f"{request}: journal entry at {entry.offset}, expected {at}"
        at += len(entry.token_ids)
    assert all(entry.end is None for entry in entries[:-1]), f"{request}: something follows its end"
    return entries


def now(world: World) -> None:
    """After any event."""
    live: dict[str, str] = {}
    for key in world.r.keys(f"{world.keys.prefix}rep:*:live"):
        replica = key.decode().split(":")[2]
        members = [m.decode() for m in world.r.smembers(key)]
        used = int(world.r.hget(world.keys.replica(replica), "used") or 0)
        assert used == len(members), f"replica {replica}: used {used}, live {len(members)}"
        for request in members:
            assert request not in live, f"{request} is bound to two replicas"
            live[request] = replica
    all_records = records(world)
    n_open: Counter[str] = Counter()
    for request, record in all_records.items():
        state, rid = record[b"state"], record.get(b"rid", b"").decode()
        if state == b"bound" and rid:  # else it ended just before its replica died, and waits for intake
            assert live.get(request) == rid, f"{request} is bound to {rid}, which does not know it"
        if state != b"done":
            n_open[record[b"key"].decode()] += 1
        journal(world, request)
        _only_its_holder_has_a_lease(world, request, record)
    for key_id, n in n_open.items():
        conc = int(world.r.hget(world.keys.limits("key", key_id), "conc") or 0)
        assert conc == n, f"key {key_id}: concurrency {conc}, {n} requests are open"


def _only_its_holder_has_a_lease(world: World, request: str, record: dict[bytes, bytes]) -> None:
    holder = record.get(b"mid", b"").decode()
    for machine in world.machines:
        epoch, state = world.r.hmget(world.keys.machine(machine).lease(request), "epoch", "state")
        if epoch is None or state == b"done":
            continue
        settled = record[b"state"] == b"done" and record.get(b"was_mid", b"").decode() == machine
        assert machine == holder or settled, (
            f"{request}: machine {machine} has a lease, {holder or 'nobody'} should"
        )
        if machine == holder:
            assert epoch == record[b"epoch"], (
                f"{request}: lease of epoch {epoch!r}, record {record[b'epoch']!r}"
            )


# -- at rest


def at_rest(world: World) -> bool:
    """Nothing is open any more, and whatever was used is booked and acknowledged."""
    return not what_waits(world)


def what_waits(world: World) -> str:
    if not world.network.up:
        return "Redis"
    waiting = [a.request or a.prompt for a in world.answers if not a.over]
    if waiting:
        return f"clients of {waiting}"
    for door in world.doors:
        if door.open and door.gateway.inbox.streams:
            return f"{len(door.gateway.inbox.streams)} streams of {door.process.name}"
    still_open = [r for r, record in records(world).items() if record[b"state"] != b"done"]
    if still_open:
        return "open requests " + "; ".join(_story(world, request) for request in still_open)
    if world.r.exists(world.keys.failed):
        return "requests given up"
    for machine in world.machines:
        if world.r.xlen(world.keys.machine(machine).usage):
            return f"usage of {machine}"
        for path in (world.var / machine / "spool").glob("*.spool"):
            if machine not in world.dead_machines and _unbooked(world, path):
                return f"spool {path.stem}"
    return ""


def _story(world: World, request: str) -> str:
    """All that is known of a request, for a failure's message."""
    record = {k.decode(): v.decode("utf-8", "replace") for k, v in world.record(request).items()}
    lease = world.r.hgetall(world.keys.machine(record["mid"]).lease(request)) if record.get("mid") else {}
    keep = ("state", "epoch", "attempt", "crashes", "rid", "was_mid", "gw")
    return f"{request}: { ({k: record.get(k) for k in keep}) } lease {lease} booked {request in world.ledger.rows}"


def _unbooked(world: World, path: Any) -> bool:
    front = world.fronts.get(path.stem)
    if (
        front is not None
        and front.process.alive
        and front.replica is not None
        and hasattr(front.replica, "spool")
    ):
        return len(front.replica.spool) > 0
    return path.stat().st_size > 0


def everything(world: World) -> None:
    """Once the world is at rest."""
    now(world)
    all_records = records(world)
    for answer in world.answers:
        _answer(world, answer)
    for request in all_records:
        _booked_as_journaled(world, request)
    _nothing_held(world)
    _nothing_left_behind(world)


def _answer(world: World, answer: Answer) -> None:
    name = answer.request or answer.prompt
    text, n_tokens, finish = reference(answer.prompt, answer.max_tokens, answer.sampling)
    if answer.complete:
        assert answer.text == text, f"{name}: text differs\n got {answer.text!r}\nwant {text!r}"
        assert answer.finish == finish, f"{name}: finish {answer.finish}, expected {finish}"
        if answer.usage:
            assert answer.usage["completion_tokens"] == n_tokens
        return
    assert text.startswith(answer.text), f"{name}: shown {answer.text!r}, which is no beginning of {text!r}"
    if answer.left or answer.broken:
        return
    if answer.code == "request_poison":
        n_deaths = int(world.record(answer.request).get(b"crashes", 0))
        assert n_deaths >= 2, f"{name}: called poison after {n_deaths} deaths"
        return
    if answer.code == "cannot_continue" and "seed" in answer.sampling:
        return
    assert answer.code, f"{name}: ended without text, error or reason (status {answer.status})"
    assert answer.code in world.allowed_codes, f"{name}: failed with {answer.status} {answer.code}"


def _booked_as_journaled(world: World, request: str) -> None:
    entries = journal(world, request)
    row = world.ledger.rows.get(request)
    if entries and entries[-1].end is not None:
        end = entries[-1].end
        n = sum(len(entry.token_ids) for entry in entries)
        assert end.n_completion == n, (
            f"{request}: the end says {end.n_completion} tokens, the journal holds {n}"
        )
        assert row is not None or world.forgot, f"{request}: ended and was not booked"
        if row is not None:
            note = Note.decode(world.record(request)[b"note"].decode())
            new = n - note.n_carried  # what a request that this one continues made was charged there
            assert row.n_completion == new, f"{request}: booked {row.n_completion} tokens, it made {new}"
            assert row.n_prompt == max(0, end.n_prompt - note.n_carried_prompt)
    elif row is not None:
        assert world.forgot, f"{request}: booked without an end in its journal"


def _nothing_held(world: World) -> None:
    for key in world.r.keys(f"{world.keys.prefix}lim:*"):
        fields = {k.decode(): float(v) for k, v in world.r.hgetall(key).items() if _is_number(v)}
        assert fields.get("conc", 0) == 0, f"{key.decode()}: concurrency {fields['conc']}"
        assert fields.get("held", 0) == 0, f"{key.decode()}: {fields['held']} nano-dollars are still held"
    for key in world.r.keys(f"{world.keys.prefix}rep:*"):
        if not key.endswith(b":live"):
            assert int(world.r.hget(key, "used") or 0) == 0, f"{key.decode()}: slots are still taken"
    for key_id, spent in _spent(world).items():
        in_redis = world.r.hget(world.keys.limits("key", key_id), "spent")
        if in_redis is not None and not world.forgot:
            assert int(in_redis) == spent, (
                f"key {key_id}: {int(in_redis)} spent in Redis, {spent} in the books"
            )


def _spent(world: World) -> Counter[str]:
    spent: Counter[str] = Counter()
    for row in world.ledger.rows.values():
        spent[row.key] += row.cost_nano
    return spent


def _is_number(value: bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


# Keys that may stay for as long as what they describe does; everything else must expire.
LASTING = ("rep:", "dep:", "lim:", "lock:")
LASTING_OF_MACHINES = (":usage", ":desired", ":actual", ":bell")


def _nothing_left_behind(world: World) -> None:
    prefix = world.keys.prefix
    n_bytes = 0
    for key in world.r.keys("*"):
        name = key.decode().removeprefix(prefix)
        if world.r.pttl(key) >= 0 or name.startswith(LASTING):
            continue
        if world.forgot and (":unacked" in name or ":replica." in name):
            continue  # what Redis brought back from before: goes with the replica, if that still lives
        n_bytes += world.r.memory_usage(key) or 0
        assert name.startswith("m:") and name.endswith(LASTING_OF_MACHINES), (
            f"{key.decode()} is left for ever"
        )
    assert n_bytes < 64_000, f"{n_bytes} bytes stay for ever"
    for did in (world.deployment,):
        assert not world.r.zcard(world.keys.queue(did)), "somebody is still queued"
