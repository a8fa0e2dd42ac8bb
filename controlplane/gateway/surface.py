"""What a client calls: the endpoints that replicas know, and those that gateways alone know and translate.

Kept apart from the contract with replicas, which a machine of the version before must be able to read.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from workers.contract import Endpoint


class Translated(StrEnum):
    """Chats to replicas. MESSAGES is Anthropic's (messages.py), COUNT one of them that is not answered; RESPONSES is
    OpenAI's second way to ask (responses.py)."""

    MESSAGES = "messages"
    COUNT = "count_tokens"
    RESPONSES = "responses"


Surface = Endpoint | Translated
SURFACES: Final[tuple[Surface, ...]] = (*Endpoint, *Translated)


def served_as(surface: Surface) -> Endpoint:
    """What replicas take it for."""
    return Endpoint.CHAT if isinstance(surface, Translated) else surface
