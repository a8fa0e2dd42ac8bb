"""From the functions that an answer may or must call to a grammar of llguidance: pure.

Called by vllm.py for answers with a CallRule that names functions. The arguments of each follow its schema, in the
spacing that models were trained on; what may stand around the calls depends on whether there must be any.
"""

from __future__ import annotations

import json
from typing import Any, Final

from workers.contract import CallRule
from workers.engine.tool_form import CLOSE, HEAD, OPEN, SEPARATORS, TAIL

MAX_CALLS: Final = 128  # of one answer
_SPACED: Final = {
    "whitespace_flexible": False,
    "item_separator": SEPARATORS[0],
    "key_separator": SEPARATORS[1],
}
_COMPACT: Final = {"whitespace_flexible": False}


def grammar_of(rule: CallRule, json_schema: str | None, *, special: bool = False) -> str:
    """Lark text. `json_schema`: what an answer in words must follow, None = free text. `special`: the tags are special
    tokens of the model, which a grammar calls by their names."""
    opening, closing = (OPEN, CLOSE) if special else (json.dumps(OPEN), "")
    lines = ["%llguidance {}"]
    names = []
    for i, (name, schema) in enumerate(rule.functions):
        head = (HEAD % name).removeprefix(OPEN)
        tail = TAIL.removesuffix(CLOSE) if special else TAIL
        names.append(f"call_{i}")
        lines.append(
            f"call_{i}: {json.dumps(head)} %json {_json(schema, _SPACED)} {json.dumps(tail)} {closing}"
        )
    lines.append(f"body: {' | '.join(names)}")
    calls = f"{opening} body"
    if rule.many:
        calls += f' ("\\n" {opening} body){{0,{MAX_CALLS - 1}}}'
    if rule.must:
        lines.append(f"start: {calls}")
    elif json_schema is not None:
        lines += [f"start: answer | {calls}", f"answer: %json {_json(json_schema, _COMPACT)}"]
    else:
        # Lazy: the text in front of a call ends where the tag does.
        lines += [
            "TEXT: /(.|\\n)*/",
            f"begun: TEXT {opening}" if special else f"begun[lazy]: TEXT {opening}",
            f"start: (begun body){{0,{MAX_CALLS if rule.many else 1}}} TEXT",
        ]
    return "\n".join(lines)


def _json(schema: str, form: dict[str, Any]) -> str:
    told = json.loads(schema)
    return json.dumps({**told, "x-guidance": form} if isinstance(told, dict) else told)
