"""From token ids to the text a client may see: incremental decoding and stop strings, exact across attempts.

Both engines use it. Text may be held back (half of a UTF-8 character, the possible start of a stop string);
what is held back depends on the token ids alone, so a resumed attempt that replays the prior ids arrives at
exactly the text already emitted and continues from there. That is why the engines' own stop handling is not
used: it starts from nothing on every attempt.
"""

from __future__ import annotations


class StopMatcher:
    """Cuts a growing text at the first stop string and holds back what might become one."""

    __slots__ = ("_hold", "_n_emitted", "_stops", "_text", "stopped")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._hold = max((len(s) for s in self._stops), default=1) - 1
        self._text = ""  # only the tail that can still matter
        self._n_emitted = 0  # characters of _text already given out
        self.stopped = False

    def push(self, piece: str, final: bool = False) -> str:
        """The text that may be emitted now that `piece` has arrived. After a match `stopped` is True and the
        text ends before the stop string. `final`: nothing follows, release everything."""
        if not self._stops:
            return piece
        search_from = max(0, len(self._text) - self._hold)
        self._text += piece
        cuts = [at for s in self._stops if (at := self._text.find(s, search_from)) >= 0]
        if cuts:
            self.stopped = True
            until = min(cuts)
        elif final:
            until = len(self._text)
        else:
            until = max(self._n_emitted, len(self._text) - self._hold)
        out = self._text[self._n_emitted : until]
        keep_from = max(0, until - self._hold)
        self._text = self._text[keep_from:]
        self._n_emitted = until - keep_from
        return out
