"""Profiles of the toy engine, and of weights whose shape nobody told: nothing to fit, only ranges. Pure."""

from __future__ import annotations

from typing import Final

from controlplane.policy.engineprofile.types import Compiled, Override, Scalar, Value, Wish

CONTEXT: Final = 2048
SEQS: Final = 64


def compile_plain(context: int, wish: Wish, why: str) -> Compiled:
    """The engine's defaults, each with the reason that there is no better one; a wish is taken as it is."""
    values = [
        Value(
            "max_model_len", min(context, CONTEXT), f"{why}: {CONTEXT} tokens, or what the model was made for"
        ),
        Value("max_num_seqs", SEQS, f"{why}; live slot control gives fewer while the pace suffers"),
    ]
    return Compiled(tuple(_own(wish, value) for value in values))


def _own(wish: Wish, chosen: Value) -> Value:
    own: Override | None = wish.get(chosen.name)
    if own is None:
        return chosen
    inputs: dict[str, Scalar] = {"instead_of": chosen.value}
    return Value(chosen.name, own.value, own.reason or "the operator set it", inputs, overridden=True)
