"""Two neighbouring versions read each other: what the one before wrote is read here, and it reads what is written here.

The version before is a recording (wire.py), so that this needs no history. The drill `rolling-upgrade` runs the real
one.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.workers import wire
from workers import contract, scripts

BEFORE = wire.recorded()
KINDS = wire.travelling()
STRUCTS = sorted(BEFORE["examples"])
THEIRS = wire.made_again(BEFORE["shapes"])


def _builtins(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


@pytest.mark.parametrize("name", STRUCTS)
def test_what_the_version_before_wrote_is_read_as_it_meant_it(name: str) -> None:
    assert name in KINDS, f"{name} is gone, and the version before still writes it"
    for example in BEFORE["examples"][name]:
        theirs = _builtins(msgspec.json.decode(example["json"], type=THEIRS[name]))
        for ours in (
            msgspec.msgpack.decode(bytes.fromhex(example["msgpack"]), type=KINDS[name]),
            msgspec.json.decode(example["json"], type=KINDS[name]),
        ):
            assert _same(_builtins(ours), theirs), f"{name}: {example['json']}"


@pytest.mark.parametrize("name", STRUCTS)
@pytest.mark.parametrize("full", [False, True])
def test_what_is_written_here_is_read_by_the_version_before(name: str, full: bool) -> None:
    ours = wire.sample(KINDS[name], full=full)
    for theirs in (
        msgspec.msgpack.decode(msgspec.msgpack.encode(ours), type=THEIRS[name]),
        msgspec.json.decode(msgspec.json.encode(ours), type=THEIRS[name]),
    ):
        assert _same(_builtins(ours), _builtins(theirs)), name


def _same(newer: Any, older: Any) -> bool:
    """Whatever the older one knows is the same; fields, and places at the end, may have been added."""
    if isinstance(newer, dict) and isinstance(older, dict):
        shared = newer.keys() & older.keys()
        return all(_same(newer[key], older[key]) for key in shared)
    if isinstance(newer, list) and isinstance(older, list):
        return all(_same(a, b) for a, b in zip(newer, older, strict=False))
    return bool(newer == older)


@pytest.mark.parametrize("name", sorted(n for n, shape in BEFORE["shapes"].items() if "members" in shape))
def test_no_word_is_written_that_the_version_before_cannot_read(name: str) -> None:
    before, now = dict(BEFORE["shapes"][name]["members"]), {m.name: m.value for m in KINDS[name]}
    assert before.items() <= now.items(), f"{name}: the version before writes {set(before) - set(now)}"
    assert now.items() <= before.items(), (
        f"{name}: the version before refuses {set(now) - set(before)}: let one version read it before one writes it"
    )


def test_the_message_of_an_attempt_is_the_same_to_the_byte() -> None:
    assert contract.celery_message("a1" * 16, 3, "b2" * 16).decode() == BEFORE["message"]


def test_scripts_that_machines_of_the_version_before_call_are_still_loaded() -> None:
    loaded = {script.sha for script in scripts.MACHINE_SCRIPTS}
    for name, sha in BEFORE["machine_scripts"].items():
        assert sha in loaded, (
            f"{name}.lua was changed: keep it as it was in workers/lua/former/{name}.lua until that version is gone"
        )


def test_a_shape_that_was_changed_is_noticed() -> None:
    """The recording must be able to fail: a place moved, a default taken away, a type changed."""
    shapes = {
        "Slo": {"array_like": True, "fields": [
            {"name": "ttft_ms", "type": "int"}, {"name": "name", "type": "str"}]},
        "Heartbeat": {"array_like": False, "fields": [{"name": "since", "type": "int"}]},
    }  # fmt: skip
    for name, made in wire.made_again(shapes).items():
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(wire.sample(KINDS[name], full=True)), type=made)
