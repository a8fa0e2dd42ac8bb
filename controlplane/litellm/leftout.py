"""What of a LiteLLM proxy has no counterpart here, each with a remedy: pure. Nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from controlplane.litellm.planned import Note
from controlplane.litellm.proxyconfig import ModelEntry, ProxyConfig
from controlplane.litellm.source import Key, Source, Team

# Fields of a row that mean something where they are not empty: (field, what it was, what to do).
_OF_KEYS: Final = (
    ("router_settings", "router settings have no counterpart", "routing is the house's; nothing to set"),
    ("config", "settings of a key have no counterpart", "send them with each request"),
    (
        "permissions",
        "permissions have no counterpart",
        "make a management token for what is no call of a model",
    ),
    ("policies", "policies have no counterpart", "check prompts before they are sent"),
    ("budget_fallbacks", "fallbacks of a budget have no counterpart", "watch its alerts"),
    (
        "object_permission_id",
        "permissions on tools, agents and stores have no counterpart",
        "there are none here",
    ),
    ("auto_rotate", "keys do not rotate by themselves", "rotate it in the console or over the API"),
)
_OF_TEAMS: Final = (("policies", "policies have no counterpart", "check prompts before they are sent"),)
_OF_METADATA: Final = (
    ("guardrails", "guardrails have no counterpart", "check prompts before they are sent"),
    ("model_rpm_limit", "requests per minute of one model have no limit", "set rpm on the key or project"),
    ("model_tpm_limit", "tokens per minute of one model have no limit", "set limits on the key or project"),
    ("tag_rpm_limit", "requests per minute of a tag have no limit", "give each tag a key of its own"),
)


def within(metadata: Any, name: str) -> Any:
    """An entry of a metadata column, None where there is none."""
    return metadata.get(name) if isinstance(metadata, dict) else None


def lost_of_key(row: Key) -> Iterator[tuple[str, str]]:
    """(what, remedy) of what a key loses."""
    yield from ((what, remedy) for name, what, remedy in _OF_KEYS if getattr(row, name))
    yield from ((what, remedy) for name, what, remedy in _OF_METADATA if within(row.metadata, name))


def lost_of_team(row: Team) -> Iterator[tuple[str, str]]:
    """(what, remedy) of what a team loses."""
    yield from ((what, remedy) for name, what, remedy in _OF_TEAMS if getattr(row, name))
    yield from ((what, remedy) for name, what, remedy in _OF_METADATA if within(row.metadata, name))


def left_out(source: Source, config: ProxyConfig) -> Iterator[Note]:
    """Rows and entries of which nothing is made."""
    for user in source.users:
        if user.user_email:
            yield Note("user", user.user_email, "people sign in here themselves", "invite them")
    for end_user in source.end_users:
        if end_user.budget_id or end_user.blocked:
            yield Note(
                "end customer",
                end_user.alias or end_user.user_id,
                "limits of end customers have no counterpart",
                "give those with limits a key of their own",
            )
    for entry in config.models:
        yield Note("model", entry.name, *_reason(entry))
    known = {entry.name for entry in config.models}
    for stored in source.models:
        if stored.model_name not in known:
            yield Note(
                "model",
                stored.model_name,
                "added at run time: where it is served is encrypted in LiteLLM's database",
                "deploy it here under this name",
            )


def lost(source: Source, config: ProxyConfig) -> Iterator[Note]:
    """What belongs to no row that is carried over."""
    names = {team.team_id: team.team_alias or team.team_id for team in source.teams}
    for member in source.team_members:
        if member.budget_id:
            yield Note(
                "team",
                names.get(member.team_id, member.team_id),
                "budgets of single members of a team have no counterpart",
                "set a budget on the member's key",
            )
    for setting, remedy in config.ignored:
        yield Note("setting", setting, "has no counterpart", remedy)


def _reason(entry: ModelEntry) -> tuple[str, str]:
    """(why a model of the configuration is not imported, remedy). Where endpoints elsewhere can be attached, this is
    the place that says so."""
    served = f"{entry.provider}/{entry.model}" + (f" at {entry.api_base}" if entry.api_base else "")
    if entry.speaks_openai and entry.api_base:
        return f"served as {served}, an endpoint elsewhere", "deploy the model here under this name"
    return f"served as {served}, at a provider", "deploy an open model under this name"
