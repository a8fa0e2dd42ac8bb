"""One request as this gateway holds it: what has arrived of its answer, and who waits for more.

Made by the generation handler, fed by the inbox, read by the handler. Holds no I/O. Text that waits for the
client is bounded: beyond the bound the stream is paused, and what it missed is read from the journal once it
drained.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final, NamedTuple

from controlplane.gateway.errors import ApiError, ClientGone, Headers
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.logprobs import tokens_of
from controlplane.gateway.surface import Surface, Translated
from controlplane.gateway.toolcalls import NOTHING, CallReader, Said
from controlplane.policy.admission import Hold
from controlplane.policy.coming import NONE
from controlplane.policy.outlook import Terms
from controlplane.policy.routing import Placed
from controlplane.prediction.lengths.model import Lengths
from workers.contract import End, Stage

MIN_BUFFER: Final = 8  # entries
MAX_NAMED: Final = 21  # tokens that a well-formed entry names the probabilities of
MAX_HELD_BACK: Final = 256  # entries kept aside while the journal is being read


class Piece:
    """Text to show, the token offset after it (with a tail where the text came without a token), and what is known of
    its tokens' probabilities (as on the wire)."""

    __slots__ = ("logprobs", "offset", "text")

    def __init__(self, offset: int | str, text: str, logprobs: list[object] | None) -> None:
        self.offset = offset
        self.text = text
        self.logprobs = logprobs


class CallsPiece(Piece):
    """The same of a request with tools: beside the text what it says, of which nothing may be known yet."""

    __slots__ = ("said",)

    def __init__(self, offset: int | str, text: str, logprobs: list[object] | None, said: Said) -> None:
        super().__init__(offset, text, logprobs)
        self.said = said


class Resumed(enum.Enum):
    """How a client that came back gets the rest."""

    ATTACHED = "attached"  # it still ran
    REPLAYED = "replayed"  # it had ended: from the journal
    CONTINUED = "continued"  # it had been cancelled: a new request goes on with it


class Origin(NamedTuple):
    """The request of a client that came back, as the client knows it."""

    request: str
    created_ms: int
    how: Resumed
    # What the client has seen: tokens, and events after them (identity.py). -1 = nothing, all is sent again.
    n_seen: int = -1
    n_tail: int = 0
    # Of a request that continues another: tokens in its journal from before, and prompt tokens charged then.
    n_carried: int = 0
    n_carried_prompt: int = 0


class HeldBack(NamedTuple):
    """A frame's entry kept aside, and the machine it came from."""

    machine: str
    offset: int
    n: int
    text: str
    end: End | None
    logprobs: list[object] | None


class Stream:
    """State of one request. Times are monotonic seconds unless named `_ms` (wall clock)."""

    __slots__ = (
        "_buffer",
        "_weighed",
        "abandoned",
        "admitted",
        "admitted_at",
        "admitted_at_ms",
        "ahead_ms",
        "ask_after",
        "calls",
        "catching_up",
        "coming",
        "comment_due",
        "counted",
        "deadline",
        "deployment",
        "end",
        "endpoint",
        "expected",
        "failure",
        "first_at",
        "have",
        "heard_at",
        "held_back",
        "hold",
        "idempotency",
        "is_greedy",
        "is_roomy",
        "keep",
        "key",
        "last_at",
        "limits",
        "live_machine",
        "machine",
        "n_chars_seen",
        "n_entries",
        "n_seen",
        "note",
        "number",
        "origin",
        "overflowed",
        "paused",
        "pieces",
        "placed",
        "predicted",
        "queued",
        "raw_estimate",
        "replica",
        "request",
        "resolve_after",
        "settled",
        "slots",
        "stage",
        "streaming",
        "terms",
        "total_s",
        "waited_for_replica",
        "waiter",
        "wrote_at",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        request: str,
        endpoint: Surface,
        key: KeyContext,
        deployment: Deployment,
        hold: Hold,
        *,
        streaming: bool,
        raw_estimate: int,
        expected: int,
        now: float,
        now_ms: int,
        timeout_s: float,
        buffer: int,
        origin: Origin | None = None,
    ) -> None:
        self.number = number
        self.request = request
        self.endpoint = endpoint
        self.key = key
        self.deployment = deployment
        self.hold = hold
        self.raw_estimate = raw_estimate
        self.streaming = streaming
        self.admitted_at = now
        self.admitted_at_ms = now_ms
        self.deadline = now + timeout_s
        # Output tokens charged in the fair queue so far: at first what is expected of it.
        self.expected = self.counted = expected
        # Output tokens as the length model sees them: none where no model was asked.
        self.predicted: Lengths | None = None

        # What was predicted of it: the terms of its admission, over so many slots, and those that were being started;
        # slot time (ms) before it in the queue, and seconds to its first word, uncorrected, where it had to wait.
        self.terms: Terms | None = None
        self.slots = 0
        self.coming = NONE
        self.ahead_ms = 0
        self.total_s = 0.0

        # The way back to it: what its record keeps for that, and whose call this is.
        self.note = ""
        self.idempotency = ""  # digest of its key
        self.keep = False  # a client that leaves may come back for it: it runs on
        self.origin = origin
        # Tokens of it that need not be told again. Events of a response repeat what came before them: all is read.
        self.n_seen = -1 if origin is None or endpoint is Translated.RESPONSES else origin.n_seen
        self.n_chars_seen = 0  # of completion text, where token probabilities are asked for

        # Where it runs. Frames are taken from `live_machine` only: None while that is being found out, while
        # the journal is being read, and while paused.
        self.machine: str | None = None
        self.live_machine: str | None = None
        self.replica = ""
        self.placed: Placed | None = None  # what routing is told of its first token
        self.admitted = False
        self.is_roomy = False  # where it is, nobody would take its slot or hold at once (batches.py)
        self.is_greedy = False  # made anew, its tokens would be the same

        self.limits: Headers = ()  # rate-limit headers of its answer

        # What has arrived: `have` tokens in `n_entries` journal entries; `pieces` of it not yet taken.
        self.have = 0
        self.n_entries = 0
        self.pieces: list[Piece] = []
        self.calls: CallReader | None = None  # reads them where the answer may call functions
        self.end: End | None = None
        self.failure: ApiError | ClientGone | None = None
        self.first_at: float | None = None
        self.last_at = now
        self.heard_at = now
        self._buffer = buffer
        self._weighed = False  # whether the bound knows of probabilities

        # Reading the journal.
        self.catching_up = False
        self.paused = False
        self.overflowed = False  # more was held back than fits: the journal must be read once more
        self.held_back: list[HeldBack] = []
        self.resolve_after = 0.0
        self.ask_after = 0.0

        # Waiting and the client.
        self.waiter: asyncio.Future[None] | None = None
        self.stage: Stage | None = None
        self.queued = False  # nothing was free at admission
        self.waited_for_replica = False  # nothing was even there
        self.comment_due = False
        self.wrote_at = now
        self.abandoned = False  # nobody reads it any more; kept to settle it when its end arrives
        self.settled = False

    @property
    def over(self) -> bool:
        """Nothing more will arrive."""
        return self.end is not None or self.failure is not None

    @property
    def is_count(self) -> bool:
        """Its prompt is counted, and nothing is generated or charged."""
        return not self.hold.n_output

    @property
    def n_new(self) -> int:
        """Tokens that have arrived of this request's own."""
        return self.have if self.origin is None else self.have - self.origin.n_carried

    @property
    def shown(self) -> str:
        """The request id that its client knows."""
        return self.request if self.origin is None else self.origin.request

    @property
    def created_ms(self) -> int:
        return self.admitted_at_ms if self.origin is None else self.origin.created_ms

    def accept(self, n: int, text: str, end: End | None, now: float, logprobs: list[object] | None) -> None:
        """Take the entry at offset `have`."""
        self.have += n
        self.n_entries += 1
        self.heard_at = now
        if self.first_at is None and n:
            self.first_at = now
            if self.placed is not None:
                self.placed.is_waiting = False
        if n:
            self.last_at = now
        if end is not None:
            self.end = end
        if self.abandoned:
            return
        # What was seen is read for calls, too: what follows hangs on it.
        said = NOTHING if self.calls is None else self.calls.read(text, final=end is not None)
        if text or logprobs or said is not NOTHING:
            if self.have <= self.n_seen and self._was_seen(n, logprobs):
                return
            if logprobs and not self._weighed:
                self._weigh(logprobs)
            offset = self.have if n else f"{self.have}.1"
            self.pieces.append(
                Piece(offset, text, logprobs)
                if self.calls is None
                else CallsPiece(offset, text, logprobs, said)
            )
        if self.streaming:
            if len(self.pieces) >= self._buffer and self.end is None:
                self.paused = True
                self.live_machine = None
            self.wake()
        elif self.end is not None:
            self.wake()

    def _weigh(self, logprobs: list[object]) -> None:
        """An entry with probabilities takes as much memory as one without for each that it names."""
        self._weighed = True
        n_named = max((1 + len(others) for _, _, others in tokens_of(logprobs)), default=MAX_NAMED)
        self._buffer = max(MIN_BUFFER, self._buffer // (1 + n_named))

    def _was_seen(self, n: int, logprobs: list[object] | None) -> bool:
        """Of the entry that `have` ends with, which is none after what was seen."""
        assert self.origin is not None
        if not n and self.have == self.n_seen and not self.origin.n_tail:
            return False
        self.n_chars_seen += sum(len(text) for text, _, _ in tokens_of(logprobs))
        if self.end is not None:
            self.wake()
        return True

    def take(self) -> list[Piece]:
        """What has arrived since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces

    def fail(self, error: ApiError | ClientGone) -> None:
        """End it from this side; the first reason stands, and an end that arrived stands before it."""
        if not self.over:
            self.failure = error
            self.wake()

    def nudge(self) -> None:
        """Ask the handler to write a comment, so that the client knows and the connection stays."""
        if self.streaming and not self.over:
            self.comment_due = True
            self.wake()

    def wake(self) -> None:
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def wait(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Resolves when there is something to do: pieces (streaming only), end, failure or a comment."""
        self.waiter = loop.create_future()
        return self.waiter
