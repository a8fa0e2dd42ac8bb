"""The Celery application of a replica front: one queue, one task, LoopPool over the atomic transport.

The front calls `make_app` and `run_worker` after the zygote's fork, on its main thread; operators point
`celery inspect` at the same settings. Nothing here starts a loop, a thread or a process at import.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from celery import Celery, signals
from celery.apps.worker import (
    Worker,
    install_worker_int_handler,
    install_worker_term_handler,
    install_worker_term_hard_handler,
)
from celery.platforms import SecurityWarning
from kombu import Exchange, Queue

from workers.contract import SERVE_TASK
from workers.redis_address import without_password_file
from workers.strategy import LightStrategy

MAX_IN_FLIGHT: Final = 1024  # jobs of one consumer; slots keep real replicas far below it
_SOCKET_TIMEOUT_S: Final = 5.0
_CONNECT_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class ConsumerConfig:
    """Where a replica front consumes from. `key_prefix` is its machine's: `<cell>:m:<machine>:`."""

    redis_url: str = field(repr=False)
    key_prefix: str
    replica_id: str
    max_in_flight: int = MAX_IN_FLIGHT

    def __post_init__(self) -> None:
        if not self.key_prefix.endswith(":"):
            raise ValueError(f"key_prefix: {self.key_prefix!r} must end with ':'")
        if not self.replica_id or ":" in self.replica_id:
            raise ValueError(f"replica_id: {self.replica_id!r} must be a non-empty id without ':'")
        if not 1 <= self.max_in_flight <= 65_536:
            raise ValueError(f"max_in_flight: {self.max_in_flight} is not in 1..65536")

    @property
    def queue(self) -> str:
        return f"replica.{self.replica_id}"

    @property
    def node_name(self) -> str:
        """Destination for `celery inspect -d`."""
        return f"{self.replica_id}@corral"


def broker_keys(config: ConsumerConfig) -> tuple[str, ...]:
    """Redis keys that this consumer alone uses; whoever removes a dead replica deletes them."""
    names = (config.queue, f"unacked.{config.replica_id}", f"unacked_index.{config.replica_id}")
    return tuple(config.key_prefix + name for name in names)


def make_app(config: ConsumerConfig) -> Celery:
    """The application, configured; connects to nothing yet."""
    app = Celery(
        f"corral-{config.replica_id}",
        set_as_current=False,
        fixups=[],
        amqp="workers.broker_connection:Amqp",
    )
    broker_url, password_file = without_password_file(config.redis_url)
    app.conf.update(
        broker_url=broker_url,
        broker_transport="workers.transport:Transport",
        broker_transport_options={
            "password_file": password_file,
            "global_keyprefix": config.key_prefix,
            # One consumer per queue for life: its records are its own, and its death is the reaper's affair.
            "unacked_key": f"unacked.{config.replica_id}",
            "unacked_index_key": f"unacked_index.{config.replica_id}",
            "redeliver_overdue": False,
            "priority_steps": [0],  # order is decided before binding; one list allows a peek that blocks
            "socket_timeout": _SOCKET_TIMEOUT_S,
            "socket_connect_timeout": _CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # Redis full or failing over must not end a front with live requests
        # The anonymous exchange: the routing key is the queue, and no binding is stored per replica.
        task_queues=[Queue(config.queue, Exchange(""), routing_key=config.queue)],
        task_default_exchange="",
        task_default_queue=config.queue,
        task_create_missing_queues=False,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        result_backend=None,
        accept_content=["json"],
        worker_pool="workers.pool:LoopPool",
        worker_concurrency=config.max_in_flight,
        worker_prefetch_multiplier=1,
        worker_disable_rate_limits=True,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # tokens flow on while the broker is away
        worker_enable_prefetch_count_reduction=False,
        worker_soft_shutdown_timeout=0.0,  # the pool's own grace is the soft part
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        control_queue_expires=None,  # an expiring control queue would need scripts on every bind
    )

    @app.task(name=SERVE_TASK, shared=False, Strategy=LightStrategy())
    def serve(request_id: str, epoch: int) -> None:
        """What the message names. LoopPool runs the front's coroutine instead; no other pool can serve."""
        raise RuntimeError("corral.serve runs on workers.pool:LoopPool only")

    return app


class FrontWorker(Worker):
    """Celery's worker program without what assumes a process of its own (re-exec on SIGHUP, the title)."""

    def install_platform_tweaks(self, worker: Worker) -> None:
        """SIGTERM: warm stop. SIGINT: warm, then cold. SIGQUIT: cold."""
        install_worker_term_handler(worker)
        install_worker_int_handler(worker)
        install_worker_term_hard_handler(worker)

    def set_process_status(self, info: str) -> None:
        """The agent names its processes."""


def run_worker(app: Celery, config: ConsumerConfig, on_ready: Callable[[], None] | None = None) -> int:
    """Consume on this, the main thread until SIGTERM; returns the exit code (0 after a warm stop).

    workers.runtime must be installed. `on_ready` runs once, when the first message can arrive.
    """
    warnings.filterwarnings("ignore", category=SecurityWarning)  # about pickle as root; we accept JSON only
    signals.setup_logging.connect(_leave_logging_alone)
    logging.getLogger("celery.worker.strategy").setLevel(logging.WARNING)  # a line per message otherwise
    app.finalize()
    called = False

    def ready(consumer: Any) -> None:
        nonlocal called
        if on_ready is not None and not called:
            called = True
            on_ready()

    worker = FrontWorker(
        app=app,
        hostname=config.node_name,
        queues=[config.queue],
        quiet=True,
        ready_callback=ready,
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _leave_logging_alone(**_: Any) -> None:
    """Connected to setup_logging, it keeps Celery from configuring any."""
