"""`manage.py publish_model VERSION s3://bucket/prefix`: put a model version where bought machines fetch it from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.deployments import importing, versions
from controlplane.deployments.models import ModelVersion
from infra.objectstore import ObjectStoreError, Place, publish
from workers.modelcache.store import ModelStoreError


class Command(BaseCommand):
    """Uploads what is not there yet; then the version's machines fetch it by signed URLs."""

    help = "Upload a registered model version to an S3 bucket and let its machines fetch it from there."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("version", help="name of the model version, or the first digits of its digest")
        parser.add_argument("place", help="s3://bucket or s3://bucket/prefix")
        parser.add_argument("--organization", default="acme", help="slug (default: %(default)s)")
        parser.add_argument("--json", action="store_true", help="one JSON object instead of text")

    def handle(self, *_: Any, **options: Any) -> None:
        mine = ModelVersion.objects.filter(organization__slug=options["organization"])
        wanted = options["version"]
        found = list(mine.filter(name=wanted)[:2]) or list(mine.filter(digest__startswith=wanted)[:2])
        if len(found) != 1:
            what = "several model versions" if found else "no model version"
            raise CommandError(
                f"{what} called {wanted!r} in {options['organization']!r}: give more of its digest"
            )
        version = found[0]
        store = importing.store(Path(settings.ENV.var))
        try:
            manifest = store.verify(version.digest)
            place = Place.parse(options["place"])
            sent = publish(store.path(version.digest), manifest, place, self._report(quiet=options["json"]))
        except (ModelStoreError, ObjectStoreError) as error:
            raise CommandError(str(error)) from None
        versions.move(
            organization_id=version.organization_id, model_version_id=version.id, source_uri=place.uri
        )
        if options["json"]:
            said = {
                "digest": version.digest,
                "place": place.uri,
                "n_bytes_sent": sent,
                "n_bytes": manifest.size_bytes,
            }
            self.stdout.write(json.dumps(said))
        else:
            self.stdout.write(
                f"{version.name} {version.digest[:12]} is in {place.uri} ({sent / 1e6:.1f} MB sent); "
                "replicas that start from now on fetch it there"
            )

    def _report(self, *, quiet: bool) -> Any:
        def say(name: str, size: int) -> None:
            if not quiet:
                self.stdout.write(f"  {name}  {size / 1e6:.1f} MB")

        return say
