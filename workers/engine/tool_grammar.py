"""From the functions that an answer may or must call to a grammar of llguidance: pure.

Called by vllm.py for answers with a CallRule that names functions. The arguments of each follow its schema, in the
spacing that models were trained on; what may stand around the calls depends on whether there must be any.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from workers.contract import CallRule
from workers.engine.tool_form import CLOSE, HEAD, OPEN, SEPARATORS, TAIL

MAX_CALLS: Final = 128  # of one answer
_FAULT: Final = re.compile(r"at (\d+)\(\d+\): failed to compile JSON schema: ([^\n]*)")
_FIRST_LINE: Final = 2  # of the functions, in the grammar
_SPACED: Final = {
    "whitespace_flexible": False,
    "item_separator": SEPARATORS[0],
    "key_separator": SEPARATORS[1],
}
# Keywords that a grammar has nothing for are read over, not refused.
_LENIENT: Final = {**_SPACED, "lenient": True}
_COMPACT: Final = {"whitespace_flexible": False}


def grammar_of(rule: CallRule, json_schema: str | None, *, special: bool = False) -> str:
    """Lark text. `json_schema`: what an answer in words must follow, None = free text. `special`: the tags are special
    tokens of the model, which a grammar calls by their names."""
    opening, closing = (OPEN, CLOSE) if special else (json.dumps(OPEN), "")
    lines = ["%llguidance {}"]
    names = []
    for i, (name, schema, strict) in enumerate(rule.functions):
        head = (HEAD % name).removeprefix(OPEN)
        tail = TAIL.removesuffix(CLOSE) if special else TAIL
        names.append(f"call_{i}")
        arguments = _json(schema, _SPACED if strict else _LENIENT)
        lines.append(f"call_{i}: {json.dumps(head)} %json {arguments} {json.dumps(tail)} {closing}")
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


def fault_of(error: str, rule: CallRule) -> str:
    """What a grammar was refused for, by the function whose schema it was; without the grammar itself."""
    found = _FAULT.search(error)
    if found is None:
        return "no grammar follows the schemas of these tools"
    line, why = int(found.group(1)) - _FIRST_LINE, found.group(2)[:200]
    whose = f"the parameters of {rule.functions[line].name!r}" if line < len(rule.functions) else "the schema"
    return f"{whose}: {why}"


def _json(schema: str, form: dict[str, Any]) -> str:
    told = json.loads(schema)
    return json.dumps({**told, "x-guidance": form} if isinstance(told, dict) else told)
