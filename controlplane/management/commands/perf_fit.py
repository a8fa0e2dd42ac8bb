"""`manage.py perf_fit`: fits the performance model to measured engines and kernels, and tells how far off it is.

Without --data it runs on the excerpt in the repository. --write replaces the committed coefficients, and with --data
the excerpt. Reads files only; needs no database.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.policy.capacity import Mix, capacity
from controlplane.policy.gpus import GPUS, gpu
from controlplane.policy.models import model
from controlplane.policy.perfbias import Bias
from controlplane.policy.perfmodel import kv_tokens, step_model
from controlplane.prediction.perf import data
from controlplane.prediction.perf.coefficients import FILE, Coefficients, as_json
from controlplane.prediction.perf.fit import Fitted, fit
from controlplane.prediction.perf.kernels import KernelShares, kernel_shares
from controlplane.prediction.perf.residuals import Residual, corrected, held_out, seen

SOURCES = (
    "serving: aiconfigurator 0.10.0 (PyPI, NVIDIA), systems/silicon_sample.csv, Apache-2.0",
    "kernels: aiconfigurator 0.6.0 (PyPI, NVIDIA), systems/data/*, Apache-2.0",
    "prompts and decoding: Mutinifni/splitwise-sim data/perf_model.csv, MIT",
    "prompts and decoding: LLMServe/DistServe simdistserve/estimators/profile_data, Apache-2.0",
)
_SAMPLE_OTHERS = 3  # of engines that only help, every third row goes into the excerpt
_N_TIMED = 20_000


class Command(BaseCommand):
    help = (
        "Fits step times per model and GPU to measurements; prints residuals, also of unseen GPUs and models."
    )
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--data", type=Path, help="folder of measurements (default: the excerpt)")
        parser.add_argument("--write", action="store_true", help="replace the committed coefficients")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        folder: Path | None = options["data"]
        try:
            rows = data.read_sample() if folder is None else data.observations(folder)
            kernels = {} if folder is None else kernel_shares(folder / "ops")
            fitted = fit(rows, kernels)
        except (OSError, KeyError, ValueError) as error:
            raise CommandError(f"--data {folder or data.SAMPLE.name}: {error}") from error
        report = _report(rows, kernels, fitted)
        if options["write"]:
            _write(rows, fitted, report, with_sample=folder is not None)
        self.stdout.write(json.dumps(report, indent=1) if options["json"] else _text(report))


def _report(
    rows: Sequence[data.Observation], kernels: dict[str, KernelShares], fitted: Fitted
) -> dict[str, Any]:
    return {
        "sources": list(SOURCES),
        "n_rows": len(rows),
        "seen": [asdict(found) for found in seen(rows, fitted)],
        "gpu_held_out": [asdict(found) for found in held_out(rows, kernels, "gpu")],
        "model_held_out": [asdict(found) for found in held_out(rows, kernels, "model")],
        "corrected": [asdict(found) for found in corrected(rows, kernels)],
        "kernels": {name: {"shares": k.shares, "median_error": k.errors} for name, k in kernels.items()},
        "us_per_prediction": _timed_us(fitted),
    }


def _timed_us(fitted: Fitted) -> dict[str, float]:
    """Microseconds of one step time, of a model made for a new pair, of slots for a mix, of a correction."""
    shape, card = model("llama-3.1-8b"), gpu("h100_sxm")
    step = step_model(shape, card, 1, fitted.of(card.name))
    room, mix, bias = kv_tokens(shape, card), Mix(1000, 200), Bias()

    def us(n: int, call: Any) -> float:
        began_s = time.perf_counter()
        for i in range(n):
            call(i)
        return round((time.perf_counter() - began_s) / n * 1e6, 2)

    return {
        "step": us(_N_TIMED, lambda i: step.step_s(0, 0.0, 32, 30_000 + i)),
        "new_pair": us(_N_TIMED // 10, lambda i: step_model(shape, card, 1, fitted.of(card.name))),
        "capacity": us(_N_TIMED // 10, lambda i: capacity(step, room, mix, 0.05)),
        "correction": us(_N_TIMED, lambda i: bias.seen(1.0 + i % 7 / 10)),
    }


def _write(
    rows: Sequence[data.Observation], fitted: Fitted, report: dict[str, Any], *, with_sample: bool
) -> None:
    told = {
        "sources": report["sources"],
        "residuals": {key: report[key] for key in ("gpu_held_out", "model_held_out")}
        | {"all": report["seen"][-1]},
    }
    by_gpu = {name: e for name, e in fitted.by_gpu.items() if name in GPUS}
    FILE.write_text(as_json(Coefficients(fitted.common, by_gpu), told))
    if with_sample:
        others = [row for row in rows if row.engine != "vllm"]
        data.write_sample([*(r for r in rows if r.engine == "vllm"), *others[::_SAMPLE_OTHERS]])


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['n_rows']} measurements", *(f"  {source}" for source in report["sources"])]
    titles = {
        "seen": "Relative error on what was fitted",
        "gpu_held_out": "GPU never seen by the fit",
        "model_held_out": "Model never seen by the fit",
    }
    for key, title in titles.items():
        lines += ["", f"{title:<44}{'rows':>6}{'median':>9}{'90 %':>9}{'bias':>9}{'prior':>9}"]
        for found in (Residual(**values) for values in report[key]):
            lines.append(
                f"  {found.group:<42}{found.n:>6}{found.median:>9.1%}{found.p90:>9.1%}{found.bias:>+9.1%}"
                f"{found.prior:>9.1%}"
            )
    lines += [
        "",
        f"{'Model never seen, corrected online':<44}{'rows':>6}{'before':>9}{'median':>9}{'< p50':>9}{'< p90':>9}",
    ]
    for row in report["corrected"]:
        lines.append(
            f"  {row['group']:<42}{row['n']:>6}{row['before']:>9.1%}{row['median']:>9.1%}{row['under_p50']:>9.0%}"
            f"{row['under_p90']:>9.0%}"
        )
    lines.append("")
    for name, kernel in report["kernels"].items():
        shares = ", ".join(f"{share} {value:.2f}" for share, value in kernel["shares"].items())
        lines.append(f"kernels of {name}: {shares}")
    us = ", ".join(f"{name} {value:g}" for name, value in report["us_per_prediction"].items())
    return "\n".join([*lines, "", f"microseconds per prediction: {us}"])
