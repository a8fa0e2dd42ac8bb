"""An explained decision as lines for people. Called by `manage.py explain decision`. Pure.

Reads the stored JSON leniently: a decision of an older version must still show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from autoscaler.explaining import Explanation

_HEADS: Final = {
    "replicas": "how many replicas",
    "machine": "on which machine",
    "retire": "which to give up",
    "offer": "which offer to buy",
    "give_up": "which machine to give up",
    "rest": "what a pool without work keeps",
}
_MACHINE_ORDERS: Final = (
    ("give_up", "give up"),
    ("cancel", "cancel"),
    ("stop", "stop"),
    ("end", "end"),
    ("quarantine", "quarantine"),
    ("lift", "let stay"),
)
_PREFIX: Final = {"machine": "mch_", "retire": "rep_", "give_up": "mch_"}


def lines(explained: Explanation) -> Iterator[str]:
    """What was seen, what was weighed, what was decided and why, and whether it would be decided again."""
    what = {
        "tick": "deployment",
        "purchase": "purchase for the",
        "pool": "turn of the",
        "health": "health of the",
        "operator": "an operator's order in the",
    }.get(explained.kind, "")
    yield f"{explained.id}  {explained.at[:19].replace('T', ' ')} UTC  {what} {explained.about}"
    yield f"policy {explained.policy_version or 'unknown: it was not kept then'}"
    if explained.link:
        yield f"its owner reads it at {explained.link} and replays it at {explained.link}/replay"
    yield ""
    yield "seen"
    read = {"tick": _tick_seen, "health": _health_seen, "operator": _operator_seen}.get(
        explained.kind, _pool_seen
    )
    seen = read(explained.inputs)
    yield from (f"  {line}" for line in seen)
    yield from _weighed(explained.alternatives)
    yield ""
    yield "decided"
    yield from (f"  because {reason}" for reason in explained.reasons)
    if explained.kind == "tick":
        yield from (f"  order   {_order(order)}" for order in explained.orders)
        if not explained.orders:
            yield "  nothing was ordered: the deployment's phase changed"
        yield from (f"  bought by {each} (manage.py explain decision {each})" for each in explained.purchases)
    else:
        yield from (f"  {line}" for order in explained.orders for line in _outcome(order))
    yield ""
    if explained.kind == "operator":
        yield "a person decided this: there is no policy to ask again"
    else:
        yield explained.replayed.words


def _tick_seen(inputs: Mapping[str, Any]) -> Iterator[str]:
    seen, spec = inputs.get("observation", {}), inputs.get("spec", {})
    queued = seen.get("n_queued")
    if queued is None:
        yield "requests waiting: unknown, Redis was away"
    else:
        yield f"{queued} {'request' if queued == 1 else 'requests'} waiting"
    replicas = seen.get("replicas") or []
    phases = Counter(str(each.get("phase")) for each in replicas)
    used = sum(each.get("used") or 0 for each in replicas)
    slots = sum(each.get("slots") or 0 for each in replicas if each.get("phase") == "ready")
    told = ", ".join(f"{n} {phase}" for phase, n in sorted(phases.items())) or "none"
    yield f"replicas: {told}" + (f"; {used} of {slots} slots taken" if slots else "")
    machines = seen.get("machines") or []
    n_free = sum(each.get("n_free") or 0 for each in machines)
    yield (
        f"machines: {len(machines)} looked at with {n_free} free places, "
        f"{seen.get('n_machines')} of {spec.get('max_machines')} in the pool"
    )
    for name, what in (("failures", "starts of replicas"), ("machine_failures", "starts of machines")):
        failed = seen.get(name) or []
        if failed:
            yield f"{len(failed)} {what} failed lately, the last: {failed[-1].get('code')}"
    yield f"wanted between {spec.get('min_replicas')} and {spec.get('max_replicas')}, {spec.get('slots')} slots each"


def _pool_seen(inputs: Mapping[str, Any]) -> Iterator[str]:
    view = inputs.get("view") or {}
    yield f"{view.get('n_wanted')} machines wanted"
    offers = view.get("offers") or []
    held = [o for o in offers if o.get("n_pending") or o.get("n_ready")]
    for each in held:
        yield (
            f"{each.get('name')}: {each.get('n_ready')} ready, {each.get('n_pending')} coming, "
            f"{each.get('n_leaving')} leaving"
        )
    yield (
        f"on-demand: {view.get('n_on_demand_ready')} ready, {view.get('n_on_demand_pending')} coming, from "
        f"{view.get('on_demand_usd_per_h', 0):.4f} $/h"
    )
    if view.get("n_stopped"):
        yield f"reserve: {view['n_stopped']} lie stopped"
    yield f"{len(offers)} spot offers in the market"


def _health_seen(inputs: Mapping[str, Any]) -> Iterator[str]:
    machines = inputs.get("machines") or []
    n_leaving = sum(bool(each.get("is_leaving")) for each in machines)
    yield f"{len(machines)} machines, {n_leaving} of them leaving already"
    for each in machines:
        for gpu in each.get("gpus") or []:
            told = [
                f"{name.removeprefix('n_')} {value}"
                for name, value in sorted(gpu.items())
                if value and name != "index"
            ]
            yield f"mch_{each.get('id')} GPU {gpu.get('index')}: {', '.join(told) or 'nothing to say'}"


def _operator_seen(inputs: Mapping[str, Any]) -> Iterator[str]:
    yield f"mch_{inputs.get('machine_id')} was {inputs.get('state')}"
    yield f"{inputs.get('by')} gave the order"


def _weighed(alternatives: list[dict[str, Any]]) -> Iterator[str]:
    for question in dict.fromkeys(str(each.get("question")) for each in alternatives):
        yield ""
        yield f"{_HEADS.get(question, question)}  (* chosen)"
        rows = [each for each in alternatives if each.get("question") == question]
        subjects = [_subject(question, str(each.get("subject", ""))) for each in rows]
        width = max(map(len, subjects))
        for subject, each in zip(subjects, rows, strict=True):
            yield f"  {'*' if each.get('chosen') else ' '} {subject:{width}}  {each.get('why')}"


def _subject(question: str, subject: str) -> str:
    if not subject:
        return "a new one"
    return f"{_PREFIX.get(question, '')}{subject}"


def _order(order: Any) -> str:
    if not isinstance(order, Mapping):
        return str(order)
    named = (("machine_id", "mch_"), ("replica_id", "rep_"))
    parts = [str(order.get("kind", "?")).replace("_", " ")]
    parts += [f"{prefix}{order[name]}" for name, prefix in named if order.get(name)]
    parts += [f"({order['reason']})"] if order.get("reason") else []
    return " ".join(parts)


def _outcome(outcome: Any) -> Iterator[str]:
    if not isinstance(outcome, Mapping):
        yield str(outcome)
        return
    if "names" in outcome:
        names = outcome["names"]
        if outcome.get("from_reserve"):
            yield "start a stopped machine of the reserve, or where none has room:"
        yield "ask for " + ", then ".join(names) if names else "ask for nothing: every offer refused lately"
        return
    for each in outcome.get("buy", []):
        stands_in = f" to stand in for mch_{each['replaces']}" if each.get("replaces") else ""
        lies = (
            "" if each.get("reserve_place") is None else f" for place {each['reserve_place']} of the reserve"
        )
        yield f"order   buy {each.get('offer')}{stands_in}{lies}"
    for name, what in _MACHINE_ORDERS:
        for each in outcome.get(name, []):
            yield f"order   {what} mch_{each.get('machine_id')} ({each.get('why')})"
    for each in outcome.get("start", []):
        yield f"order   start mch_{each} again"
