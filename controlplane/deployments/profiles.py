"""Engine profiles of deployments: from what an owner asks for to what a replica is started with, and why.

Called by services.py when a deployment is written, and by `manage.py profile`. The choosing is pure
(controlplane/policy/engineprofile); this file says what is known of the model, the cell's accelerator and the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from django.conf import settings

from controlplane.deployments.models import ModelSource, ModelVersion, SloClass
from controlplane.errors import InvalidInputError
from controlplane.policy.engineprofile.compiling import compile_profile
from controlplane.policy.engineprofile.modelconfig import model_config
from controlplane.policy.engineprofile.toy import compile_plain
from controlplane.policy.engineprofile.types import (
    Compiled,
    Hardware,
    ImpossibleError,
    Override,
    Promise,
    Scalar,
    Value,
    Wish,
)
from controlplane.policy.gpus import accelerator as parse_accelerator
from controlplane.policy.gpus import gpu
from controlplane.prediction.perf.coefficients import coefficients
from workers.engine.base import EngineProfile, ProfileError

# Who asks for such a knob insists; the rest is the compiler's.
OWN_KNOBS: Final = (
    *("engine", "toy_step_ms", "toy_seq_ms", "toy_prefill_ms", "toy_fail_every", "toy_faults"),
    "toy_weights_bytes",
)
MAX_REASON: Final = 300


@dataclass(frozen=True, slots=True)
class Chosen:
    """`profile`: every knob of the worker's EngineProfile. `compiled` says why, knob by knob."""

    profile: dict[str, Any]
    compiled: Compiled
    hardware: str


def hardware(text: str) -> Hardware:
    """`cpu`, `l4`, `4xl4`: what one replica runs on. Raises InvalidInputError (field `accelerator`)."""
    try:
        name, n = parse_accelerator(text)
    except ValueError as error:
        raise InvalidInputError(f"accelerator={text!r}: {error}, or cpu", field="accelerator") from None
    return Hardware(gpu(name), n) if name else Hardware(None)


def promise(slo: SloClass) -> Promise:
    return Promise(slo.name, slo.ttft_ms, slo.itl_ms)


def choose(
    version: ModelVersion,
    slo: SloClass,
    given: Mapping[str, object],
    reasons: Mapping[str, str] | None = None,
    accelerator: str | None = None,
) -> Chosen:
    """The whole profile for what is `given`: what differs from the compiler's choice is an override, with its reason.

    Raises InvalidInputError (field `engine_profile`) naming the knob and the remedy.
    """
    kind = settings.AUTOSCALER.accelerator if accelerator is None else accelerator
    place = hardware(kind)
    try:
        asked = EngineProfile.from_json(dict(given)) if given else EngineProfile()
        first = _compile(version, slo, place, asked.engine, {})
        wanted = {
            name: Override(_scalar(getattr(asked, name)), (reasons or {}).get(name, "")[:MAX_REASON])
            for name in given
            if name not in OWN_KNOBS and _differs(first, name, getattr(asked, name))
        }
        compiled = _compile(version, slo, place, asked.engine, wanted) if wanted else first
        known = {value.name for value in compiled.values}
        more = tuple(
            Value(name, own.value, own.reason or "the operator set it", overridden=True)
            for name, own in wanted.items()
            if name not in known
        )
        compiled = replace(compiled, values=(*compiled.values, *more))
        own = {name: getattr(asked, name) for name in given if name in OWN_KNOBS}
        profile = EngineProfile.from_json({**compiled.as_dict(), "engine": asked.engine, **own})
    except ProfileError as error:
        raise InvalidInputError(str(error), field="engine_profile") from error
    except ImpossibleError as error:
        raise InvalidInputError(f"engine profile: {error}", field="engine_profile") from error
    if profile.max_model_len > version.max_model_len:
        raise InvalidInputError(
            f"engine profile: max_model_len = {profile.max_model_len} is out of range; "
            f"this model holds at most {version.max_model_len} tokens",
            field="engine_profile",
        )
    if profile.engine != "toy" and version.source_kind == ModelSource.TOY:
        raise InvalidInputError(
            f"engine profile: engine = {profile.engine!r} needs weights; this version runs on 'toy' only",
            field="engine_profile",
        )
    return Chosen(profile.to_json(), compiled, place.name)


def _compile(
    version: ModelVersion, slo: SloClass, place: Hardware, engine: str, wanted: Mapping[str, Override]
) -> Compiled:
    wish = Wish(overrides=wanted)
    if engine == "toy":
        return compile_plain(version.max_model_len, wish, "the toy engine has no weights to fit")
    if not version.config:
        if place.gpu is not None:
            raise InvalidInputError(
                f"engine profile: {version.name} was registered without its config.json, so nobody can say whether it "
                f"fits {place.name}: register it again",
                field="model_version_id",
            )
        return compile_plain(version.max_model_len, wish, "registered without its config.json")
    model = model_config(
        version.name,
        version.config,
        n_params=float(version.n_params or 0),
        max_model_len=version.max_model_len,
    )
    known = coefficients()
    efficiency = known.common if place.gpu is None else known.by_gpu.get(place.gpu.name, known.common)
    return compile_profile(model, place, promise(slo), wish, efficiency)


def _differs(compiled: Compiled, name: str, value: object) -> bool:
    """Whether it is more than the engine's default, or the compiler's own choice, said back to us."""
    chosen = compiled.as_dict()
    if name in chosen:
        return bool(chosen[name] != value)
    return bool(getattr(EngineProfile(), name) != value)


def _scalar(value: object) -> Scalar:
    assert value is None or isinstance(value, str | int | float)
    return value
