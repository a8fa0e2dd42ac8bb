"""Keys and tokens by the thousand for the benchmarks that present them: rows like one that is there, by SQL, with
digests under the stack's own pepper. Only for private stacks.
"""

from __future__ import annotations

import json
from typing import Any

import psycopg

from benchmarks.stack import BenchStack
from controlplane import ids
from controlplane.tenants import api_keys
from infra.local.environment import SAVED
from infra.local.privatefile import read_json


def pepper_of(stack: BenchStack) -> bytes:
    saved = read_json(stack.var / SAVED) or {}
    return bytes.fromhex(str(saved["CORRAL_KEY_PEPPER"]))


def copies(stack: BenchStack, table: str, like: str, kind: str, n: int) -> list[str]:
    """Plaintexts of `n` new rows of a table of keys or tokens that are like the one with this id."""
    pepper = pepper_of(stack)
    new = [api_keys.generate(pepper, kind) for _ in range(n)]
    changes = [
        json.dumps(
            {"id": str(ids.new_id()), "lookup": k.lookup, "digest": f"\\x{k.digest.hex()}", "last4": k.last4}
        )
        for k in new
    ]
    statement = (
        f"INSERT INTO {table} SELECT (jsonb_populate_record(t, changed.row)).* "  # noqa: S608 - two names of ours
        f"FROM {table} t, unnest(%s::jsonb[]) AS changed(row) WHERE t.id = %s"
    )
    with psycopg.connect(stack.dsn("owner"), connect_timeout=5) as owner:
        made = owner.execute(statement, (changes, like)).rowcount
    if made != n:
        raise RuntimeError(f"{table} took {made} of {n} rows")
    return [k.plaintext for k in new]


def new_key(stack: BenchStack, name: str) -> tuple[str, str]:
    """(id in the database, plaintext) of a key of the demo project."""
    made: dict[str, Any] = stack.manage_json("create_key", name)
    return str(ids.from_text(ids.Prefix.API_KEY, made["id"])), str(made["api_key"])
