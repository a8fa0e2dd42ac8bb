"""Reads calls of functions out of an answer's text, as it grows: pure, and the same however the text is cut.

Called by stream.py for requests with tools, entry by entry from the first one on, also for what a client that came back
has seen: so replay, resume and another gateway give the same events. What is no call in the form of
workers/engine/tool_form.py is text. Never raises; what it holds back is bounded, or released as text.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Final, NamedTuple

import msgspec

from workers.engine.tool_form import CLOSE, OPEN

MAX_CALLS: Final = 128  # of one answer; what follows is read over
MAX_HEAD: Final = 1_024  # characters up to the arguments
LEAST_TAG: Final = 6  # characters of a tag that an answer is not expected to end with: `<tool_`
MAX_WHOLE: Final = 64 * 1024  # of a call in another order, which is read at its end

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([\w.:/-]{1,128})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.ASCII
)
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_TAG = re.compile(f"{re.escape(OPEN)}|{re.escape(CLOSE)}")


class CallPiece(NamedTuple):
    """A part of one call; the name comes with its first."""

    call: int  # from 0
    name: str | None
    arguments: str


class Said(NamedTuple):
    """What a portion of the text says, as far as it is known."""

    content: str
    calls: tuple[CallPiece, ...] = ()
    n_after: int = 0  # of the content's characters: those that came after a call
    begins: bool = False  # the content is the first, and no call came before it


NOTHING: Final = Said("")


class _In(Enum):
    TEXT = 1
    HEAD = 2  # after the opening tag, before the arguments
    ARGUMENTS = 3
    TAIL = 4  # after them
    WHOLE = 5  # a call that does not begin as they should: read when it is complete


class _Call(msgspec.Struct):
    name: str
    arguments: Any = None
    parameters: Any = None


_decode = msgspec.json.Decoder(_Call).decode


class CallReader:
    """Of one answer. `n_calls` so far; `only_one`: those after the first are read over. `has_lead`: whether it began
    with text; `after`: text that came after a call."""

    __slots__ = (
        "_after",
        "_begins",
        "_content",
        "_depth",
        "_escaped",
        "_held",
        "_in",
        "_in_string",
        "_n_after",
        "_only_one",
        "_out",
        "has_lead",
        "n_calls",
    )

    def __init__(self, *, only_one: bool = False) -> None:
        self.n_calls = 0
        self.has_lead = False
        self._after: list[str] = []
        self._n_after, self._begins = 0, False
        self._only_one = only_one
        self._in = _In.TEXT
        self._held = ""  # read, not decided
        self._depth = 0
        self._in_string = self._escaped = False
        self._content: list[str] = []
        self._out: list[CallPiece] = []

    def read(self, text: str, *, final: bool = False) -> Said:
        """What is said by now that was not before. `final`: nothing follows."""
        self._held += text
        while self._step():
            pass
        if final:
            self._finish()
        if not (self._content or self._out):
            return NOTHING
        said = Said("".join(self._content), tuple(self._out), self._n_after, self._begins)
        self._content, self._out = [], []
        self._n_after, self._begins = 0, False
        return said

    def _step(self) -> bool:
        """Decide what can be decided in this state; whether the state has changed and more may be decided."""
        match self._in:
            case _In.TEXT:
                return self._text()
            case _In.HEAD:
                return self._head()
            case _In.ARGUMENTS:
                return self._arguments()
            case _In.TAIL:
                return self._tail()
            case _In.WHOLE:
                return self._whole()

    def _text(self) -> bool:
        before, tag, after = self._held.partition(OPEN)
        if tag:
            self._say(before.rstrip())
            self._held, self._in = after, _In.HEAD
            return True
        n_out = len(before) - _n_begun(before, OPEN)
        shown = before[:n_out].rstrip()  # white space in front of a call belongs to it
        self._say(shown)
        self._held = before[len(shown) :]
        return False

    def _head(self) -> bool:
        found = _HEAD.match(self._held)
        if found is not None and found.end() <= MAX_HEAD:
            self._held, self._in = self._held[found.end() :], _In.ARGUMENTS
            self._depth, self._in_string, self._escaped = 0, False, False
            self._call(found.group(1), "")
            return True
        if len(self._held) > MAX_HEAD or CLOSE in self._held:
            self._in = _In.WHOLE
            return True
        return False

    def _arguments(self) -> bool:
        text, at = self._held, 0
        self._held = ""
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            mark = (_IN_STRING if self._in_string else _STRUCTURE).search(text, at)
            if mark is None:
                break
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
                        self._go_on(text[:at])
                        self._held, self._in = text[at:], _In.TAIL
                        return True
        self._go_on(text)
        return False

    def _tail(self) -> bool:
        found = _TAG.search(self._held)
        if found is None:
            self._held = self._held[len(self._held) - _longest_begun(self._held) :]
            return False
        self._held = self._held[found.end() :]
        self._in = _In.HEAD if found.group() == OPEN else _In.TEXT
        return True

    def _whole(self) -> bool:
        at = self._held.find(CLOSE, 0, MAX_WHOLE + len(CLOSE))
        if at >= 0:
            whole, self._held, self._in = self._held[:at], self._held[at + len(CLOSE) :], _In.TEXT
            if not self._complete(whole):
                self._say(OPEN + whole + CLOSE)
            return True
        if len(self._held) >= MAX_WHOLE + len(CLOSE):
            self._say(OPEN + self._held[:MAX_WHOLE])
            self._held, self._in = self._held[MAX_WHOLE:], _In.TEXT
            return True
        return False

    def _finish(self) -> None:
        held, self._held = self._held, ""
        if self._in is _In.TEXT:
            # Nothing, or the first characters of a call: after one any of them, before one as many as nothing else has.
            begun = held.strip()
            cut_off = OPEN.startswith(begun) and (self.n_calls or len(begun) >= LEAST_TAG)
            if not cut_off:
                self._say(held)
        elif self._in in (_In.HEAD, _In.WHOLE) and not self._complete(held) and not _is_cut_off(held):
            self._say(OPEN + held)

    def _complete(self, text: str) -> bool:
        """Take text between the tags as a call, whatever the order of its members."""
        try:
            call = _decode(text.strip())
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return False
        if not 0 < len(call.name) <= 128:
            return False
        arguments = call.parameters if call.arguments is None else call.arguments
        if isinstance(arguments, str):  # JSON within JSON
            self._call(call.name, arguments)
        else:
            self._call(call.name, "{}" if arguments is None else msgspec.json.encode(arguments).decode())
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        self._content.append(text)
        if self.n_calls:
            self._after.append(text)
            self._n_after += len(text)
        elif not self.has_lead:
            self.has_lead = self._begins = True

    def _call(self, name: str, arguments: str) -> None:
        self.n_calls += 1
        if not self._is_over:
            self._out.append(CallPiece(self.n_calls - 1, name, arguments))

    def _go_on(self, arguments: str) -> None:
        """More of the arguments of the call that was begun last."""
        if not arguments or self._is_over:
            return
        call = self.n_calls - 1
        if self._out and self._out[-1].call == call:
            begun = self._out[-1]
            self._out[-1] = begun._replace(arguments=begun.arguments + arguments)
        else:
            self._out.append(CallPiece(call, None, arguments))

    @property
    def after(self) -> str:
        return "".join(self._after)

    @property
    def n_told(self) -> int:
        """Calls that are not read over."""
        return min(self.n_calls, 1 if self._only_one else MAX_CALLS)

    @property
    def _is_over(self) -> bool:
        """Whether the call that was begun last is one too many."""
        return self.n_calls > (1 if self._only_one else MAX_CALLS)


def _is_cut_off(held: str) -> bool:
    """Whether what came after an opening tag is a call as far as it goes: then it is none of the answer's text."""
    try:
        _decode(held.strip())
    except msgspec.ValidationError:
        return False
    except (msgspec.DecodeError, RecursionError) as error:
        return "truncated" in str(error)
    return False


def whole(said: list[Said]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of each call, of a complete answer."""
    calls: list[tuple[str, list[str]]] = []
    for each in said:
        for piece in each.calls:
            if piece.name is not None:
                calls.append((piece.name, []))
            calls[-1][1].append(piece.arguments)
    return "".join(each.content for each in said), [(name, "".join(parts)) for name, parts in calls]


def _n_begun(text: str, tag: str) -> int:
    """How many of the last characters may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _longest_begun(text: str) -> int:
    return max(_n_begun(text, OPEN), _n_begun(text, CLOSE))
