"""`manage.py doctor aws`: whether the provider's account can do what will be asked of it."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from autoscaler.config import AutoscalerConfig
from autoscaler.policy.sizes import places
from infra.providers.aws.config import AwsConfig
from infra.providers.base import Offering, ProviderError

_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED ", "unknown": "unknown"}


class Command(BaseCommand):
    """Exit status 1 when something failed; warnings and what could not be found out do not."""

    help = (
        "Check a provider's account: credentials, rights, image, network, types and prices, quotas, notices, expected "
        "cost. Buys nothing. Each finding that needs something done says what."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("provider", choices=["aws"], help="which provider")
        parser.add_argument("--json", action="store_true", help="one JSON object instead of text")

    def handle(self, *_: Any, **options: Any) -> None:
        from infra.providers.aws.clients import connect
        from infra.providers.aws.doctor import Verdict, examine

        try:
            config = AwsConfig.read(os.environ)
        except ProviderError as error:
            raise CommandError(str(error)) from None
        house: AutoscalerConfig = settings.AUTOSCALER

        def holds(offer: Offering) -> int:
            return places(house.need, offer.gpu, offer.n_gpus, house.replicas_per_machine)

        found = []
        clients = connect(config.region)
        n_most = house.max_machines + house.spot_reserve  # that may run at once
        for finding in examine(config, clients, max_machines=n_most, holds=holds):
            found.append(finding)
            if not options["json"]:
                self.stdout.write(f"{_MARKS[finding.verdict]}  {finding.subject}: {finding.found}")
                if finding.remedy:
                    self.stdout.write(f"         → {finding.remedy}")
        n_failed = sum(f.verdict is Verdict.FAILED for f in found)
        if options["json"]:
            self.stdout.write(
                json.dumps({"findings": [asdict(f) for f in found], "n_failed": n_failed}, indent=2)
            )
        else:
            n_warned = sum(f.verdict is Verdict.WARNING for f in found)
            self.stdout.write(f"\n{n_failed} failed, {n_warned} warnings, {len(found)} asked")
        if n_failed:
            sys.exit(1)
