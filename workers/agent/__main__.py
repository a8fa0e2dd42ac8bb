"""`python -m workers.agent`: the agent's process. SIGTERM or SIGINT stops the machine's replicas, then this.

Exit codes: 0 stopped as asked, 2 wrong configuration, 4 enrolment refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from workers import logs
from workers.agent.agent import Agent
from workers.agent.enrol import EnrolRefused
from workers.config import AgentConfig, ConfigError

EXIT_CONFIG, EXIT_REFUSED = 2, 4


async def _run(config: AgentConfig) -> None:
    agent = Agent(config)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, agent.stop)
    await agent.run()


def main() -> int:
    try:
        config = AgentConfig.from_args(sys.argv[1:])
    except ConfigError as error:
        print(f"workers.agent: {error}", file=sys.stderr)
        return EXIT_CONFIG
    os.environ.pop("CORRAL_ENROL_PROOF", None)  # children need not inherit it
    logs.configure(machine=config.machine)
    try:
        asyncio.run(_run(config))
    except EnrolRefused as error:
        logging.getLogger("workers.agent").error("%s", error)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
