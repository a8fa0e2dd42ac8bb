"""`manage.py rotate pepper|secret-key|database|redis|tls|all`: change secrets of the running local stack.

The new secret is added beside the old one, processes are started again one by one (streams go on: clients that come
back get the rest from the other gateway), then the old one ends. `--finish` ends the former pepper and secret key.
"""

import json
import os
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from infra.local import tls
from infra.local.rotation import KINDS, Rotation, RotationError


class Command(BaseCommand):
    help = "Changes a secret of the running local stack without an interruption."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("what", choices=(*KINDS, "tls", "all"), help="all: all but tls")
        parser.add_argument("--finish", action="store_true", help="end the former pepper or secret key")
        parser.add_argument(
            "--force", action="store_true", help="with --finish: also where keys become worthless by it"
        )
        parser.add_argument(
            "--cert", type=Path, metavar="FILE", help="tls: the new certificate with its chain, PEM"
        )
        parser.add_argument("--key", type=Path, metavar="FILE", help="tls: its key, PEM")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            facts = self._tls(options) if options["what"] == "tls" else self._rotate(options)
        except (RotationError, RuntimeError, OSError, ValueError) as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps(facts))
            return
        self.stdout.write(str(facts.pop("text")))

    def _rotate(self, options: dict[str, Any]) -> dict[str, Any]:
        rotation = Rotation(settings.ENV.var, lambda text: self.stderr.write(f"  {text}"))
        kinds = KINDS if options["what"] == "all" else (options["what"],)
        if options["finish"]:
            rotation.finish(kinds, force=options["force"])
            return {"finished": list(kinds), "text": "the former secrets have ended"}
        rotation.rotate(kinds)
        facts: dict[str, Any] = {"rotated": list(kinds), "text": f"rotated: {', '.join(kinds)}"}
        kept = [kind for kind in kinds if kind in ("pepper", "secret-key")]
        if "pepper" in kinds:
            left = rotation.left()
            facts |= {"n_keys_left": left.n_keys, "n_tokens_left": left.n_tokens}
            facts["text"] += (
                f"\n{left.n_keys} keys and {left.n_tokens} tokens are kept under the former pepper until their next use"
            )
        if kept:
            facts["text"] += f"\nstill accepted: the former {' and '.join(kept)}; --finish ends them"
        return facts

    def _tls(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["cert"] is None or options["key"] is None:
            raise ValueError("tls: give the new pair with --cert FILE --key FILE")
        over = {
            f"over_{name}": os.environ.get(f"CORRAL_GATEWAY_TLS_{name.upper()}") for name in ("cert", "key")
        }
        if not all(over.values()):
            raise ValueError("tls: the gateways have none of their own (CORRAL_GATEWAY_TLS_CERT, …_KEY)")
        paths = {name: Path(str(value)) for name, value in over.items()}
        fingerprint = tls.replace_pair(options["cert"], options["key"], **paths, url=settings.ENV.gateway_url)
        return {"certificate": fingerprint, "text": f"gateways serve the certificate {fingerprint[:16]}…"}
