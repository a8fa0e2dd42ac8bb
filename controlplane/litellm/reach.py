"""What a LiteLLM key may call, as our scopes: pure.

There an empty list means everything, special words mean the team's or the proxy's models, a name may be that of an
access group, and key, team and organization must all allow a model. Here that is one list, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from controlplane.tenants.key_scopes import MAX_MODELS, KeyScopes, Route, allows

Models = tuple[str, ...] | None
Tell = Callable[[str, str], None]
_EVERYTHING: Final = frozenset({"all-proxy-models", "all-team-models", "*"})
_NOTHING: Final = "no-default-models"
_ROUTES: Final = {
    "chat/completions": Route.CHAT,
    "completions": Route.COMPLETIONS,
    "models": Route.MODELS,
}
# Names of groups of routes there, with what of ours is in them.
_GROUPS: Final = {
    "llm_api_routes": tuple(Route),
    "openai_routes": tuple(Route),
    "info_routes": (Route.MODELS,),
    "management_routes": (),
}
NO_V1: Final = frozenset({"management", "read_only"})  # kinds of keys that call no model


def models_of(names: Iterable[str], group: Callable[[str], tuple[str, ...]]) -> Models:
    """A list of allowed models without special words; None = all."""
    found: list[str] = []
    for name in names:
        if name in _EVERYTHING:
            return None
        if name != _NOTHING:
            found += group(name) or (name,)
    names = tuple(names)
    return tuple(dict.fromkeys(found)) if names else None


def both(first: Models, second: Models) -> Models:
    """What both allow."""
    if first is None or second is None:
        return second if first is None else first
    kept = [name for name in first if allows(second, name)]
    kept += [name for name in second if allows(first, name)]
    return tuple(dict.fromkeys(kept))


def scopes_of(models: Models, routes: Iterable[str], tell: Tell) -> KeyScopes:
    """The scopes; names that are none here are left out, which allows less, never more."""
    if models is not None:
        good = [name for name in models if not list(KeyScopes(models=(name,)).problems())]
        if len(good) < len(models):
            bad = ", ".join(sorted(set(models) - set(good))[:3])
            tell(
                f"models {bad} have names that no deployment can have here", "deploy them under another name"
            )
        if len(good) > MAX_MODELS:
            tell(
                f"{len(good)} allowed models became {MAX_MODELS}",
                "use the beginning of names with * at its end",
            )
        models = tuple(good[:MAX_MODELS])
    return KeyScopes(routes=_routes_of(tuple(routes), tell), models=models)


def _routes_of(routes: tuple[str, ...], tell: Tell) -> tuple[str, ...] | None:
    if not routes:
        return None
    found: set[Route] = set()
    unknown = []
    for route in routes:
        plain = route.strip("/").removeprefix("v1/")
        if route in _GROUPS:
            found |= set(_GROUPS[route])
        elif plain in _ROUTES:
            found |= {_ROUTES[plain], Route.REQUESTS}
        elif plain in ("*", "") or route.endswith("/*"):
            found |= set(Route)
        else:
            unknown.append(route)
    if unknown:
        tell(f"routes {', '.join(unknown[:3])} are none of /v1 here", "call those services elsewhere")
    return None if found == set(Route) else tuple(sorted(route.value for route in found))
