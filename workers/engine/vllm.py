"""vLLM behind the `Engine` interface: one AsyncLLM in this process, its EngineCore forked from it.

The order of construction is why a replica starts in one second and cannot deadlock:

1. The zygote (`workers.agent.zygote`) calls `vllm_process.preimport()` and stays single-threaded.
2. The forked replica front calls `VllmEngine(profile, model_dir)` on its main thread, before any other
   thread, hub or loop exists. vLLM makes its configuration, binds its ZeroMQ sockets and forks the
   EngineCore. At that fork the process has one Python thread. libzmq's own threads are there too, but they
   run no Python and hold no lock of ours, the child makes a ZeroMQ context of its own, and this is the path
   vLLM itself takes on a GPU. `forking.ForkWatch` refuses to fork beside a second Python thread, so the order
   cannot rot unnoticed.
3. No asyncio loop is needed so far: AsyncLLM starts its tasks, and pyzmq registers its sockets, on the loop
   that first uses them (AsyncLLM.add_request: "so we can call __init__ before the event loop"). The sockets
   move to the loop's thread once, and that thread's start is the memory fence.
4. `await start()` on the loop's thread makes the first token. From then on only that loop may touch the
   engine.

The core is forked by the *main* thread because PR_SET_PDEATHSIG fires when the forking thread ends: so the
core dies with its front, even by SIGKILL, and never holds memory as an orphan.

The fork needs VLLM_WORKER_MULTIPROC_METHOD=fork, set after the configuration is made: the CPU platform
overwrites it with "spawn" while checking the configuration (22 s instead of 1 s). Everything else that is
particular to the CPU build is in vllm_process.py; a GPU runs the same code with the ordinary vllm wheel
(not tried: no GPU where this was written).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from workers.contract import Endpoint, FinishReason
from workers.engine import forking, native_form, tool_form
from workers.engine.base import (
    AdapterRefused,
    Delta,
    EngineDead,
    EngineInputError,
    EngineProfile,
    EngineRequest,
    EngineStats,
    SamplingSpec,
    TokenLogprob,
    context_exceeded,
)
from workers.engine.chat import check_messages
from workers.engine.native_calls import NativeCalls, names_of
from workers.engine.native_form import Form
from workers.engine.stats_board import StatsBoard
from workers.engine.steps import Steps
from workers.engine.text import Detokenizer
from workers.engine.vllm_args import engine_args
from workers.engine.vllm_process import is_cpu_build, prepare_environment
from workers.engine.vllm_requests import input_error, sampling_params

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHUTDOWN_S: Final = 3.0
_FINISH: Final = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
}


class VllmEngine:
    """See the module for where and when to construct.

    Blocks until the core is ready; raises when it cannot be (bad weights, out of memory: the core's own
    traceback is in the log, the exception is vLLM's), UnsafeForkError beside another thread.
    """

    def __init__(self, profile: EngineProfile, model_dir: Path, *, arriving: bool = False) -> None:
        """arriving: the weights are still being fetched, see arriving.py."""
        prepare_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from workers.engine.resume_grammar import continue_grammars
        from workers.engine.resume_penalties import ResumePenalties
        from workers.engine.uncompiled import uncompile

        uncompile()
        continue_grammars()
        self.profile = profile
        self._board = StatsBoard()
        args = AsyncEngineArgs(
            model=str(model_dir),
            **(engine_args(profile) | _lora_args(profile) | _load_format(profile, arriving)),
            # Nothing of ours runs in the core beside speculation: vLLM refuses it.
            logits_processors=None if profile.speculative_method else [ResumePenalties],
            disable_log_stats=True,  # our own logger below; vLLM's would keep a Prometheus registry
        )
        config = args.create_engine_config()
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        with forking.ForkWatch() as watch:
            self._llm = AsyncLLM.from_vllm_config(
                config, disable_log_stats=True, stat_loggers=[self._board.logger]
            )
        self.threads_at_fork = watch.threads_at_fork
        self.core_pids = [child.pid for child in multiprocessing.active_children() if child.pid]
        # The core may have reduced it to what its KV cache can hold.
        self._max_model_len: int = self._llm.model_config.max_model_len
        cache = self._llm.vllm_config.cache_config
        self._kv_tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
        self._hf = self._llm.get_tokenizer()
        self._tokenizer: Tokenizer = self._hf._tokenizer  # the Rust one; only "fast" tokenizers have it
        self._eos = _eos_ids(self._llm)
        self._speaks_calls = _speaks_calls(self._hf)
        # How the model writes calls, where that is not as the house does; its template has words for functions then.
        self._form = None if self._speaks_calls else native_form.form_of(self._render)
        self._tags = _special_tags(self._hf, self._form)
        self._stopped = False
        self._loras: dict[str, Any] = {}  # adapter -> vLLM's LoRARequest
        self._n_loaded = 0  # ever: a number is never used again, whatever vLLM may remember of it

    # -- the Engine interface

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def kv_tokens(self) -> int:
        return self._kv_tokens

    def tokenize(self, text: str) -> list[int]:
        """Thread-safe; about 0.5 ms per 1,000 characters."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def tokenize_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Thread-safe. The template runs in transformers' sandbox; its refusals become EngineInputError."""
        checked = check_messages(messages)
        if tools or any("tool_calls" in message or message["role"] == "tool" for message in checked):
            checked, tools = self._told(checked, tools)
        if not self._hf.chat_template:
            raise EngineInputError(
                "no_chat_template",
                "messages",
                "this model has no chat template; use the completions endpoint",
            )
        try:
            text = self._render(checked, tools=tools)
        except Exception as error:  # jinja's own and whatever the template's expressions raise
            raise EngineInputError(
                "invalid_messages", "messages", f"the model's chat template refused the messages: {error}"
            ) from None
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool = True,
    ) -> str:
        text: str = self._hf.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _told(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Functions, calls and results as the template takes them, or in words where it has none for them."""
        if not self._speaks_calls and self._form is None:
            return tool_form.as_words(messages, tools), None
        try:
            if self._form is not None:
                return native_form.turns_for(self._form, messages), tools
            return tool_form.parsed_arguments(messages), tools
        except ValueError:
            raise EngineInputError(
                "invalid_messages",
                "messages",
                "messages: the arguments of a call are no JSON object; send it as the model made it",
            ) from None

    async def start(self) -> None:
        """Make one token: proof that the whole path works, and the moment the loop adopts the engine."""
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        async for _ in self.generate(
            EngineRequest("warm-up", ids, SamplingSpec(max_tokens=1, temperature=0.0))
        ):
            pass

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            # In a thread: it waits for the core's end. The loop must go on, it is asked to close the sockets.
            await asyncio.to_thread(self._llm.shutdown, _SHUTDOWN_S)

    async def check_health(self) -> None:
        if self._stopped or self._llm.errored:
            raise EngineDead("the engine core has ended")

    async def load_adapter(self, adapter: str, directory: Path) -> None:
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        if adapter in self._loras:
            return
        if len(self._loras) >= self.profile.max_loras:
            # vLLM would put another one out, maybe one in use.
            raise AdapterRefused(f"{self.profile.max_loras} adapters are loaded: that is max_loras")
        self._n_loaded += 1
        request = LoRARequest(adapter, self._n_loaded, str(directory))
        try:
            is_loaded = await self._llm.add_lora(request)
        except EngineDeadError as error:
            raise EngineDead("the engine core has ended") from error
        except Exception as error:  # the core's own error, by its text only
            raise AdapterRefused(str(error).replace(str(directory), "the adapter")[:300]) from None
        if not is_loaded:
            raise AdapterRefused("the engine did not take it")
        self._loras[adapter] = request

    @property
    def sleep_level(self) -> int:
        return self.profile.sleep_level

    async def sleep(self) -> None:
        await self._asked(self._llm.sleep(level=self.profile.sleep_level))

    async def wake(self) -> None:
        """Level 2 has dropped the weights: they are read again from the model's directory before KV memory is taken,
        in vLLM's own order."""
        if self.profile.sleep_level == 2:
            await self._asked(self._llm.wake_up(tags=["weights"]))
            await self._asked(self._llm.collective_rpc("reload_weights"))
            await self._asked(self._llm.wake_up(tags=["kv_cache"]))
        else:
            await self._asked(self._llm.wake_up())

    @staticmethod
    async def _asked(call: Coroutine[Any, Any, Any]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await call
        except EngineDeadError as error:
            raise EngineDead("the engine core has ended") from error

    async def unload_adapter(self, adapter: str) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        request = self._loras.pop(adapter, None)
        if request is None:
            return
        try:
            await self._llm.remove_lora(request.lora_int_id)
        except EngineDeadError as error:
            raise EngineDead("the engine core has ended") from error

    def stats(self) -> EngineStats:
        return self._board.read()

    def take_steps(self) -> Steps:
        return self._board.steps.take()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        sampling, prior = request.sampling, request.prior_token_ids
        n_prompt = len(request.prompt_token_ids)
        # A chat names as many as were asked for; a completion the chosen token beside them.
        n_top = sampling.logprobs if request.endpoint is Endpoint.CHAT else None
        if not n_prompt:
            raise EngineInputError("empty_prompt", "messages", "the prompt has no tokens; send some text")
        if n_prompt >= self._max_model_len:
            raise context_exceeded(n_prompt, self._max_model_len)
        if (
            prior
            and self.profile.speculative_method
            and (sampling.presence_penalty or sampling.frequency_penalty)
        ):
            raise EngineInputError(
                "cannot_continue",
                "presence_penalty",
                "the answer was interrupted and cannot go on with penalties "
                "beside speculative decoding: send it again",
            )
        tags, calls = None, None
        if sampling.calls is not None:
            tags = self._tags
            if self._form is not None:
                names = names_of(request.body, sampling.calls)
                calls = NativeCalls(self._form, names, is_marked=bool(tags))
        text_of = Detokenizer(self._tokenizer, request.prompt_token_ids, sampling.stop, tags, calls)
        n_left = min(sampling.max_tokens, self._max_model_len - n_prompt) - len(prior)
        if prior:
            # Earlier attempts emitted this text; whatever they held back comes with our first delta.
            text_of.push(prior)
            ended = text_of.stopped or (prior[-1] in self._eos and not sampling.ignore_eos)
            if ended or n_left <= 0:
                held_back = "" if text_of.stopped else text_of.push([], final=True)[1]
                yield Delta([], held_back, FinishReason.STOP if ended else FinishReason.LENGTH)
                return
        self._board.n_inflight += 1
        try:
            async with aclosing(self._outputs(request, n_left)) as outputs:
                async for output in outputs:
                    completion = output.outputs[0]
                    reason = _finish_of(completion.finish_reason)
                    n_all = len(completion.token_ids)
                    n_portion = 1 if request.single_tokens else max(n_all, 1)
                    for at in range(0, max(n_all, 1), n_portion):
                        ids = list(completion.token_ids[at : at + n_portion])
                        ends = reason if at + n_portion >= n_all else None
                        n_ids, text = text_of.push(ids, final=ends is not None)
                        if text_of.stopped:
                            ends = FinishReason.STOP
                        yield Delta(
                            ids[:n_ids],
                            text,
                            ends,
                            min(output.num_cached_tokens or 0, n_prompt),
                            None
                            if sampling.logprobs is None
                            else self._logprobs(completion, at, n_ids, n_top),
                        )
                        if ends is not None:
                            return  # after a stop string this aborts the sequence in the core
        finally:
            self._board.n_inflight -= 1

    # -- helpers

    async def _outputs(self, request: EngineRequest, n_left: int) -> AsyncGenerator[Any, None]:
        """vLLM's own outputs, with its errors made ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = tokens_input(
            request.prompt_token_ids + request.prior_token_ids, cache_salt=request.cache_salt or None
        )
        lora = self._loras[request.adapter] if request.adapter else None
        try:
            params = sampling_params(
                request.sampling, n_left, request.prior_token_ids, form=self._form, tags=self._tags
            )
            async with aclosing(
                self._llm.generate(prompt, params, request.id, lora_request=lora, priority=request.priority)
            ) as outputs:
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise EngineDead("the engine core has ended") from error
        except EngineGenerateError as error:
            raise EngineDead(f"the engine failed: {error.__cause__!r}") from error
        except (VLLMClientError, ValueError) as error:
            raise input_error(error, request) from None

    def _logprobs(self, completion: Any, at: int, n: int, n_top: int | None) -> tuple[TokenLogprob, ...]:
        found = []
        known = (completion.logprobs or ())[at : at + n]
        for token_id, alternatives in zip(completion.token_ids[at : at + n], known, strict=False):
            # vLLM lists the chosen token first, then the best ones; the chosen one may be among them.
            top = sorted(alternatives.items(), key=lambda item: item[1].rank)[:n_top]
            found.append(
                TokenLogprob(
                    token_id,
                    self._text(token_id),
                    alternatives[token_id].logprob,
                    tuple((i, self._text(i), lp.logprob) for i, lp in top),
                )
            )
        return tuple(found)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _lora_args(profile: EngineProfile) -> dict[str, Any]:
    """Nothing where the profile has no adapters: then the engine is what it was without them."""
    if not profile.max_loras:
        return {}
    # vLLM 0.32 on CPU takes the slot of a request without an adapter for the last one (index -1; vllm-project/vllm
    # #48421): beside others it is answered with the adapter that lies there, somebody else's maybe. So there is one
    # slot more than is ever used. Slots are taken from the first, so the last stays as it was made: zero.
    n_slots = profile.max_loras + is_cpu_build()
    return {
        "enable_lora": True,
        "max_loras": n_slots,
        "max_lora_rank": profile.max_lora_rank,
        # Who is in memory is decided by workers/adapters.py: vLLM keeps those and no others.
        "max_cpu_loras": n_slots,
    }


def _load_format(profile: EngineProfile, arriving: bool) -> dict[str, Any]:
    """As the profile says, unless the files are still being fetched."""
    if not arriving:
        return {"load_format": profile.load_format}
    from workers.engine import arriving as loader

    loader.register()
    return {"load_format": loader.FORMAT}


def _speaks_calls(hf: Any) -> bool:
    """Whether the model's template tells it of functions in our form; it may have one of its own for that."""
    try:
        return tool_form.speaks(hf.get_chat_template(tools=[{}]))
    except ValueError:  # it has none at all
        return False


def _special_tags(hf: Any, form: Form | None) -> dict[int, str]:
    """The tags of calls where they are special tokens, which are left out of texts otherwise."""
    tags = (tool_form.OPEN, tool_form.CLOSE) if form is None else native_form.MARKS
    return {
        token: added.content
        for token, added in hf.added_tokens_decoder.items()
        if added.special and added.content in tags
    }


def _finish_of(reason: str | None) -> FinishReason | None:
    return None if reason is None else _FINISH.get(reason, FinishReason.ERROR)


def _eos_ids(llm: Any) -> frozenset[int]:
    """Every token that ends a sequence by itself: the tokenizer's and the generation configuration's."""
    declared = llm.model_config.try_get_generation_config().get("eos_token_id")
    extra: Iterable[int] = [declared] if isinstance(declared, int) else declared or ()
    primary = llm.get_tokenizer().eos_token_id
    return frozenset(extra) | ({primary} if primary is not None else frozenset())
