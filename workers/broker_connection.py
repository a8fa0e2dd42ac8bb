"""How Celery comes back to a Redis that was away: within a moment of its return, not seconds later.

Both applications (a replica's front, the control worker) name `Amqp` when they are made. kombu waits 2 s before its
first try and up to 30 s between later ones, which suits a cluster that fails over; a restarted Redis serves again
within a second, and requests that are bound meanwhile would wait for the consumer.
"""

from __future__ import annotations

import random
from typing import Any, Final

from celery.app.amqp import AMQP
from kombu import Connection

FIRST_S: Final = 0.1
STEP_S: Final = 0.2
MAX_S: Final = 1.0


class BrokerConnection(Connection):
    """Tries again after 0.1, 0.3, 0.5 … 1 s; the start is drawn, so that a fleet does not knock in step."""

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("interval_start", FIRST_S * random.uniform(0.5, 1.5))
        kwargs.setdefault("interval_step", STEP_S)
        kwargs.setdefault("interval_max", MAX_S)
        return super().ensure_connection(*args, **kwargs)  # type: ignore[no-untyped-call]


class Amqp(AMQP):  # type: ignore[misc]
    """`Celery(..., amqp="workers.broker_connection:Amqp")`."""

    Connection = BrokerConnection
