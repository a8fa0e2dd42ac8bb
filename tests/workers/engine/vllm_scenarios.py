"""What the vLLM adapter must do, run inside a child of the zygote (the engine may not be made in pytest's
process).

`run` makes one engine on the tiny model, runs every coroutine named `check_*`, and writes its result to a
file.
"""

import asyncio
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from controlplane.gateway.toolcalls import CallReader, whole
from tests.workers.engine.reading import read
from workers.contract import CallRule, Endpoint, FinishReason, HeldFunction
from workers.engine.base import EngineDead, EngineInputError, EngineProfile, EngineRequest, SamplingSpec
from workers.engine.forking import UnsafeForkError
from workers.engine.native_form import Form, form_of
from workers.engine.steps import gaps_of, quantile_ms
from workers.engine.tool_form import OPEN, speaks, written
from workers.engine.vllm import VllmEngine

CHECK_S = 300.0
PROFILE = EngineProfile(max_model_len=1024, max_num_seqs=32, kv_cache_bytes=64 << 20, block_size=32)


def run(argument: dict[str, Any]) -> None:
    """Entry: all checks against one engine, in whose core a function that would be compiled raises."""
    import torch

    torch.compiler.set_stance("fail_on_recompile")
    engine = VllmEngine(PROFILE, Path(argument["model_dir"]))
    results = {}
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result(60)
    for name, check in checks().items():
        try:
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(check(engine), CHECK_S), loop).result(
                CHECK_S + 10
            )
            results[name] = "ok"
        except BaseException:
            results[name] = traceback.format_exc()
    Path(argument["file"]).write_text(json.dumps(results))


def run_with_second_thread(argument: dict[str, Any]) -> int:
    """Entry: constructing beside another thread must be refused, before anything is forked."""
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    try:
        VllmEngine(PROFILE, Path(argument["model_dir"]))
    except UnsafeForkError:
        return 0
    return 1


def run_with_bad_model(argument: dict[str, Any]) -> int:
    """Entry: a model that cannot be loaded raises within the constructor."""
    try:
        VllmEngine(PROFILE, Path(argument["model_dir"]))
    except Exception as error:
        print(f"refused: {error}", file=sys.stderr)
        return 0
    return 1


def run_and_wait(argument: dict[str, Any]) -> None:
    """Entry: an engine that does nothing until it is killed; writes its core's pid."""
    engine = VllmEngine(PROFILE, Path(argument["model_dir"]))
    Path(argument["file"]).write_text(str(engine.core_pids[0]))
    time.sleep(600)


def checks() -> dict[str, Callable]:
    """By name, in order; the one that kills the core is last."""
    found = inspect.getmembers(sys.modules[__name__], inspect.iscoroutinefunction)
    return {n: f for n, f in found if n.startswith("check_")}


def a_request(
    engine: VllmEngine, text: str = "What is a journal?", prior=(), salt=None, **sampling
) -> EngineRequest:
    ids = engine.tokenize_chat([{"role": "user", "content": text}])
    spec = SamplingSpec(**{"max_tokens": 60, "temperature": 0.0, **sampling})
    return EngineRequest(f"t-{text[:8]}", ids, spec, prior_token_ids=list(prior), cache_salt=salt)


async def settle(engine: VllmEngine) -> None:
    """Until the core has told us that nothing runs."""
    end_s = time.monotonic() + 10
    while engine._board.n_running and time.monotonic() < end_s:
        # The core reports with its outputs only, so give it something to report.
        await read(engine, a_request(engine, "tick", max_tokens=2, ignore_eos=True))
    assert engine.stats().n_running == 0


async def check_a_resumed_request_continues_identically_in_ids_and_text(engine: VllmEngine) -> None:
    """Random weights give invalid and multi-byte characters, so half characters are among the cuts."""
    few = dict.fromkeys(range(300, 312), 100.0)  # only these can win, so that penalties decide among them
    for sampling in (
        {"ignore_eos": True},
        {"repetition_penalty": 1.3},
        {"ignore_eos": True, "stop": ("zzzz",)},
        {"ignore_eos": True, "frequency_penalty": 1.5, "logit_bias": few},
        {"ignore_eos": True, "presence_penalty": 2.0, "frequency_penalty": 0.3, "logit_bias": few},
    ):
        for text in ("one", "two"):
            whole = await read(engine, a_request(engine, text, **sampling))
            assert whole.n_tokens > 20
            for cut, _ in whole.pieces[:-1:4]:  # where deltas end: they merge when the loop is late
                rest = await read(engine, a_request(engine, text, prior=whole.token_ids[:cut], **sampling))
                ids = whole.token_ids[:cut] + rest.token_ids
                assert ids == whole.token_ids, (text, cut, sampling, ids, whole.token_ids)
                assert rest.text == whole.texts_after(cut), (text, cut, sampling)
                assert rest.finish is whole.finish


async def check_it_says_what_its_memory_holds(engine: VllmEngine) -> None:
    assert engine.kv_tokens >= PROFILE.max_model_len
    assert engine.kv_tokens % 32 == 0


async def check_a_stop_string_ends_text_before_it_and_frees_the_engine(engine: VllmEngine) -> None:
    whole = await read(engine, a_request(engine, ignore_eos=True))
    stop = next(whole.text[i : i + 3] for i in range(10, 100) if whole.text[i : i + 3].isascii())
    answer = await read(engine, a_request(engine, ignore_eos=True, stop=(stop,)))
    assert answer.finish is FinishReason.STOP
    assert answer.text == whole.text.partition(stop)[0]
    assert answer.n_tokens < whole.n_tokens
    await settle(engine)
    # A resume after the stop string was journaled, but its end was not, ends at once.
    again = await read(engine, a_request(engine, ignore_eos=True, stop=(stop,), prior=answer.token_ids))
    assert (again.token_ids, again.text, again.finish) == ([], "", FinishReason.STOP)


async def check_single_tokens_stay_single_however_slowly_they_are_read(engine: VllmEngine) -> None:
    """An answer whose money may end after any token. A late reader is otherwise given several at once."""
    whole = await read(engine, a_request(engine, ignore_eos=True, logprobs=0))
    ids, text, logprobs, sizes, finish = [], "", [], [], None
    request = replace(a_request(engine, ignore_eos=True, logprobs=0), single_tokens=True)
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            sizes.append(len(delta.token_ids))
            ids += delta.token_ids
            text += delta.text
            logprobs += delta.logprobs or ()
            finish = delta.finish
            if len(sizes) in (2, 9):
                await asyncio.sleep(0.3)
    assert max(sizes) == 1
    assert (ids, text, finish) == (whole.token_ids, whole.text, whole.finish)
    assert [lp.token_id for lp in logprobs] == ids


async def check_finished_priors_need_no_engine(engine: VllmEngine) -> None:
    n_steps = engine.stats().n_steps
    length = await read(engine, a_request(engine, max_tokens=3, prior=[300, 301, 302]))
    assert (length.token_ids, length.finish) == ([], FinishReason.LENGTH)
    eos = await read(engine, a_request(engine, max_tokens=30, prior=[300, engine._hf.eos_token_id]))
    assert (eos.token_ids, eos.finish) == ([], FinishReason.STOP)
    assert engine.stats().n_steps == n_steps


async def check_max_tokens_and_context_bound_the_output(engine: VllmEngine) -> None:
    answer = await read(engine, a_request(engine, max_tokens=7, ignore_eos=True))
    assert (answer.n_tokens, answer.finish) == (7, FinishReason.LENGTH)
    ids = [300 + i % 100 for i in range(1020)]
    answer = await read(engine, EngineRequest("ctx", ids, SamplingSpec(max_tokens=99, ignore_eos=True)))
    assert (answer.n_tokens, answer.finish) == (4, FinishReason.LENGTH)


async def check_bad_input_is_refused_by_name(engine: VllmEngine) -> None:
    ids = [300] * 1024
    cases: list[tuple[Any, str]] = [
        (
            lambda: read(engine, EngineRequest("long", ids, SamplingSpec(max_tokens=1))),
            "context_length_exceeded",
        ),
        (lambda: read(engine, EngineRequest("none", [], SamplingSpec(max_tokens=1))), "empty_prompt"),
        (
            lambda: read(engine, EngineRequest("odd", [300, 2**31 - 1], SamplingSpec(max_tokens=1))),
            "invalid_token",
        ),
        (lambda: read(engine, a_request(engine, temperature=-1.0)), "invalid_request"),
        (lambda: read(engine, a_request(engine, logit_bias={99_999: 1.0})), "invalid_request"),
        (
            lambda: asyncio.to_thread(engine.tokenize_chat, [{"role": "wizard", "content": "x"}]),
            "invalid_role",
        ),
        (
            lambda: asyncio.to_thread(engine.tokenize_chat, [{"role": "developer", "content": "x"}]),
            "invalid_messages",
        ),
    ]
    for call, code in cases:
        try:
            await call()
        except EngineInputError as error:
            assert error.code == code, (error.code, code)
        else:
            raise AssertionError(f"{code}: was not refused")
    assert (await read(engine, a_request(engine))).n_tokens  # and the engine lives


async def check_templates_run_in_a_sandbox(engine: VllmEngine) -> None:
    """A model's chat template is a program by a stranger: it reaches nothing but the messages."""
    own = engine._hf.apply_chat_template  # the pool behind it has copies of the model's template
    hostile = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages.append(messages[0]) }}",
        "{% include '/etc/passwd' %}",
    )
    try:
        for template in hostile:
            engine._hf.apply_chat_template = partial(own, chat_template=template)
            try:
                ids = await asyncio.to_thread(engine.tokenize_chat, [{"role": "user", "content": "x"}])
            except EngineInputError as error:
                assert error.code == "invalid_messages", error.code
            else:
                raise AssertionError(f"{template} gave {engine._hf.decode(ids)!r}")
    finally:
        del engine._hf.apply_chat_template


async def check_cancelling_stops_the_core(engine: VllmEngine) -> None:
    async def consume(i: int) -> None:
        await read(engine, a_request(engine, f"endless {i}", max_tokens=900, ignore_eos=True))

    tasks = [asyncio.create_task(consume(i)) for i in range(8)]
    while engine.stats().n_running < 8:
        await asyncio.sleep(0.005)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, asyncio.CancelledError) for r in results)
    assert engine.stats().n_waiting == 0
    await settle(engine)


async def check_leaving_a_stream_stops_the_core(engine: VllmEngine) -> None:
    async with aclosing(engine.generate(a_request(engine, max_tokens=900, ignore_eos=True))) as deltas:
        async for _ in deltas:
            break
    await settle(engine)


async def check_prefixes_are_cached_within_a_salt_only(engine: VllmEngine) -> None:
    text = "journal " * 100
    for salt, expected in (("a", False), ("a", True), ("b", False), (None, False), (None, True)):
        answer = await read(engine, a_request(engine, text, salt=salt))
        assert (answer.n_cached >= 64) is expected, (salt, answer.n_cached)
    assert engine.stats().n_prefix_hits > 0


async def check_lower_priority_numbers_run_first(engine: VllmEngine) -> None:
    order: list[str] = []

    async def serve(name: str, priority: int, n_tokens: int) -> None:
        ids = engine.tokenize(name)
        spec = SamplingSpec(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        await read(engine, EngineRequest(name, ids, spec, priority=priority))
        order.append(name)

    fill = [asyncio.create_task(serve(f"fill{i}", 0, 200)) for i in range(PROFILE.max_num_seqs)]
    while engine.stats().n_running < PROFILE.max_num_seqs:
        await asyncio.sleep(0.005)
    low = [asyncio.create_task(serve(f"low{i}", 9, 200)) for i in range(PROFILE.max_num_seqs)]
    await asyncio.sleep(0.05)
    high = asyncio.create_task(serve("high", 1, 2))
    await asyncio.gather(*fill, *low, high)
    assert order.index("high") < min(order.index(f"low{i}") for i in range(PROFILE.max_num_seqs))


async def check_logprobs_cover_every_token_in_order(engine: VllmEngine) -> None:
    answer = await read(engine, a_request(engine, logprobs=3, max_tokens=8, ignore_eos=True))
    assert [lp.token_id for lp in answer.logprobs] == answer.token_ids
    for lp in answer.logprobs:
        assert lp.logprob <= 0
        ranked = [p for _, _, p in lp.top]
        assert len(ranked) == 3
        assert ranked == sorted(ranked, reverse=True)
        assert lp.top[0][0] == lp.token_id  # greedy
    hot = a_request(engine, logprobs=2, max_tokens=8, ignore_eos=True, temperature=2.0, seed=1)
    chat, legacy = await read(engine, hot), await read(engine, replace(hot, endpoint=Endpoint.COMPLETIONS))
    assert {len(lp.top) for lp in chat.logprobs} == {2}  # also where the chosen token is none of them
    assert 3 in {len(lp.top) for lp in legacy.logprobs}
    chosen = await read(engine, a_request(engine, logprobs=0, max_tokens=2, ignore_eos=True))
    assert [lp.top for lp in chosen.logprobs] == [(), ()]


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 10, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)


async def check_an_answer_follows_its_schema_also_when_it_is_continued_anywhere(engine: VllmEngine) -> None:
    """Greedy, so every continuation must be the undisturbed answer; a random model would never write JSON itself."""
    request = a_request(engine, json_schema=SCHEMA, max_tokens=120)
    whole = await read(engine, request)
    said = json.loads(whole.text)
    assert list(said) == ["name", "age", "tags"]
    assert 10 <= said["age"] <= 99
    assert len(said["name"]) <= 6
    assert set(said["tags"]) <= {"a", "b"}
    assert whole.finish is FinishReason.STOP
    for n in range(1, len(whole.token_ids)):
        rest = await read(engine, replace(request, id=f"rest{n}", prior_token_ids=whole.token_ids[:n]))
        assert whole.token_ids[:n] + rest.token_ids == whole.token_ids, n


async def check_a_schema_that_no_grammar_can_follow_is_refused_by_name(engine: VllmEngine) -> None:
    for schema in (
        '{"type": "nonsense"}',
        '{"type": "object", "patternProperties": {"x": {}}, "$ref": "#/no"}',
    ):
        try:
            await read(engine, a_request(engine, json_schema=schema))
        except EngineInputError as error:
            assert (error.code, error.param) == ("invalid_schema", "response_format"), error
        else:
            raise AssertionError("accepted")


async def check_what_a_schema_never_allowed_cannot_be_continued(engine: VllmEngine) -> None:
    plain = await read(engine, a_request(engine, ignore_eos=True))
    request = a_request(engine, json_schema=SCHEMA)
    answer = await read(engine, replace(request, id="foreign", prior_token_ids=plain.token_ids[:4]))
    assert answer.finish is FinishReason.ERROR, answer


CITY = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "maximum": 99}},
        "required": ["city", "n"],
        "additionalProperties": False,
    }
)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": json.loads(CITY)}},
    {"type": "function", "function": {"name": "clock"}},
]
WEATHER = HeldFunction("weather", CITY, strict=True)
CLOCK = HeldFunction("clock", '{"type":"object","properties":{},"additionalProperties":false}')


def calls_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = CallReader()
    content, calls = whole([reader.read(text, final=True)])
    assert not content, text
    return [(name, json.loads(arguments)) for name, arguments in calls]


async def check_calls_that_must_be_made_follow_their_schemas_also_when_continued_anywhere(
    engine: VllmEngine,
) -> None:
    """Greedy, so every continuation must be the undisturbed answer; a random model would never write a call."""
    rules = {
        "weather": CallRule((WEATHER,), must=True, many=False),
        "clock": CallRule((CLOCK,), must=True, many=False),
        "either": CallRule((WEATHER, CLOCK), must=True, many=False),
    }
    for name, rule in rules.items():
        request = a_request(engine, calls=rule, max_tokens=120)
        whole_answer = await read(engine, request)
        assert whole_answer.finish is FinishReason.STOP
        ((called, arguments),) = calls_in(whole_answer.text)
        assert called == name or (name == "either" and called in ("weather", "clock"))
        assert list(arguments) == (["city", "n"] if called == "weather" else [])
        if called == "weather":
            assert len(arguments["city"]) <= 6
        if name == "clock":
            continue
        for n in range(1, len(whole_answer.token_ids), 5):
            rest = await read(
                engine, replace(request, id=f"{name}{n}", prior_token_ids=whole_answer.token_ids[:n])
            )
            assert whole_answer.token_ids[:n] + rest.token_ids == whole_answer.token_ids, (name, n)


async def check_several_calls_and_calls_beside_words_or_json(engine: VllmEngine) -> None:
    both = (WEATHER, CLOCK)
    many = await read(engine, a_request(engine, calls=CallRule(both, must=True), max_tokens=150))
    content, calls = whole([CallReader().read(many.text, final=True)])
    assert {name for name, _ in calls} <= {"weather", "clock"}
    assert calls
    begun = content.strip()[: len(OPEN)]  # of another call, where the answer was cut off
    assert not begun or (many.finish is FinishReason.LENGTH and OPEN.startswith(begun)), content
    free = await read(engine, a_request(engine, calls=CallRule(), max_tokens=20))
    plain = await read(engine, a_request(engine, max_tokens=20))
    assert free.token_ids == plain.token_ids, "nothing is held to anything"
    rule = CallRule(both, many=False)
    held = await read(engine, a_request(engine, calls=rule, json_schema=SCHEMA, max_tokens=150))
    assert (
        (list(json.loads(held.text)) == ["name", "age", "tags"])
        if held.text[0] == "{"
        else calls_in(held.text)
    )


async def check_a_tool_that_no_grammar_can_follow_is_refused_by_name(engine: VllmEngine) -> None:
    try:
        await read(
            engine, a_request(engine, calls=CallRule((HeldFunction("f", '{"type": "nonsense"}'),), must=True))
        )
    except EngineInputError as error:
        assert (error.code, error.param) == ("invalid_schema", "tools"), error
    else:
        raise AssertionError("accepted")


async def check_tools_calls_and_results_are_in_the_prompt(engine: VllmEngine) -> None:
    """In words where the template has none for them, and as the template has it where it does."""
    called = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    chat = [
        {"role": "user", "content": "What is it like?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "It rains"},
    ]
    told = engine._hf.decode(engine.tokenize_chat(chat, TOOLS))
    for part in (
        '"name": "clock"',
        written("weather", '{"city": "Rome"}'),
        "<tool_response>\nIt rains\n</tool",
    ):
        assert part in told, told
    plain = engine.tokenize_chat(chat[:1])
    assert "clock" not in engine._hf.decode(plain)
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }} {{ tool | tojson }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
        "{% endfor %}"
    )
    own = engine._hf.apply_chat_template
    try:
        engine._hf.apply_chat_template = partial(own, chat_template=template)
        engine._speaks_calls = speaks(template)
        told = engine._hf.decode(engine.tokenize_chat(chat, TOOLS))
        for part in ("[weather {", "[clock {", '<tool_call>{"city": "Rome"}</tool_call>', "tool: It rains"):
            assert part in told, told
    finally:
        del engine._hf.apply_chat_template
        engine._speaks_calls = False


LLAMAS = (
    "{% for m in messages %}{% if m.tool_calls %}<assistant>"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}<{{ m.role }}>{% if loop.first and tools %}{{ tools | tojson }}{% endif %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


async def check_calls_in_a_models_own_form_are_the_houses_also_when_continued_anywhere(
    engine: VllmEngine,
) -> None:
    """A template that speaks Llama's form: functions are told by it, and calls are held to it and rewritten."""
    own = engine._hf.apply_chat_template
    try:
        engine._hf.apply_chat_template = partial(own, chat_template=LLAMAS)
        engine._form = form_of(engine._render)
        assert engine._form is Form.LLAMA
        ids = engine.tokenize_chat([{"role": "user", "content": "How is it?"}], TOOLS)
        assert '"name": "clock"' in engine._hf.decode(ids)
        rule = CallRule((WEATHER,), must=True, many=False)
        spec = SamplingSpec(max_tokens=120, temperature=0.0, calls=rule)
        request = EngineRequest("own", ids, spec, body=json.dumps({"tools": TOOLS}).encode())
        answer = await read(engine, request)
        assert answer.finish is FinishReason.STOP
        said = engine._hf.decode(answer.token_ids, skip_special_tokens=True)
        assert said.startswith('{"name": "weather", "parameters": {"city": "'), said
        ((name, arguments),) = calls_in(answer.text)
        assert (name, list(arguments)) == ("weather", ["city", "n"])
        assert answer.text == written("weather", said.partition('"parameters": ')[2].removesuffix("}"))
        for n in range(1, len(answer.token_ids), 5):
            begun = "".join(await texts_until(engine, request, n))
            prior = answer.token_ids[:n]
            rest = await read(engine, replace(request, id=f"own{n}", prior_token_ids=prior))
            assert prior + rest.token_ids == answer.token_ids, n
            assert begun + rest.text == answer.text, n
    finally:
        del engine._hf.apply_chat_template
        engine._form = None


async def texts_until(engine: VllmEngine, request: EngineRequest, n: int) -> list[str]:
    """What an attempt has said by its token `n`, one at a time."""
    texts: list[str] = []
    n_read = 0
    async with aclosing(engine.generate(replace(request, id=f"begun{n}", single_tokens=True))) as deltas:
        async for delta in deltas:
            texts.append(delta.text)
            n_read += len(delta.token_ids)
            if n_read >= n:
                break
    return texts


async def check_stats_tell_work_from_idleness(engine: VllmEngine) -> None:
    await asyncio.sleep(0.2)
    idle = engine.stats()
    assert (idle.n_running, idle.n_waiting, idle.kv_used_ratio) == (0, 0, 0.0)
    began_s = time.monotonic()
    stream = engine.generate(a_request(engine, ignore_eos=True))
    await anext(stream)
    busy = engine.stats()
    assert busy.n_running == 1
    assert began_s <= busy.last_step_at_s <= time.monotonic()
    assert busy.n_steps > idle.n_steps
    assert busy.kv_used_ratio > 0
    await stream.aclose()


async def check_steps_are_told_with_what_ran_and_how_full_the_cache_was(engine: VllmEngine) -> None:
    await asyncio.sleep(0.2)
    engine.take_steps()
    await asyncio.gather(
        *(read(engine, a_request(engine, f"number {n}", max_tokens=30, ignore_eos=True)) for n in range(2))
    )
    steps = engine.take_steps()
    assert 30 <= steps.n_steps <= 70, steps
    assert 55 <= steps.n_tokens <= 70, steps
    assert sum(n for _, n in gaps_of(steps.buckets)) == steps.n_tokens
    assert 0 < quantile_ms(gaps_of(steps.buckets), 0.5) < 1000
    assert 0 < steps.kv_peak_ratio < 1
    assert engine.take_steps().n_steps == 0


async def check_z_a_dead_core_fails_requests_and_health(engine: VllmEngine) -> None:
    await engine.check_health()
    stream = engine.generate(a_request(engine, max_tokens=900, ignore_eos=True))
    await anext(stream)
    (core_pid,) = engine.core_pids
    os.kill(core_pid, signal.SIGKILL)
    for call in (lambda: _drain(stream), lambda: read(engine, a_request(engine)), engine.check_health):
        try:
            await asyncio.wait_for(call(), 10)
        except EngineDead:
            continue
        raise AssertionError("a dead core was not noticed")
    await engine.stop()


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass
