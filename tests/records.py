"""Request records as tests like to read them: what was admitted and what is the same as that or 0, one field each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from workers.records import Admitted, decode_admitted


def expanded(record: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """`{}` stays that: there is no such record."""
    if b"adm" not in record:
        return dict(record)
    adm = decode_admitted(record[b"adm"])
    values: dict[str, Any] = {
        "dep": adm.deployment, "pv": adm.price_version, "in_est": adm.n_prompt_estimate,
        "out_est": adm.n_output_asked, "hold_out": adm.n_output_asked, "money": adm.money_held_nano,
        "adm_ms": adm.admitted_at_ms, "pred": adm.n_output_expected, "pfx": adm.prefixes, "note": adm.note,
        "fq": f"{adm.band},{adm.key_weight},{adm.project_weight},{adm.organization_weight}",
        "key": adm.key, "prj": adm.project, "org": adm.organization,
        "n": 0, "crashes": 0, "epoch": 0, "attempt": 0, "rid": "", "mid": "",
    }  # fmt: skip
    return {name.encode(): str(value).encode() for name, value in values.items()} | dict(record)


def changed(record: Mapping[bytes, bytes], **values: Any) -> bytes:
    """The field `adm` with other values."""
    return msgspec.msgpack.encode(msgspec.structs.replace(decode_admitted(record[b"adm"]), **values))


def packed(**values: Any) -> bytes:
    """A field `adm` without limits."""
    return msgspec.msgpack.encode(Admitted(**values))
