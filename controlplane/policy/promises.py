"""What a request is promised: its service class with the targets that hold for it. Pure.

The gateway resolves it per key and deployment once, when it learns of the key; the request then names a class or takes
the default. A class above the deployment's own must have been granted by a rule: whoever sets his requests before
everybody else's should have been asked first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

PPM: Final = 1_000_000
# A class whose first token may take so long is one whose requests can wait: they are queued, not refused.
PATIENT_TTFT_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Promise:
    """A service class as it holds for one project, key and deployment. `objective_ppm`: share of requests, in
    millionths, that must meet all targets; `band`: order in the fair queue, 0 first."""

    name: str
    band: int
    ttft_ms: int
    itl_ms: int
    deadline_s: int
    objective_ppm: int = 990_000

    @property
    def can_wait(self) -> bool:
        return self.ttft_ms >= PATIENT_TTFT_MS


# As the first migration makes them; what a gateway goes by where it was told of no others.
CLASSES: Final[tuple[Promise, ...]] = (
    Promise("interactive", 0, 1_000, 100, 300, 990_000),
    Promise("standard", 1, 5_000, 250, 900, 990_000),
    Promise("batch", 2, 600_000, 2_000, 86_400, 950_000),
    Promise("flex", 3, 3_600_000, 5_000, 86_400, 900_000),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a project says of a class, for one key, one deployment, or all (''). None leaves the class's own value.
    `is_default`: requests that name no class get this one."""

    slo_class: str
    deployment: str = ""
    key: str = ""
    is_default: bool = False
    ttft_ms: int | None = None
    itl_ms: int | None = None
    deadline_s: int | None = None
    objective_ppm: int | None = None

    @property
    def weight(self) -> int:
        """The more it names, the later it speaks; a key says more than a deployment."""
        return 2 * bool(self.key) + bool(self.deployment)


def promises(
    own: Promise, deployment: str, key: str, classes: Iterable[Promise], rules: Iterable[Rule]
) -> tuple[Promise, dict[str, Promise]]:
    """(the promise of a request that names no class, all that it may name). `own`: the deployment's class.

    Allowed are the deployment's own class, those after it, and those that a rule names.
    """
    mine = sorted(
        (r for r in rules if r.deployment in ("", deployment) and r.key in ("", key)), key=lambda r: r.weight
    )
    granted = {rule.slo_class for rule in mine}
    # The deployment's class as it stands there wins over the list: both are read at one instant, but say the same.
    known = {each.name: each for each in classes} | {own.name: own}
    allowed = {name: each for name, each in known.items() if each.band >= own.band or name in granted}
    default = own.name
    for rule in mine:
        if rule.slo_class not in allowed:
            continue  # a class that is no more
        allowed[rule.slo_class] = _changed(allowed[rule.slo_class], rule)
        if rule.is_default:
            default = rule.slo_class
    return allowed[default], allowed


def best(allowed: Iterable[Promise]) -> Promise:
    """The class served first of those allowed."""
    return min(allowed, key=lambda promise: (promise.band, promise.name))


def _changed(promise: Promise, rule: Rule) -> Promise:
    values = {
        name: value
        for name in ("ttft_ms", "itl_ms", "deadline_s", "objective_ppm")
        if (value := getattr(rule, name)) is not None
    }
    return replace(promise, **values)
