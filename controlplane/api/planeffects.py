"""What planned changes would cost and whom they would disrupt: read from the audit entries of the call and the rows.

Called by plans.py inside the planned transaction, so rows are as they would be afterwards. Reads only, within the
tenant; asks the cell's Redis for running requests, once, and says null where it does not answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import redis
from django.conf import settings
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from autoscaler.house import build_cell
from autoscaler.longoperations import DRAIN_MACHINE, DRAIN_REPLICA
from autoscaler.models import Replica, ReplicaPhase
from autoscaler.selectors import next_machine
from autoscaler.specs import engine_digest
from controlplane import ids
from controlplane.api.plandocument import (
    Cost,
    Disruption,
    FromTo,
    GrantHit,
    KeyHit,
    MemberHit,
    NarrowedKey,
    ReplicaHit,
    Written,
)
from controlplane.deployments.models import Deployment
from controlplane.tenants.models import ApiKey, ManagementToken, Member, Role, User
from controlplane.tenants.rights import PERMISSIONS
from controlplane.upstreams.models import UpstreamReplica

MAX_LISTED: Final = 200  # of each kind
_RUNNING: Final = (ReplicaPhase.STARTING, ReplicaPhase.LOADING, ReplicaPhase.WAKING, ReplicaPhase.READY)
_ENGINE: Final = frozenset({"engine_profile", "model_version_id"})


def cost_of(organization_id: UUID, written: Sequence[Written]) -> Cost | None:
    """The change of what machines cost an hour; None where no deployment's number of replicas changes."""
    config = settings.AUTOSCALER
    least, most = [0, 0], [0, 0]
    for entry, row in _deployments(organization_id, written):
        for n, total in (("min_replicas", least), ("max_replicas", most)):
            now = getattr(row, n)
            was = entry.changes[n][0] if n in entry.changes else now
            total[0] += 0 if entry.action == "create" else was
            total[1] += 0 if row.deleted_at is not None else now
    if least[0] == least[1] and most[0] == most[1]:
        return None

    kind = next_machine(config, settings.ENV.cell)

    def nano(n_replicas: int) -> int:
        return -(-n_replicas * kind.price_nano_per_h // kind.n_places)

    return Cost(
        machine_nano_per_h=kind.price_nano_per_h,
        replicas_per_machine=kind.n_places,
        least_nano_per_h=FromTo(before=nano(least[0]), after=nano(least[1])),
        most_nano_per_h=FromTo(before=nano(most[0]), after=nano(most[1])),
    )


def disruption_of(organization_id: UUID, written: Sequence[Written]) -> Disruption:
    """Who would notice."""
    found = Disruption(
        n_streams=0,
        summary=[],
        replicas=_replicas(organization_id, written),
        keys=_keys(organization_id, written),
        narrowed=_narrowed(organization_id, written),
        tokens=_tokens(organization_id, written),
        members=_members(organization_id, written),
        grants=[
            GrantHit(
                name=str(each.before("name")),
                grantee_id=ids.to_text(ids.Prefix.ORGANIZATION, UUID(str(each.before("grantee_id")))),
            )
            for each in written
            if each.kind == "grant" and each.action == "delete"
        ][:MAX_LISTED],
    )
    streams = [replica.n_streams for replica in found.replicas]
    if None in streams:
        found.n_streams = None
    else:
        found.n_streams = sum(n or 0 for n in streams)
    found.summary = list(_sentences(found))
    return found


def _deployments(organization_id: UUID, written: Iterable[Written]) -> list[tuple[Written, Deployment]]:
    entries = {each.thing: each for each in written if each.kind == "deployment"}
    rows = Deployment.objects.filter(organization_id=organization_id, id__in=entries)
    return [(entries[row.id], row) for row in rows.select_related("model_version").order_by("id")]


def _replicas(organization_id: UUID, written: Sequence[Written]) -> list[ReplicaHit]:
    """Those that the autoscaler would drain for what is wanted then (autoscaler/policy/retire.py)."""
    hit: list[tuple[Replica, Deployment, str]] = []
    surplus: list[tuple[list[Replica], Deployment, int]] = []
    for entry, row in _deployments(organization_id, written):
        live = list(
            Replica.objects.filter(organization_id=organization_id, deployment_id=row.id, phase__in=_RUNNING)
            .exclude(id__in=UpstreamReplica.objects.filter(deployment_id=row.id).values("replica_id"))
            .order_by("id")[:MAX_LISTED]
        )
        if row.deleted_at is not None:
            hit += [(replica, row, "deleted") for replica in live]
        elif _ENGINE & entry.changes.keys():
            digest = engine_digest(row)
            hit += [(replica, row, "replaced") for replica in live if replica.spec_digest != digest]
        elif len(live) > row.max_replicas:
            surplus.append((live, row, len(live) - row.max_replicas))
    hit += _drained(organization_id, written)
    used = _used([replica for replica, _, _ in hit] + [replica for live, _, _ in surplus for replica in live])
    for live, row, n in surplus:  # never ready first, then the least used, then the youngest
        live.sort(
            key=lambda each: (
                each.phase == ReplicaPhase.READY,
                used.get(each.id, 0),
                -each.created_at.timestamp(),
            )
        )
        hit += [(replica, row, "surplus") for replica in live[:n]]
    return [
        ReplicaHit(
            id=str(replica),
            deployment=row.name,
            phase=replica.phase,
            why=why,
            n_streams=used.get(replica.id),
        )
        for replica, row, why in hit[:MAX_LISTED]
    ]


def _drained(organization_id: UUID, written: Sequence[Written]) -> list[tuple[Replica, Deployment, str]]:
    """By operations that the call begins."""
    subjects = {
        str(each.after("kind")): str(each.after("subject")) for each in written if each.kind == "operation"
    }
    rows = Replica.objects.filter(organization_id=organization_id, phase__in=_RUNNING)
    if subject := subjects.get(DRAIN_REPLICA):
        rows = rows.filter(id=ids.from_text(ids.Prefix.REPLICA, subject))
    elif subject := subjects.get(DRAIN_MACHINE):
        rows = rows.filter(machine_id=ids.from_text(ids.Prefix.MACHINE, subject))
    else:
        return []
    return [
        (row, row.deployment, "drained")
        for row in rows.select_related("deployment").order_by("id")[:MAX_LISTED]
    ]


def _keeps(replica: Replica, used: dict[UUID, int]) -> tuple[bool, int, float]:
    """Lowest goes first: never ready, then the least used, then the youngest."""
    return replica.phase == ReplicaPhase.READY, used.get(replica.id, 0), -replica.created_at.timestamp()


def _used(replicas: Sequence[Replica]) -> dict[UUID, int]:
    """Running requests by replica; nothing while Redis is away."""
    if not replicas:
        return {}
    asked = [(row.id.hex, row.machine_id.hex, row.deployment_id.hex) for row in replicas]
    try:
        return {UUID(hex=name): seen.used for name, seen in build_cell().read_replicas(asked).items()}
    except redis.RedisError:
        return {}


def _keys(organization_id: UUID, written: Sequence[Written]) -> list[KeyHit]:
    ended = [each for each in written if each.kind == "api_key" and _ends(each)]
    rows = {
        row.id: row
        for row in ApiKey.objects.filter(organization_id=organization_id, id__in=[e.thing for e in ended])
    }
    if any(_is_suspension(each) for each in written):
        active = ApiKey.objects.filter(organization_id=organization_id, revoked_at=None)
        rows |= {row.id: row for row in active.order_by("-id")[:MAX_LISTED]}
    now = timezone.now()
    return [
        KeyHit(
            id=str(row),
            name=row.name,
            ends_at=None
            if row.revoked_at or row.expires_at is None or row.expires_at <= now
            else row.expires_at,
            last_used_at=row.last_used_at,
        )
        for row in list(rows.values())[:MAX_LISTED]
    ]


def _narrowed(organization_id: UUID, written: Sequence[Written]) -> list[NarrowedKey]:
    found = []
    for entry in written:
        if entry.kind != "api_key" or entry.action != "update":
            continue
        loses = [*_scopes_lost(entry.before("scopes") or {}, entry.after("scopes") or {})]
        aliases = (entry.before("aliases") or {}).keys() - (entry.after("aliases") or {}).keys()
        loses += [f"the alias {alias}" for alias in sorted(aliases)]
        row = (
            ApiKey.objects.filter(organization_id=organization_id, id=entry.thing).first() if loses else None
        )
        if row is not None:
            found.append(NarrowedKey(id=str(row), name=row.name, loses=loses[:MAX_LISTED]))
    return found[:MAX_LISTED]


def _scopes_lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """By routes, models and networks; where nothing was bound before, all but what is named now."""
    for part, word in (("routes", "routes"), ("models", "models"), ("ip_ranges", "networks")):
        was, becomes = before.get(part), after.get(part)
        if becomes is None or was == becomes:
            continue
        if was is None:
            yield f"{word} other than {', '.join(becomes)}" if becomes else f"all {word}"
        elif gone := sorted(set(was) - set(becomes)):
            yield f"the {word} {', '.join(gone)}"


def _tokens(organization_id: UUID, written: Sequence[Written]) -> list[KeyHit]:
    ended = [each.thing for each in written if each.kind == "management_token" and _ends(each)]
    rows = ManagementToken.objects.filter(organization_id=organization_id, id__in=ended).order_by("id")
    return [KeyHit(id=str(row), name=row.name, ends_at=None, last_used_at=None) for row in rows[:MAX_LISTED]]


def _ends(entry: Written) -> bool:
    """Whether this entry ends a key, or ends it sooner."""
    if entry.action != "update":
        return entry.action == "delete"
    if entry.after("revoked_at") is not None and entry.before("revoked_at") is None:
        return True
    was, becomes = entry.before("expires_at"), entry.after("expires_at")
    if becomes is None:
        return False
    if was is None:
        return True
    before, after = parse_datetime(str(was)), parse_datetime(str(becomes))
    return before is not None and after is not None and after < before


def _is_suspension(entry: Written) -> bool:
    return (
        entry.kind == "organization"
        and entry.before("suspended_at") is None
        and entry.after("suspended_at") is not None
    )


def _members(organization_id: UUID, written: Sequence[Written]) -> list[MemberHit]:
    found = []
    for entry in written:
        if entry.kind != "member" or entry.action == "create" or "role" not in entry.changes:
            continue
        before = PERMISSIONS[Role(entry.before("role"))]
        becomes = entry.after("role")
        lost = before - (PERMISSIONS[Role(becomes)] if becomes else frozenset())
        if lost:
            found.append(
                MemberHit(
                    id=ids.to_text(ids.Prefix.MEMBER, entry.thing),
                    email=_email(organization_id, entry),
                    loses=sorted(permission.value for permission in lost),
                )
            )
    return found[:MAX_LISTED]


def _email(organization_id: UUID, entry: Written) -> str:
    user_id = entry.before("user_id")  # of a member that is gone; the row of one that stays knows it
    if user_id is None:
        member = Member.objects.filter(organization_id=organization_id, id=entry.thing).first()
        user_id = member.user_id if member else None
    user = User.objects.filter(id=user_id).first() if user_id else None
    return user.email if user else ""


def _sentences(found: Disruption) -> Iterable[str]:
    by_deployment: dict[tuple[str, str], int] = {}
    for replica in found.replicas:
        by_deployment[replica.deployment, replica.why] = (
            by_deployment.get((replica.deployment, replica.why), 0) + 1
        )
    for (name, why), n in by_deployment.items():
        what = "replaced" if why == "replaced" else "drained"
        yield f"{_count(n, 'replica')} of {name} {'is' if n == 1 else 'are'} {what}"
    if found.n_streams is None:
        yield "how many requests run on them cannot be asked now"
    elif found.n_streams:
        yield f"{_count(found.n_streams, 'running request')} on them finish or move on"
    for key in found.keys:
        yield f"key {key.name} stops working {f'at {key.ends_at:%Y-%m-%d %H:%M:%S %Z}' if key.ends_at else 'at once'}"
    for narrowed in found.narrowed:
        yield f"key {narrowed.name} loses {'; '.join(narrowed.loses)}"
    for token in found.tokens:
        yield f"token {token.name} stops working at once"
    for member in found.members:
        yield f"{member.email} loses {', '.join(member.loses)}"
    for grant in found.grants:
        yield f"{grant.grantee_id} can no longer call {grant.name}"


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
