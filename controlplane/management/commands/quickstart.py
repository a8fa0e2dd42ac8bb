"""`manage.py quickstart`: what a fresh local stack needs to be used, and a first answer as proof that it works.

Run by `manage.py up` once everything is ready; may run again at any time. Creates the admin, an organization, a
project, a key, the demo model and its deployment where they are missing, asks a first question through the public
API, writes var/quickstart.json and prints the panel. Runs as operator.
"""

import secrets
import time
from typing import Any

import httpx
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane import quickstart_file
from controlplane.askclient import Answer, AskError, ask
from controlplane.deployments import importing
from controlplane.deployments import services as deployments
from controlplane.quickstart_file import NoQuickstartError, Quickstart
from controlplane.tenants import key_services
from controlplane.tenants import services as tenants

ADMIN_EMAIL = "admin@corral.local"
ORGANIZATION, PROJECT = "acme", "demo"
QUESTION = "What is the capital of France?"
# Small enough for a laptop: 135M parameters in float32, in which a resumed answer continues exactly.
PROFILES: dict[str, dict[str, object]] = {
    "vllm": {"engine": "vllm", "max_model_len": 2048, "max_num_seqs": 32, "kv_cache_bytes": 512 << 20},
    "toy": {"engine": "toy", "max_model_len": 8192, "max_num_seqs": 256, "toy_step_ms": 10.0},
}
DEPLOYMENT_NAMES = {"vllm": "smollm2-135m-instruct", "toy": "toy"}
MODEL_SOURCES = {"vllm": f"package:{importing.DEMO_PACKAGE}", "toy": "toy"}
IDLE_TIMEOUT_S = 1800
FIRST_ANSWER_TIMEOUT_S = 240.0


class Command(BaseCommand):
    help = "Sets up the demo tenant, model and deployment, asks a first question, prints how to go on."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--engine", choices=sorted(PROFILES), help="default: CORRAL_ENGINE")
        parser.add_argument("--no-question", action="store_true", help="set up only")

    def handle(self, *args: Any, **options: Any) -> None:
        self._started_s = time.monotonic()
        engine = options["engine"] or settings.ENV.engine
        if engine not in PROFILES:
            raise CommandError(f"CORRAL_ENGINE={engine!r}: set one of {', '.join(sorted(PROFILES))}")
        facts, key_is_new = self._set_up(engine)
        quickstart_file.write(settings.ENV.var, facts)
        answer = None if options["no_question"] else self._first_question(facts)
        self._panel(facts, answer, key_is_new, engine)

    def _set_up(self, engine: str) -> tuple[Quickstart, bool]:
        env = settings.ENV
        try:
            known: Quickstart | None = quickstart_file.read(env.var)
        except NoQuickstartError:
            known = None
        password = known.admin_password if known else secrets.token_urlsafe(12)
        admin = tenants.ensure_user(email=ADMIN_EMAIL, password=password, name="Admin")
        organization = tenants.ensure_organization(name="Acme", slug=ORGANIZATION, owner=admin)
        project = tenants.ensure_project(organization_id=organization.id, name="Demo", slug=PROJECT)
        self._step(f"tenant {ORGANIZATION}/{PROJECT} ready")
        version = importing.register(
            organization_id=organization.id, source=MODEL_SOURCES[engine], var=env.var, progress=self._step
        )
        self._step(
            f"model {version.name} ready ({version.size_bytes / 1e6:.0f} MB, digest {version.digest[:12]})"
        )
        name = DEPLOYMENT_NAMES[engine]
        deployments.ensure_deployment(
            organization_id=organization.id,
            project_id=project.id,
            name=name,
            model_version_id=version.id,
            engine_profile=PROFILES[engine],
            min_replicas=0,
            max_replicas=1,
            idle_timeout_s=IDLE_TIMEOUT_S,
        )
        self._step(f"deployment {name} ready (scaled to zero; the first request wakes it)")
        key_is_new = known is None
        if known is None:
            _, api_key = key_services.create_api_key(
                organization_id=organization.id, project_id=project.id, name="quickstart", created_by=admin
            )
        else:
            api_key = known.api_key
        return Quickstart(
            base_url=f"{env.gateway_url}/v1",
            api_key=api_key,
            console_url=env.console_url,
            admin_email=ADMIN_EMAIL,
            admin_password=password,
            project=PROJECT,
            deployment=name,
        ), key_is_new

    def _first_question(self, facts: Quickstart) -> Answer:
        self._step(f"asking: {QUESTION}")
        last = ""

        def on_stage(text: str) -> None:
            """A line per stage, not one per second."""
            nonlocal last
            told = dict(part.partition("=")[::2] for part in text.removeprefix("corral ").split())
            stage = told.get("stage", "")
            if stage and stage != last:
                last = stage
                eta = (
                    f", about {int(told['eta_ms']) / 1000:.0f} s to go"
                    if told.get("eta_ms", "0") != "0"
                    else ""
                )
                self._step(f"  {stage.replace('_', ' ')}{eta}")

        try:
            return ask(
                facts.base_url,
                facts.api_key,
                facts.deployment,
                QUESTION,
                max_tokens=60,
                timeout_s=FIRST_ANSWER_TIMEOUT_S,
                on_stage=on_stage,
            )
        except (AskError, httpx.TransportError) as error:
            raise CommandError(
                f"the first question was not answered: {error}\n"
                "  `manage.py status` shows what runs, `manage.py logs` why"
            ) from error

    def _step(self, text: str) -> None:
        self.stdout.write(f"  {time.monotonic() - self._started_s:6.1f} s  {text}")
        self.stdout.flush()

    def _panel(self, facts: Quickstart, answer: Answer | None, key_is_new: bool, engine: str) -> None:
        key = (
            facts.api_key
            if key_is_new
            else f"{facts.api_key[:19]}…  (shown at the first start; in var/quickstart.json)"
        )
        curl_key = facts.api_key if key_is_new else "$CORRAL_API_KEY"
        rows = [
            ("console", facts.console_url),
            ("sign in", f"{facts.admin_email}  /  {facts.admin_password}"),
            ("base URL", facts.base_url),
            ("API key", key + ("  (shown once; also in var/quickstart.json)" if key_is_new else "")),
            (
                "model",
                facts.deployment + ("  (toy engine: no language model runs here)" if engine == "toy" else ""),
            ),
        ]
        line = "─" * 78
        out = ["", line, "  Corral is up", line, *(f"  {name:<9} {value}" for name, value in rows), ""]
        out += [
            "  try it",
            f"    curl -N {facts.base_url}/chat/completions \\",
            f"      -H 'Authorization: Bearer {curl_key}' -H 'Content-Type: application/json' \\",
            f'      -d \'{{"model":"{facts.deployment}","stream":true,'
            '"messages":[{"role":"user","content":"Hello!"}]}\'',
            '    make ask Q="Why is the sky blue?"',
            "",
            "  command line",
            "    .venv/bin/python manage.py create_token me --role owner | "
            f".venv/bin/corral login --url {facts.console_url}",
            "    .venv/bin/corral get deployments",
        ]
        if answer:
            ttft = f"{answer.ttft_ms / 1000:.1f} s" if answer.ttft_ms else "-"
            out += [
                "",
                f"  first question   {QUESTION}",
                f"  first answer     {' '.join(answer.text.split())}",
                f"                   {answer.n_completion_tokens} tokens, first after {ttft}, "
                f"through gateway, queue and worker; {answer.request_id}",
            ]
        self.stdout.write("\n".join([*out, line]))
