"""What a request was admitted with, as the admission script keeps it in the request record (`adm`).

Read by billing intake; written by lua/admit.lua, whose fellows read it through lua/lib_record.lua. Never written from
Python, except by tests. Holds no I/O.
"""

from __future__ import annotations

import msgspec


class Admitted(msgspec.Struct, frozen=True, array_like=True):
    """Places as in lua/lib_record.lua. Money in nano-dollars; -1 = no limit; ids are bare hex."""

    deployment: str
    price_version: str
    n_prompt_estimate: int
    n_output_asked: int
    money_held_nano: int
    admitted_at_ms: int
    band: str
    n_output_expected: int
    prefixes: str
    note: str
    key: str
    project: str
    organization: str
    key_weight: int = 100
    project_weight: int = 100
    organization_weight: int = 100
    key_input_tpm: int = -1
    key_output_tpm: int = -1
    key_budget_nano: int = -1
    project_input_tpm: int = -1
    project_output_tpm: int = -1
    project_budget_nano: int = -1
    organization_input_tpm: int = -1
    organization_output_tpm: int = -1
    organization_budget_nano: int = -1
    slot_ms: int = 0
    # Window budgets: id, level, limit, width of a bucket, number of buckets, window it began in (ms).
    windows: tuple[tuple[str, int, int, int, int, int], ...] = ()


_decoder = msgspec.msgpack.Decoder(Admitted)


def decode_admitted(payload: bytes) -> Admitted:
    """Of what the script packed; raises msgspec.DecodeError on anything else."""
    return _decoder.decode(payload)
