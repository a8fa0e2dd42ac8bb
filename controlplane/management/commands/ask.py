"""`manage.py ask "…"`: a question to the running local stack, through the public API like any program."""

import json
from dataclasses import asdict
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import quickstart_file
from controlplane.askclient import AskError, ask


class Command(BaseCommand):
    help = (
        "Asks the running local stack a question through its public API and prints the answer as it arrives."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("question", nargs="?", default="What is the capital of France?")
        parser.add_argument("--model", help="deployment name; default: the one of quickstart.json")
        parser.add_argument("--max-tokens", type=int, default=120)
        parser.add_argument("--json", action="store_true", help="one JSON object instead of text")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            facts = quickstart_file.read(settings.ENV.var)
        except quickstart_file.NoQuickstartError as error:
            raise CommandError(str(error)) from error
        quiet = options["json"]

        def show(text: str) -> None:
            if not quiet:
                self.stdout.write(text, ending="")
                self.stdout.flush()

        try:
            answer = ask(
                facts.base_url,
                facts.api_key,
                options["model"] or facts.deployment,
                options["question"],
                max_tokens=options["max_tokens"],
                on_text=show,
                on_stage=lambda stage: quiet or self.stderr.write(f"[{stage}]"),
            )
        except AskError as error:
            raise CommandError(str(error)) from error
        except httpx.TransportError as error:
            raise CommandError(
                f"{facts.base_url} does not answer ({error}): is the stack up? `make status`"
            ) from error
        if quiet:
            self.stdout.write(json.dumps(asdict(answer), indent=2))
            return
        ttft = f"first token after {answer.ttft_ms:.0f} ms, " if answer.ttft_ms else ""
        self.stdout.write(
            f"\n\n[{answer.model}: {answer.n_prompt_tokens} prompt + {answer.n_completion_tokens} completion tokens, "
            f"{ttft}{answer.total_ms:.0f} ms in all, {answer.request_id}]"
        )
