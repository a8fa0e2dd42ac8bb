"""`manage.py profile MODEL [GPU]`: how Corral would run a model on an accelerator, every setting with its reason.

MODEL: a model directory, its config.json, or a name of the shape catalogue. GPU: `cpu`, `l4`, `4xl4`, … Reads files
only; needs no database. Exit status 1, with field and remedy, when it cannot run.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser

from controlplane.deployments.profiles import hardware
from controlplane.errors import InvalidInputError
from controlplane.policy.engineprofile.catalogue import known_model
from controlplane.policy.engineprofile.compiling import compile_profile
from controlplane.policy.engineprofile.modelconfig import model_config
from controlplane.policy.engineprofile.types import (
    Compiled,
    ImpossibleError,
    ModelConfig,
    Override,
    Promise,
    Wish,
)
from controlplane.policy.models import MODELS
from controlplane.prediction.perf.coefficients import coefficients
from workers.engine.base import EngineProfile, ProfileError
from workers.engine.vllm_args import argv, engine_args

# As deployments/migrations/0002 sets them; this command asks no database.
CLASSES: Final = {
    "interactive": Promise("interactive", 1_000, 100),
    "standard": Promise("standard", 5_000, 250),
    "batch": Promise("batch", 600_000, 2_000),
    "flex": Promise("flex", 3_600_000, 5_000),
}
_WIDTH: Final = 112


class Command(BaseCommand):
    help = "Compiles an engine profile for a model, an accelerator and a service class, and says why."
    requires_system_checks: list[str] = []  # noqa: RUF012 - Django's own declaration

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "model", help="a model directory, a config.json, or a name of the shape catalogue"
        )
        parser.add_argument("gpu", nargs="?", default="cpu", help="cpu (default), l4, 4xl4, h100_sxm, …")
        parser.add_argument("--class", dest="slo", choices=sorted(CLASSES), default="interactive")
        parser.add_argument(
            "--prompt-tokens", type=int, default=1024, metavar="N", help="of a typical request (1024)"
        )
        parser.add_argument(
            "--answer-tokens", type=int, default=256, metavar="N", help="of a typical request (256)"
        )
        parser.add_argument("--adapters", type=int, default=0, metavar="N", help="LoRA adapters to serve")
        parser.add_argument(
            "--lora-rank", type=int, default=0, metavar="R", help="the largest rank among them"
        )
        parser.add_argument(
            "--acceptance", type=float, metavar="A", help="measured share of drafted tokens kept"
        )
        parser.add_argument(
            "--set", action="append", default=[], metavar="KNOB=VALUE[:REASON]", help="override a setting"
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            place = hardware(options["gpu"])
            model = _model(options["model"])
            wish = Wish(
                mean_prompt=options["prompt_tokens"],
                mean_output=options["answer_tokens"],
                n_adapters=options["adapters"],
                lora_rank=options["lora_rank"],
                acceptance=options["acceptance"],
                overrides=dict(_override(text) for text in options["set"]),
            )
            known = coefficients()
            efficiency = known.common if place.gpu is None else known.by_gpu.get(place.gpu.name, known.common)
            compiled = compile_profile(model, place, CLASSES[options["slo"]], wish, efficiency)
            profile = EngineProfile.from_json({**compiled.as_dict(), "engine": "vllm"})
        except (InvalidInputError, ProfileError) as error:
            raise CommandError(str(error)) from error
        except ImpossibleError as error:
            told = [
                {"field": r.field, "code": r.code, "message": r.message, "remedy": r.remedy}
                for r in error.refusals
            ]
            raise CommandError(
                json.dumps({"impossible": told})
                if options["json"]
                else f"{model.name} on {place.name} is impossible\n"
                + "\n".join(f"  {r}" for r in error.refusals)
            ) from error
        flags = argv(engine_args(profile))
        if options["json"]:
            self.stdout.write(json.dumps(_told(model, place.name, options["slo"], compiled, flags), indent=2))
        else:
            basis = "" if place.gpu is None else known.basis(place.gpu)
            self.stdout.write(_text(model, place.name, CLASSES[options["slo"]], compiled, flags, basis))


def _model(text: str) -> ModelConfig:
    path = Path(text)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise CommandError(f"{path}: {error}") from error
        return model_config(path.parent.name or path.stem, config)
    found = known_model(text)
    if found is None:
        raise CommandError(
            f"{text!r}: give a model directory, a config.json or one of {', '.join(sorted(MODELS))}"
        )
    return found


def _override(text: str) -> tuple[str, Override]:
    name, separator, rest = text.partition("=")
    if not separator:
        raise CommandError(f"--set {text!r}: give KNOB=VALUE or KNOB=VALUE:REASON")
    if name not in EngineProfile.__dataclass_fields__:
        raise CommandError(
            f"--set {text!r}: no such knob; known: {', '.join(EngineProfile.__dataclass_fields__)}"
        )
    value, _, reason = rest.partition(":")
    try:
        return name, Override(json.loads(value), reason)
    except ValueError:
        return name, Override(value, reason)


def _told(model: ModelConfig, place: str, slo: str, compiled: Compiled, flags: list[str]) -> dict[str, Any]:
    return {
        "model": model.name,
        "hardware": place,
        "slo_class": slo,
        "values": [
            {
                "name": v.name,
                "value": v.value,
                "reason": v.reason,
                "inputs": dict(v.inputs),
                "overridden": v.overridden,
            }
            for v in compiled.values
        ],
        "forecast": dict(compiled.forecast),
        "warnings": list(compiled.warnings),
        "arguments": flags,
    }


def _text(
    model: ModelConfig, place: str, promise: Promise, compiled: Compiled, flags: list[str], basis: str
) -> str:
    experts = (
        f", {model.n_experts} experts of which {model.n_experts_used} serve a token"
        if model.n_experts
        else ""
    )
    lines = [
        f"{model.name} on {place}, class {promise.slo_class} "
        f"(first token {promise.ttft_ms:g} ms, then {promise.itl_ms:g} ms)",
        f"{model.n_params / 1e9:.3g}B parameters at {model.weight_bits:g} bits, {model.n_layers} layers, "
        f"{model.n_heads} heads over {model.n_kv_heads} KV heads{experts}",
        "",
    ]
    # What says nothing here: the details of what is off.
    chosen = compiled.as_dict()
    hidden = set() if chosen.get("speculative_method") else {"num_speculative_tokens", "speculative_model"}
    hidden |= set() if chosen.get("max_loras") else {"max_lora_rank"}
    values = [value for value in compiled.values if value.name not in hidden]
    name_width = max(len(value.name) for value in values)
    shown = {
        v.name: "-" if v.value is None else "off" if v.value == "" else str(v.value) for v in compiled.values
    }
    value_width = max(len(text) for text in shown.values())
    for value in values:
        head = f"  {value.name:<{name_width}}  {shown[value.name]:>{value_width}}{'*' if value.overridden else ' '} "
        first, *rest = textwrap.wrap(value.reason, _WIDTH - len(head)) or [""]
        lines.append(head + first)
        lines += [" " * len(head) + line for line in rest]
    if any(value.overridden for value in compiled.values):
        lines.append("  * set by the operator")
    f = compiled.forecast
    if "itl_full_ms" in f:
        lines += [
            "",
            f"Expected ({basis}): {f['itl_alone_ms']:g} ms per token alone, {f['itl_full_ms']:g} ms in a full batch, "
            f"first token after {f['ttft_alone_ms']:g} ms, {f['tokens_per_s']:g} tokens/s",
            f"Memory per GPU: {f['weights_gib_per_gpu']:g} GiB of weights, {f['kv_gib_per_gpu']:g} GiB of KV, together "
            f"{f['kv_tokens']:.0f} tokens",
        ]
    lines += [f"Warning: {warning}" for warning in compiled.warnings]
    return "\n".join([*lines, "", shlex.join(["vllm", "serve", "MODEL", *flags])])
