"""Answers that follow a schema and outlive an attempt: a grammar that starts where the last attempt stopped.

vLLM starts every grammar at its beginning, and the output of earlier attempts is prompt to it, so a resumed answer
would open its JSON a second time. `vllm.py` sends the earlier tokens along, and the grammar takes them in before the
first mask is made, in the thread that compiled it. Imports vLLM: only vllm.py may import this module.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.v1.structured_output import StructuredOutputManager

EXTRA_ARG: Final = "corral_grammar_prior"
_create: Final = StructuredOutputManager._create_grammar


def extra_args(prior_token_ids: list[int]) -> dict[str, Any]:
    """What SamplingParams.extra_args carries to the core."""
    return {EXTRA_ARG: prior_token_ids}


def continue_grammars() -> None:
    """Have vLLM's manager make grammars so; before the core is forked. Safe to repeat."""
    StructuredOutputManager._create_grammar = _create_continued


def _create_continued(manager: StructuredOutputManager, request: Any) -> Any:
    """ValueError where the schema refuses the earlier tokens: vLLM then ends this request alone, with an error."""
    grammar = _create(manager, request)
    params = request.sampling_params
    prior = (params.extra_args or {}).get(EXTRA_ARG) if params is not None else None
    if prior and not grammar.accept_tokens(request.request_id, prior):
        raise ValueError("the schema does not allow what earlier attempts wrote")
    return grammar
