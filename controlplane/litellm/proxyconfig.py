"""What a LiteLLM proxy's config.yaml says that matters here: its models, where they are served, and what it sets.

`os.environ/NAME` stays a reference: no secret is resolved, and none is kept. Raises SourceError.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from controlplane.litellm.source import SourceError

MAX_BYTES: Final = 8 << 20
# Providers under which LiteLLM talks to a server that speaks OpenAI's API, at `api_base`.
OPENAI_LIKE: Final = frozenset(
    {"openai", "hosted_vllm", "vllm", "openai_like", "custom_openai", "text-completion-openai"}
)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of model_list. Several of the same name share its load there."""

    name: str  # what clients send
    provider: str
    model: str  # what the provider is asked for
    api_base: str  # "" = the provider's own
    key_reference: str  # os.environ/NAME, "" where none or where it is written out
    access_groups: tuple[str, ...]

    @property
    def speaks_openai(self) -> bool:
        return self.provider in OPENAI_LIKE


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """The parts of config.yaml. `ignored` names settings that mean something and have no counterpart here."""

    models: tuple[ModelEntry, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()  # of every key: router_settings.model_group_alias
    counts: str = "total"  # what tpm_limit counts: total, input or output
    timezone: str | None = None
    ignored: tuple[tuple[str, str], ...] = ()  # (setting, what to do)

    def access_group(self, name: str) -> tuple[str, ...]:
        """Models of an access group; empty where there is none of this name."""
        return tuple(dict.fromkeys(entry.name for entry in self.models if name in entry.access_groups))


# (section, setting, what to do instead)
_REMEDIES: Final = (
    ("general_settings", "master_key", "make a management token: manage.py create_token"),
    ("general_settings", "allowed_ips", "set scopes.ip_ranges on the keys"),
    ("general_settings", "alerting", "create a webhook for alerts of budgets"),
    ("general_settings", "custom_auth", "issue keys here; there is no hook in the request path"),
    ("general_settings", "enable_jwt_auth", "sign people in by OIDC; programs call with keys"),
    ("general_settings", "max_parallel_requests", "set max_concurrency on the organization"),
    ("general_settings", "global_max_parallel_requests", "set max_concurrency on the organization"),
    ("general_settings", "pass_through_endpoints", "call those services directly"),
    ("router_settings", "fallbacks", "deploy more replicas: no model stands in for another"),
    ("router_settings", "default_fallbacks", "deploy more replicas: no model stands in for another"),
    ("router_settings", "context_window_fallbacks", "choose the model in the client"),
    ("router_settings", "routing_strategy", "routing is by prefix, load and prediction; nothing to set"),
    ("litellm_settings", "callbacks", "use webhooks, metrics and the usage API"),
    ("litellm_settings", "success_callback", "use webhooks, metrics and the usage API"),
    ("litellm_settings", "failure_callback", "use webhooks, metrics and the usage API"),
    ("litellm_settings", "cache", "answers are not cached; prefixes are, on the replicas"),
    ("litellm_settings", "max_budget", "set a budget on the organization"),
    ("litellm_settings", "max_end_user_budget", "set limits on keys: end customers have none of their own"),
    ("litellm_settings", "default_internal_user_params", "invite people with a role"),
    ("litellm_settings", "guardrails", "check prompts before they are sent"),
    ("", "guardrails", "check prompts before they are sent"),
    ("", "mcp_servers", "call those servers directly"),
    ("", "include", "give each included file to --config in turn"),
    ("", "finetune_settings", "no counterpart"),
    ("", "files_settings", "no counterpart"),
)  # fmt: skip


def read(path: Path) -> ProxyConfig:
    """The configuration in this file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(f"--config: {path} is larger than {MAX_BYTES} bytes")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--config: {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise SourceError(f"--config: {path} is no YAML{where}") from None
    if not isinstance(raw, dict):
        raise SourceError(f"--config: {path} must hold a mapping such as model_list: …")
    general, router, litellm = (
        _section(raw, n) for n in ("general_settings", "router_settings", "litellm_settings")
    )
    sections = {"": raw, "general_settings": general, "router_settings": router, "litellm_settings": litellm}
    ignored = tuple(
        (f"{section}.{name}" if section else name, remedy)
        for section, name, remedy in _REMEDIES
        if sections[section].get(name)
    )
    counts = str(general.get("token_rate_limit_type") or "total")
    return ProxyConfig(
        models=tuple(_entry(each, n) for n, each in enumerate(raw.get("model_list") or ())),
        aliases=tuple(sorted(_aliases(router.get("model_group_alias") or {}).items())),
        counts=counts if counts in ("input", "output") else "total",
        timezone=str(litellm["timezone"]) if litellm.get("timezone") else None,
        ignored=ignored,
    )


def _section(raw: dict[str, Any], name: str) -> dict[str, Any]:
    found = raw.get(name) or {}
    if not isinstance(found, dict):
        raise SourceError(f"--config: {name} must be a mapping")
    return found


def _entry(each: Any, n: int) -> ModelEntry:
    params = each.get("litellm_params") if isinstance(each, dict) else None
    if not isinstance(params, dict) or not each.get("model_name") or not params.get("model"):
        raise SourceError(f"--config: model_list[{n}] needs model_name and litellm_params.model")
    text = str(params["model"])
    provider, slash, rest = text.partition("/")
    provider = str(params.get("custom_llm_provider") or (provider if slash else "openai"))
    info = each.get("model_info") or {}
    groups = info.get("access_groups") if isinstance(info, dict) else None
    key = str(params.get("api_key") or "")
    return ModelEntry(
        name=str(each["model_name"]),
        provider=provider,
        model=rest if slash else text,
        api_base=str(params.get("api_base") or params.get("base_url") or ""),
        key_reference=key if key.startswith("os.environ/") else "",
        access_groups=tuple(map(str, groups or ())),
    )


def _aliases(found: dict[str, Any]) -> dict[str, str]:
    """{alias: model}; an alias may also be {"model": …, "hidden": …}."""
    return {
        str(alias): str(target["model"] if isinstance(target, dict) and "model" in target else target)
        for alias, target in found.items()
    }
