"""Progress lines of the stack: seconds since the start, and what just happened. Called by stack.py."""

import sys
import time
from typing import TextIO

from infra.local.supervisor import Phase

_COLOURS = {Phase.READY: "32", Phase.DONE: "32", Phase.FAILED: "31", Phase.BACKING_OFF: "33"}
_SILENT = (Phase.WAITING, Phase.STARTING)


class Progress:
    """Lines on a stream, coloured on a terminal only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._colour = self._stream.isatty()
        self._started_s = time.monotonic()

    def line(self, text: str) -> None:
        """One line with the time since the start."""
        print(f"  {time.monotonic() - self._started_s:6.1f} s  {text}", file=self._stream, flush=True)

    def change(self, name: str, phase: Phase, detail: str, elapsed_s: float) -> None:
        """A change of one process, as the supervisor reports it."""
        if phase in _SILENT:
            return
        word = str(phase).replace("-", " ")
        if self._colour and phase in _COLOURS:
            word = f"\033[{_COLOURS[phase]}m{word}\033[0m"
        aside = (
            ""
            if phase is Phase.STOPPED and not detail
            else f" ({elapsed_s:.1f} s)"
            if not detail
            else f": {detail}"
        )
        if phase in (Phase.READY, Phase.DONE):
            aside = f" ({elapsed_s:.1f} s)"
        self.line(f"{name} {word}{aside}")
