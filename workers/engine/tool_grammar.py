"""From the functions that an answer may or must call to a grammar of llguidance: pure.

Called by vllm.py for answers with a CallRule that names functions. Calls are written as the model writes them by
itself, in its own form or in the house's. The arguments of each follow their schema, in the spacing that models were
trained on; what may stand around the calls depends on whether there must be any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from workers.contract import CallRule
from workers.engine.native_form import ARGS, TOOL_CALLS, Form
from workers.engine.tool_form import HEAD, OPEN, SEPARATORS, TAIL

MAX_CALLS: Final = 128  # of one answer


class _Style(NamedTuple):
    """Calls are `opening`, `before`, calls parted by `between`, `after`; a call is `call` % name, arguments, `end`."""

    opening: str
    before: str
    call: str
    end: str
    between: str
    after: str


_STYLES: Final = {
    None: _Style(OPEN, "", HEAD.removeprefix(OPEN), TAIL, "\n" + OPEN, ""),
    Form.LLAMA: _Style("", "", '{"name": "%s", "parameters": ', "}", "; ", ""),
    Form.MISTRAL_LIST: _Style(TOOL_CALLS, " [", '{"name": "%s", "arguments": ', "}", ", ", "]"),
    Form.MISTRAL_ARGS: _Style(TOOL_CALLS, "", "%s" + ARGS, "", TOOL_CALLS, ""),
}
_TAG: Final = r"<\|python_tag\|>"
_TYPE: Final = r'"type"\s*:\s*"function"\s*,\s*'
# What a call begins with, in lexemes that end where those of JSON do: an answer in JSON may begin in the same way.
_SIGNS: Final = re.compile(r'"[^"]*"|[{:,] ?')
_NO_TAGS: Final[Mapping[int, str]] = {}
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


def grammar_of(
    rule: CallRule, json_schema: str | None, form: Form | None = None, tags: Mapping[int, str] = _NO_TAGS
) -> str:
    """Lark text. `json_schema`: what an answer in words must follow, None = free text. `form`: the model's own for
    calls, None = the house's. `tags`: of those the special tokens, which a grammar calls by their numbers."""
    numbers = {tag: f"<[{token}]>" for token, tag in tags.items()}
    style = _STYLES[form]
    lines = ["%llguidance {}"]
    names = []
    for i, (name, schema, strict) in enumerate(rule.functions):
        names.append(f"call_{i}")
        head = _spelled(style.call % name, numbers)
        if json_schema is not None and not style.opening:
            head = " ".join(json.dumps(sign) for sign in _SIGNS.findall(style.call % name))
        arguments = _json(schema, _SPACED if strict else _LENIENT)
        lines.append(f"call_{i}: {head} %json {arguments} {_spelled(style.end, numbers)}")
    lines.append(f"body: {' | '.join(names)}")
    opening = _spelled(style.opening, numbers)
    rest = f"{_spelled(style.before, numbers)} body"
    if rule.many:
        rest += f" ({_spelled(style.between, numbers)} body){{0,{MAX_CALLS - 1}}}"
    rest += f" {_spelled(style.after, numbers)}"
    if rule.must:
        lines.append(f"start: {opening} {rest}")
    elif json_schema is not None:
        lines += [f"start: answer | {opening} {rest}", f"answer: %json {_json(json_schema, _COMPACT)}"]
    elif not opening:
        # Without a mark, what begins as a call of one of them is one.
        begun = "|".join(re.escape(name) for name, _, _ in rule.functions)
        lines += [
            f'TEXT: /(?s:.*)/ & ~/\\s*({_TAG}\\s*)?\\{{\\s*({_TYPE})?"name"\\s*:\\s*"({begun})"(?s:.*)/',
            f"start: TEXT | {rest}",
        ]
    else:
        # Lazy: the text in front of a call ends where the tag does.
        is_special = opening.startswith("<[")
        lines += [
            "TEXT: /(.|\\n)*/",
            f"begun: TEXT {opening}" if is_special else f"begun[lazy]: TEXT {opening}",
        ]
        if form is None:
            one = f"begun {_spelled(style.before, numbers)} body {_spelled(style.after, numbers)}"
            lines.append(f"start: ({one}){{0,{MAX_CALLS if rule.many else 1}}} TEXT")
        else:
            lines.append(f"start: TEXT | begun {rest}")
    return "\n".join(lines)


def _spelled(text: str, numbers: Mapping[str, str]) -> str:
    """Of a grammar: text as literals, special tokens as themselves."""
    if not text:
        return ""
    if not numbers:
        return json.dumps(text)
    parts = re.split("(" + "|".join(re.escape(tag) for tag in numbers) + ")", text)
    return " ".join(numbers.get(part) or json.dumps(part) for part in parts if part)


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
