"""A request's story in sentences: why it was refused, why it waited, why it went where it went.

Called by everything that shows a request. From the facts only; the sentences say what was seen and what was promised.
"""

from __future__ import annotations

from typing import Any

from controlplane.decisions.models import Outcome, RequestDecision
from controlplane.decisions.selectors import Request

_SCOPES = {"end": "end customer", "key": "API key", "prj": "project", "org": "organization"}


def explain(request: Request) -> list[str]:
    """Sentences, in the order of what happened."""
    found = [line for decision in request.decisions for line in decision_in_words(decision)]
    found += _now(request)
    return found + _end(request)


def decision_in_words(decision: RequestDecision) -> list[str]:
    """What one decision said, and why."""
    facts: dict[str, Any] = decision.facts or {}
    lines = []
    if decision.outcome == Outcome.REFUSED:
        lines.append(
            f"Refused with {decision.status} {decision.code}: {facts.get('message', 'no reason was kept')}."
        )
        limit = facts.get("limit")
        if limit:
            scope = _SCOPES.get(facts.get("scope", ""), "tenant")
            lines.append(f"The limit that refused is {limit.replace('_', ' ')} of the {scope}.")
        retry_s = facts.get("retry_after_s")
        if retry_s is not None:
            lines.append(f"It was told to try again after {_seconds(retry_s)}.")
    elif decision.outcome == Outcome.QUEUED:
        waits = facts.get("waits_for_replica")
        why = "no replica was there" if waits else "no slot was free"
        lines.append(f"Admitted in class {decision.slo_class} and queued, because {why}.")
    else:
        replica = facts.get("replica", "")
        lines.append(
            f"Admitted in class {decision.slo_class} and given to replica {_short(replica)} at once."
        )
    lines += _prediction(decision, facts.get("prediction"), facts.get("admission", ""))
    return lines + _candidates(facts)


def _prediction(decision: RequestDecision, said: dict[str, Any] | None, admission: str) -> list[str]:
    if not said:
        return []
    lines = [
        f"Its first token was expected after {_seconds(said['ttft_p50_s'])} ({_seconds(said['ttft_p90_s'])} in one of "
        f"ten cases); the class promises {_seconds(said['target_s'])}, which it would have met with a probability of "
        f"{said['attainment']:.0%}."
    ]
    if said.get("ahead_s"):
        bound = said.get("most_ahead_s")
        most = "" if bound is None else f"; the target allows {_seconds(max(bound, 0.0))}"
        lines.append(
            f"Before it in its fair order waited {_seconds(said['ahead_s'])} of slot time for {said.get('slots', 0)} "
            f"slots{most}."
        )
    if decision.outcome == Outcome.REFUSED and admission == "bounded":
        lines.append("The deployment refuses by the length of its queue, not by prediction.")
    return lines


def _candidates(facts: dict[str, Any]) -> list[str]:
    rows = facts.get("candidates") or []
    if not rows:
        return []
    best, *others = rows
    replica, used, slots, cost, n_prefill, n_cached = [*best, 0, 0][:6]
    line = f"Of {len(rows)} {'replica' if len(rows) == 1 else 'replicas'} {_short(replica)} ranked first: "
    line += f"{used} of {slots} slots taken"
    line += f", {n_cached} tokens of the prompt cached" if n_cached else ""
    line += f", {n_prefill} prompt tokens before it" if n_prefill else ""
    line += f", a cost of {cost:,.0f}"
    if others:
        line += f"; the next, {_short(others[0][0])}, would have cost {others[0][3]:,.0f}"
    return [line + "."]


def _now(request: Request) -> list[str]:
    live = request.live
    if live is None or request.booked is not None:
        return []
    if live.stage == "queued":
        place = (
            ""
            if live.n_before is None
            else f", behind {live.n_before} that were admitted before it or go first"
        )
        lines = [f"It waits now{place}."]
        if live.waits_for:
            left = "" if live.eta_ms is None else f", for about {_seconds(live.eta_ms / 1000)} more"
            lines.append(f"Nothing serves its deployment yet: {live.waits_for.replace('_', ' ')}{left}.")
        return lines
    if live.stage == "running":
        attempt = f" (attempt {live.attempt})" if live.attempt > 1 else ""
        return [f"It runs now on replica {_short(live.replica)}{attempt}."]
    return ["It has ended; its usage is not booked yet."]


def _end(request: Request) -> list[str]:
    row = request.booked
    if row is None:
        return []
    first = (
        "no token was made" if row.first_token_ms is None else f"first token after {row.first_token_ms} ms"
    )
    lines = [
        f"Ended with status {row.status} ({row.finish_reason}) after {row.duration_ms} ms: {first}, "
        f"{row.n_prompt_tokens} prompt tokens ({row.n_cached_tokens} cached), {row.n_completion_tokens} completion "
        "tokens."
    ]
    if row.attempts > 1:
        last = _short(row.replica_id.hex if row.replica_id else "")
        lines.append(f"It was handed to {row.attempts} replicas; the last was {last}.")
    target_s = next(
        (d.facts["prediction"]["target_s"] for d in request.decisions if d.facts.get("prediction")), None
    )
    if target_s is not None and row.first_token_ms is not None:
        kept = "kept" if row.first_token_ms <= target_s * 1000 else "missed"
        lines.append(f"The promise of a first token within {_seconds(target_s)} was {kept}.")
    return lines


def _short(replica: str) -> str:
    return f"rep_{replica[-8:]}" if replica else "unknown"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.3g} s" if value < 1_000 else f"{value / 60:.0f} min"
