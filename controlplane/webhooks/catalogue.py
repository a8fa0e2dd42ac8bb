"""Every kind of event: what it means and what its data holds. The OpenAPI document and the docs are made from this.

Data is flat, ids carry their prefix, money is in nano-dollars; fields are added, never renamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Kind:
    """`fields` maps a name to (JSON type, sentence, example)."""

    name: str
    sentence: str
    fields: dict[str, tuple[str, str, Any]]
    is_mailed: bool = False  # to owners and billing members, too

    def schema(self) -> dict[str, Any]:
        """JSON schema of the data."""
        return {
            "type": "object",
            "required": list(self.fields),
            "properties": {
                name: {"type": kind, "description": sentence, "examples": [example]}
                for name, (kind, sentence, example) in self.fields.items()
            },
        }

    def example(self) -> dict[str, Any]:
        return {name: example for name, (_, _, example) in self.fields.items()}


_BUDGET: Final[dict[str, tuple[str, str, Any]]] = {
    "budget_id": ("string", "The budget", "bud_0193f2c47e1a7b3c9d5e6f7081920a1b"),
    "name": ("string", "Its name", "team chat"),
    "hard": ("boolean", "Whether it refuses what does not fit", True),
    "threshold": ("integer", "Percent of the limit that was crossed", 80),
    "spent_nano": ("integer", "Spent in the window when it was noticed", 40_100_000_000),
    "limit_nano": ("integer", "The limit", 50_000_000_000),
    "window_start": ("string", "Start of the window", "2026-11-01T00:00:00+00:00"),
    "window_end": ("string", "Its end; empty for rolling and total", "2026-12-01T00:00:00+00:00"),
}
_KEY: Final[dict[str, tuple[str, str, Any]]] = {
    "key_id": ("string", "The API key", "key_0193f2c47e1a7b3c9d5e6f7081920a1b"),
    "name": ("string", "Its name", "production backend"),
    "project_id": ("string", "Its project", "prj_0193f2c47e1a7b3c9d5e6f7081920a1b"),
}
_DEPLOYMENT: Final[dict[str, tuple[str, str, Any]]] = {
    "deployment_id": ("string", "The deployment", "dep_0193f2c47e1a7b3c9d5e6f7081920a1b"),
    "name": ("string", "Its name", "chat"),
}
CATALOGUE: Final = {
    kind.name: kind
    for kind in (
        Kind("budget.threshold", "Spending crossed a threshold, once per threshold and window.", _BUDGET, True),
        Kind("budget.exhausted", "All of a budget is spent; a hard one refuses from here on.", _BUDGET, True),
        Kind("key.created", "An API key was made.", _KEY),
        Kind("key.revoked", "An API key was revoked.", _KEY),
        Kind(
            "key.expiring",
            "An API key expires within a week, told once.",
            {**_KEY, "expires_at": ("string", "When", "2026-12-01T00:00:00+00:00")},
            is_mailed=True,
        ),
        Kind("deployment.ready", "A deployment serves.", _DEPLOYMENT),
        Kind(
            "deployment.failed",
            "A deployment was given up for now.",
            {**_DEPLOYMENT, "reason": ("string", "What was found", "the model's files are incomplete")},
            is_mailed=True,
        ),
        Kind(
            "quota.reached",
            "A machine was not launched because a quota would be exceeded; told once an hour and quota.",
            {
                "kind": ("string", "machines, spend_rate or gpu_hours_day, …_week, …_month", "machines"),
                "limit": ("integer", "The limit", 8),
                "used": ("integer", "In use when it was asked for", 8),
                "deployment_id": ("string", "For which a machine was wanted", _DEPLOYMENT["deployment_id"][2]),
            },
            is_mailed=True,
        ),
        Kind(
            "slo.burn",
            "A class spends its error budget too fast to last, or does so no longer.",
            {
                "alert_id": ("string", "The alert", "alr_0193f2c47e1a7b3c9d5e6f7081920a1b"),
                "state": ("string", "burning or ended", "burning"),
                "project_id": ("string", "The project", _KEY["project_id"][2]),
                "slo_class": ("string", "The class", "interactive"),
                "severity": ("string", "page or ticket", "page"),
                "window": ("string", "The long window it was seen in", "1h"),
                "burn_rate": ("number", "How many times too fast, when it began", 14.4),
                "started_at": ("string", "When it began", "2026-11-20T12:00:30+00:00"),
                "ended_at": ("string", "When it ended; empty while it burns", ""),
            },
            is_mailed=True,
        ),
        Kind(
            "invitation.created",
            "Somebody was invited.",
            {"email": ("string", "Who", "new@example.org"), "role": ("string", "As what", "developer")},
        ),
        Kind(
            "webhook.disabled",
            "An endpoint failed for days and is called no more.",
            {"webhook_id": ("string", "The endpoint", "whk_0193f2c47e1a7b3c9d5e6f7081920a1b"),
             "reason": ("string", "Why", "nothing was delivered for 3 days")},
            is_mailed=True,
        ),
        Kind("webhook.test", "Sent when asked for, to try an endpoint out.", {"sentence": ("string", "…", "hello")}),
    )
}  # fmt: skip
