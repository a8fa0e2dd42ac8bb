"""How Celery comes back to a Redis that was away: within a moment of its return, not seconds later.

Both applications (a replica's front, the control worker) name `Amqp` when they are made. kombu waits 2 s before its
first try and up to 30 s between later ones, which suits a cluster that fails over; a restarted Redis serves again
within a second, and requests that are bound meanwhile would wait for the consumer.
"""

from __future__ import annotations

import logging
import random
from typing import Any, Final

from celery.app.amqp import AMQP
from kombu import Connection

log = logging.getLogger(__name__)

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

    def maybe_close_channel(self, channel: Any) -> None:
        """As kombu's, which closes a channel twice when the broker is away and may not survive it.

        The first attempt fails at a queue that it wants to delete, the second has no transport any more to put
        messages back by. Celery takes the AttributeError for a fault that nothing helps against and ends the worker:
        a replica with all its streams, or the control worker (seen in 1 of 20 kills of Redis under load). What was
        not put back is on record in Redis, and whoever serves it goes on.
        """
        try:
            super().maybe_close_channel(channel)  # type: ignore[no-untyped-call]
        except AttributeError as error:
            log.warning("a channel of the lost connection could not be closed in order: %s", error)


class Amqp(AMQP):  # type: ignore[misc]
    """`Celery(..., amqp="workers.broker_connection:Amqp")`."""

    Connection = BrokerConnection
