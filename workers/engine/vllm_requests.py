"""A request in vLLM's words, and vLLM's refusal of it in ours.

Called by vllm.py for each attempt. What earlier attempts produced goes with it for penalties and grammars; texts do
not: they are made by text.py. Nothing here touches the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.engine.base import EngineInputError, EngineRequest, SamplingSpec
from workers.engine.native_form import Form
from workers.engine.tool_grammar import fault_of, grammar_of


def sampling_params(
    sampling: SamplingSpec,
    max_tokens: int,
    prior_token_ids: list[int],
    *,
    form: Form | None = None,
    tags: Mapping[int, str] | None = None,
) -> Any:
    """`form`: the model's own for calls, None: the house's. `tags`: of those, what special tokens say."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    from workers.engine import resume_grammar, resume_penalties

    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    extra: dict[str, Any] = {}
    if prior_token_ids and (presence or frequency):
        extra |= resume_penalties.extra_args(prior_token_ids, presence, frequency)
        presence = frequency = 0.0
    structured = None
    if sampling.calls is not None and sampling.calls.functions:
        grammar = grammar_of(sampling.calls, sampling.json_schema, form, tags or {})
        structured = StructuredOutputsParams(grammar=grammar)
    elif sampling.json_schema is not None:
        structured = StructuredOutputsParams(json=sampling.json_schema)
    if structured is not None and prior_token_ids:
        extra |= resume_grammar.extra_args(prior_token_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=sampling.repetition_penalty,
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        logit_bias=sampling.logit_bias or None,
        extra_args=extra or None,
        structured_outputs=structured,
        detokenize=False,  # ours is exact across attempts, see text.py
        output_kind=RequestOutputKind.DELTA,
    )


def input_error(error: Exception, request: EngineRequest) -> EngineInputError:
    """What was wrong with the request, by the field that the client knows."""
    param = getattr(error, "parameter", None)
    calls = request.sampling.calls
    if param is None and calls is not None and calls.functions:
        return EngineInputError(
            "invalid_schema",
            "tools",
            f"tools: {fault_of(str(error), calls)}; leave that out, or leave out strict",
        )
    if param is None and request.sampling.json_schema is not None:
        return EngineInputError(
            "invalid_schema",
            "response_format",
            f"response_format: no grammar follows this schema: {error}",
        )
    if param is None and "out of vocabulary" in str(error):
        return EngineInputError("invalid_token", "prompt", f"prompt: {error}")
    return EngineInputError("invalid_request", param or "body", str(error))
