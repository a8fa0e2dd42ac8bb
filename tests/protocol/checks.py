"""What must hold of a world: after every event (`now`), and once it has come to rest (`everything`).

Reads Redis directly; changes nothing. Each check says in one sentence what it found.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from controlplane.gateway.identity import Note
from tests.protocol.surface import Answer, reference
from tests.records import expanded
from workers.contract import JournalEntry, decode_journal_entry

if TYPE_CHECKING:
    from tests.protocol.world import World


class View:
    """All keys of the cell as they are now, read at once."""

    def __init__(self, world: World) -> None:
        prefix = world.keys.prefix
        names = sorted(key.decode().removeprefix(prefix) for key in world.r.keys("*"))
        pipeline = world.r.pipeline(transaction=False)
        read = []
        for name in names:
            ask = _read_as(pipeline, name)
            if ask is not None:
                ask(prefix + name)
                read.append(name)
        self.names = names
        self.values: dict[str, Any] = dict(zip(read, pipeline.execute() if read else [], strict=True))

    def records(self) -> dict[str, dict[bytes, bytes]]:
        return {name[4:]: expanded(value) for name, value in self.values.items() if name.startswith("req:")}

    def journal(self, request: str) -> list[JournalEntry]:
        """Wherever it lies; offsets checked."""
        found = [name for name in self.values if name.endswith(f"jrn:{request}")]
        assert len(found) <= 1, f"{request}: journals at {found}"
        entries = [decode_journal_entry(raw) for raw in self.values[found[0]]] if found else []
        at = 0
        for entry in entries:
            assert entry.offset == at, f"{request}: journal entry at {entry.offset}, expected {at}"
            at += len(entry.token_ids)
        assert all(entry.end is None for entry in entries[:-1]), f"{request}: something follows its end"
        return entries


def _read_as(pipeline: Any, name: str) -> Any:
    """How to read what a check looks at; None for what none does."""
    if name.endswith(":live"):
        return pipeline.smembers
    if name.endswith(":usage"):
        return pipeline.xlen
    part = name.split(":", 2)[2] if name.startswith("m:") else name
    if part.startswith("jrn:"):
        return lambda key: pipeline.lrange(key, 0, -1)
    if part.startswith(("req:", "lim:")) or (part.startswith("rep:") and part.count(":") == 1):
        return pipeline.hgetall
    return None


def records(world: World) -> dict[str, dict[bytes, bytes]]:
    """Every request record of the cell, by id."""
    return View(world).records()


def journal(world: World, request: str) -> list[JournalEntry]:
    return View(world).journal(request)


def now(world: World, view: View | None = None) -> None:
    """After any event."""
    view = view or View(world)
    live: dict[str, str] = {}
    for name, value in view.values.items():
        if name.startswith("rep:") and not name.endswith(":live"):
            replica = name[4:]
            members = [m.decode() for m in view.values.get(f"{name}:live", ())]
            used = int(value.get(b"used", 0))
            assert used == len(members), f"replica {replica}: used {used}, live {len(members)}"
            for request in members:
                assert request not in live, f"{request} is bound to two replicas"
                live[request] = replica
    n_open: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for request, record in view.records().items():
        state, rid = record[b"state"], record.get(b"rid", b"").decode()
        if state == b"bound" and rid:  # else it ended just before its replica died, and waits for intake
            assert live.get(request) == rid, f"{request} is bound to {rid}, which does not know it"
        if state != b"done":
            n_open[record[b"key"].decode()] += 1
            held[record[b"key"].decode()] += int(record[b"money"])
        view.journal(request)
        _only_its_holder_has_a_lease(world, view, request, record)
    for key_id, n in n_open.items():
        scope = view.values[f"lim:key:{key_id}"]
        assert int(scope[b"conc"]) == n, (
            f"key {key_id}: concurrency {scope[b'conc']!r}, {n} requests are open"
        )
        assert int(scope[b"held"]) == held[key_id], (
            f"key {key_id}: {scope[b'held']!r} held, not {held[key_id]}"
        )


def _only_its_holder_has_a_lease(world: World, view: View, request: str, record: dict[bytes, bytes]) -> None:
    holder = record.get(b"mid", b"").decode()
    for machine in world.machines:
        lease = view.values.get(f"m:{machine}:req:{request}")
        if lease is None or lease.get(b"state") == b"done":
            continue
        settled = record[b"state"] == b"done" and record.get(b"was_mid", b"").decode() == machine
        assert machine == holder or settled, (
            f"{request}: machine {machine} has a lease, {holder or 'nobody'} should"
        )
        if machine == holder:
            assert lease[b"epoch"] == record[b"epoch"], (
                f"{request}: lease of epoch {lease[b'epoch']!r}, record {record[b'epoch']!r}"
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
    view = View(world)
    still_open = [r for r, record in view.records().items() if record[b"state"] != b"done"]
    if still_open:
        return "open requests " + "; ".join(_story(world, request) for request in still_open)
    if "failed" in view.names:
        return "requests given up"
    for machine in world.machines:
        if view.values.get(f"m:{machine}:usage"):
            return f"usage of {machine}"
        for path in (world.var / machine / "spool").glob("*.spool"):
            if machine not in world.dead_machines and _unbooked(world, path):
                return f"spool {path.stem}"
    return ""


def _story(world: World, request: str) -> str:
    """All that is known of a request, for a failure's message."""
    record = {k.decode(): v.decode("utf-8", "replace") for k, v in world.record(request).items()}
    lease = world.r.hgetall(world.keys.machine(record["mid"]).lease(request)) if record.get("mid") else {}
    keep = ("state", "epoch", "attempt", "crashes", "deaths", "rid", "was_mid", "gw")
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
    view = View(world)
    now(world, view)
    for answer in world.answers:
        _answer(world, view, answer)
    for request, record in view.records().items():
        _booked_as_journaled(world, view, request, record)
    _nothing_held(world, view)
    _nothing_left_behind(world, view)


def _answer(world: World, view: View, answer: Answer) -> None:
    name = answer.request or answer.prompt
    text, n_tokens, finish = reference(answer.prompt, answer.max_tokens, answer.sampling)
    if answer.complete and answer.out_of_money:
        assert text.startswith(answer.text)
        assert answer.finish == "length"
        return
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
        record = world.record(answer.request)
        # Told when it came back: the call that came back has no record of its own.
        if not record and answer.returns:
            record = max(view.records().values(), key=lambda known: int(known.get(b"crashes", 0)), default={})
        elif b"next" in record:  # it left and came back: the one that continued it died, under its name
            record = world.record(record[b"next"].decode())
        n_blamed, n_deaths = (int(record.get(field, 0)) for field in (b"crashes", b"deaths"))
        assert n_blamed >= 2 or n_deaths >= 4, f"{name}: called poison after {n_deaths} deaths"
        return
    if answer.code == "insufficient_quota" and answer.key != world.key:
        return
    if answer.code == "cannot_continue" and "seed" in answer.sampling:
        return
    assert answer.code, f"{name}: ended without text, error or reason (status {answer.status})"
    assert answer.code in world.allowed_codes, f"{name}: failed with {answer.status} {answer.code}"


def _booked_as_journaled(world: World, view: View, request: str, record: dict[bytes, bytes]) -> None:
    entries = view.journal(request)
    row = world.ledger.rows.get(request)
    if entries and entries[-1].end is not None:
        end = entries[-1].end
        n = sum(len(entry.token_ids) for entry in entries)
        assert end.n_completion == n, (
            f"{request}: the end says {end.n_completion} tokens, the journal holds {n}"
        )
        assert row is not None or world.forgot, f"{request}: ended and was not booked"
        if row is not None and not world.forgot:  # else it may have ended twice, and the first end was booked
            note = Note.decode(record[b"note"].decode())
            new = n - note.n_carried  # what a request that this one continues made was charged there
            assert row.n_completion == new, f"{request}: booked {row.n_completion} tokens, it made {new}"
            assert row.n_prompt == max(0, end.n_prompt - note.n_carried_prompt)
    elif row is not None:
        assert world.forgot, f"{request}: booked without an end in its journal"


def _nothing_held(world: World, view: View) -> None:
    for name, fields in view.values.items():
        if name.startswith("lim:"):
            assert int(fields.get(b"conc", 0)) == 0, f"{name}: concurrency {fields[b'conc']!r}"
            assert int(fields.get(b"held", 0)) == 0, (
                f"{name}: {fields[b'held']!r} nano-dollars are still held"
            )
        if name.startswith("rep:") and not name.endswith(":live"):
            assert int(fields.get(b"used", 0)) == 0, f"{name}: slots are still taken"
    for key_id, spent in _spent(world).items():
        if key_id in world.budgets and not world.forgot:
            assert spent <= world.budgets[key_id], f"key {key_id}: {spent} spent of {world.budgets[key_id]}"
        in_redis = view.values.get(f"lim:key:{key_id}", {}).get(b"spent")
        if in_redis is not None and not world.forgot:
            assert int(in_redis) == spent, (
                f"key {key_id}: {int(in_redis)} spent in Redis, {spent} in the books"
            )


def _spent(world: World) -> Counter[str]:
    spent: Counter[str] = Counter()
    for row in world.ledger.rows.values():
        spent[row.key] += row.cost_nano
    return spent


# What may stay for as long as what it describes does; everything else must expire.
LASTING = ("lim:", "lock:", "born", "decisions")  # the last a stream of bounded length
LASTING_OF_DEPLOYMENTS = (":reps", ":v", ":stage")
LASTING_OF_MACHINES = (":usage", ":desired", ":actual", ":bell")


def _nothing_left_behind(world: World, view: View) -> None:
    prefix = world.keys.prefix
    pipeline = world.r.pipeline(transaction=False)
    for name in view.names:
        pipeline.pttl(prefix + name)
        pipeline.memory_usage(prefix + name)
    answers = pipeline.execute()
    n_bytes = 0
    for name, ttl_ms, n in zip(view.names, answers[::2], answers[1::2], strict=True):
        if ttl_ms >= 0 or ttl_ms == -2:
            continue
        if ":unacked" in name or ":replica." in name:
            front = world.fronts.get(name.rpartition(".")[2])
            if world.forgot or (front is not None and front.process.alive):
                continue  # of messages that a lost answer took along, or a Redis of before: go with the replica
        n_bytes += n or 0
        kind = name.partition(":")[0]
        value = view.values.get(name)
        may_stay = (
            name.startswith(LASTING)
            or (kind == "dep" and name.endswith(LASTING_OF_DEPLOYMENTS))
            or (kind == "m" and name.endswith(LASTING_OF_MACHINES))
            or (kind == "rep" and (not isinstance(value, dict) or value.get(b"state") != b"dead"))
        )
        assert may_stay, f"{name} is left for ever: {str(value)[:300]}"
    assert n_bytes < 64_000, f"{n_bytes} bytes stay for ever"
