"""A machine's Redis credential, taken from its file and used in another process: it opens that machine's keys, no more.

The credential is what enrolment gives, the thief a process of its own (thief.py), Redis and its ACL are real. What is
foreign is read off the code: every name that CellKeys and MachineKeys make, every family that the scripts and the table
in workers/keys.py name, every command that this Redis knows. A new family that a machine can reach fails here.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoscaler import services
from tests.autoscaler.conftest import Scaling
from workers import keys as keys_module
from workers.keys import MACHINE_COMMANDS, CellKeys, MachineKeys
from workers.scripts import MACHINE_SCRIPTS, TRUSTED_SCRIPTS

SECRET = "what a thief must not read"
OTHER = "f" * 32
ROOT = Path(__file__).parents[2]
_ARGUMENTS = {"scope": "org"}  # of methods that take no name they please
# Redis lets everybody ask these of their own connection, whatever the list says.
_ANYBODY = {"quit", "reset"}


def _names(keys: CellKeys | MachineKeys) -> dict[str, str]:
    """Every key or channel name (pattern) that the object makes, by attribute."""
    found: dict[str, str] = {}
    for name, member in inspect.getmembers(type(keys)):
        if name.startswith("_") or name in (
            "machine",
            "machine_of_channel",
            "acl_rules",
            "redis_user",
            "queue_name",
        ):
            continue
        if isinstance(member, property):
            made: Any = getattr(keys, name)
        elif callable(member):
            parameters = list(inspect.signature(member).parameters)[1:]
            made = member(keys, *(_ARGUMENTS.get(p, "x") for p in parameters))
        else:
            continue  # cell, machine_id, prefix
        for number, each in enumerate(made if isinstance(made, tuple) else (made,)):
            found[f"{name}/{number}" if number else name] = each
    return found


def _of_scripts(prefix: str) -> Iterator[str]:
    """A key of every family that a script names after the cell's prefix."""
    for path in sorted((ROOT / "workers/lua").rglob("*.lua")):
        for family in re.findall(r"P \.\. '([a-z:]+)", path.read_text()):
            yield f"{prefix}{family}{OTHER}:x" if family == "m:" else f"{prefix}{family}x"


def _of_table(prefix: str, machine: str) -> Iterator[str]:
    """A key of every family in the table of workers/keys.py, those of machines under `machine`."""
    for line in (keys_module.__doc__ or "").splitlines():
        if line.startswith("| `"):
            for pattern in re.findall(r"`([^`]+)`", line.split("|")[1]):
                name = pattern.replace("<mid>", machine).replace("…", "x")
                if not pattern.startswith(("p:", "k:", "r:", "unacked", "_kombu")):  # said in short
                    yield prefix + re.sub(r"<[a-z]+>", "x", name)


# Of the commands that a machine may use in part (Redis 6 does not list them).
_SUBCOMMANDS = (
    *("client|setname", "client|setinfo", "client|id", "script|exists"),
    *("client|kill", "client|list", "client|info", "client|pause", "client|unpause", "client|unblock"),
    *("client|reply", "client|tracking", "client|getname", "client|getredir", "client|caching"),
    *("script|load", "script|flush", "script|kill", "script|debug"),
)


_TAILS = {"lmove": ("LEFT", "RIGHT"), "blmove": ("LEFT", "RIGHT", "1"), "blpop": ("1",), "brpop": ("1",)}


class Thief:
    """Another process with the machine's address and password; runs lists of commands."""

    def __init__(self, url: str) -> None:
        self.url = url

    def run(self, commands: list[list[Any]], *, fresh: bool = False) -> list[str]:
        """The answer to each, or `error <first word>`. fresh: each on a connection of its own."""
        question = json.dumps({"url": self.url, "commands": commands, "fresh": fresh})
        answer = subprocess.run(
            [sys.executable, "-m", "tests.autoscaler.thief"],
            input=question, capture_output=True, text=True, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr[-2000:]
        found = json.loads(answer.stdout)
        assert len(found) == len(commands)
        return [str(each) for each in found]


@pytest.fixture
def thief(scaling: Scaling) -> Thief:
    scaling.queue("a")
    scaling.tick()
    machine = scaling.machine().id.hex
    cell = scaling.house.cell
    given = services.enrol(
        machine_id=machine, proof=scaling.provider.proofs[machine], capabilities={}, cell=cell
    )
    cell.load_machine_scripts()
    for script in TRUSTED_SCRIPTS:
        cell.redis.script_load(script.source)
    for key in _foreign(scaling):
        cell.redis.delete(key)
        cell.redis.set(key, SECRET)
    return Thief(given.redis_url)


def _foreign(scaling: Scaling) -> list[str]:
    cell = scaling.house.cell.keys
    return sorted(
        {
            *_names(cell).values(),
            *_names(cell.machine(OTHER)).values(),
            *_names(CellKeys("c9")).values(),
            *_names(CellKeys("c9").machine(scaling.machine().id.hex)).values(),
            *_of_scripts(cell.prefix),
            *_of_table(cell.prefix, OTHER),
            "celery", "_kombu.binding.celery", "unacked",  # the control worker's own queue
        }
    )  # fmt: skip


def _keyspace(client: Any, own: str) -> dict[bytes, Any]:
    return {key: client.dump(key) for key in client.scan_iter(count=1000) if not key.startswith(own.encode())}


def _commands(client: Any) -> dict[str, tuple[int, int, int]]:
    """Every command that this Redis knows, and of those with subcommands the ones below: (arity, first, last key)."""
    connection = client.connection_pool.get_connection()
    connection.send_command("COMMAND")
    entries = connection.read_response()
    client.connection_pool.release(connection)
    found = {entry[0].decode().lower(): (entry[1], entry[3], entry[4]) for entry in entries}
    for name in ("client", "script", "command"):
        del found[name]
    return found | dict.fromkeys(_SUBCOMMANDS, (-3, 0, 0)) | {"command": (-1, 0, 0)}


def test_no_key_of_another_machine_of_tenants_or_of_control_can_be_touched(
    thief: Thief, scaling: Scaling
) -> None:
    client, foreign = scaling.house.cell.redis, _foreign(scaling)
    own = scaling.house.cell.keys.machine(scaling.machine().id.hex)
    assert len(foreign) > 100 and not [key for key in foreign if key.startswith(own.prefix)]
    before = _keyspace(client, own.prefix)
    tried: list[list[Any]] = [["GET", key] for key in foreign]
    tried += [["SET", key, "mine"] for key in foreign]
    some = (scaling.house.cell.keys.request("x"), own.prefix.replace(own.machine_id, OTHER) + "desired")
    for name, (arity, first, last) in _commands(client).items():
        if name in _granted() and first > 0:
            for key in some:
                tried.append(_padded(name, arity, first, key))
                if last != first:  # its own key first, then a foreign one
                    tried.append([name, own.bell, key, *_TAILS.get(name, ())])
    tried += [["EVALSHA", script.sha, "1", key] for script in MACHINE_SCRIPTS for key in some]
    answers = thief.run(tried)
    assert {tuple(c): a for c, a in zip(tried, answers, strict=True) if a != "refused"} == {}
    assert _keyspace(client, own.prefix) == before
    assert thief.run([["SET", own.heartbeat(), "x"], ["GET", own.heartbeat()]]) == ["b'OK'", "b'x'"], (
        "its own it may"
    )


def test_no_command_beyond_the_list_runs(thief: Thief, scaling: Scaling) -> None:
    """Each on a connection of its own, since some end it; none may do anything even with the thief's own keys."""
    client = scaling.house.cell.redis
    own = scaling.house.cell.keys.machine(scaling.machine().id.hex)
    known = _commands(client)
    assert _granted() <= known.keys(), "a command that this Redis does not know"
    forbidden = sorted(known.keys() - _granted() - _ANYBODY)
    assert {"eval", "keys", "scan", "flushall", "config", "acl", "client|kill", "script|load", "debug"} <= {
        *forbidden
    }
    tried = [_padded(name, *known[name][:1], 1, own.bell) for name in forbidden]
    answers = thief.run(tried, fresh=True)
    assert {name: a for name, a in zip(forbidden, answers, strict=True) if a != "refused"} == {}


def test_no_script_reaches_what_its_caller_may_not(thief: Thief, scaling: Scaling) -> None:
    """By name the trusted side's scripts can be called, too; Redis checks every call they make against the caller."""
    cell = scaling.house.cell
    own = cell.keys.machine(scaling.machine().id.hex)
    before = _keyspace(cell.redis, own.prefix)
    tried: list[list[Any]] = []
    for script in (*TRUSTED_SCRIPTS, *MACHINE_SCRIPTS):
        for prefix in (cell.keys.prefix, cell.keys.machine(OTHER).prefix):
            for rest in (["1"] * 60, ["1000", "x", OTHER, "x", *["1"] * 56]):
                tried.append(["EVALSHA", script.sha, "0", prefix, *rest])
    answers = thief.run(tried)
    assert not [a for a in answers if SECRET in a]
    n_stopped = sum("can't access at least one of the keys" in a or a == "refused" for a in answers)
    assert n_stopped > len(answers) / 2, answers
    assert _keyspace(cell.redis, own.prefix) == before


def test_no_channel_of_others_can_be_heard_or_spoken_on(thief: Thief, scaling: Scaling) -> None:
    keys = scaling.house.cell.keys
    own, other = keys.machine(scaling.machine().id.hex), keys.machine(OTHER)
    named = [*_names(keys).values(), *_names(other).values()]
    channels = sorted({name for name in named if name != own.event_channel})
    tried: list[list[Any]] = [["PUBLISH", channel, "x"] for channel in channels]
    tried += [["SUBSCRIBE", channel] for channel in channels]
    wide = (
        "*",
        "c0:*",
        "c0:m:*",
        f"{own.prefix[:-1]}*",
        keys.event_pattern,
        f"{other.prefix}*",
        "__key*__:*",
    )
    tried += [["PSUBSCRIBE", pattern] for pattern in wide]
    answers = thief.run(tried, fresh=True)
    assert {tuple(c): a for c, a in zip(tried, answers, strict=True) if a != "refused"} == {}
    (n_listeners,) = thief.run([["PUBLISH", own.event_channel, "x"]])
    assert n_listeners.isdigit(), "its own; a watcher of another test may still be listening"


def test_the_credential_is_dead_when_its_machine_is_given_back(thief: Thief, scaling: Scaling) -> None:
    from autoscaler import launch

    assert thief.run([["PING"]]) == ["b'PONG'"]
    launch.gone(scaling.machine().id, "given back", scaling.house.cell)
    with pytest.raises(AssertionError, match=r"WRONGPASS|AuthenticationError"):
        thief.run([["PING"]])


def _granted() -> set[str]:
    return {rule.removeprefix("+") for rule in MACHINE_COMMANDS.split() if rule.startswith("+")}


def _padded(name: str, arity: int, first: int, key: str) -> list[str]:
    """The command with as many arguments as it wants at least, the key in the place of its first."""
    words = name.split("|")
    n_wanted = max(abs(arity), len(words))
    arguments = [*words, *["1"] * (n_wanted - len(words))]
    if first < len(arguments) and first >= len(words):
        arguments[first] = key
    return arguments
