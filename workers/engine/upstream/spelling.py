"""Calls of functions as an endpoint tells them, written down as any model of ours writes them: pure.

So that the journal holds one form (workers/engine/tool_form.py), whoever answered, and an answer is read the same when
it is replayed. Used by engine.py for requests that may call functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from workers.engine.tool_form import HEAD, TAIL
from workers.engine.upstream.answer import CallPart, NotAnAnswerError

_MAX_NAME: Final = 128


class Spelling:
    """Of one answer."""

    __slots__ = ("_call", "_has_arguments", "_n_begun")

    def __init__(self) -> None:
        self._call: int | None = None  # the one that is being written
        self._has_arguments = False
        self._n_begun = 0

    def add(self, text: str, parts: Iterable[CallPart]) -> str:
        """The next portion. Raises NotAnAnswerError for parts of a call that was never begun."""
        out = [self.close(), text] if text else []
        for part in parts:
            if part.index != self._call:
                if not 0 < len(part.name) <= _MAX_NAME:
                    raise NotAnAnswerError("what came is a part of no call")
                out.append(self.close())
                out.append("\n" * bool(self._n_begun) + HEAD % json.dumps(part.name)[1:-1])
                self._call, self._has_arguments = part.index, False
                self._n_begun += 1
            out.append(part.arguments)
            self._has_arguments = self._has_arguments or bool(part.arguments.strip())
        return "".join(out)

    def close(self) -> str:
        """What is missing to the call that is being written."""
        if self._call is None:
            return ""
        self._call = None
        return TAIL if self._has_arguments else "{}" + TAIL
