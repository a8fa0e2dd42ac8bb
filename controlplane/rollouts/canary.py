"""Carries a rollout on, step by step: starting, observing, promoting or rolling back.

The handler of its operation, run by the control worker as operator, every two seconds, possibly twice and after a
restart at any point: what it is about to do is in the row first (compare-and-set on `version`), and every effect may be
repeated. It judges with controlplane/policy/canary.py and never waits.
"""

from __future__ import annotations

from typing import Any, Final

import structlog
from django.utils import timezone

from autoscaler.act import drain
from autoscaler.cell import Cell
from autoscaler.house import build_cell
from autoscaler.models import LIVE_PHASES, Replica, ReplicaPhase
from autoscaler.specs import engine_digest
from controlplane import ids
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, NotFoundError
from controlplane.operations.advance import Again, Claim, Done, handles
from controlplane.policy.canary import Action, Limits, Verdict, judge, threshold
from controlplane.rollouts import evidence as arms
from controlplane.rollouts import services
from controlplane.rollouts.models import CANARY_STATES, OPEN_STATES, PPM, Rollout, RolloutState, Wanted

log = structlog.get_logger("corral.rollouts")

LOOK_EVERY_S: Final = 2.0
_MAX_TEXT: Final = 300
_MAX_EVIDENCE: Final = 32


class LostStepError(RuntimeError):
    """Somebody else wrote the rollout meanwhile: the next look takes it from there."""


@handles(services.CANARY)
def canary(claim: Claim) -> Again | Done:
    """Until it is promoted; a rollout that is rolled back or superseded fails, with the reason."""
    row = (
        Rollout.objects.select_related("candidate", "deployment", "deployment__slo_class")
        .filter(
            organization_id=claim.organization_id, id=ids.from_text(ids.Prefix.ROLLOUT, claim.row.subject)
        )
        .first()
    )
    if row is None:
        raise NotFoundError("no such rollout", field="rollout")
    return advance(row, build_cell())


def advance(row: Rollout, cell: Cell) -> Again | Done:
    """One step of it. Raises ConflictError when it has ended otherwise than promoted."""
    try:
        if row.state in CANARY_STATES and _is_superseded(row):
            _move(
                row, RolloutState.ROLLING_BACK, "the deployment was changed otherwise meanwhile", share_ppm=0
            )
        if row.state in CANARY_STATES and row.wanted == Wanted.ABORT:
            _move(row, RolloutState.ROLLING_BACK, "an operator aborted it", share_ppm=0)
        if row.state in CANARY_STATES and row.wanted == Wanted.PROMOTE:
            _move(row, RolloutState.PROMOTING, "an operator promoted it")
        match row.state:
            case RolloutState.STARTING:
                return _starting(row, cell)
            case RolloutState.OBSERVING:
                return _observing(row, cell)
            case RolloutState.PROMOTING:
                return _promoting(row, cell)
            case RolloutState.ROLLING_BACK:
                return _rolling_back(row, cell)
            case RolloutState.PROMOTED:
                return Done({"state": row.state}, row.verdict)
    except LostStepError:
        return Again(_progress(row), row.verdict, 0.5)
    raise ConflictError(row.verdict or str(row.state), code=str(row.state))


def _starting(row: Rollout, cell: Cell) -> Again | Done:
    limits = Limits(**row.limits)
    replicas = arms.replicas_of(row)
    found = judge(
        arms.evidence(row, row.deployment.slo_class, 0),
        limits,
        n_steps=len(row.steps_ppm),
        in_step_s=0,
        paused=True,
    )
    if found.action is Action.BACK:
        failed = next((r for r in reversed(replicas) if r.phase == ReplicaPhase.FAILED), None)
        why = "" if failed is None else f": {failed.reason_code} {failed.reason_message}"
        return _back(row, cell, f"{found.reason}{why}", found)
    waited_s = (timezone.now() - row.created_at).total_seconds()
    if any(r.phase == ReplicaPhase.READY for r in replicas):
        share = row.steps_ppm[0]
        _move(
            row, RolloutState.OBSERVING, f"{_percent(share)} of the requests", share_ppm=share, step=0,
            step_at=timezone.now(),
        )  # fmt: skip
        _tell(row, cell)
        return Again(_progress(row), row.verdict, LOOK_EVERY_S)
    if waited_s > limits.step_max_s:
        return _back(row, cell, f"no replica of it was ready after {waited_s:.0f} s", None)
    return Again(0, "its first replica starts", LOOK_EVERY_S)


def _observing(row: Rollout, cell: Cell) -> Again | Done:
    _tell(row, cell)
    limits = Limits(**row.limits)
    seen = arms.evidence(row, row.deployment.slo_class, handed_back(row, cell))
    in_step_s = (timezone.now() - row.step_at).total_seconds()
    verdict = judge(seen, limits, n_steps=len(row.steps_ppm), in_step_s=in_step_s, paused=row.paused)
    if verdict.action is Action.WAIT:
        return Again(
            _progress(row), f"{_percent(row.share_ppm)} of the requests; {verdict.reason}", LOOK_EVERY_S
        )
    kept = _entry(row, verdict, arms.told(seen), errors_total(row, cell))
    if verdict.action is Action.BACK:
        return _back(row, cell, verdict.reason, verdict, kept)
    step = row.step + 1
    if step >= len(row.steps_ppm):
        _move(row, RolloutState.PROMOTING, verdict.reason, evidence=[*row.evidence, kept][-_MAX_EVIDENCE:])
        return _promoting(row, cell)
    share = row.steps_ppm[step]
    _move(
        row,
        RolloutState.OBSERVING,
        f"{_percent(share)} of the requests after: {verdict.reason}",
        step=step,
        share_ppm=share,
        step_at=timezone.now(),
        evidence=[*row.evidence, kept][-_MAX_EVIDENCE:],
    )
    _tell(row, cell)
    return Again(_progress(row), row.verdict, LOOK_EVERY_S)


def _promoting(row: Rollout, cell: Cell) -> Again | Done:
    """The deployment wants it first; then its replicas are as good as any; the autoscaler replaces the former ones."""
    try:
        services.adopt(row)
    except ConflictError:
        _move(row, RolloutState.ROLLING_BACK, "the deployment was changed otherwise meanwhile", share_ppm=0)
        return _rolling_back(row, cell)
    live = _live(row)
    cell.set_share(row.deployment_id.hex, {r.id.hex: None for r in live})
    _move(row, RolloutState.PROMOTED, row.verdict, share_ppm=PPM, finished_at=timezone.now())
    return Done({"state": RolloutState.PROMOTED.value, "reason": row.verdict}, row.verdict)


def _rolling_back(row: Rollout, cell: Cell) -> Again:
    """Nothing new goes there; what runs there finishes or moves on; then it has ended."""
    live = _live(row)
    if _is_wanted(row):  # somebody made it the deployment's own meanwhile: its replicas serve
        cell.set_share(row.deployment_id.hex, {r.id.hex: None for r in live})
        live = []
    _tell(row, cell)
    for replica in live:
        if replica.phase != ReplicaPhase.DRAINING:
            drain(replica.id, f"rolled back: {row.verdict}", cell)
    if live:
        return Again(90, f"rolls back: {row.verdict}", LOOK_EVERY_S)
    state = RolloutState.SUPERSEDED if _is_superseded(row) else RolloutState.ROLLED_BACK
    _move(row, state, row.verdict, finished_at=timezone.now())
    raise ConflictError(row.verdict, code=state.value)


def _back(
    row: Rollout, cell: Cell, reason: str, verdict: Verdict | None, kept: dict[str, Any] | None = None
) -> Again | Done:
    entry = kept or {"step": row.step, "action": "back", "reason": reason}
    _move(
        row,
        RolloutState.ROLLING_BACK,
        reason,
        share_ppm=0,
        evidence=[*row.evidence, entry][-_MAX_EVIDENCE:],
    )
    log.warning("rollout.rolls_back", rollout=row.id.hex, deployment=row.deployment_id.hex, reason=reason)
    return _rolling_back(row, cell)


def handed_back(row: Rollout, cell: Cell) -> int:
    """Requests that the canary handed back in this step."""
    before = row.evidence[-1].get("errors_total", 0) if row.evidence else 0
    return max(0, errors_total(row, cell) - int(before))


def errors_total(row: Rollout, cell: Cell) -> int:
    """As the canary's live replicas count; a replica's count ends with it, and its end counts as a death."""
    live = _live(row)
    readings = cell.read_replicas([(r.id.hex, r.machine_id.hex, row.deployment_id.hex) for r in live])
    return sum(reading.beat.n_errors_total for reading in readings.values() if reading.beat is not None)


def _tell(row: Rollout, cell: Cell) -> None:
    """Every canary has the share that the row says; repeated at each look, since Redis may have lost it."""
    if row.state == RolloutState.PROMOTED:
        return
    shares = {r.id.hex: threshold(row.share_ppm) for r in _live(row)}
    if shares and not _is_wanted(row):
        cell.set_share(row.deployment_id.hex, dict(shares))


def _is_superseded(row: Rollout) -> bool:
    """Whether the deployment runs something else by now, or nothing. Its scale may change as it likes."""
    found = Deployment.objects.select_related("model_version").get(id=row.deployment_id)
    return found.deleted_at is not None or engine_digest(found) != row.base_digest


def _is_wanted(row: Rollout) -> bool:
    """Whether the deployment's own specification is the candidate by now."""
    found = Deployment.objects.select_related("model_version").get(id=row.deployment_id)
    return engine_digest(found) == row.candidate.digest


def _move(row: Rollout, state: RolloutState, verdict: str, **values: Any) -> None:
    """Compare-and-set; raises LostStepError when somebody wrote meanwhile."""
    values |= {"state": state, "verdict": verdict[:_MAX_TEXT]}
    written = Rollout.objects.filter(id=row.id, version=row.version, state__in=OPEN_STATES).update(
        version=row.version + 1, **values
    )
    if not written:
        raise LostStepError(str(row))
    row.version += 1
    for name, value in values.items():
        setattr(row, name, value)
    log.info("rollout.step", rollout=row.id.hex, state=state.value, step=row.step, share_ppm=row.share_ppm)


def _entry(row: Rollout, verdict: Verdict, seen: Any, n_errors_total: int) -> dict[str, Any]:
    """A decision with what it was made from, as it is kept."""
    return {
        "step": row.step,
        "share_ppm": row.share_ppm,
        "at": timezone.now().isoformat(),
        "action": verdict.action.value,
        "reason": verdict.reason,
        "weak": verdict.is_weak,
        "seen": dict(seen),
        "errors_total": n_errors_total,
        "figures": [
            {
                "name": f.name,
                "canary": list(f.canary),
                "stable": list(f.stable),
                "worse": f.is_worse,
                "fine": f.is_fine,
            }
            for f in verdict.figures
        ],
    }


def _live(row: Rollout) -> list[Replica]:
    return [r for r in arms.replicas_of(row) if r.phase in LIVE_PHASES]


def _progress(row: Rollout) -> int:
    return 5 + 90 * row.step // max(len(row.steps_ppm), 1)


def _percent(ppm: int) -> str:
    return f"{ppm / 10_000:g} %"
