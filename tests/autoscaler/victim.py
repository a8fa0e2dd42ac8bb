"""A control worker to be killed: `python -m tests.autoscaler.victim`, fed with what to do, one JSON line each.

Every order is carried out in a forked process of its own, with new connections, that knows nothing of those before it.
It is the product's code as it is: whoever kills it sits on its connections (killing.py). Answers the process's id, and
when it is over how it ended.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from typing import Any
from uuid import UUID

import django

django.setup()

from autoscaler import reconcile, stopping, tick  # noqa: E402
from autoscaler.cell import Cell  # noqa: E402
from autoscaler.config import AutoscalerConfig  # noqa: E402
from infra.providers.aws.clients import connect  # noqa: E402
from infra.providers.aws.config import AwsConfig  # noqa: E402
from infra.providers.aws.provider import AwsProvider  # noqa: E402
from workers.keys import CellKeys  # noqa: E402


def main() -> None:
    aws = AwsConfig.read(os.environ)
    provider = AwsProvider(aws, connect(aws.region), "c0")  # makes clients, opens nothing
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _carry_out(order, provider)
                code = 0
            finally:
                os._exit(code)
        _say({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _say({"ended": os.waitstatus_to_exitcode(status)})


def _carry_out(order: dict[str, Any], provider: AwsProvider) -> None:
    sys.stdin.readline()  # whoever may strike knows our id by now
    house = tick.House(
        config=AutoscalerConfig(**order["config"]),
        provider=provider,
        cell=Cell(os.environ["CORRAL_REDIS_URL"], CellKeys("c0")),
    )
    now = datetime.fromisoformat(order["now"])
    for step in order["steps"]:
        if step == "reconcile":
            reconcile.reconcile(house, now)
        elif step.startswith("stop "):
            keeper = stopping.Keeper(house.config, house.provider, house.cell)
            stopping.stop(UUID(hex=step.removeprefix("stop ")), "rests", keeper, now)
        else:
            tick.tick(UUID(hex=step), house, now)


def _say(what: dict[str, int]) -> None:
    print(json.dumps(what), flush=True)


main()
