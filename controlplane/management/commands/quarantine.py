"""`manage.py quarantine mch_… --reason …`: a machine leaves, its replicas replaced first; `--lift`: it stays.

Runs as operator: machines are the house's, no role of a tenant and no token can do it (the API's drain is for those who
have a machine to themselves). Without a machine it lists them.
"""

from __future__ import annotations

import getpass
import json
from typing import Any
from uuid import UUID

import redis
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Count

from autoscaler import quarantine
from autoscaler.house import build_house
from autoscaler.models import Machine, MachineState
from autoscaler.observe import LIVE_Q
from autoscaler.tick import House
from controlplane import ids
from controlplane.errors import CorralError
from infra.providers.base import ProviderError


class Command(BaseCommand):
    help = "Has a machine replaced, drained and ended, whatever it says of itself. Without a machine: lists them."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("machine", nargs="?", help="its id, mch_…")
        parser.add_argument("--reason", default="", help="kept, and told to those whose replicas live on it")
        parser.add_argument(
            "--lift", action="store_true", help="it stays after all, while nothing drains yet"
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        house = build_house()
        if options["machine"] is None:
            return self._list(house, as_json=options["json"])
        if options["lift"] and options["reason"]:
            raise CommandError("--reason: only for a quarantine, leave it out with --lift")
        machine_id = _id(options["machine"])
        touched = quarantine.deployments_on(machine_id)
        try:
            if options["lift"]:
                decision = quarantine.lift(machine_id, getpass.getuser(), house)
            else:
                decision = quarantine.quarantine(machine_id, options["reason"], getpass.getuser(), house)
        except CorralError as error:
            raise CommandError(error.message) from error
        except (ProviderError, redis.RedisError) as error:
            raise CommandError(f"{type(error).__name__}: {error}: try again") from error
        for deployment_id in touched:
            house.cell.redis.publish(house.cell.keys.invalidate_channel, f"dep:{deployment_id.hex}")
        row = Machine.objects.get(id=machine_id)
        if options["json"]:
            told = {
                "machine": ids.to_text(ids.Prefix.MACHINE, row.id),
                "state": row.state,
                "reason": row.reason,
            }
            self.stdout.write(json.dumps(told | {"decision": str(decision), "n_deployments": len(touched)}))
            return None
        self.stdout.write(f"{decision.reasons[0]} ({decision})")
        if options["lift"] or row.state == MachineState.GONE:
            return None
        n = f"{len(touched)} deployment{'' if len(touched) == 1 else 's'}"
        self.stdout.write(
            f"successors for {n} come first, then it drains and ends, at {row.ends_at:%H:%M:%S} UTC at the latest"
        )
        self.stdout.write("--lift lets it stay, until the first of its replicas drains")
        return None

    def _list(self, house: House, *, as_json: bool) -> None:
        rows = (
            Machine.objects.filter(cell=house.cell.keys.cell, provider=house.provider.name)
            .exclude(state=MachineState.GONE)
            .annotate(n_live=Count("replicas", filter=LIVE_Q))
            .order_by("id")
        )
        told = [
            {
                "machine": ids.to_text(ids.Prefix.MACHINE, row.id),
                "state": str(row.state),
                "n_replicas": row.n_live,
                "offering": row.offering or row.provider,
                "reserve_place": row.reserve_place,
                "reason": row.reason,
            }
            for row in rows
        ]
        if as_json:
            self.stdout.write(json.dumps(told))
            return
        for each in told:
            n = each["n_replicas"]
            count = f"{n} replica{'' if n == 1 else 's'}"
            kept = "" if each["reserve_place"] is None else f"  reserve {each['reserve_place']}"
            line = f"{each['machine']}  {each['state']:9} {count:>11}  {each['offering']}{kept}  {each['reason']}"
            self.stdout.write(line.rstrip())
        if not told:
            self.stdout.write("no machine")
        if house.config.spot_reserve:
            n = sum(row.state == MachineState.STOPPED and row.reserve_place is not None for row in rows)
            self.stdout.write(f"reserve: {n} of {house.config.spot_reserve} lie stopped")


def _id(text: str) -> UUID:
    try:
        return ids.from_text(ids.Prefix.MACHINE, text)
    except ids.InvalidIdError as error:
        raise CommandError(f"machine: {error} (`manage.py quarantine` lists them)") from error
