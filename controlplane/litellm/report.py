"""A plan as people and programs read it: what is made, what is there, what is left out or changed, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from controlplane import ids
from controlplane.litellm.planned import Fate, Note, Plan

_NAMES_SHOWN: Final = 4
_MODELS_SHOWN: Final = 12


def as_json(plan: Plan, *, is_dry: bool) -> dict[str, Any]:
    """Everything but secrets; equal for equal plans."""
    return {
        "from": plan.where,
        "planned_only": is_dry,
        "counts": {thing: dict(fates) for thing, fates in plan.counts().items()},
        "organizations": [
            {"id": ids.to_text(ids.Prefix.ORGANIZATION, row.id), "name": row.name, "fate": row.fate.value}
            for row in plan.organizations
        ],
        "projects": [
            {
                "id": ids.to_text(ids.Prefix.PROJECT, row.id),
                "name": row.name,
                "slug": row.slug,
                "fate": row.fate.value,
            }
            for row in plan.projects
        ],
        "keys": [
            {
                "id": ids.to_text(ids.Prefix.API_KEY, row.id),
                "project_id": ids.to_text(ids.Prefix.PROJECT, row.project_id),
                "name": row.name,
                "revoked": row.is_revoked,
                "fate": row.fate.value,
            }
            for row in plan.keys
        ],
        "not_carried": [
            {"kind": kind, "what": what, "remedy": remedy, "names": names}
            for (kind, what, remedy), names in _grouped((*plan.left, *plan.notes)).items()
        ],
        "models": plan.models,
    }


def as_text(plan: Plan, *, is_dry: bool, base_url: str) -> str:
    """The summary table, what is not as it was, and the next steps."""
    counts = plan.counts()
    fates = [Fate.NEW, Fate.THERE, Fate.LEFT]
    lines = [
        f"LiteLLM ({plan.where})"
        + (": what an import would do; nothing was changed" if is_dry else ": imported"),
        "",
        f"{'':<16}" + "".join(f"{fate.value:>15}" for fate in fates),
    ]
    for thing, found in counts.items():
        lines.append(f"{thing:<16}" + "".join(f"{found.get(fate.value, 0) or '·':>15}" for fate in fates))
    grouped = _grouped((*plan.left, *plan.notes))
    if grouped:
        lines += ["", "Not carried over, or not as it was:"]
        for (kind, what, remedy), names in grouped.items():
            shown = ", ".join(names[:_NAMES_SHOWN]) + (
                f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            )
            lines += [
                f"  {len(names)} {kind}{'' if len(names) == 1 else 's'} ({shown}): {what}",
                f"      → {remedy}",
            ]
    lines += ["", "Next:"]
    if is_dry:
        lines.append("  run it again without --plan")
    if plan.models:
        more = f" and {len(plan.models) - _MODELS_SHOWN} more" if len(plan.models) > _MODELS_SHOWN else ""
        lines.append(
            f"  serve under the names that clients send: {', '.join(plan.models[:_MODELS_SHOWN])}{more}"
        )
    lines.append(f"  point clients at {base_url}; their keys stay as they are")
    return "\n".join(lines)


def _grouped(notes: Iterable[Note]) -> dict[tuple[str, str, str], list[str]]:
    """{(kind, what, remedy): names}, in the order they came."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for note in notes:
        names = found.setdefault((note.kind, note.what, note.remedy), [])
        if note.name not in names:
            names.append(note.name)
    return found
