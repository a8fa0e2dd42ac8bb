"""Chat messages as engines take them: checked, with text content only. Pure."""

from __future__ import annotations

from typing import Any, Final

from workers.engine.base import EngineInputError

ROLES: Final = ("system", "developer", "user", "assistant", "tool")


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages whose content is one string. Raises EngineInputError naming the message at
    fault.

    Other members (`name`, `tool_calls`, `tool_call_id`) pass through for the chat template to judge.
    """
    if not messages:
        raise EngineInputError("empty_messages", "messages", "messages is empty; send at least one message")
    checked = []
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise EngineInputError(
                "invalid_role", f"messages[{i}].role", f"role must be one of {', '.join(ROLES)}"
            )
        checked.append({**message, "content": _text_of(message.get("content"), f"messages[{i}].content")})
    return checked


def _text_of(content: object, param: str) -> str:
    """A string, or the texts of `{"type": "text", "text": …}` parts joined by newlines. None is empty."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise EngineInputError("invalid_content", param, "content must be a string or a list of text parts")
    parts = []
    for k, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise EngineInputError(
                "unsupported_content", f"{param}[{k}]", "only text parts are supported by this model"
            )
        parts.append(text)
    return "\n".join(parts)
