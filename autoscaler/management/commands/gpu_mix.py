"""`manage.py gpu_mix`: which GPUs, and how many of each, serve a recorded mix of request sizes most cheaply.

Prints a fleet of several kinds and the best fleet of one kind, both sized by simulation of the very file, and where
each size should go. Reads files only; needs no database.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from autoscaler.gpumix import cheapest
from autoscaler.policy.gpumix import Bucket, Fleet, Promise, single
from autoscaler.sim.pools import sized
from autoscaler.sim.replicas import kinds
from autoscaler.sim.workload import WorkloadError, read_sizes
from controlplane.policy.gpus import GPUS, PRICES
from controlplane.policy.models import MODELS
from controlplane.policy.perfmodel import DTYPES

_MAX_SIZES = 50_000  # more tell nothing new


class Command(BaseCommand):
    help = "Recommends GPUs for a recorded mix of request sizes at promised times."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--requests", type=Path, required=True, help="request file, or table of lengths")
        parser.add_argument("--rate", type=float, required=True, help="requests per second at the busy hour")
        parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b", metavar="NAME")
        parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
        parser.add_argument(
            "--gpus",
            default="l4,a10g,l40s,a100_sxm,h100_sxm",
            help="names of the catalogue, with a price of your own as NAME=USD per GPU hour",
        )
        parser.add_argument("--tp", default="1", help="GPUs per replica, several as 1,2,4")
        parser.add_argument("--itl-s", type=float, default=0.1, help="promised mean time between tokens")
        parser.add_argument("--ttft-s", type=float, default=2.0, help="promised time to the first token")
        parser.add_argument("--kept", type=float, default=0.99, help="share of requests that keep both")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            names, prices = _gpus(options["gpus"])
            tps = [int(tp) for tp in options["tp"].split(",")]
            offered = kinds(options["model"], names, tps, dtype=options["dtype"], prices=prices)
            sizes = read_sizes(options["requests"])
            sizes = sizes[:: -(-len(sizes) // _MAX_SIZES)]
            promise = Promise(options["itl_s"], options["ttft_s"])
            plans = {}
            for name, choose in (("mix", cheapest), ("single", single)):
                self.stderr.write(f"sizing: {name}")
                plan = sized(choose, offered, sizes, options["rate"], promise, kept_share=options["kept"])
                if plan is not None:
                    plans[name] = plan
        except (WorkloadError, ValueError) as error:
            raise CommandError(str(error)) from error
        if "mix" not in plans:
            raise CommandError(
                "no fleet of these GPUs keeps the promise: give more kinds, a larger --tp, or longer times"
            )
        report = {name: _told(*plan) for name, plan in plans.items()}
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _text(report))


def _gpus(text: str) -> tuple[list[str], dict[str, float]]:
    names, prices = [], {}
    for part in text.split(","):
        name, has_price, usd = part.strip().partition("=")
        if name not in GPUS:
            raise ValueError(f"--gpus: {name!r} is not in the catalogue; known: {', '.join(sorted(GPUS))}")
        names.append(name)
        if has_price:
            prices[name] = float(usd)
        elif name not in PRICES:
            raise ValueError(f"--gpus: {name} has no price in the catalogue; give one as {name}=USD")
    return names, prices


def _told(fleet: Fleet, fill: float, wanted: list[Bucket]) -> dict[str, Any]:
    return {
        "replicas": dict(fleet.replicas),
        "usd_per_h": round(fleet.usd_per_h, 4),
        "filled_to": fill,
        "solver": fleet.reason,
        "routing": [
            {
                "prompt_tokens_mean": round(bucket.n_prompt),
                "answer_tokens_mean": round(bucket.n_output),
                "requests_per_s": round(bucket.requests_per_s, 3),
                "shares": {name: round(share, 3) for name, share in sorted(shares.items())},
            }
            for bucket, shares in zip(wanted, fleet.shares, strict=True)
        ],
    }


def _text(report: dict[str, Any]) -> str:
    lines = []
    for name, plan in report.items():
        fleet = " + ".join(f"{n} {kind}" for kind, n in sorted(plan["replicas"].items()))
        lines.append(
            f"{name + ':':<8}{fleet}, {plan['usd_per_h']:.2f} USD/h, filled to {plan['filled_to']:.0%}"
        )
    if "single" in report:
        saving = 1 - report["mix"]["usd_per_h"] / report["single"]["usd_per_h"]
        lines.append(f"the mix saves {saving:.1%}")
    lines += ["", f"{'prompt':>8}{'answer':>8}{'requests/s':>12}  goes to (mix)"]
    for row in report["mix"]["routing"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        lines.append(
            f"{row['prompt_tokens_mean']:>8}{row['answer_tokens_mean']:>8}{row['requests_per_s']:>12.2f}  {shares}"
        )
    return "\n".join(lines)
