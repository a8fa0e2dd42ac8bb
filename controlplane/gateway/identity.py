"""What makes two calls one generation: event ids, idempotency keys, the digest of a body, and the note of them that
a request's record keeps.

Called by the app, the dispatcher and the resumer. Pure but for the secret that salts digests: equal in every gateway
process, so that any of them can compare, and unknown to whoever reads Redis, so that nobody can guess a short prompt.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from typing import Final, NamedTuple, Self

from controlplane.gateway.bodies import ChatBody
from controlplane.gateway.errors import bad_request
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.surface import SURFACES, Surface, Translated
from controlplane.gateway.tools import READ, READ_ONE, letter_of
from controlplane.tenants.end_customers import pseudonym
from workers.contract import Endpoint

MAX_KEY_BYTES: Final = 255
# Parts of the event id after the tokens so far, for what comes without a token.
TAIL_TEXT: Final = 1  # text held back until the end
TAIL_FINISH: Final = 2
TAIL_USAGE: Final = 3

ALL_CHARGED: Final = 2**31 - 1  # prompt tokens, more than any context has: of a prompt that is only counted

_EVENT_ID = re.compile(rb"([0-9a-f]{32})\.(\d{1,9})(?:\.([123]))?\Z")
_REQUEST_ID = re.compile(r"req_([0-9a-f]{32})\Z")
_KEY = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")
_HEX_DIGITS: Final = 32  # of a digest: 128 bits
_ENDPOINT_LETTERS: dict[Surface, str] = {
    Endpoint.CHAT: "c",
    Endpoint.COMPLETIONS: "t",
    Translated.MESSAGES: "m",
    Translated.RESPONSES: "r",
}
_ENDPOINTS = {letter: endpoint for endpoint, letter in _ENDPOINT_LETTERS.items()}


class EventId(NamedTuple):
    """The last event a client has seen: its request (bare hex), tokens until then, and which of the events without a
    token after them (0 = none of those)."""

    request: str
    n_tokens: int
    n_tail: int


class Asked(NamedTuple):
    """What a call's headers say about an earlier one. At least one is there."""

    event: EventId | None
    key: bytes | None


def asked(last_event_id: bytes | None, idempotency_key: bytes | None) -> Asked | None:
    """From the raw headers; an empty Last-Event-ID counts as none, as in browsers. ApiError (400) names the one that
    is malformed."""
    event = parse_event_id(last_event_id) if last_event_id else None
    if idempotency_key is not None and (
        len(idempotency_key) > MAX_KEY_BYTES or not _KEY.match(idempotency_key)
    ):
        raise bad_request(
            f"Idempotency-Key must be 1 to {MAX_KEY_BYTES} printable ASCII characters: send a fresh UUID per request",
            "Idempotency-Key",
            "invalid_idempotency_key",
        )
    return None if event is None and idempotency_key is None else Asked(event, idempotency_key)


def parse_event_id(raw: bytes) -> EventId:
    match = _EVENT_ID.match(raw)
    if match is None:
        raise bad_request(
            "Last-Event-ID must be the id of an event of the stream to go on with, unchanged",
            "Last-Event-ID",
            "invalid_event_id",
        )
    request, n_tokens, n_tail = match.groups()
    return EventId(request.decode(), int(n_tokens), int(n_tail or 0))


def parse_request_id(text: str) -> str | None:
    """Bare hex of `req_<hex>`; None for anything else."""
    match = _REQUEST_ID.match(text)
    return match.group(1) if match else None


class Note(NamedTuple):
    """What a reconnect must know of a request, as its record keeps it: `<letters>:<digest>[:<tokens>:<tokens>]`.

    `digest` is empty for a plain request without a key: nothing leads back to it. `n_carried` and `n_carried_prompt`
    are what requests that this one continues were charged for.
    """

    endpoint: Surface
    streaming: bool
    include_usage: bool
    keyed: bool
    digest: str = ""
    n_carried: int = 0
    n_carried_prompt: int = 0
    calls: str = ""  # whether its text is read for calls of functions, and how (tools.py)

    def encode(self) -> str:
        note = (
            _letters(self.endpoint, self.streaming, self.include_usage, self.keyed, self.calls) + self.digest
        )
        if self.n_carried or self.n_carried_prompt:
            note += f":{self.n_carried}:{self.n_carried_prompt}"
        return note

    @classmethod
    def decode(cls, note: str) -> Self:
        """Of what `encode` made."""
        letters, digest, *carried = note.split(":")
        n_carried, n_carried_prompt = map(int, carried) if carried else (0, 0)
        return cls(
            _ENDPOINTS[letters[0]],
            "s" in letters,
            "u" in letters,
            "k" in letters,
            digest,
            n_carried,
            n_carried_prompt,
            READ if READ in letters else READ_ONE if READ_ONE in letters else "",
        )


@cache
def _letters(endpoint: Surface, streaming: bool, include_usage: bool, keyed: bool, calls: str) -> str:
    letters = _ENDPOINT_LETTERS[endpoint] + ("s" if streaming else "p")
    return letters + ("u" if include_usage else "") + ("k" if keyed else "") + calls + ":"


class Digests:
    """Salted digests under one secret. 0.5 µs for a short body, 27 µs for 50 KB (SHA-256 in hardware)."""

    def __init__(self, secret: bytes) -> None:
        self._of_body = {
            e: hashlib.sha256(b"body\0" + e.value.encode() + b"\0" + secret + b"\0") for e in SURFACES
        }
        self._secret = secret
        self._of_key = hashlib.sha256(b"idempotency-key\0" + secret + b"\0")

    def body(self, endpoint: Surface, body: bytes) -> str:
        digest = self._of_body[endpoint].copy()
        digest.update(body)
        return digest.hexdigest()[:_HEX_DIGITS]

    def key(self, key: bytes) -> str:
        digest = self._of_key.copy()
        digest.update(key)
        return digest.hexdigest()[:_HEX_DIGITS]

    def end_customer(self, organization: str, request: GenerationRequest) -> str:
        """Pseudonym of the customer that the request names, header first; empty where it names none."""
        body = request.body
        named = (
            request.end_customer
            or (body.safety_identifier if isinstance(body, ChatBody) else None)
            or body.user
        )
        return pseudonym(self._secret, organization, named) if named else ""

    def note(self, request: GenerationRequest, body: bytes, *, keyed: bool) -> str:
        """The note of a request of its own."""
        if request.max_tokens == 0:
            return Note(request.endpoint, False, False, False, n_carried_prompt=ALL_CHARGED).encode()
        calls = letter_of(request.calls)
        letters = _letters(request.endpoint, request.stream, request.include_usage, keyed, calls)
        return letters + self.body(request.endpoint, body) if keyed or request.stream else letters
