"""`manage.py publish_adapter DIRECTORY --deployment chat --name formal`: serve a LoRA adapter of this host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.adapters import receiving, selectors, services
from controlplane.adapters.models import Adapter, AdapterState
from controlplane.deployments.models import Deployment, this_cell
from controlplane.errors import CorralError
from infra.objectstore import ObjectStoreError


class Command(BaseCommand):
    """Registers, checks and serves it in one go; an adapter registered by the API can be named instead."""

    help = "Check a LoRA adapter (a PEFT directory on this host) and serve it under a deployment."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("directory", help="with adapter_config.json and adapter_model.safetensors")
        parser.add_argument("--deployment", required=True, help="name of the deployment it belongs to")
        parser.add_argument("--name", required=True, help="programs send DEPLOYMENT:NAME as the model")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--project", help="slug, where several projects have a deployment of that name")
        parser.add_argument("--json", action="store_true", help="one JSON object instead of text")

    def handle(self, *_: Any, **options: Any) -> None:
        found = Deployment.objects.filter(
            organization__slug=options["organization"],
            name=options["deployment"],
            cell=this_cell(),
            deleted_at=None,
        )
        if options["project"]:
            found = found.filter(project__slug=options["project"])
        rows = list(found[:2])
        if len(rows) != 1:
            what = "several deployments are" if rows else "no deployment is"
            raise CommandError(
                f"{what} called {options['deployment']!r} in {options['organization']!r}"
                + (": name its --project" if rows else "")
            )
        deployment = rows[0]
        try:
            row = self._awaiting(deployment, options["name"]) or services.register(
                organization_id=deployment.organization_id,
                deployment_id=deployment.id,
                name=options["name"],
            )
            ready = receiving.receive(
                selectors.adapter(organization_id=row.organization_id, adapter_id=row.id),
                Path(options["directory"]).expanduser().resolve(),
            )
        except (CorralError, ObjectStoreError) as error:
            raise CommandError(str(error)) from None
        if options["json"]:
            said = {
                "id": str(ready),
                "model": ready.model,
                "digest": ready.digest,
                "rank": ready.rank,
                "modules": ready.modules,
                "size_bytes": ready.size_bytes,
                "source": ready.source_uri,
            }
            self.stdout.write(json.dumps(said))
        else:
            self.stdout.write(
                f"{ready.model} is served: rank {ready.rank}, {', '.join(ready.modules)}, "
                f"{ready.size_bytes / 1e6:.1f} MB, {ready.digest[:12]}"
            )

    @staticmethod
    def _awaiting(deployment: Deployment, name: str) -> Adapter | None:
        """One that was registered by the API and waits for its files."""
        return Adapter.objects.filter(
            organization_id=deployment.organization_id,
            deployment=deployment,
            name=name,
            state=AdapterState.AWAITING,
        ).first()
