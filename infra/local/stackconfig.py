"""What the local stack can be told. Read from the environment once, checked, with a message naming the knob.

Called by stack.py and the commands over it. Children get an environment made by environment.py, not this one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
ENGINES = ("vllm", "toy")
_DSN_NAMES = ("CORRAL_PG_DSN_OWNER", "CORRAL_PG_DSN_APP", "CORRAL_PG_DSN_OPERATOR")


class StackConfigError(ValueError):
    """A knob is missing or out of range; the message names it, its value and the range."""


@dataclass(frozen=True)
class StackConfig:
    """Defaults beside the reason for them. Secrets stay out of the repr."""

    var: Path = ROOT / "var"
    cell: str = "c0"
    engine: str = ""  # empty: vllm where it can run, else toy
    n_gateways: int = 2  # the least at which one may die unnoticed
    gateway_port: int = 8000  # preferred; another one is taken when it is in use
    web_port: int = 8080
    # External servers instead of embedded ones. Either an administrator's URL, from which roles and database
    # are made, or one DSN per role for where that is done already.
    database_url: str = field(default="", repr=False)
    pg_dsns: Mapping[str, str] = field(default_factory=dict, repr=False)  # owner, app, operator; or empty
    redis_url: str = field(default="", repr=False)
    pg_pooler: str = ""  # "transaction": the DSNs lead to a pooler in that mode

    @property
    def embedded_postgres(self) -> bool:
        """Whether we run PostgreSQL ourselves."""
        return not self.database_url and not self.pg_dsns

    @property
    def embedded_redis(self) -> bool:
        """Whether we run Redis ourselves."""
        return not self.redis_url

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Self:
        """From CORRAL_ variables. Raises StackConfigError."""

        def number(name: str, default: int, low: int, high: int) -> int:
            text = environ.get(name) or str(default)
            if not text.isdigit() or not low <= int(text) <= high:
                raise StackConfigError(f"{name}={text!r}: set a whole number from {low} to {high}")
            return int(text)

        engine = environ.get("CORRAL_ENGINE", "")
        if engine and engine not in ENGINES:
            raise StackConfigError(f"CORRAL_ENGINE={engine!r}: set {' or '.join(ENGINES)}, or leave it out")
        given = [name for name in _DSN_NAMES if environ.get(name)]
        if given and len(given) < len(_DSN_NAMES):
            raise StackConfigError(
                f"{', '.join(sorted(set(_DSN_NAMES) - set(given)))}: set all three, or none"
            )
        for name, scheme in (
            *((name, "postgres") for name in ("CORRAL_DATABASE_URL", *given)),
            ("CORRAL_REDIS_URL", "redis"),
        ):
            value = environ.get(name, "")
            if value and not value.startswith((f"{scheme}://", f"{scheme}ql://", f"{scheme}s://")):
                raise StackConfigError(f"{name}: set a {scheme}{'ql' if scheme == 'postgres' else ''}:// URL")
        pooler = environ.get("CORRAL_PG_POOLER", "")
        if pooler not in ("", "transaction"):
            raise StackConfigError(f"CORRAL_PG_POOLER={pooler!r}: set transaction, or leave it out")
        if pooler and not given:
            raise StackConfigError(
                f"CORRAL_PG_POOLER={pooler}: set {', '.join(_DSN_NAMES)} to the pooler's address, too"
            )
        return cls(
            var=Path(environ.get("CORRAL_VAR") or cls.var).absolute(),
            cell=environ.get("CORRAL_CELL") or cls.cell,
            engine=engine,
            n_gateways=number("CORRAL_GATEWAYS", cls.n_gateways, 1, 16),
            gateway_port=number("CORRAL_GATEWAY_PORT", cls.gateway_port, 1, 65_535),
            web_port=number("CORRAL_WEB_PORT", cls.web_port, 1, 65_535),
            database_url=environ.get("CORRAL_DATABASE_URL", ""),
            pg_dsns={name.rpartition("_")[2].lower(): environ[name] for name in given},
            redis_url=environ.get("CORRAL_REDIS_URL", ""),
            pg_pooler=pooler,
        )
