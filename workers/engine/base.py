"""What an engine is to the rest of the worker: requests in, deltas out, one asyncio loop.

The serve loop (`workers/serve.py`) talks to this interface only; `toy.py` and `vllm.py` implement it. Nothing
here imports an engine, so tests and the agent may import it for free. Nothing here may touch Redis or Celery:
an engine knows tokens, never tenants.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from workers.contract import CallRule, Endpoint, FinishReason, Sampling
from workers.engine.steps import Steps


class EngineInputError(ValueError):
    """The request can never be served as it stands: a 400, not a retry.

    `code` is stable and machine-readable, `param` names the public field, `message` says the remedy.
    """

    def __init__(self, code: str, param: str, message: str) -> None:
        super().__init__(message)
        self.code, self.param, self.message = code, param, message


def context_exceeded(n_prompt: int, max_model_len: int) -> EngineInputError:
    """The refusal every engine gives a prompt that leaves no room for an answer."""
    return EngineInputError(
        "context_length_exceeded",
        "messages",
        f"the prompt has {n_prompt} tokens; the context of this model holds {max_model_len}, "
        "and at least one must remain for the answer: shorten the prompt",
    )


class EngineFailed(RuntimeError):  # noqa: N818 - a state of one request
    """This request failed in an engine that goes on: it ends with this error (HTTP status, code, sentence)."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


BY_ESTIMATE: Final = "estimate"  # of `Counted.by`: about four bytes a token
# Of a token whose text is known and whose id is not: nobody can continue an answer from it.
UNKNOWN_ID: Final = -1


class AdapterRefused(ValueError):  # noqa: N818 - as ImportRefused
    """The engine cannot load this adapter; it lives on. The message is the engine's, without paths."""


class EngineDead(RuntimeError):  # noqa: N818 - a state, spoken of as "engine dead" everywhere
    """The engine process is gone. The replica must exit; its requests resume elsewhere from the journal."""


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to choose tokens. Defaults are neutral; temperature 0 is greedy.

    `max_tokens` counts all output tokens of the request, those of earlier attempts included.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None  # number of alternatives per token; 0 = the chosen one only; None = off
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    # JSON text of the schema that the whole output must follow; None = free text.
    json_schema: str | None = None
    calls: CallRule | None = None  # functions that the output may or must call; None = none


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One attempt of one request.

    prior_token_ids: output already journaled by earlier attempts; deltas start after it. Empty on attempt 1.
    priority: lower runs first; ties by arrival. cache_salt: prefix-cache isolation domain (per tenant), None
    = shared. min_delta_tokens: deltas between the first and the last need not come sooner than with so many
    tokens: a hint that saves the wake-up per token where nobody watches. An engine may ignore it.
    single_tokens: no delta may hold more than one, because the answer may have to end after any of them.
    endpoint, body: what the client sent, verbatim, for an engine that does not take token ids.
    adapter: id of a loaded adapter that answers; empty: the model as it is. Cached prefixes are kept apart by it.
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    prior_token_ids: list[int] = field(default_factory=list)
    priority: int = 0
    cache_salt: str | None = None
    min_delta_tokens: int = 1
    single_tokens: bool = False
    endpoint: Endpoint = Endpoint.CHAT
    body: bytes = b""
    adapter: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """Log probability (natural) of one output token, with the best alternatives as (id, text, logprob)."""

    token_id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


class Counted(msgspec.Struct, frozen=True, gc=False):
    """Counts of a whole request that the engine knows better than its deltas tell, and by whom they were counted.
    n_prompt -1: as counted before.
    """

    n_prompt: int
    n_cached: int
    n_completion: int
    by: str


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one or more engine steps added to one sequence.

    `text` may lag behind `token_ids` (half a character, or the possible beginning of a stop string) and
    catches up in a later delta, so only the concatenation of all texts is the output. The delta that carries
    `finish` is the last. A msgspec Struct, not a dataclass: one is made per token and a frozen dataclass
    costs 5x as much.
    """

    token_ids: list[int]
    text: str
    finish: FinishReason | None = None
    n_cached_prompt_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    # With the last delta, from an engine of which token ids are not known.
    counted: Counted | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A glance at the engine for heartbeats and the watchdog.

    `last_step_at_s` (time.monotonic()) is the last step, or the instant at which an idle engine got work:
    with work (`n_running + n_waiting > 0`) it must keep moving.
    """

    n_running: int
    n_waiting: int
    kv_used_ratio: float
    n_steps: int
    last_step_at_s: float
    step_ms: float  # exponentially weighted, most recent steps count most
    n_preemptions: int = 0
    n_prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    n_prefix_hits: int = 0  # ... of which were found


class Engine(Protocol):
    """One model on one accelerator, stepping many sequences in one continuous batch.

    Construct on the main thread while the process has no other thread (see vllm.py for why); call everything
    else on the one asyncio loop that called `start`.
    """

    @property
    def max_model_len(self) -> int:
        """Tokens of context, prompt and output together."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV memory holds, of all requests together; 0 where it does not know."""

    def tokenize_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Prompt ids of a conversation under the model's chat template; EngineInputError when it does not fit
        it.
        """

    def tokenize(self, text: str) -> list[int]:
        """Prompt ids of a bare completion prompt."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Deltas until one carries `finish`.

        Raises EngineInputError before the first delta, EngineDead and EngineFailed at any time. Cancelling the
        consuming task or `aclose()` aborts the sequence in the engine within one step; consume inside
        `contextlib.aclosing`.
        """

    async def load_adapter(self, adapter: str, directory: Path) -> None:
        """Have it ready for requests. Raises AdapterRefused, also when `max_loras` are loaded; EngineDead."""

    async def unload_adapter(self, adapter: str) -> None:
        """Forget it; nothing happens where it is not loaded. No request may run with it. Raises EngineDead."""

    def stats(self) -> EngineStats:
        """Never blocks and never asks the engine process: the last known figures."""

    def take_steps(self) -> Steps:
        """The steps since the last call; for one caller (the heartbeat)."""

    async def start(self) -> None:
        """Begin stepping on the running loop."""

    async def stop(self) -> None:
        """Abort what runs and release everything; idempotent."""

    async def check_health(self) -> None:
        """Raises EngineDead. A hung engine passes: the watchdog reads `stats().last_step_at_s` for that."""


@runtime_checkable
class Offering(Protocol):
    """An engine that cannot always take what its replica has slots for."""

    @property
    def note(self) -> str:
        """How it stands, in a word or two; empty while all is well."""

    def offered(self, slots: int) -> int:
        """How many of these to use now."""


@runtime_checkable
class Sleeper(Protocol):
    """An engine that can give its accelerator's memory back and take it again without starting anew."""

    @property
    def sleep_level(self) -> int:
        """0: it cannot, as it was configured. 1: weights stay in RAM. 2: they are read again from the disk."""

    async def sleep(self) -> None:
        """Free it all; nothing runs and nothing may be asked for until `wake`. Raises EngineDead."""

    async def wake(self) -> None:
        """As before the sleep, with an empty KV cache. Raises EngineDead, also where the weights are not what they
        were."""


class ProfileError(ValueError):
    """An engine profile holds a value the engine cannot run with; the message names knob, value and range."""


LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM 0.32 has kernels for


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """How to run a model on a machine. Travels as JSON in the desired state; unknown knobs are refused."""

    engine: str = "vllm"
    # The only dtype in which a resumed greedy request was measured to continue identically.
    dtype: str = "float32"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_bytes: int = 256 << 20
    max_num_batched_tokens: int | None = None  # None: the engine's default (toy: 2048)
    # A step computes so much of one prompt at most; 0: all it has room for.
    long_prefill_token_threshold: int = 0
    enforce_eager: bool = True  # skips compilation: seconds of start for some speed; on a GPU choose False
    tensor_parallel_size: int = 1
    block_size: int | None = None  # tokens per KV block; None: the engine's default (toy: 16)
    max_loras: int = 0  # adapters in memory at once, all usable in one batch; 0: none are served
    max_lora_rank: int = 16  # of any of them: memory is set aside for max_loras of this rank
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    gpu_memory_utilization: float | None = None  # share of a GPU's memory; then kv_cache_bytes does not count
    kv_cache_dtype: str = "auto"
    quantization: str | None = None  # as the weights are; None: the checkpoint says
    enable_prefix_caching: bool = True
    attention_backend: str | None = None  # None: the engine chooses
    load_format: str = "auto"
    # What its sleep keeps: 1 the weights in RAM, 2 nothing (read again); 0: it does not sleep.
    sleep_level: int = 0
    speculative_method: str = ""  # ngram or eagle; empty: off
    num_speculative_tokens: int = 0
    speculative_model: str = ""  # eagle: directory of the drafting head
    toy_step_ms: float = 10.0  # 0 = as fast as the loop turns
    toy_seq_ms: float = 0.0  # a step takes so much longer per running sequence
    toy_prefill_ms: float = 0.0  # ... and per 1,000 prompt tokens that it computes
    toy_weights_bytes: int = 0  # it takes memory for so much weights and for its KV cache; 0: it pretends
    toy_fail_every: int = 0  # tests: every so many-th request fails before its first token; 0: none
    toy_faults: bool = False  # tests: the words <die> and <hang> in a prompt do what they say

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, ("vllm", "toy"))
        _one_of("dtype", self.dtype, ("float32", "bfloat16", "float16", "auto"))
        _within("max_model_len", self.max_model_len, 16, 10_000_000)
        _within("max_num_seqs", self.max_num_seqs, 1, 4096)
        _within("kv_cache_bytes", self.kv_cache_bytes, 1 << 20, 1 << 43)
        if self.max_num_batched_tokens is not None:
            _within("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, 1_000_000)
        _within("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, 1_000_000)
        _within("tensor_parallel_size", self.tensor_parallel_size, 1, 64)
        _within("pipeline_parallel_size", self.pipeline_parallel_size, 1, 64)
        _within("data_parallel_size", self.data_parallel_size, 1, 64)
        if self.gpu_memory_utilization is not None:
            _within("gpu_memory_utilization", self.gpu_memory_utilization, 0.1, 0.99)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"))
        _one_of("load_format", self.load_format, ("auto", "safetensors", "runai_streamer", "dummy"))
        _one_of("speculative_method", self.speculative_method, ("", "ngram", "eagle"))
        _within(
            "num_speculative_tokens", self.num_speculative_tokens, 1 if self.speculative_method else 0, 16
        )
        if self.block_size is not None:
            _within("block_size", self.block_size, 1, 4096)
        _within("max_loras", self.max_loras, 0, 256)
        _one_of("max_lora_rank", self.max_lora_rank, LORA_RANKS)
        _within("sleep_level", self.sleep_level, 0, 2)
        if self.sleep_level == 2 and self.max_loras:
            raise ProfileError(
                "engine profile: sleep_level = 2 loses the adapters (max_loras > 0); choose 1, which keeps them"
            )
        _within("toy_weights_bytes", self.toy_weights_bytes, 0, 1 << 34)
        _within("toy_step_ms", self.toy_step_ms, 0, 60_000)
        _within("toy_seq_ms", self.toy_seq_ms, 0, 1_000)
        _within("toy_fail_every", self.toy_fail_every, 0, 1_000_000)
        _within("toy_prefill_ms", self.toy_prefill_ms, 0, 60_000)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineProfile:
        """Raises ProfileError for an unknown knob, a wrong type or a value out of range."""
        known = {f.name: f for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ProfileError(f"engine profile: unknown knob {name!r}; known: {', '.join(known)}")
        try:
            checked: dict[str, Any] = msgspec.convert(data, _PROFILE_TYPES, strict=True)
        except msgspec.ValidationError as error:
            raise ProfileError(f"engine profile: {error}") from None
        return cls(**{name: checked[name] for name in data})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _profile_types() -> Any:
    from typing import NotRequired, TypedDict, get_type_hints

    hints = get_type_hints(EngineProfile)
    return TypedDict("_ProfileJson", {n: NotRequired[t] for n, t in hints.items()})  # type: ignore[operator]


def _within(knob: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ProfileError(f"engine profile: {knob} = {value} is out of range; allowed: {low} to {high}")


def _one_of(knob: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ProfileError(f"engine profile: {knob} = {value!r} is not known; allowed: {listed}")


_PROFILE_TYPES = _profile_types()


def resume_blockers(sampling: SamplingSpec | Sampling) -> tuple[str, ...]:
    """Features that a resumed request would break: what it promised the client cannot be kept by going on.

    Empty: it goes on from the journal. Not empty: it drains to its end where there is time, else it fails visibly.
    Measured on vLLM 0.32 (2026-11-20): the random generator of a seeded request restarts with an attempt.
    Presence and frequency penalties are carried over by resume_penalties.py, which cannot be combined with
    repetition_penalty. An unseeded sampled request promises no particular continuation, so sampling itself
    blocks nothing. Greedy choices below float32 depend on the batch they run in (15 of 24 went on with the same
    words): no undisturbed run promises them either, so they go on, and `corral.attempts` says that they did.
    """
    reasons = []
    if sampling.repetition_penalty != 1.0:
        if sampling.presence_penalty:
            reasons.append("presence_penalty")
        if sampling.frequency_penalty:
            reasons.append("frequency_penalty")
    if sampling.temperature > 0 and sampling.seed is not None:
        reasons.append("seed")
    return tuple(reasons)
