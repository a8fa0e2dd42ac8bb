"""Bodies of /v1/chat/completions and /v1/completions: decoded, checked field by field, nothing reserved yet.

Called by the generation handler before admission. The rule for what a replica cannot honour yet: a field that
would change the answer is refused by name with the remedy, a harmless one is accepted, nothing unknown
passes. The body itself travels on verbatim, so that what was checked here is what the replica reads.
"""

from __future__ import annotations

import re
from array import array
from operator import attrgetter
from typing import Any, Final

import msgspec

from controlplane.gateway.bodies import ChatBody, CompletionBody, Message
from controlplane.gateway.errors import ApiError, bad_request
from controlplane.gateway.structured import json_schema_of
from controlplane.gateway.surface import Surface
from controlplane.gateway.tools import check_history, rule_of
from controlplane.policy import estimate
from workers.contract import CallRule, Endpoint, Sampling

MAX_STOPS: Final = 16
MAX_LOGIT_BIAS: Final = 1_024
MAX_TOKEN_ID: Final = 2**31 - 1


class GenerationRequest(msgspec.Struct, gc=False):
    """A checked body: all that the gateway needs of it. `max_tokens` None = as much as the context leaves, 0 = it asks
    how long its prompt is."""

    endpoint: Surface
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    n_text_bytes: int
    n_messages: int
    body: ChatBody | CompletionBody
    stop: tuple[str, ...]
    logprobs: int | None  # alternatives per token; 0 = the chosen one only; None = off
    slo_class: str | None = None  # named by a header
    end_customer: str | None = None  # named by a header, or in OpenAI's words in the body
    tier: str | None = None  # `service_tier`; None, "auto": the default of whoever asks
    json_schema: str | None = None  # JSON text of the schema that the answer follows
    token_ids: list[int] | None = None  # the prompt, where it came so: its length is no estimate then
    calls: CallRule | None = None  # functions that the answer may or must call
    tools: bytes = b""  # they, as JSON
    echo: dict[str, Any] | None = None  # members of a response that repeat what was asked

    def prompt_bytes(self) -> bytes:
        """The prompt's text for finding its beginnings again; not what the model reads."""
        body = self.body
        if self.token_ids is not None:
            return array("I", self.token_ids).tobytes()
        if isinstance(body, CompletionBody):
            prompt = body.prompt[0] if isinstance(body.prompt, list) else body.prompt
            return str(prompt).encode("utf-8", "surrogatepass")
        # Templates tell of the tools first.
        parts: list[str] = [self.tools.decode(), "\0"] if self.tools else []
        for message in body.messages:
            content = message.content
            if isinstance(content, list):
                content = "".join(part.text or "" for part in content)
            parts += (message.role, "\0", content or "", "\0")
            for call in message.tool_calls or ():
                parts += (call.function.name, "\0", call.function.arguments, "\0")
        return "".join(parts).encode("utf-8", "surrogatepass")

    def question(self) -> str:
        """The text that tells most of how long the answer will be: the prompt, or the last message of a chat."""
        body = self.body
        if self.token_ids is not None:
            return ""
        if isinstance(body, CompletionBody):
            return str(body.prompt[0] if isinstance(body.prompt, list) else body.prompt)
        content = body.messages[-1].content if body.messages else ""
        if isinstance(content, list):
            return "".join(part.text or "" for part in content)
        return content or ""

    def sampling(self, max_tokens: int) -> Sampling:
        """Parameters for the replica; `max_tokens` is what is held."""
        body = self.body
        top_k = body.top_k
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=0 if top_k is None or top_k < 0 else top_k,
            min_p=body.min_p or 0.0,
            seed=body.seed,
            stop=self.stop,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logprobs=self.logprobs,
            ignore_eos=bool(body.ignore_eos),
            logit_bias=body.logit_bias or {},
            json_schema=self.json_schema,
            calls=self.calls,
        )


# Field -> (values that ask for nothing, remedy). Everything else would change the answer or promise what is
# not kept.
UNSUPPORTED: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "n": ((None, 1), "send one request per choice"),
    "best_of": ((None, 1), "leave it out"),
    "echo": ((None, False), "leave it out and prepend the prompt yourself"),
    "suffix": ((None, ""), "leave it out"),
    "functions": ((None, []), "send tools"),
    "function_call": ((None, "none", "auto"), "send tool_choice"),
    "modalities": ((None, ["text"]), 'leave it out or send ["text"]'),
    "audio": ((None,), "leave it out"),
    "service_tier": (
        (None, "auto", "default", "flex", "priority"),
        'leave it out, or send "auto", "default", "flex" or "priority"',
    ),
    "store": ((None, False), "leave it out: requests and answers are not stored"),
    "reasoning_effort": ((None, "none"), "leave it out"),
    "verbosity": ((None, "medium"), "leave it out"),
    "web_search_options": ((None,), "leave it out"),
}
_CHAT_FIELDS = tuple(f for f in ChatBody.__struct_fields__ if f in UNSUPPORTED)
_COMPLETION_FIELDS = tuple(f for f in CompletionBody.__struct_fields__ if f in UNSUPPORTED)
_CHAT_VALUES, _COMPLETION_VALUES = attrgetter(*_CHAT_FIELDS), attrgetter(*_COMPLETION_FIELDS)
_CHAT_UNSET, _COMPLETION_UNSET = (None,) * len(_CHAT_FIELDS), (None,) * len(_COMPLETION_FIELDS)

_decode_chat = msgspec.json.Decoder(ChatBody).decode
_decode_completion = msgspec.json.Decoder(CompletionBody).decode


def parse(endpoint: Endpoint, body: bytes) -> GenerationRequest:
    """The checked request, or an ApiError (400) naming the field at fault."""
    if endpoint is Endpoint.CHAT:
        chat: ChatBody = decoded(_decode_chat, body)
        if (values := _CHAT_VALUES(chat)) != _CHAT_UNSET:
            _refuse_unsupported(_CHAT_FIELDS, values)
        limit = _max_tokens(chat.max_tokens, chat.max_completion_tokens)
        request = _request(endpoint, chat, limit, _measure_messages(chat.messages), len(chat.messages))
        if chat.tools is not None or chat.tool_choice is not None:
            request.calls, request.tools = rule_of(chat)
            request.n_text_bytes += len(request.tools)
        return request
    completion: CompletionBody = decoded(_decode_completion, body)
    if (values := _COMPLETION_VALUES(completion)) != _COMPLETION_UNSET:
        _refuse_unsupported(_COMPLETION_FIELDS, values)
    prompt = completion.prompt
    if isinstance(prompt, list):
        if len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list):
            return _request_of_ids(endpoint, completion, prompt)
    if not isinstance(prompt, str):
        raise bad_request("prompt must be a string or token ids", "prompt", "invalid_type")
    if not prompt:
        raise bad_request("prompt is empty; send at least one character", "prompt")
    return _request(endpoint, completion, completion.max_tokens, _n_bytes(prompt), 0)


def _request_of_ids(endpoint: Endpoint, body: CompletionBody, prompt: list[Any]) -> GenerationRequest:
    """Whether the model knows them, its replica says."""
    if not prompt:
        raise bad_request("prompt is empty; send at least one token", "prompt")
    if set(map(type, prompt)) != {int}:
        raise bad_request(
            "prompt: several prompts are not supported; send one request for each, a string or a list of token ids",
            "prompt",
            "unsupported_value",
        )
    if min(prompt) < 0 or max(prompt) > MAX_TOKEN_ID:
        raise bad_request(f"prompt: token ids lie between 0 and {MAX_TOKEN_ID}", "prompt")
    request = _request(endpoint, body, body.max_tokens, len(prompt) * estimate.BYTES_PER_TOKEN, 0)
    request.token_ids = prompt
    return request


def _request(
    endpoint: Endpoint,
    body: ChatBody | CompletionBody,
    max_tokens: int | None,
    n_text_bytes: int,
    n_messages: int,
) -> GenerationRequest:
    options = body.stream_options
    if options is not None and not body.stream:
        raise bad_request("stream_options is only allowed when stream is true", "stream_options")
    if body.logit_bias:
        _check_bias(body.logit_bias)
    return GenerationRequest(
        endpoint=endpoint,
        model=body.model,
        stream=bool(body.stream),
        include_usage=options is not None and bool(options.include_usage),
        max_tokens=max_tokens,
        n_text_bytes=n_text_bytes,
        n_messages=n_messages,
        body=body,
        stop=_stops(body.stop),
        logprobs=_logprobs(body),
        tier=body.service_tier,
        json_schema=_json_schema(body),
    )


def _refuse_unsupported(names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    for name, value in zip(names, values, strict=True):
        neutral, remedy = UNSUPPORTED[name]
        if value is not None and value not in neutral:
            raise bad_request(
                f"{name} is not supported by this server: {remedy}", name, "unsupported_parameter"
            )


def _max_tokens(old: int | None, new: int | None) -> int | None:
    if old is not None and new is not None and old != new:
        raise bad_request(
            "max_tokens and max_completion_tokens differ; send one of them", "max_completion_tokens"
        )
    return old if new is None else new


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", "stop")
    if not all(stops):
        raise bad_request("stop: an empty string would stop everything; leave it out", "stop")
    return stops


def _logprobs(body: ChatBody | CompletionBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise bad_request("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    return None


def _json_schema(body: ChatBody | CompletionBody) -> str | None:
    if isinstance(body, CompletionBody) or body.response_format is None:
        return None
    schema = json_schema_of(body.response_format)
    if schema is not None and body.ignore_eos:
        raise bad_request("ignore_eos and response_format exclude each other; leave one out", "ignore_eos")
    return schema


def _check_bias(bias: dict[str, float]) -> None:
    if len(bias) > MAX_LOGIT_BIAS:
        raise bad_request(
            f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS} are allowed", "logit_bias"
        )
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise bad_request(
                f"logit_bias: key {token[:20]!r} is no token id; use whole numbers", "logit_bias"
            )


def _measure_messages(messages: list[Message]) -> int:
    """UTF-8 bytes of all texts; refuses what no chat model here can read."""
    if not messages:
        raise bad_request("messages is empty; send at least one message", "messages", "empty_messages")
    n_bytes = 0
    for i, message in enumerate(messages):
        content = message.content
        if message.tool_calls:
            n_bytes += check_history(message, f"messages[{i}]")
        if isinstance(content, str):
            n_bytes += len(content) if content.isascii() else len(content.encode("utf-8", "surrogatepass"))
        elif content is None:
            if message.role != "assistant":
                raise bad_request(
                    f"messages[{i}].content is missing; only an assistant message may leave it out",
                    f"messages[{i}].content",
                )
        else:
            for k, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    raise bad_request(
                        f"messages[{i}].content[{k}]: only text parts are supported, "
                        f"this one is {part.type[:40]!r}",
                        f"messages[{i}].content[{k}]",
                        "unsupported_content",
                    )
                n_bytes += _n_bytes(part.text)
    return n_bytes


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


_PATH = re.compile(r" - at `([^`]*)`\Z")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")
_MISSING = re.compile(r"missing required field `([^`]*)`")


def decoded(decode: Any, body: bytes) -> Any:
    """What a decoder makes of a body; its errors become ApiErrors (400) that name the field."""
    try:
        return decode(body)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None
    except ValueError as error:  # malformed, or text that is no UTF-8
        raise bad_request(f"the body is not valid JSON: {error}", None, "invalid_json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", None, "invalid_json") from None


def _field_error(text: str) -> ApiError:
    """msgspec's sentence, such as "Expected `float` <= 2.0 - at `$.temperature`", as a 400 on that field."""
    match = _PATH.search(text)
    at = match.group(1).removeprefix("$").lstrip(".") if match else ""
    sentence = text[: match.start()] if match else text
    for pattern, code in ((_UNKNOWN, "unknown_parameter"), (_MISSING, "missing_required_parameter")):
        found = pattern.search(sentence)
        if found:
            param = f"{at}.{found.group(1)}" if at else found.group(1)
            verb = (
                "is not known to this server: leave it out" if code == "unknown_parameter" else "is required"
            )
            return bad_request(f"{param} {verb}", param, code)
    if not at:
        return bad_request("the body must be a JSON object", None, "invalid_type")
    code = "invalid_type" if "got `" in sentence else "invalid_value"
    return bad_request(f"{at}: {sentence[:1].lower()}{sentence[1:]}", at, code)
