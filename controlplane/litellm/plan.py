"""What becomes of a LiteLLM proxy's rows here: pure. The same source gives the same plan, ids included.

Organizations stay organizations, teams (and LiteLLM's projects) become projects, keys keep their text. Keys of people
without a team go to a project of the person where that has limits of its own, else to one for all of them. What has no
counterpart is noted with a remedy. Ids are made of what they were there, so a second run finds what the first one made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from controlplane.litellm.leftout import left_out, lost, lost_of_key, lost_of_team, within
from controlplane.litellm.planned import Fate, Note, Plan, PlannedKey, PlannedOrganization, PlannedProject
from controlplane.litellm.proxyconfig import ProxyConfig
from controlplane.litellm.reach import NO_V1, Models, both, models_of, scopes_of
from controlplane.litellm.source import Key, Project, Source, Team, User
from controlplane.litellm.spending import Tell, spending_of
from controlplane.tenants.key_scopes import MAX_ALIASES, MAX_TAG, MAX_TAGS, check_aliases, check_tags

DASHBOARD: Final = "litellm-dashboard"  # the team of the keys that LiteLLM's console makes for sessions
_LONG_AGO: Final = datetime(2023, 1, 1, tzinfo=UTC)
_NOT_SLUG: Final = re.compile(r"[^a-z0-9]+")
_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Existing:
    """What is here already, as far as the plan must know."""

    organizations: frozenset[UUID] = frozenset()
    projects: frozenset[UUID] = frozenset()
    lookups: Mapping[str, UUID] = field(default_factory=dict)  # of imported keys
    slugs: frozenset[str] = frozenset()  # of organizations
    project_slugs: frozenset[tuple[UUID, str]] = frozenset()
    default: UUID | None = None  # the organization for what has none there, if it is here


@dataclass(frozen=True, slots=True)
class Options:
    """How to plan. `make_id(kind, name, at)` gives an id that is the same each time; `lookups` (under every pepper that
    counts, the present one first) and `digest` are keyed hashes of a key's SHA-256."""

    now: datetime
    make_id: Callable[[str, str, datetime], UUID]
    lookups: Callable[[str], tuple[str, ...]]
    digest: Callable[[str], bytes]
    organization: str = "litellm"  # slug of the organization for what has none there
    shared_by: str = ""  # slug of whoever shares the models: aliases lead to OWNER/NAME


@dataclass(slots=True)
class _Home:
    """Where keys go: a project, with what it allows beyond its own limits."""

    project: PlannedProject
    models: Models = None
    aliases: dict[str, str] = field(default_factory=dict)
    is_blocked: bool = False


def plan(source: Source, config: ProxyConfig, existing: Existing, options: Options) -> Plan:
    """The whole plan. Raises nothing: what cannot be carried over is a note."""
    return _Planner(source, config, existing, options).made()


class _Planner:
    def __init__(self, source: Source, config: ProxyConfig, existing: Existing, options: Options) -> None:
        self._source, self._config, self._existing, self._options = source, config, existing, options
        self._plan = Plan(source.where)
        self._slugs = set(existing.slugs)
        self._project_slugs = set(existing.project_slugs)
        self._default: PlannedOrganization | None = None
        self._organizations: dict[str, tuple[PlannedOrganization, Models]] = {}
        self._homes: dict[tuple[str, str], _Home] = {}
        self._users = {user.user_id: user for user in source.users}
        self._teams = {team.team_id: team for team in source.teams}
        self._projects = {project.project_id: project for project in source.projects}
        self._groups = {g.access_group_id: g for g in source.access_groups}
        self._group_names = {g.access_group_name: g for g in source.access_groups}

    def made(self) -> Plan:
        for organization in self._source.organizations:
            self._organizations[organization.organization_id] = self._organization(organization)
        for team in self._source.teams:
            if team.team_id != DASHBOARD:
                self._team(team)
        for project in self._source.projects:
            self._project(project)
        for key in self._source.keys:
            self._key(key)
        by_token = {key.token: key for key in self._source.keys}
        for old in self._source.rotated:
            if old.active_token_id in by_token:
                self._key(by_token[old.active_token_id], old.token, old.revoke_at)
        self._plan.left += left_out(self._source, self._config)
        self._plan.notes += lost(self._source, self._config)
        self._plan.models = sorted(self._named_models())
        return self._plan

    # -- organizations and projects

    def _organization(self, row: Any) -> tuple[PlannedOrganization, Models]:
        name = row.organization_alias or row.organization_id
        tell = self._teller("organization", name)
        found = self._spending(row, row.budget_id, row.spend, tell)
        made = PlannedOrganization(
            id=self._options.make_id("organization", row.organization_id, row.created_at or _LONG_AGO),
            name=name[:120],
            slug="",
            fate=Fate.NEW,
            limits=found.limits,
            budgets=found.budgets,
            timezone=self._config.timezone or "UTC",
        )
        made = self._placed(made)
        return made, models_of(row.models, self._group)

    def _placed(self, made: PlannedOrganization) -> PlannedOrganization:
        if made.id in self._existing.organizations:
            made = replace(made, fate=Fate.THERE)
        else:
            made = replace(made, slug=self._free_slug(made.name, made.id))
        self._plan.organizations.append(made)
        return made

    def _home_organization(self, organization_id: str | None) -> tuple[PlannedOrganization, Models]:
        if organization_id and organization_id in self._organizations:
            return self._organizations[organization_id]
        if self._default is None:
            slug, known = self._options.organization, self._existing.default
            made_id = known or self._options.make_id("organization", "", _LONG_AGO)
            self._default = PlannedOrganization(
                id=made_id,
                name=slug,
                slug=slug,
                fate=Fate.NEW if known is None else Fate.THERE,
                timezone=self._config.timezone or "UTC",
            )
            self._slugs.add(slug)
            self._plan.organizations.append(self._default)
        return self._default, None

    def _team(self, row: Team) -> None:
        name = row.team_alias or row.team_id
        tell = self._teller("team", name)
        organization, allowed = self._home_organization(row.organization_id)
        found = self._spending(row, None, row.spend, tell)
        made = self._new_project("team", row.team_id, name, row.created_at, organization, found)
        stored = self._source.model_aliases.get(row.model_id) if row.model_id is not None else None
        self._homes["team", row.team_id] = _Home(
            made,
            both(models_of(row.models, self._group), allowed),
            _strings(stored.aliases if stored else None),
            row.blocked,
        )
        for what, remedy in lost_of_team(row):
            tell(what, remedy)

    def _project(self, row: Project) -> None:
        team = self._teams.get(row.team_id or "")
        parent = self._homes.get(("team", row.team_id or ""))
        name = row.project_alias or row.project_id
        tell = self._teller("project", name)
        organization, allowed = self._home_organization(team.organization_id if team else None)
        found = self._spending(row, row.budget_id, row.spend, tell)
        made = self._new_project("project", row.project_id, name, row.created_at, organization, found)
        if parent is not None and (parent.project.budgets or any(_values(parent.project.limits))):
            tell(
                "limits of a project's team hold for keys of the team itself only: here projects have no projects",
                "set limits on this project, or on the organization",
            )
        self._homes["project", row.project_id] = _Home(
            made,
            both(models_of(row.models, self._group), parent.models if parent else allowed),
            dict(parent.aliases) if parent else {},
            row.blocked or bool(parent and parent.is_blocked),
        )

    def _home(self, key: Key) -> _Home:
        """Where a key belongs."""
        for kind, name in (("project", key.project_id), ("team", key.team_id)):
            if name and (kind, name) in self._homes:
                return self._homes[kind, name]
        user = self._users.get(key.user_id or "")
        organization, allowed = self._home_organization(
            key.organization_id or (user.organization_id if user else None)
        )
        if user is not None and _has_limits(user):
            if ("user", user.user_id) not in self._homes:
                name = user.user_alias or user.user_email or user.user_id
                found = self._spending(user, None, user.spend, self._teller("user", name))
                made = self._new_project("user", user.user_id, name, user.created_at, organization, found)
                models = both(models_of(user.models, self._group), allowed)
                self._homes["user", user.user_id] = _Home(made, models)
            return self._homes["user", user.user_id]
        place = f"personal of {organization.id.hex}"
        if ("", place) not in self._homes:
            made = self._new_project("personal", place, "Personal keys", None, organization, None)
            self._homes["", place] = _Home(made, allowed)
        return self._homes["", place]

    def _new_project(
        self,
        kind: str,
        source_id: str,
        name: str,
        at: datetime | None,
        organization: PlannedOrganization,
        found: Any,
    ) -> PlannedProject:
        made_id = self._options.make_id(kind, source_id, at or _LONG_AGO)
        is_there = made_id in self._existing.projects
        slug = base = _slug(name, kind)
        if (organization.id, slug) in self._project_slugs and not is_there:
            slug = f"{base}-{made_id.hex[-6:]}"
        self._project_slugs.add((organization.id, slug))
        made = PlannedProject(
            id=made_id,
            organization_id=organization.id,
            name=name.strip()[:120] or kind,
            slug=slug,
            fate=Fate.THERE if is_there else Fate.NEW,
        )
        if found is not None:
            made = replace(made, limits=found.limits, budgets=found.budgets)
        self._plan.projects.append(made)
        return made

    # -- keys

    def _key(self, row: Key, token: str | None = None, until: datetime | None = None) -> None:
        """A key; `token` and `until` are those of an older text of it that goes on for a while."""
        token = token or row.token
        name = (row.key_alias or row.key_name or f"key {token[:8]}").strip()[:120]
        reason = self._no_key(row, token, until)
        if reason is not None:
            self._plan.left.append(Note("key", name, *reason))
            return
        tell = self._teller("key", name)
        home = self._home(row)
        user = self._users.get(row.user_id or "")
        found = self._spending(row, row.budget_id, row.spend, tell)
        listed = [*row.models, *(m for g in row.access_group_ids for m in self._group_by_id(g))]
        models = both(models_of(listed, self._group), home.models)
        expires = min((at for at in (row.expires, until) if at is not None), default=None)
        lookups = self._options.lookups(token)
        known = next(
            (self._existing.lookups[each] for each in lookups if each in self._existing.lookups), None
        )
        made_id = known or self._options.make_id("key", lookups[0], row.created_at or _LONG_AGO)
        if home.is_blocked or row.blocked:
            tell(
                "it is blocked there, which can be undone; here it is revoked",
                "create another key in its place",
            )
        for what, remedy in lost_of_key(row):
            tell(what, remedy)
        self._plan.keys.append(
            PlannedKey(
                id=made_id,
                organization_id=home.project.organization_id,
                project_id=home.project.id,
                name=name if until is None else f"{name[:110]} (old)",
                lookup=lookups[0],
                digest=self._options.digest(token),
                last4=row.key_name[-4:] if row.key_name and until is None and len(row.key_name) > 6 else "",
                fate=Fate.NEW if known is None else Fate.THERE,
                limits=found.limits,
                budgets=found.budgets,
                scopes=scopes_of(models, row.allowed_routes, tell),
                aliases=self._aliases(_strings(row.aliases), home.aliases, tell),
                tags=self._tags(row, user),
                expires_at=expires,
                is_revoked=bool(row.blocked or home.is_blocked),
            )
        )

    def _no_key(self, row: Key, token: str, until: datetime | None) -> tuple[str, str] | None:
        """(why nothing becomes of it, remedy)."""
        ends = [at for at in (row.expires, until) if at is not None]
        if row.team_id == DASHBOARD:
            return "session of LiteLLM's console", "sign in to the console here"
        if not _SHA256.match(token):
            return "not stored as a SHA-256", "create a new key"
        if ends and min(ends) <= self._options.now:
            return "expired", "create a new key"
        if row.key_type in NO_V1 or (row.allowed_routes and set(row.allowed_routes) <= {"management_routes"}):
            return "calls no model, it manages LiteLLM", "make a management token: manage.py create_token"
        return None

    def _aliases(self, own: dict[str, str], team: dict[str, str], tell: Tell) -> dict[str, str]:
        """Those of the key before its team's, then the proxy's; at last the shared models under their old names."""
        found = {**dict(self._config.aliases), **team, **own}
        if self._options.shared_by:
            owner = self._options.shared_by
            shared = {entry.name: f"{owner}/{entry.name}" for entry in self._config.models}
            found = {**shared, **{alias: shared.get(name, name) for alias, name in found.items()}}
        good = {a: n for a, n in found.items() if not list(check_aliases({a: n}))}
        if len(good) < len(found):
            tell("an alias has a name that no model can have here", "give it another name")
        return dict(list(good.items())[:MAX_ALIASES])

    def _tags(self, row: Key, user: User | None) -> tuple[str, ...]:
        raw = within(row.metadata, "tags")
        tags = [str(tag).strip()[:MAX_TAG] for tag in raw] if isinstance(raw, list) else []
        if user is not None or row.user_id:
            who = (user.user_email or user.user_alias) if user else None
            tags.append(f"user:{who or row.user_id}"[:MAX_TAG])
        return tuple(tag for tag in dict.fromkeys(tags) if not list(check_tags([tag])))[:MAX_TAGS]

    def _named_models(self) -> set[str]:
        named = {
            name for key in self._plan.keys for name in key.scopes.models or () if not name.endswith("*")
        }
        return named | {entry.name for entry in self._config.models if "*" not in entry.name}

    # -- small things

    def _spending(self, row: Any, budget_id: str | None, spent: Decimal, tell: Tell) -> Any:
        shared = self._source.budgets.get(budget_id) if budget_id else None
        return spending_of(row, shared, spent, self._config.counts, tell)

    def _group(self, name: str) -> tuple[str, ...]:
        stored = self._group_names.get(name)
        return self._config.access_group(name) or (tuple(stored.access_model_names) if stored else ())

    def _group_by_id(self, group_id: str) -> tuple[str, ...]:
        stored = self._groups.get(group_id)
        return tuple(stored.access_model_names) if stored else ()

    def _teller(self, kind: str, name: str) -> Tell:
        def tell(what: str, remedy: str) -> None:
            self._plan.notes.append(Note(kind, name, what, remedy))

        return tell

    def _free_slug(self, name: str, made_id: UUID) -> str:
        slug = base = _slug(name, "organization")
        if slug in self._slugs:
            slug = f"{base}-{made_id.hex[-6:]}"
        self._slugs.add(slug)
        return slug


def _slug(name: str, otherwise: str) -> str:
    return _NOT_SLUG.sub("-", name.lower()).strip("-")[:50].strip("-") or otherwise


def _strings(found: Any) -> dict[str, str]:
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _values(limits: Any) -> Iterable[bool]:
    return (
        value is not None
        for value in (
            limits.rpm,
            limits.input_tpm,
            limits.output_tpm,
            limits.max_concurrency,
            limits.budget_nano,
        )
    )


def _has_limits(user: User) -> bool:
    limited = (user.max_budget, user.tpm_limit, user.rpm_limit, user.max_parallel_requests)
    return any(value is not None for value in limited) or bool(user.models)
