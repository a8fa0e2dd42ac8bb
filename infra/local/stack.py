"""The local stack: which processes there are, in which order, with what environment; up, down, status.

Called by the commands `manage.py up | down | status | logs`, which may run without any database: nothing here
imports Django. PostgreSQL and Redis are embedded unless URLs of external ones are given.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.local import environment, preflight
from infra.local.machines import end_machines, machine_directories
from infra.local.ports import claimed_ports
from infra.local.postgres import EmbeddedPostgres
from infra.local.privatefile import make_traversable
from infra.local.process import find_marked, is_alive, wait_until
from infra.local.progress import Progress
from infra.local.readiness import answers_readyz, wrote_its_pid
from infra.local.redis import EmbeddedRedis
from infra.local.restart import NEVER
from infra.local.stackconfig import ROOT, StackConfig
from infra.local.stackstate import StackRecord, end_leftovers, hold_stack, is_locked, read_state
from infra.local.supervisor import ProcessSpec, Supervisor
from infra.providers.local import MARK

QUICKSTART = "quickstart"
QUICKSTART_TIMEOUT_S = 900.0
DOWN_TIMEOUT_S = 90.0
GATEWAY_GRACE_S = 5.0  # how long streams may run on when the stack stops; a fleet gives them longer
_QUICKSTART_ENV = {"CORRAL_LOG_LEVEL": "WARNING"}  # people read its lines
_PYTHON = sys.executable


def up(config: StackConfig, *, ask: bool = True) -> int:
    """Run the stack in this process until a stop signal; the exit status. Raises AlreadyRunningError."""
    progress = Progress()
    make_traversable(config.var)
    with hold_stack(config.var, progress.line):
        engine, why_toy = choose_engine(config)
        if why_toy:
            progress.line(f"the toy engine serves, its text means nothing: {why_toy}")
        preferred = {
            "gateway": config.gateway_port,
            "web": config.web_port,
            "control_metrics": None,
            **({"postgres": None} if config.embedded_postgres else {}),
            **({"redis": None} if config.embedded_redis else {}),
        }
        with claimed_ports(preferred, config.var / "ports.json") as ports:
            supervisor = Supervisor(
                stack_specs(config, ports=ports, engine=engine, progress=progress, ask=ask),
                var=config.var,
                facts={
                    "ports": ports,
                    "engine": engine,
                    "gateway_url": f"http://127.0.0.1:{ports['gateway']}",
                    "console_url": f"http://127.0.0.1:{ports['web']}",
                },
                report=progress.change,
            )
            return supervisor.run()


def choose_engine(config: StackConfig) -> tuple[str, str]:
    """(engine, why it is the toy although nobody asked for it)."""
    if config.engine:
        return config.engine, ""
    facts = preflight.gather()
    runs, reason = preflight.engine_verdict(facts)
    if runs and not facts.engine_installed:
        reason = "vLLM is not installed"
    return ("toy", reason) if reason else ("vllm", "")


def stack_specs(
    config: StackConfig, *, ports: Mapping[str, int], engine: str, progress: Progress, ask: bool
) -> list[ProcessSpec]:
    """Every process, in order of start. Talks to an external database, if there is one, to make its roles."""
    var, logs = config.var, config.var / "log"
    specs: list[ProcessSpec] = []
    if config.embedded_postgres:
        postgres = EmbeddedPostgres(var / "postgres", ports["postgres"])
        pg_dsns = {role: postgres.dsn(role) for role in ("owner", "app", "operator")}
        specs.append(
            ProcessSpec(
                name="postgres",
                argv=postgres.argv,
                marker="postgres",
                env=postgres.env(),
                log_path=logs / "postgres.log",
                account=postgres.account,
                before_start=postgres.prepare,
                ready=lambda _pid: postgres.is_ready(),
                on_ready=postgres.bootstrap,
                on_stopped=postgres.release,
                ready_timeout_s=120.0,  # recovery after a crash reads the log
                stop_signal=signal.SIGINT,
                death_signal=signal.SIGINT,
                stop_grace_s=20.0,
            )
        )
    else:
        pg_dsns = environment.external_dsns(config)
    if config.embedded_redis:
        redis = EmbeddedRedis(var / "redis", ports["redis"])
        redis_url = redis.url()
        specs.append(
            ProcessSpec(
                name="redis",
                argv=redis.argv,
                marker="redis-server",
                env=redis.env(),
                log_path=logs / "redis.log",
                before_start=redis.prepare,
                ready=lambda _pid: redis.is_ready(),
                on_ready=redis.compact,
                on_stopped=redis.release,
                ready_timeout_s=120.0,
                death_signal=signal.SIGTERM,
            )
        )
    else:
        redis_url = config.redis_url
    stack = environment.stack_environment(
        config, ports=ports, engine=engine, pg_dsns=pg_dsns, redis_url=redis_url
    )
    environment.save(var, environment.given(os.environ) | stack)
    servers = tuple(spec.name for spec in specs)

    def python(name: str, kind: str, argv: list[str], **fields: Any) -> ProcessSpec:
        extra_env = fields.pop("extra_env", {})
        return ProcessSpec(
            **{
                "name": name,
                "argv": [_PYTHON, *argv],
                "marker": next(word for word in argv if not word.startswith("-")),
                # Read at every start: secrets change while the stack runs (rotation.py).
                "env": lambda: (
                    environment.process_environment(kind, environment.load(var), os.environ) | extra_env
                ),
                "log_path": logs / f"{name}.log",
                "cwd": ROOT,
                "ready_timeout_s": 60.0,  # 2 s on an idle machine; imports are slow on a busy one
                "depends_on": ("migrate",),
                **fields,
            }
        )

    specs.append(
        python(
            "migrate",
            "migrate",
            ["manage.py", "migrate", "--no-input", "--verbosity", "1"],
            depends_on=servers,
            one_shot=True,
            restart=NEVER,
            ready_timeout_s=300.0,
        )
    )
    gateways = [
        python(
            f"gateway-{number}",
            "gateway",
            ["-m", "controlplane.gateway"],
            extra_env={
                "CORRAL_GATEWAY_NAME": f"gw-{number}",
                "CORRAL_GATEWAY_SHUTDOWN_GRACE_S": f"{GATEWAY_GRACE_S:g}",
            },
            ready=answers_readyz(ports["gateway"]),
            stop_grace_s=GATEWAY_GRACE_S + 3.0,
        )
        for number in range(1, config.n_gateways + 1)
    ]
    web = python(
        "web",
        "web",
        [
            *("-m", "uvicorn", "controlplane.asgi:application"),
            *("--host", "127.0.0.1", "--port", str(ports["web"])),
            *("--loop", "uvloop", "--http", "httptools", "--lifespan", "off"),
            *("--no-access-log", "--timeout-graceful-shutdown", "3"),
            # Sets nothing, so that uvicorn's lines go through Django's JSON handler instead of its own.
            *("--log-config", str(ROOT / "infra" / "local" / "uvicorn-log.json")),
        ],
        ready=answers_readyz(ports["web"]),
    )
    control_ready = var / "control.ready"
    control = python(
        "control",
        "control",
        [
            *("-m", "celery", "-A", "controlplane", "worker", "-Q", "control", "-n", "control@%h"),
            *("--pool", "threads", "-c", "4", "--without-mingle", "--without-gossip"),
        ],
        ready=wrote_its_pid(control_ready),
        on_stopped=lambda: _end_machines(var, progress),
    )
    beat = python("beat", "beat", ["-m", "celery", "-A", "controlplane", "beat", "--pidfile="])
    specs += [*gateways, web, control, beat]
    if ask:
        specs.append(
            python(
                QUICKSTART,
                QUICKSTART,
                ["manage.py", QUICKSTART],
                log_path=None,  # its lines and its panel are for whoever started us
                extra_env=_QUICKSTART_ENV,
                depends_on=tuple(spec.name for spec in specs),
                one_shot=True,
                required=False,
                restart=NEVER,
                ready_timeout_s=QUICKSTART_TIMEOUT_S,
            )
        )
    return specs


def _end_machines(var: Path, progress: Progress) -> None:
    """After the autoscaler is gone, or it would start them again, and before the Redis they report to."""
    for machine_id in end_machines(var):
        progress.line(f"machine {machine_id[:8]} stopped")


def down(config: StackConfig, say: Callable[[str], None]) -> bool:
    """Stop this data directory's stack, whoever started it, and what a killed one left; whether any ran."""
    record = read_state(config.var)
    anything = False
    if record and is_locked(config.var) and record.supervisor_runs():
        anything = True
        say(f"stopping the stack (pid {record.supervisor.pid})")
        os.kill(record.supervisor.pid, signal.SIGTERM)
        if not wait_until(lambda: not is_alive(record.supervisor), DOWN_TIMEOUT_S):
            say(f"it did not stop in {DOWN_TIMEOUT_S:g} s: killed")
            os.kill(record.supervisor.pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(record.supervisor), 5.0)
    if record:
        for name in end_leftovers(record):
            anything = True
            say(f"{name}: left over, ended")
    for machine_id in end_machines(config.var):
        anything = True
        say(f"machine {machine_id[:8]}: left over, ended")
    return anything


@dataclass(frozen=True)
class MachineStatus:
    """A machine of the local provider: its agent's processes, and its log."""

    machine_id: str
    n_processes: int
    log: Path


@dataclass(frozen=True)
class StackStatus:
    """What runs now. `phase` is `down` when no supervisor does, whatever the state file says."""

    phase: str
    record: StackRecord | None
    machines: tuple[MachineStatus, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that should run does."""
        return (
            self.phase == "running"
            and self.record is not None
            and all(process.phase in ("ready", "done") for process in self.record.processes)
        )


def status(config: StackConfig) -> StackStatus:
    """Look at the state file and at the processes it names."""
    record = read_state(config.var)
    running = record is not None and record.supervisor_runs()
    machines = tuple(
        MachineStatus(path.name, n_processes, path / "agent.log")
        for path in machine_directories(config.var)
        if (n_processes := len(find_marked(f"{MARK}={path.name}")))
    )
    return StackStatus(record.phase if record and running else "down", record, machines)


def is_up(config: StackConfig, supervisor_pid: int) -> bool:
    """Whether the stack of that supervisor has everything running."""
    record = read_state(config.var)
    return record is not None and record.supervisor.pid == supervisor_pid and record.phase == "running"


def first_question(config: StackConfig) -> int:
    """Set up the demo and ask a running stack its first question, on our own output; the exit status.

    For detached stacks: what it prints has a key and a password in it, which belong into no log.
    """
    env = environment.process_environment(QUICKSTART, environment.load(config.var), os.environ)
    try:
        return subprocess.run(
            [_PYTHON, "manage.py", QUICKSTART],
            cwd=ROOT,
            env=env | _QUICKSTART_ENV,
            timeout=QUICKSTART_TIMEOUT_S,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return 1
