"""`manage.py openapi_client`: the typed Python client, or the document itself."""

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.api.app import api
from controlplane.api.client.generate import generate


class Command(BaseCommand):
    help = "Generates the typed Python client of the provisioning API from its OpenAPI document."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--to", type=Path, default=Path("var/client"), help="folder (default: %(default)s)"
        )
        parser.add_argument("--document", action="store_true", help="print the OpenAPI document and stop")

    def handle(self, *args: Any, **options: Any) -> None:
        document = json.loads(json.dumps(api.get_openapi_schema(), default=str))
        if options["document"]:
            self.stdout.write(json.dumps(document, indent=1))
            return
        try:
            folder = generate(document, options["to"])
        except ModuleNotFoundError as error:
            raise CommandError(f"{error}: `make install-dev` installs the generator") from error
        self.stdout.write(f"{folder}: pip install {options['to']}")
