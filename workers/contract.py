"""The wire between gateway, control and replica: versioned structures and the Celery message.

Called by both sides; holds no I/O. The rule that keeps N and N-1 talking: add fields with defaults, never reuse a
name or a position, never remove one that the other side still reads. Bodies travel as `RequestEnvelope` under
`body:<id>`; the Celery message carries ids only.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

import msgspec

from workers.keys import WIRE_VERSION

SERVE_TASK: Final = "corral.serve"
# Code of a replica that was stopped because its machine was told to end: nobody's failure.
MACHINE_STOPPED: Final = "machine_stopped"

# Fields of an entry of the usage stream: the event, and who announces it where it is not the flush (flush.lua).
USAGE_FIELD: Final = "u"
WITNESS_FIELD: Final = "w"
WITNESS_SPOOL: Final = "spool"


class FinishReason(enum.StrEnum):
    """Why a generation ended. The first two are OpenAI's; the rest are ours."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    BUDGET = "budget"


class Endpoint(enum.StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"


class ReplicaPhase(enum.StrEnum):
    """Life of a replica as its agent reports it."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class HeldFunction(NamedTuple):
    """A function with the schema (JSON text) that its arguments follow. strict: wholly, or the request is refused; else
    as far as a grammar can tell."""

    name: str
    schema: str
    strict: bool = False


class CallRule(msgspec.Struct, frozen=True, array_like=True):
    """Functions that an answer may or must call; in the journal they have the form of workers/engine/tool_form.py.

    `functions`: those that are held to their schema; none: the model writes calls as it likes. must: the answer is
    calls and nothing else. many: more than one is allowed.
    """

    functions: tuple[HeldFunction, ...] = ()
    must: bool = False
    many: bool = True


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters after validation; `max_tokens`: the lesser of what was asked and what the context leaves."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] = {}
    json_schema: str | None = None  # JSON text of the schema that the answer must follow
    calls: CallRule | None = None  # None: no function may be called


class Slo(msgspec.Struct, frozen=True, array_like=True):
    """What a request was promised when it was admitted: its service class, the targets, and how many millionths of such
    requests must meet them."""

    name: str
    ttft_ms: int
    itl_ms: int
    deadline_s: int
    objective_ppm: int


class RequestEnvelope(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a replica needs to serve a request. `payload` is the client's JSON body, verbatim and already valid."""

    id: str
    org: str
    project: str
    key: str
    deployment: str
    model: str
    endpoint: Endpoint
    payload: bytes
    sampling: Sampling
    price_version: str
    admitted_at_ms: int
    stream: bool = False
    # True when max_tokens was cut by the money or tokens left: such an end is `budget`, not `length`.
    budget_bound: bool = False
    # Where a budget holds for the request: how many prompt tokens are held, and the rates (nano-dollars per million
    # tokens) at which a longer prompt takes from the output held. 0 tokens: no budget.
    n_prompt_held: int = 0
    prompt_rate: int = 0
    output_rate: int = 0
    priority: int = 0
    cache_salt: str = ""
    zero_retention: bool = False
    # The client set no max_tokens: the engine may use the whole context that is left.
    open_ended: bool = False
    # The request as its client knows it, when this one continues it after a disconnect; how many tokens of the journal
    # come from before, and how many prompt tokens were charged then. Neither is charged again.
    continues: str = ""
    n_carried: int = 0
    n_carried_prompt: int = 0
    slo: Slo | None = None
    # Pseudonym of the tenant's own customer (controlplane/tenants/end_customers.py), empty where none was named.
    end_customer: str = ""
    # Id of the LoRA adapter that answers, empty for the model as it is. What it is stands under the machine's
    # `adapters` (AdapterSpec), where only the trusted side writes.
    adapter: str = ""
    v: int = WIRE_VERSION


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """A refusal or failure decided on the worker: HTTP status, OpenAI error code, sentence, offending field."""

    status: int
    code: str
    message: str
    param: str | None = None


class End(msgspec.Struct, frozen=True, array_like=True):
    """Last frame entry of a request: reason and exact counts."""

    reason: FinishReason
    n_prompt: int
    n_cached: int
    n_completion: int
    error: WireError | None = None
    # Attempts so far: 1 for a request served by the first replica it was bound to.
    attempts: int = 1


class Ask(msgspec.Struct, frozen=True, array_like=True):
    """A replica needs more of its request's money: what it was granted is used up (`empty`: it waits) or nearly."""

    n_granted: int
    # Exact, which the gateway's estimate is not.
    n_prompt: int
    empty: bool = False


class FrameEntry(msgspec.Struct, frozen=True, array_like=True):
    """One step of one stream inside a frame. `offset` counts tokens from 0; `n` tokens are covered by `text`.

    A frame is a msgpack array of entries; the script that accepts them writes the array header, so a frame holds
    exactly what the journal holds. `stream` is a number chosen by the gateway that awaits it.
    An entry with `ask` is no step: it has offset -1 and is in no journal.
    """

    stream: int
    choice: int
    offset: int
    n: int
    text: str
    end: End | None = None
    logprobs: list[object] | None = None
    ask: Ask | None = None


class JournalEntry(msgspec.Struct, frozen=True, array_like=True):
    """One accepted step: enough to resume the generation elsewhere and to refill a client's gap."""

    choice: int
    offset: int
    token_ids: list[int]
    text: str
    end: End | None = None
    logprobs: list[object] | None = None


class UsageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one request consumed; one per request, however many attempts served it. Counts come from the journal."""

    request_id: str
    org: str
    project: str
    key: str
    deployment: str
    replica: str
    machine: str
    model: str
    endpoint: Endpoint
    n_prompt: int
    n_cached: int
    n_completion: int
    attempts: int
    finish_reason: FinishReason
    # HTTP status the client was (or would have been) given.
    status: int
    admitted_at_ms: int
    # Milliseconds from admission; None when no token was produced.
    first_token_ms: int | None
    duration_ms: int
    price_version: str
    # None: admitted by a gateway that did not say.
    slo: Slo | None = None
    end_customer: str = ""
    # By whom tokens were counted where no engine of ours did: `upstream`, `tokenizer` or `estimate`.
    counted_by: str = ""
    v: int = WIRE_VERSION


class GpuHealth(msgspec.Struct, frozen=True, omit_defaults=True):
    """One GPU as its driver's library tells it (workers/agent/gpuhealth.py); what a model does not tell is 0.

    lost: why it cannot be read. xids: the driver's error codes since the agent's start, each once, bounded.
    n_ecc_uncorrected: memory errors since the driver was loaded. is_remap_pending: memory that is bad waits for a reset
    to be retired or remapped; has_remap_failed: there is no spare left. hot_s: for so long at or above `slowdown_c`.
    """

    index: int
    lost: str = ""
    xids: tuple[int, ...] = ()
    n_ecc_uncorrected: int = 0
    is_remap_pending: bool = False
    has_remap_failed: bool = False
    temperature_c: int = 0
    slowdown_c: int = 0
    shutdown_c: int = 0
    hot_s: float = 0.0


class Heartbeat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """State of a replica (or of an agent, with `replica` empty). `seq` grows by one per beat: observers judge
    staleness by its change on their own clock, so a machine with a wrong clock neither lives nor dies by it."""

    machine: str
    seq: int
    at_ms: int
    replica: str = ""
    deployment: str = ""
    phase: ReplicaPhase = ReplicaPhase.STARTING
    reason: str = ""
    slots: int = 0
    n_running: int = 0
    n_waiting: int = 0
    kv_used_ratio: float = 0.0
    step_ms: float = 0.0
    n_tokens_total: int = 0
    n_requests_total: int = 0
    max_model_len: int = 0
    spool_full: bool = False
    # Engine steps since the beat before, and the gaps between tokens that streams saw in them: quantiles, and the
    # counts as flat pairs (workers/engine/steps.py). A beat without steps has none of these.
    n_steps: int = 0
    itl_p50_ms: float = 0.0
    itl_p95_ms: float = 0.0
    itl_counts: tuple[int, ...] = ()
    # Sequences in the engine's own queue, mean over those steps; the fullest that the KV cache was in them; sequences
    # that were put back for want of its blocks.
    engine_queue: float = 0.0
    kv_peak_ratio: float = 0.0
    n_preempted: int = 0
    # Prompt tokens whose first answer token is awaited, now.
    n_prefill_tokens: int = 0
    # CPU time spent on counting prompts since the start.
    tokenise_cpu_ms: float = 0.0
    # What its KV memory holds, 0 = unknown.
    kv_tokens: int = 0
    # Of an external endpoint: how it is treated, and why (`open upstream_timeout`); `slots` follows it.
    note: str = ""
    # Ids of the adapters in its memory; None: it takes none.
    adapters: tuple[str, ...] | None = None
    # Requests that failed here through no fault of theirs, since the start; and of a canary the latest that it handed
    # back unbegun, to be served elsewhere.
    n_errors_total: int = 0
    handed_back: tuple[str, ...] = ()
    # Of an agent: its machine will be taken away in so many milliseconds (phase is then DRAINING). Relative, since
    # the machine's clock may be wrong.
    ends_in_ms: int | None = None
    # It sleeps (workers/rest.py): `phase` is LOADING, since it takes nothing until it is READY again.
    asleep: bool = False
    # Of an agent: SHA-256 (hex) of the Redis password that its processes connect with.
    password: str = ""
    # Of an agent: its machine's GPUs; none where there are none, or none can be asked.
    gpus: tuple[GpuHealth, ...] = ()
    v: int = WIRE_VERSION


class ServingReport(msgspec.Struct, kw_only=True):
    """Which requests a replica has in its hands, every two seconds: what is bound to it and stands neither here nor
    in its queue was lost on the way, and is bound again. `seq` is that of the heartbeats."""

    seq: int
    requests: list[str]
    v: int = WIRE_VERSION


class UpstreamRole(enum.StrEnum):
    """What an external endpoint is to its deployment."""

    REPLICA = "replica"  # takes requests beside the others, or alone
    OVERFLOW = "overflow"  # takes what would wait too long for the others
    SHADOW = "shadow"  # is sent copies; what it answers is compared and dropped


class UpstreamSecret(msgspec.Struct, omit_defaults=True):
    """What an endpoint is called with; travels in `UpstreamSpec.sealed` only."""

    api_key: str = ""
    headers: dict[str, str] = {}


class UpstreamSpec(msgspec.Struct, kw_only=True):
    """An OpenAI-compatible endpoint that a replica stands for (workers/engine/upstream)."""

    upstream: str
    base_url: str
    model: str
    role: UpstreamRole
    # UpstreamSecret (JSON), sealed for the machine (workers/sealed.py); empty: it is called without.
    sealed: str = ""
    # Networks that may be called although they are not public, as the operator lists them.
    allow: str = ""
    max_model_len: int = 2048
    connect_s: float = 5.0
    first_token_s: float = 30.0
    between_tokens_s: float = 15.0
    n_retries: int = 2
    breaker_failures: int = 5
    breaker_pause_s: float = 5.0
    # What it takes: vLLM's extensions of OpenAI's body, `stream_options`, and how it calls the bound of the answer.
    extensions: bool = False
    stream_usage: bool = True
    max_tokens_field: str = "max_tokens"
    # tokenizer.json files of the deployment's model, the first that is there counts; `toy` for the toy engine's.
    tokenizers: list[str] = []


class ReplicaSpec(msgspec.Struct, kw_only=True):
    """Field of `desired`: a replica that the agent should be running. Absent from the hash = stop it."""

    replica: str
    deployment: str
    model_digest: str
    # Where the agent's model cache may fetch the version from (file:// or s3://); empty for the toy engine.
    model_source: str
    # EngineProfile as JSON (workers/engine/base.py).
    profile: dict[str, object]
    slots: int
    # True: finish or hand off what runs, take nothing new, then stop.
    drain: bool = False
    # True: finish what runs, then give the accelerator's memory back and wait to be woken (workers/rest.py).
    sleep: bool = False
    grace_s: float = 10.0
    # It tries something out: what it cannot even begin is handed back, and served elsewhere.
    canary: bool = False
    # Of a version in an object store: file name -> signed URLs of it, best first. Secrets for as long as they last.
    model_urls: dict[str, list[str]] = {}
    # The version on other machines of this cell, `{name}` for the file's: asked before the object store. Secrets, too.
    model_siblings: list[str] = []
    # Set where it is no engine of ours but an endpoint elsewhere.
    upstream: UpstreamSpec | None = None
    v: int = WIRE_VERSION


class AdapterSpec(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Field of `adapters`, by the adapter's id: a LoRA adapter that replicas of this machine may be asked for. Absent
    from the hash = it was retired, or nothing here serves its deployment."""

    deployment: str
    # Names its files in the model cache, as a model version's digest does.
    digest: str
    # As `model_source` and `model_urls` of a replica.
    source: str
    n_bytes: int = 0
    urls: dict[str, list[str]] = {}
    # When that was written: URLs are signed anew long before they end.
    at_ms: int = 0
    v: int = WIRE_VERSION


class ModelShelf(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What model versions a machine holds whole, and where siblings may fetch them with a ticket. `key` signs those
    (workers/modelcache/ticket.py): a secret between this machine and the trusted side."""

    digests: tuple[str, ...] = ()
    url: str = ""
    key: bytes = b""
    free_bytes: int = 0  # room for more, without anything leaving
    # Of the digests those that lie in the page cache, too.
    resident: tuple[str, ...] = ()
    v: int = WIRE_VERSION


class PrefetchSpec(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Field of `prefetch`, by digest: a model version that the machine should fetch when it has nothing better to do.
    `source`, `urls` and `siblings` as of ReplicaSpec."""

    digest: str
    source: str
    urls: dict[str, list[str]] = {}
    siblings: list[str] = []
    v: int = WIRE_VERSION


class ReplicaStatus(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Field of `actual`, also published on the machine's event channel when it changes."""

    replica: str
    phase: ReplicaPhase
    deployment: str = ""
    # Stable code for a failure (`bad_weights`, `out_of_memory`, `engine_died`, `start_timeout`, …) and a sentence.
    code: str = ""
    message: str = ""
    slots: int = 0
    max_model_len: int = 0
    kv_tokens: int = 0  # what its KV memory holds, 0 = unknown
    pid: int = 0
    # Milliseconds spent per start stage, e.g. {"fetch": 12, "fork": 40, "load": 610}.
    stages_ms: dict[str, int] = {}
    asleep: bool = False  # `phase` is LOADING then
    v: int = WIRE_VERSION


class Stage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What waiting clients are told about a deployment. `failed` ends their wait with a 503 and the message."""

    deployment: str
    # waking | launching_machine | starting_machine | waking_replica | starting_replica | loading_model | ready | failed
    stage: str
    eta_ms: int | None = None
    code: str = ""
    message: str = ""
    # Set with `failed`: when a retry may help.
    retry_after_s: int | None = None
    at_ms: int = 0
    v: int = WIRE_VERSION


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Trusted word to a gateway that a request ended without a replica (poison, deployment removed), or that its
    client reads elsewhere."""

    request: str
    error: WireError
    # Only the stream with this number, if not 0: its client has reconnected elsewhere.
    stream: int = 0
    v: int = WIRE_VERSION


class ClaimVerdict(enum.StrEnum):
    """Answer of the claim script."""

    OK = "ok"
    HELD = "held"  # this epoch is already being served: a duplicate delivery
    STALE = "stale"  # a newer epoch exists, or the request was moved away
    DONE = "done"
    CANCELLED = "cancelled"


class FlushVerdict(enum.StrEnum):
    """Answer of the flush script per entry, one character each."""

    ACCEPTED = "a"
    STALE = "s"  # epoch or lease gone: stop generating
    DUPLICATE = "d"  # offset already journaled
    GAP = "g"  # offset beyond the journal: a bug or a lost flush; stop and let the reaper resume
    CANCELLED = "c"  # accepted, and the client has gone: end the generation
    MOVED = "m"  # accepted, and the client reads elsewhere now: the lease says where
    BUDGET = "b"  # tokens beyond the hold: refused


_MESSAGE_BODY: Final = (
    r"[[\"%s\", %d], {}, {\"callbacks\": null, \"errbacks\": null, \"chain\": null, \"chord\": null}]"
)

# Filled by Python % and by Lua string.format alike, with: id, epoch, tag, id, replica id, tag.
# body_encoding is left unset: the body is JSON text inside the JSON message, and no script needs base64.
MESSAGE_TEMPLATE: Final = (
    '{"body": "' + _MESSAGE_BODY + '", "content-encoding": "utf-8", "content-type": "application/json", '
    '"headers": {"lang": "py", "task": "' + SERVE_TASK + '", "id": "%s", "shadow": null, "eta": null, '
    '"expires": null, "group": null, "group_index": null, "retries": 0, "timelimit": [null, null], '
    '"root_id": "%s", "parent_id": null, "argsrepr": "", "kwargsrepr": "", "origin": "corral", '
    '"ignore_result": true}, "properties": {"correlation_id": "", "delivery_mode": 2, '
    '"delivery_info": {"exchange": "", "routing_key": "replica.%s"}, "priority": 0, "delivery_tag": "%s"}}'
)


def celery_message(request_id: str, epoch: int, replica_id: str) -> bytes:
    """The Celery (protocol 2) message that asks a replica to serve one attempt of a request: ids only.

    `delivery_tag` is `<id>.<epoch>`, unique per attempt. The bind script builds the same bytes.
    """
    tag = f"{request_id}.{epoch}"
    return (MESSAGE_TEMPLATE % (request_id, epoch, tag, request_id, replica_id, tag)).encode()


_frame_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(list[FrameEntry])
_journal_decoder = msgspec.msgpack.Decoder(JournalEntry)
_envelope_decoder = msgspec.msgpack.Decoder(RequestEnvelope)
_usage_decoder = msgspec.msgpack.Decoder(UsageEvent)
_error_decoder = msgspec.msgpack.Decoder(WireError)


def encode(value: msgspec.Struct) -> bytes:
    """msgpack bytes of any structure of this module."""
    return _frame_encoder.encode(value)


def encode_ask(stream: int, ask: Ask) -> bytes:
    """A frame with one question of a replica to the gateway of `stream`."""
    return _frame_encoder.encode([FrameEntry(stream, 0, -1, 0, "", ask=ask)])


def decode_frame(payload: bytes) -> list[FrameEntry]:
    """Entries of one frame; raises msgspec.DecodeError on anything else."""
    return _frame_decoder.decode(payload)


def decode_journal_entry(payload: bytes) -> JournalEntry:
    return _journal_decoder.decode(payload)


def decode_envelope(payload: bytes) -> RequestEnvelope:
    return _envelope_decoder.decode(payload)


def decode_usage(payload: bytes) -> UsageEvent:
    return _usage_decoder.decode(payload)


def decode_error(payload: bytes) -> WireError:
    """What a request record says of a request that nobody will serve (`error`)."""
    return _error_decoder.decode(payload)
