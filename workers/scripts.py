"""The Lua scripts of a cell, assembled once: includes first, the Celery message template as a constant.

Trusted scripts may touch any key of the cell; those in MACHINE_SCRIPTS run as a machine's Redis user and touch
only keys under its prefix (Redis checks every call a script makes against the caller's ACL). Scripts take now_ms
from the caller, so that a test may run them on a virtual clock; only the windows of budgets go by the clock of Redis.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workers.contract import MESSAGE_TEMPLATE

_LUA = Path(__file__).parent / "lua"


@dataclass(frozen=True, slots=True)
class Script:
    """A script's source and the SHA-1 by which EVALSHA names it."""

    name: str
    source: str
    sha: str


def _message_function() -> str:
    """Lua that writes the Celery message: its parts joined, at half the cost of string.format."""
    parts = "|".join(MESSAGE_TEMPLATE.split("%s")).replace("%d", "|").split("|")
    fields = ("id", "epoch", "tag", "id", "rid", "tag")
    joined = " .. ".join(
        word
        for part, field in zip(parts, (*fields, ""), strict=True)
        for word in (f"[==[{part}]==]", field)
        if word
    )
    return f"local function message_of(id, epoch, tag, rid) return {joined} end"


_MESSAGE = _message_function()

# What most calls do without: these includes are opened by the first of a call that needs them, as the fields of
# `seldom()`. A call of a script makes every function anew that it defines: that was a tenth of a lone admission.
_SELDOM = {
    "lib_flows": ("join", "leave", "charge", "ahead_of", "within_share", "is_taken", "full"),
    "lib_queue": ("pump", "spill", "overflow_slot"),
    "lib_windows": ("examine_windows", "refused_by", "take_windows", "settle_windows"),
}


def _seldom() -> str:
    """Lua of a function that gives those functions."""
    names = [name for given in _SELDOM.values() for name in given]
    return "\n".join(
        (
            "local opened",
            "local function seldom()",
            "if opened then return opened end",
            *((_LUA / f"{include}.lua").read_text() for include in _SELDOM),
            "opened = {" + ", ".join(f"{name} = {name}" for name in names) + "}",
            "return opened",
            "end",
        )
    )


@cache
def load(name: str, *includes: str, wraps: tuple[tuple[str, str], ...] = ()) -> Script:
    """Script `lua/<name>.lua` with its includes in front; the same object on every call. The include
    `seldom` is that function.

    `wraps`: (function, script): other scripts, which it may call as functions of (ARGV, body, body_ms).
    """
    parts = [_MESSAGE] if includes else []
    parts += [
        _seldom() if include == "seldom" else (_LUA / f"{include}.lua").read_text() for include in includes
    ]
    for function, script in wraps:
        parts += [
            f"local function {function}(ARGV, body, body_ms)",
            (_LUA / f"{script}.lua").read_text(),
            "end",
        ]
    parts.append((_LUA / f"{name}.lua").read_text())
    source = "\n".join(parts)
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


_QUEUE = ("lib_record", "lib_bind", "lib_service", "lib_flows", "lib_queue")
_LIMITS = ("lib_limits", "lib_windows")
_PATH = ("lib_record", "lib_bind", "lib_service", "lib_limits", "seldom")

ADMIT = load("alone", *_PATH, wraps=(("one", "admit"),))
SETTLE = load("alone", *_PATH, wraps=(("one", "settle"),))
PASS = load("pass", *_PATH, wraps=(("settle", "settle"), ("admit", "admit")))
CHARGE = load("charge", "lib_record", "lib_service", "lib_flows")
SWEEP = load("sweep")
TOPUP = load("topup", "lib_record", *_LIMITS)
SEED = load("seed", "lib_limits")
SEED_WINDOW = load("seed_window")
TRUE_UP = load("true_up")
LATE = load("late", "lib_limits")
CANCEL = load("cancel", "lib_record", "lib_service", "lib_flows")
IDEM = load("idem")
ATTACH = load("attach", "lib_record")
CONTINUE = load("continue")
RETRACT = load("retract")
ENROL = load("enrol", *_QUEUE)
RESIZE = load("resize", *_QUEUE)
SPILL = load("spill", *_QUEUE)
WITHDRAW = load("withdraw", *_QUEUE)
SHORTEN = load("shorten")
CLAIM = load("claim")
FLUSH = load("flush")
POP = load("pop")
RELEASE = load("release")

TRUSTED_SCRIPTS = (
    *(ADMIT, SETTLE, PASS, TOPUP, CHARGE, SWEEP, SEED, SEED_WINDOW, TRUE_UP, LATE, CANCEL),
    *(SHORTEN, IDEM, ATTACH, CONTINUE, RETRACT, ENROL, RESIZE, SPILL, WITHDRAW),
)
# Machines of the version before call theirs by name, and may not load them: lua/former/ keeps each that was changed
# since, as it was, until that version is gone. So they find it in a Redis that restarts half-way through an upgrade.
FORMER = tuple(load(f"former/{path.stem}") for path in sorted((_LUA / "former").glob("*.lua")))
MACHINE_SCRIPTS = (CLAIM, FLUSH, RELEASE, POP, *FORMER)
