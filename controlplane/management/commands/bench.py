"""`manage.py bench NAME`: the benchmarks behind every speed figure in the documentation."""

import argparse
import json
import signal
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from benchmarks import (
    admission,
    autoscaler,
    budgets,
    cells,
    clients,
    coldstart,
    delay,
    engine,
    gateway,
    isolation,
    joint,
    keycheck,
    limits,
    modelcache,
    modelload,
    revoke,
    slots,
    timing,
    truth,
)

_WIDTH = 105
_INDENT: dict[str, Any] = {"initial_indent": "  ", "subsequent_indent": " " * 14}


@dataclass(frozen=True)
class Bench:
    help: str
    measure: Callable[..., dict[str, Any]]
    as_text: Callable[[dict[str, Any]], str]
    repeats: int = 7
    options: tuple[str, ...] = ()  # of the command, passed on
    strict: bool = False  # exit status 1 where a goal is not reached


BENCHES = {
    "admission": Bench(
        "an overloaded deployment that refuses by prediction, and one that refuses by the length of its queue",
        admission.measure,
        admission.as_text,
        2,
    ),
    "autoscaler": Bench(
        "one pass over a whole cell, at a tenth, a third and the whole size; the purchase plan beside it",
        autoscaler.measure,
        autoscaler.as_text,
        options=("replicas", "deployments"),
    ),
    "gateway": Bench(
        "CPU per request and per streamed event, everything switched on",
        gateway.measure,
        gateway.as_text,
        options=("only", "gateways"),
    ),
    "engine": Bench(
        "the same vLLM behind Corral and behind its own API server",
        engine.measure,
        engine.as_text,
        options=("only",),
    ),
    "cells": Bench(
        "a tenant in two cells stays within its limits; one cell loses its Redis",
        cells.measure,
        cells.as_text,
        1,
    ),
    "clients": Bench(
        "clients that leave, in the queue and in the middle of an answer, and clients that do not read",
        clients.measure,
        clients.as_text,
        3,
    ),
    "coldstart": Bench(
        "a request to its first token from each rung: machine warm, weights from disk, control plane alone",
        coldstart.measure,
        coldstart.as_text,
        options=("only",),
    ),
    "isolation": Bench(
        "a tenant beside another that sends ten times as much; served tokens against weights",
        isolation.measure,
        isolation.as_text,
        3,
    ),
    "delay": Bench(
        "gaps between tokens when Redis is far from the machines", delay.measure, delay.as_text, 3
    ),
    "joint": Bench(
        "zygote, Celery front and forked engine core with 512 requests in flight",
        joint.report,
        joint.as_text,
        1,
    ),
    "keycheck": Bench(
        "CPU of a cached key check, its questions to Postgres, known keys without Postgres",
        keycheck.measure,
        keycheck.as_text,
        strict=True,
    ),
    "revoke": Bench(
        "how long a revoked key still works on either of two gateways under load",
        revoke.measure,
        revoke.as_text,
        1,
        strict=True,
    ),
    "timing": Bench(
        "whether the time of a refusal tells an unknown key from a wrong secret",
        timing.measure,
        timing.as_text,
        1,
        strict=True,
    ),
    "budgets": Bench(
        "what window budgets cost a request, in Redis and in the gateway", budgets.measure, budgets.as_text
    ),
    "limits": Bench(
        "each kind of limit at each level lets exactly 10 of 64 through; 32 streams share the last credit",
        limits.measure,
        limits.as_text,
        1,
    ),
    "modelcache": Bench(
        "ten models on one machine with room for three: what leaves, against LRU and the optimum",
        modelcache.measure,
        modelcache.as_text,
        options=("traces",),
    ),
    "modelload": Bench(
        "a version from a real S3 server into an engine's memory: download, verify, load, alone and at once",
        modelload.measure,
        modelload.as_text,
        options=("size_mib", "link_mb_s"),
    ),
    "slots": Bench(
        "gaps between tokens and throughput with standing slots and with slots that keep a promise",
        slots.measure,
        slots.as_text,
        3,
    ),
    "truth": Bench(
        "latencies of bursty loads, live and as the simulator says",
        truth.measure,
        truth.as_text,
        3,
        ("engine", "requests"),
    ),
}


# Options that not every benchmark takes, and what they are where nothing is said.
DEFAULTS: dict[str, Any] = {
    "only": None,
    "gateways": gateway.N_GATEWAYS,
    "replicas": 10_000,
    "deployments": 1_000,
    "engine": "toy",
    "requests": None,
    "traces": None,
    "link_mb_s": 0.0,
    "size_mib": 512,
}


class Command(BaseCommand):
    help = textwrap.fill(
        "Measures on private stacks of its own and ends them; progress goes to standard error. Prints the figures, and "
        "the goals with whether they were reached. Give it a quiet machine.",
        _WIDTH,
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "benchmarks (runs per figure unless --repeats is given):\n" + "\n".join(
            textwrap.fill(f"{name:<12}{bench.help} ({bench.repeats})", _WIDTH, **_INDENT)
            for name, bench in sorted(BENCHES.items())
        )
        parser.add_argument(
            "name", choices=sorted(BENCHES), metavar="NAME", help="one of the benchmarks below"
        )
        parser.add_argument("--repeats", type=int, metavar="N", help="runs per figure")
        parser.add_argument(
            "--only", metavar="TEXT", help=f"{_who('only')}: scenarios whose name contains this"
        )
        parser.add_argument(
            "--gateways",
            type=int,
            choices=range(1, 17),
            metavar="N",
            help=f"{_who('gateways')}: processes, 1 to 16 (default: {gateway.N_GATEWAYS}, as in the local stack)",
        )
        parser.add_argument(
            "--replicas", type=int, metavar="N", help=_help("replicas", "replicas of the cell")
        )
        parser.add_argument(
            "--deployments", type=int, metavar="N", help=_help("deployments", "deployments of the cell")
        )
        parser.add_argument("--engine", choices=sorted(truth.CASES), help=_help("engine", "which engine"))
        parser.add_argument(
            "--requests",
            type=Path,
            metavar="FILE",
            help=f"{_who('requests')}: a request file whose bursts and sizes to send",
        )
        parser.add_argument(
            "--traces",
            type=Path,
            metavar="DIR",
            help=f"{_who('traces')}: a directory with the trace itself, instead of the law",
        )
        parser.add_argument(
            "--link-mb-s",
            type=float,
            metavar="MB",
            help=f"{_who('link_mb_s')}: over a link of this speed (default: as it comes)",
        )
        parser.add_argument(
            "--size-mib", type=int, metavar="MIB", help=_help("size_mib", "how large a version")
        )
        parser.add_argument("--json", action="store_true", help="one JSON object on standard output")

    def handle(self, *args: Any, **options: Any) -> None:
        name = options["name"]
        bench = BENCHES[name]
        repeats = bench.repeats if options["repeats"] is None else options["repeats"]
        if not 1 <= repeats <= 100:
            raise CommandError(f"--repeats {repeats}: give 1 to 100")
        for option in DEFAULTS:
            if options[option] is not None and option not in bench.options:
                flag = "--" + option.replace("_", "-")
                raise CommandError(f"{flag}: {name} does not take it, only {_who(option)}")
        given = {o: DEFAULTS[o] if options[o] is None else options[o] for o in bench.options}
        if "replicas" in given and not 1 <= given["deployments"] <= given["replicas"] <= 100_000:
            raise CommandError("--deployments and --replicas: 1 to 100000, a replica for each at least")
        # A run that is ended from outside ends its private stack, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        report = bench.measure(repeats=repeats, progress=self.stderr.write, **given)
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else bench.as_text(report))
        if bench.strict and not all(goal["reached"] for goal in report["goals"]):
            raise SystemExit(1)


def _who(option: str) -> str:
    """The benchmarks that take it."""
    return ", ".join(sorted(name for name, bench in BENCHES.items() if option in bench.options))


def _help(option: str, what: str) -> str:
    return f"{_who(option)}: {what} (default: {DEFAULTS[option]})"
