"""What a request was admitted with, as the admission script keeps it in the request record (`adm`).

A later version adds places at the end, with defaults; it never moves or removes one: so versions next to each other
read each other's records. (The version before packed records wrote a field each: `from_fields`, and lib_record.lua.)
Read by billing intake; written by lua/admit.lua, whose fellows read it through lua/lib_record.lua. Never written from
Python, except by tests. Holds no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

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
    # Of an end customer that is limited: its scope, input_tpm, output_tpm, budget.
    end_customer: tuple[str, int, int, int] | None = None


_decoder = msgspec.msgpack.Decoder(Admitted)


def decode_admitted(payload: bytes) -> Admitted:
    """Of what the script packed; raises msgspec.DecodeError on anything else."""
    return _decoder.decode(payload)


# What intake needs of a record that was written a field each.
OLD_FIELDS: Final = ("dep", "pv", "in_est", "out_est", "money", "adm_ms", "key", "prj", "org")


def from_fields(values: Sequence[bytes | None]) -> Admitted | None:
    """Of the values of OLD_FIELDS; None where one is missing. Without what only the scripts read."""
    if any(value is None for value in values):
        return None
    deployment, price, n_prompt, n_output, money, admitted_ms, *ids = [
        str(v, "ascii") for v in values if v is not None
    ]
    key, project, organization = ids
    return Admitted(
        deployment=deployment,
        price_version=price,
        n_prompt_estimate=int(n_prompt),
        n_output_asked=int(n_output),
        money_held_nano=int(float(money)),
        admitted_at_ms=int(admitted_ms),
        band="0",
        n_output_expected=0,
        prefixes="",
        note="",
        key=key,
        project=project,
        organization=organization,
    )
