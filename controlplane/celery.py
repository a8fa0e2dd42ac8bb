"""The Celery application of the control side: `celery -A controlplane.celery:app worker -Q control`, and
beat.

Housekeeping only: the autoscaler's ticks, billing intake, partitions. Requests for models never pass here;
replicas have an application of their own (workers/app.py). Results are off: facts go to Postgres.
"""

import logging
import os
from typing import Final

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")

from celery import Celery
from celery.signals import setup_logging, worker_ready
from django.conf import settings
from prometheus_client import start_http_server

from autoscaler.watch.bootstep import WatcherStep

log = logging.getLogger(__name__)

# Seconds between two turns of each task. A turn that is late by as much (5 s at least) is left out: after an outage one
# run catches up, not a thousand.
EVERY_S: Final = {
    "tenants.prune_changes": 600.0,
    "adapters.clean_up": 600.0,
    "audit.seal": 5.0,
    "tenants.forget_answers": 600.0,
    "webhooks.send": 1.0,
    "webhooks.tell_expiring_keys": 3_600.0,
    "webhooks.forget": 3_600.0,
    "budgets.watch": 3.0,
    "operations.advance": 1.0,
    "operations.forget": 3_600.0,
    "rollouts.mend": 30.0,
    "lifecycle.erase_due": 60.0,
    "lifecycle.forget_exports": 3_600.0,
    "tenants.lease_shares": 10.0,
    "autoscaler.tick_all": 5.0,
    "autoscaler.reconcile": 15.0,
    "autoscaler.heed_notices": 5.0,
    "autoscaler.tend_pool": 15.0,
    "autoscaler.look_at_health": 5.0,
    "autoscaler.renew_passwords": 5.0,
    "autoscaler.refresh_market": 300.0,
    "autoscaler.keep_upstreams": 2.0,
    "decisions.intake": 2.0,
    "decisions.prune": 60.0,
    "upstreams.intake": 2.0,
    "upstreams.prune": 600.0,
    "slo.alert": 30.0,
    "slo.prune": 600.0,
    "billing.intake": 1.0,
    "billing.ensure_partitions": 3_600.0,
}

app = Celery("corral-control", amqp="workers.broker_connection:Amqp")
app.conf.update(
    broker_url=settings.ENV.redis_url,
    # As the replicas': a task that ends while Redis is away is acknowledged when it is back. Stock kombu asks the
    # closed channel for a connection, and the AttributeError ends the worker (2 of 6 kills of Redis under load).
    broker_transport="workers.transport:Transport",
    broker_transport_options={
        "priority_steps": [0],
        "global_keyprefix": f"{settings.ENV.cell}:ctl:",
        # Longer than any task may run (task_time_limit), so that none is delivered to two workers at once.
        "visibility_timeout": 600,
        "socket_timeout": 5.0,
        "socket_connect_timeout": 2.0,
        "socket_keepalive": True,
        "health_check_interval": 10,
    },
    broker_connection_timeout=2.0,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # a worker outlives Redis being away, however long
    task_publish_retry_policy={
        "max_retries": 2,
        "interval_start": 0.1,
        "interval_step": 0.2,
        "interval_max": 0.5,
    },
    task_default_queue="control",
    task_serializer="json",
    accept_content=["json"],
    result_backend=None,
    task_ignore_result=True,
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_time_limit=300,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    timezone="UTC",
    beat_scheduler="controlplane.beat:PunctualScheduler",
    beat_schedule_filename=str(settings.ENV.var / "beat-schedule"),
    beat_schedule={
        name: {"task": name, "schedule": every_s, "options": {"expires": max(every_s, 5.0)}}
        for name, every_s in EVERY_S.items()
    },
)
app.autodiscover_tasks(
    [
        "autoscaler",
        "billing",
        "controlplane.adapters",
        "controlplane.audit",
        "controlplane.budgets",
        "controlplane.decisions",
        "controlplane.lifecycle",
        "controlplane.operations",
        "controlplane.rollouts",
        "controlplane.slo",
        "controlplane.tenants",
        "controlplane.upstreams",
        "controlplane.webhooks",
    ]
)
app.steps["worker"].add(WatcherStep)


@setup_logging.connect  # type: ignore[untyped-decorator]
def _keep_our_logging(**_: object) -> None:
    """Celery would install its own handlers; a receiver of this signal keeps those of the settings."""


@worker_ready.connect  # type: ignore[untyped-decorator]
def _say_ready(**_: object) -> None:
    """Serve the worker's metrics, and tell the supervisor of the local stack that it consumes."""
    port = settings.ENV.control_metrics_port
    if port:
        try:
            start_http_server(port, addr="127.0.0.1")
        except OSError as error:  # work matters more than being watched
            log.warning("no metrics: CORRAL_CONTROL_METRICS_PORT=%d cannot be bound: %s", port, error)
    (settings.ENV.var / "control.ready").write_text(str(os.getpid()))
