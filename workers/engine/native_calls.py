"""Calls that a model writes in its family's own form, rewritten into the house's as the text grows: pure, and the same
however the text is cut.

Used by text.py for answers that may call functions, so that the journal holds one form (tool_form.py) whoever answered,
and its reader need not know models. What is held back depends on the text alone: an attempt that goes on elsewhere
reads the earlier tokens again and arrives where the one before had been. What is no call passes as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum
from typing import Any, Final

import msgspec

from workers.contract import CallRule
from workers.engine.native_form import ARGS, CALL_ID, PYTHON_TAG, TOOL_CALLS, Form
from workers.engine.tool_form import HEAD, TAIL, written

MAX_HEAD: Final = 1_024  # characters up to the arguments
MAX_WHOLE: Final = 64 * 1024  # of a call in another order, which is read at its end
_LEAST_MARK: Final = 6  # characters of a mark at the end of an answer that nothing else begins with: `[TOOL_`

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
# Steps of a head, each a pattern that never gives back what it took: what follows it begins otherwise.
_SPACE: Final = r"\s*+"
_NAME: Final = r'[^"\\\x00-\x1f]{1,128}+'
_FUNCTION: Final = r"[\w.:/-]{1,128}+"


def _chars(text: str) -> list[str]:
    return [re.escape(char) for char in text]


def _key(name: str) -> list[str]:
    return [*_chars(f'"{name}"'), _SPACE, ":", _SPACE]


def _begun(*heads: list[str]) -> re.Pattern[str]:
    """Fits every beginning of these heads."""
    found = []
    for steps in heads:
        pattern = ""
        for step in reversed(steps):
            pattern = f"(?:{step}{pattern})?"
        found.append(pattern)
    return re.compile("|".join(found))


def _heads(*rests: list[str]) -> list[list[str]]:
    return [
        ["{", _SPACE, *lead, *_key("name"), '"', _NAME, '"', _SPACE, *rest]
        for lead in ([], [*_key("type"), *_chars('"function"'), _SPACE, ",", _SPACE])
        for rest in rests
    ]


_KEYS: Final = ("parameters", "arguments")
_NULLS: Final = [[",", _SPACE, *_key(key), *_chars("null"), _SPACE, r"\}"] for key in _KEYS]
_OBJECTS: Final = [[",", _SPACE, *_key(key), r"\{"] for key in _KEYS]
_TYPE: Final = rf'(?:"type"{_SPACE}:{_SPACE}"function"{_SPACE},{_SPACE})?'
_TO_NAME: Final = rf'\{{{_SPACE}{_TYPE}"name"{_SPACE}:{_SPACE}"'
_NAMED: Final = rf'{_TO_NAME}(?P<name>{_NAME})"{_SPACE}'
_TO_ARGUMENTS: Final = (
    rf',{_SPACE}"(?:parameters|arguments)"{_SPACE}:{_SPACE}(?:(?=\{{)|(?P<null>null{_SPACE}\}}))'
)
# Llama's, which nothing marks: without a word of arguments it is an object like any other.
_TO_LLAMA: Final = rf"{_SPACE};?{_SPACE}(?:{re.escape(PYTHON_TAG)})?{_SPACE}"
_LLAMA_TAG = re.compile(rf"\A({_SPACE};?{_SPACE}){re.escape(PYTHON_TAG)}")
_LLAMA_HEAD = re.compile(_TO_LLAMA + _NAMED + _TO_ARGUMENTS)
_LLAMA_NAME = re.compile(rf'{_TO_LLAMA}{_TO_NAME}(?P<name>[^"]*+)(?P<quote>"?)')
_LLAMA_BEGUN = _begun(
    *(
        [_SPACE, ";?", _SPACE, *tag, _SPACE, *head]
        for tag in ([], _chars(PYTHON_TAG))
        for head in _heads(*_NULLS, *_OBJECTS)
    )
)
_ITEM_HEAD = re.compile(rf"{_SPACE}{_NAMED}(?:(?P<none>\}})|{_TO_ARGUMENTS})")
_ITEM_BEGUN = _begun(*([_SPACE, *head] for head in _heads([r"\}"], *_NULLS, *_OBJECTS)))
_ARGS_HEAD = re.compile(
    rf"{_SPACE}(?P<name>{_FUNCTION}){_SPACE}(?:{re.escape(CALL_ID)}{_SPACE}[\w-]{{1,64}}+{_SPACE})?"
    rf"(?:{re.escape(ARGS)})?{_SPACE}(?=\{{)"
)
_ARGS_BEGUN = _begun(
    *(
        [_SPACE, _FUNCTION, _SPACE, *call_id, *args, _SPACE]
        for call_id in ([], [*_chars(CALL_ID), _SPACE, r"[\w-]{1,64}+", _SPACE])
        for args in ([], _chars(ARGS))
    )
)


class _In(Enum):
    TEXT = 1  # of Mistral's: up to a mark
    LLAMA = 2  # at the beginning, or after a call: up to the arguments
    MARK = 3  # after a mark: a list, one object, or a name
    ITEM = 4  # of a list
    NAME = 5  # and what may stand between it and the arguments
    WHOLE = 6  # an item that does not begin as it should: read when it is complete
    ARGUMENTS = 7
    REST = 8  # of the object that the arguments are in
    NEXT = 9  # of a list: a comma or its end
    DONE = 10  # of Llama's: no call can follow


class _Call(msgspec.Struct):
    name: str
    arguments: Any = None
    parameters: Any = None


class _Function(msgspec.Struct, frozen=True):
    name: str = ""


class _Tool(msgspec.Struct, frozen=True):
    function: _Function = _Function()


class _Body(msgspec.Struct):
    tools: list[_Tool] | None = None


_decode = msgspec.json.Decoder(_Call).decode
_body = msgspec.json.Decoder(_Body).decode


class _JsonEnd:
    """Finds the end of an object that is open already."""

    __slots__ = ("_depth", "_escaped", "_in_string")

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """Where in this portion it ends; -1: not in it."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            mark = (_IN_STRING if self._in_string else _STRUCTURE).search(text, at)
            if mark is None:
                return -1
            at = mark.end()
            match mark.group():
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = True
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return at
        return -1


class NativeCalls:
    """Of one answer. `names`: the request's functions; Llama's form is a call only where it names one of them, since
    it has no mark. `is_marked`: the model has tokens of its own for marks, which are no text then."""

    __slots__ = (
        "_end",
        "_held",
        "_in",
        "_in_object",
        "_is_list",
        "_is_llama",
        "_is_marked",
        "_n_calls",
        "_n_seen",
        "_names",
        "_out",
        "_raw",
    )

    def __init__(self, form: Form, names: Collection[str], *, is_marked: bool) -> None:
        self._names = frozenset(names)
        self._is_marked = is_marked
        self._is_llama = form is Form.LLAMA
        self._in = _In.LLAMA if self._is_llama else _In.TEXT
        self._held = ""  # read, not decided
        self._raw = ""  # a mark and what belongs to it: text, should no call follow
        self._end = _JsonEnd()
        self._n_seen = 0  # characters of what is held that it has looked at
        self._in_object = self._is_list = False
        self._n_calls = 0
        self._out: list[str] = []

    def read(self, text: str, *, final: bool = False) -> str:
        """The text that is decided by now, in the house's form. `final`: nothing follows."""
        self._held += text
        while self._step():
            pass
        if final:
            self._finish()
        out = "".join(self._out)
        self._out.clear()
        return out

    def _step(self) -> bool:
        """Decide what can be decided in this state; whether the state has changed and more may be decided."""
        match self._in:
            case _In.TEXT:
                return self._text()
            case _In.LLAMA:
                return self._llama()
            case _In.MARK:
                return self._mark()
            case _In.ITEM:
                return self._item()
            case _In.NAME:
                return self._function()
            case _In.WHOLE:
                return self._whole()
            case _In.ARGUMENTS:
                return self._arguments()
            case _In.REST:
                return self._rest()
            case _In.NEXT:
                return self._next()
            case _In.DONE:
                self._out.append(self._held)
                self._held = ""
                return False

    # -- up to the arguments

    def _llama(self) -> bool:
        found = _LLAMA_HEAD.match(self._held)
        if found is not None and found.end() <= MAX_HEAD and found["name"] in self._names:
            return self._begin(found)
        if self._may_be_llamas():
            return False
        if self._is_marked:  # the mark of something else
            self._held = _LLAMA_TAG.sub(r"\1", self._held)
        return self._go(_In.DONE)

    def _may_be_llamas(self) -> bool:
        """Whether a call that names a function of the request may still come of what is held."""
        if len(self._held) > MAX_HEAD or not _LLAMA_BEGUN.fullmatch(self._held):
            return False
        named = _LLAMA_NAME.match(self._held)
        if named is None:
            return True
        name = named["name"]
        return name in self._names if named["quote"] else any(n.startswith(name) for n in self._names)

    def _text(self) -> bool:
        before, mark, after = self._held.partition(TOOL_CALLS)
        n_out = len(before) if mark else len(before) - _n_begun(before)
        self._out.append(before[:n_out])
        if not mark:
            self._held = before[n_out:]
            return False
        self._held, self._raw = after, "" if self._is_marked else TOOL_CALLS
        return self._go(_In.MARK)

    def _mark(self) -> bool:
        held = self._held.lstrip()
        if len(self._held) - len(held) > MAX_HEAD:
            return self._no_call()
        if not held:
            return False
        self._is_list = held[0] == "["
        if self._is_list:
            n = len(self._held) - len(held) + 1
            self._raw += self._held[:n]
            self._held = self._held[n:]
        return self._go(_In.ITEM if self._is_list or held[0] == "{" else _In.NAME)

    def _item(self) -> bool:
        found = _ITEM_HEAD.match(self._held)
        if found is not None and found.end() <= MAX_HEAD:
            return self._begin(found)
        if len(self._held) <= MAX_HEAD and _ITEM_BEGUN.fullmatch(self._held):
            return False
        held = self._held.lstrip()
        if not held.startswith("{") or len(self._held) - len(held) > MAX_HEAD:
            return self._no_call()
        self._end, self._n_seen = _JsonEnd(), 0
        return self._go(_In.WHOLE)

    def _function(self) -> bool:
        found = _ARGS_HEAD.match(self._held)
        if found is not None and found.end() <= MAX_HEAD:
            return self._begin(found)
        if len(self._held) <= MAX_HEAD and _ARGS_BEGUN.fullmatch(self._held):
            return False
        return self._no_call()

    def _no_call(self) -> bool:
        """What the mark seemed to begin is text."""
        self._out.append(self._raw)
        return self._go(_In.TEXT)

    # -- a call

    def _begin(self, head: re.Match[str]) -> bool:
        found = head.groupdict()
        self._held = self._held[head.end() :]
        name = json.dumps(head["name"])[1:-1]
        if found.get("none") or found.get("null"):
            self._call(written(name, "{}"))
            return self._after_call()
        self._call(HEAD % name)
        self._end, self._in_object = _JsonEnd(), "null" in found
        return self._go(_In.ARGUMENTS)

    def _call(self, text: str) -> None:
        self._out.append("\n" * bool(self._n_calls) + text)
        self._n_calls += 1

    def _arguments(self) -> bool:
        held, self._held = self._held, ""
        at = self._end.find(held)
        if at < 0:
            self._out.append(held)
            return False
        self._out.append(held[:at] + TAIL)
        self._held = held[at:]
        if not self._in_object:
            return self._after_call()
        self._end = _JsonEnd(depth=1)
        return self._go(_In.REST)

    def _rest(self) -> bool:
        at = self._end.find(self._held)
        self._held = self._held[at:] if at >= 0 else ""
        return at >= 0 and self._after_call()

    def _whole(self) -> bool:
        at = self._end.find(self._held[self._n_seen :])
        n = self._n_seen + at if at >= 0 else 0
        self._n_seen = len(self._held)
        if n > MAX_WHOLE or (not n and len(self._held) > MAX_WHOLE):
            return self._no_call()
        if not n:
            return False
        call = _whole_call(self._held[:n])
        if call is None:
            return self._no_call()
        self._held = self._held[n:]
        self._call(call)
        return self._after_call()

    def _after_call(self) -> bool:
        self._raw = ""
        if self._is_llama:
            return self._go(_In.LLAMA)
        return self._go(_In.NEXT if self._is_list else _In.TEXT)

    def _next(self) -> bool:
        held = self._held.lstrip()
        is_far = len(self._held) - len(held) > MAX_HEAD
        if not held and not is_far:
            return False
        if is_far or held[0] not in ",]":
            return self._go(_In.TEXT)
        self._held = held[1:]
        return self._go(_In.ITEM if held[0] == "," else _In.TEXT)

    def _go(self, state: _In) -> bool:
        self._in = state
        return True

    # -- the end

    def _finish(self) -> None:
        """What was begun of a call, and cut off, is no text; what only might have become one is."""
        held, self._held = self._held, ""
        if self._in is _In.TEXT:
            is_text = self._is_marked or len(held) < _LEAST_MARK
        elif self._in is _In.LLAMA:
            named = _LLAMA_NAME.match(held)
            is_text = not (
                self._n_calls
                or held.lstrip().startswith(PYTHON_TAG if self._is_marked else PYTHON_TAG[:_LEAST_MARK])
                or (named is not None and named["quote"])
            )
        else:
            is_text = False
        if is_text:
            self._out.append(held)


def names_of(body: bytes, rule: CallRule) -> frozenset[str]:
    """Of the functions that a request's body offers."""
    names = {function.name for function in rule.functions}
    if body:
        names |= {tool.function.name for tool in _body(body).tools or ()}
    return frozenset(names)


def _whole_call(text: str) -> str | None:
    """A call from a complete object, whatever the order of its members."""
    try:
        call = _decode(text.strip())
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not 0 < len(call.name) <= 128:
        return None
    arguments = call.parameters if call.arguments is None else call.arguments
    if not isinstance(arguments, str):  # else JSON within JSON
        arguments = "{}" if arguments is None else msgspec.json.encode(arguments).decode()
    return written(json.dumps(call.name)[1:-1], arguments)


def _n_begun(text: str) -> int:
    """How many of the last characters may be the beginning of a mark."""
    return next(
        (n for n in range(min(len(TOOL_CALLS) - 1, len(text)), 0, -1) if text.endswith(TOOL_CALLS[:n])), 0
    )
