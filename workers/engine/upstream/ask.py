"""From a client's body to the body that an endpoint is sent: pure.

Only what the model needs goes on: who asks (user, metadata, cache keys) stays here. What an endpoint of the plain
OpenAI kind does not know is refused by name instead of being dropped, since it would change the answer.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from workers.contract import Endpoint, UpstreamSpec
from workers.engine.base import EngineInputError, SamplingSpec

PATHS: Final = {Endpoint.CHAT: "/chat/completions", Endpoint.COMPLETIONS: "/completions"}
# Of the client's body, verbatim; None is left out.
_CHAT: Final = (
    "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "logprobs", "top_logprobs",
)  # fmt: skip
_COMPLETIONS: Final = ("prompt", "logprobs")
_BOTH: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias")
# Not of OpenAI's: vLLM, SGLang and others take them. Field -> value that asks for nothing.
_EXTENSIONS: Final[dict[str, object]] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
}


def body_for(
    spec: UpstreamSpec, endpoint: Endpoint, payload: bytes, sampling: SamplingSpec, max_tokens: int
) -> bytes:
    """Raises EngineInputError naming a field that this endpoint cannot honour."""
    given: dict[str, Any] = msgspec.json.decode(payload)
    wanted = (*(_CHAT if endpoint is Endpoint.CHAT else _COMPLETIONS), *_BOTH)
    body = {name: given[name] for name in wanted if given.get(name) is not None}
    for name, neutral in _EXTENSIONS.items():
        value = getattr(sampling, name)
        if value == neutral:
            continue
        if not spec.extensions:
            raise EngineInputError(
                "unsupported_parameter",
                name,
                f"{name} is not supported by the endpoint that serves this model: leave it out",
            )
        body[name] = value
    limit = spec.max_tokens_field if endpoint is Endpoint.CHAT else "max_tokens"
    body |= {"model": spec.model, "stream": True, limit: max_tokens}
    if spec.stream_usage:
        body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)
