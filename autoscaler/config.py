"""What the house sets for the whole pool; a deployment's own wishes are in its row.

Read once, in controlplane/settings.py, from CORRAL_ + the upper-case name. Imports no Django.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from autoscaler.policy.sizes import Need
from controlplane.policy.gpus import accelerator


class ConfigError(ValueError):
    """A knob is out of range; the message names it, its value and the range."""


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """Defaults beside the reason for them."""

    provider: str = "local"
    max_machines: int = 1  # of the whole pool: the local stack shares one computer
    replicas_per_machine: int = 4  # where neither the machine nor its GPUs say what it holds
    # Replicas that may sleep on a machine beside those that serve: each keeps its weights in the machine's RAM. What
    # one costs, as a share of the price of a place: RAM against an accelerator.
    sleepers_per_machine: int = 2
    sleep_share: float = 0.12
    machine_nano_per_h: int = 0  # what one of the pool costs; 0: it is there anyway
    # Long enough to bridge a break between two questions, short enough to notice that it ends.
    machine_keep_warm_s: float = 900.0
    # An agent that has imported the engine answers in some 15 s; a cloud machine boots for a minute.
    machine_pending_timeout_s: float = 300.0
    agent_restarts: int = 3  # of one machine, before it is replaced
    # A machine that its provider calls running and whose agent is silent so long is ended and replaced. Its own init
    # starts a dead agent again within seconds; replicas that died with it are withdrawn after two.
    agent_lost_s: float = 60.0
    spot: bool = True  # buy machines that may be taken back where that is cheaper in the end
    machine_boot_s: float = 180.0  # order to first token on a cloud machine: what a loss without notice costs
    spot_notice_s: float = 120.0  # AWS warns so long before; 0 where no warning comes
    # Machines kept beside what has work, so that a spot machine taken back is stood in for at once: as many as cost
    # less than the time in shortage is worth (policy/cover.py), this many at most.
    max_spares: int = 4
    # On-demand machines that lie stopped, weights on their disks, and serve while what replaces a spot machine starts:
    # as many as have work, where a notice is shorter than a boot. 0: none, cover is bought instead.
    spot_reserve: int = 0
    # What a pool without work keeps, where machines cost something: a warm one as long as that costs less than what it
    # saves the next request, by the gaps seen so far. 0: `machine_keep_warm_s`, whatever they cost. A request that
    # waits more than `late_after_s` costs `late_usd`, and each second of it `late_usd_per_s`.
    warm_ladder: bool = True
    # What a stopped machine costs: its disk (100 GB of gp3 at 0.08 USD a month). 0: none is stopped.
    stopped_nano_per_h: int = 11_000_000
    late_after_s: float = 2.0
    late_usd: float = 0.02
    late_usd_per_s: float = 0.002
    # Machines given up to save money: this share of the pool at once, so many an hour; their replicas move meanwhile.
    disruption_share: float = 0.1
    disruptions_per_h: int = 10
    give_up_grace_s: float = 900.0
    engine: str = "vllm"  # what the agent preloads
    # What one replica runs on: cpu, l4, 4xl4, … Its engine profile is made for it; a machine with GPUs holds as many
    # replicas as it has such sets of them, or of any that do at least as much.
    accelerator: str = "cpu"
    model_cache: str = ""  # directory the agents of the local provider share; empty: <var>/models
    enrol_url: str = ""  # empty: <console_url>/internal/enrol
    machine_redis: str = ""  # host:port of the cell's Redis as machines reach it; empty: as we do
    # A machine's Redis password is valid so long at most, and replaced when half of it is over (policy/passwords.py).
    machine_password_s: float = 6 * 3600.0
    # A machine with a sick GPU leaves so long after, at the latest: its successor comes first.
    quarantine_s: float = 300.0
    lease_s: float = 10.0  # a tick takes milliseconds; after a crash this long nobody ticks
    heartbeat_stale_s: float = 2.0  # four beats missed
    decision_days: float = 7.0
    # A suspended tenant's replicas end after it: what was admitted may finish.
    suspension_grace_s: float = 300.0
    # Load is foretold so far ahead, with a calibrated reserve (policy/forecast.py): what a start takes from the order
    # to the first token. 0, no forecast, where that is seconds, as on the local stack.
    forecast_lead_s: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_machines", 1, 10_000),
            ("replicas_per_machine", 1, 256),
            ("machine_nano_per_h", 0, 10**15),
            ("sleepers_per_machine", 0, 256),
            ("sleep_share", 0, 1),
            ("machine_keep_warm_s", 0, 7 * 24 * 3600),
            ("machine_pending_timeout_s", 1, 3600),
            ("agent_restarts", 0, 100),
            ("agent_lost_s", 10, 3600),
            ("max_spares", 0, 100),
            ("spot_reserve", 0, 1000),
            ("stopped_nano_per_h", 0, 10**12),
            ("late_after_s", 0, 3600),
            ("late_usd", 0, 1e6),
            ("late_usd_per_s", 0, 1e6),
            ("disruption_share", 0, 1),
            ("disruptions_per_h", 0, 10_000),
            ("give_up_grace_s", 60, 86_400),
            ("machine_boot_s", 1, 3600),
            ("spot_notice_s", 0, 3600),
            ("machine_password_s", 60, 30 * 24 * 3600),
            ("quarantine_s", 30, 86_400),
            ("lease_s", 1, 600),
            ("heartbeat_stale_s", 0.5, 600),
            ("decision_days", 0.01, 3650),
            ("suspension_grace_s", 0, 30 * 24 * 3600),
            ("forecast_lead_s", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{_variable(name)}={value}: set a number from {low} to {high}")
        if self.spot_reserve and not self.spot:
            raise ConfigError(
                f"{_variable('spot_reserve')}={self.spot_reserve}: nothing to stand in for with "
                f"{_variable('spot')}=0; set it to 1, or the reserve to 0"
            )
        if self.spot_reserve and not self.stopped_nano_per_h:
            raise ConfigError(
                f"{_variable('spot_reserve')}={self.spot_reserve}: {_variable('stopped_nano_per_h')}=0 has no machine "
                "stopped; set what a stopped one costs, or the reserve to 0"
            )
        try:
            accelerator(self.accelerator)
        except ValueError as error:
            raise ConfigError(f"{_variable('accelerator')}: {error}, or cpu") from None

    @property
    def need(self) -> Need:
        """What one replica runs on."""
        return Need(*accelerator(self.accelerator))

    @classmethod
    def read(cls, environ: Mapping[str, str], *, console_url: str, var: Path) -> Self:
        """From the environment; raises ConfigError naming the variable."""
        kinds: dict[str, Callable[[str], object]] = {"int": int, "float": float, "str": str, "bool": _switch}
        found: dict[str, object] = {}
        for field in fields(cls):
            text = environ.get(_variable(field.name), "")
            if text:
                try:
                    found[field.name] = kinds[str(field.type)](text)
                except ValueError:
                    wanted = "0 or 1" if str(field.type) == "bool" else "a number"
                    raise ConfigError(f"{_variable(field.name)}={text!r}: set {wanted}") from None
        found.setdefault("enrol_url", f"{console_url.rstrip('/')}/internal/enrol")
        found.setdefault("model_cache", str(var / "models"))
        return cls(**found)  # type: ignore[arg-type]


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def _variable(name: str) -> str:
    return f"CORRAL_{name.upper()}"
