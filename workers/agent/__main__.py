"""`python -m workers.agent`: the agent's process. SIGTERM or SIGINT stops the machine's replicas, then this.

Exit codes: 0 stopped as asked, 2 wrong configuration, 4 enrolment refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from dataclasses import replace

from workers import logs
from workers.agent.agent import Agent
from workers.agent.enrol import EnrolRefused
from workers.agent.imds import Metadata, MetadataError
from workers.config import AgentConfig, ConfigError

EXIT_CONFIG, EXIT_REFUSED = 2, 4
_TAG_ATTEMPTS, _TAG_PAUSE_S = 20, 1.0


async def _run(config: AgentConfig) -> None:
    agent = Agent(config)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, agent.stop)
    await agent.run()


def _named(config: AgentConfig) -> AgentConfig:
    """The configuration with the machine id that this instance is tagged with; the tags may come a moment late."""
    metadata = Metadata()
    for attempt in range(_TAG_ATTEMPTS):
        try:
            return replace(config, machine=metadata.tag(f"{config.tag_prefix}:machine"))
        except MetadataError:
            if attempt == _TAG_ATTEMPTS - 1:
                raise
            time.sleep(_TAG_PAUSE_S)
    raise AssertionError("unreachable")


def main() -> int:
    try:
        config = AgentConfig.from_args(sys.argv[1:])
    except ConfigError as error:
        print(f"workers.agent: {error}", file=sys.stderr)
        return EXIT_CONFIG
    os.environ.pop("CORRAL_ENROL_PROOF", None)  # children need not inherit it
    if config.tag_prefix:
        try:
            config = _named(config)
        except MetadataError as error:
            print(f"workers.agent: {error}", file=sys.stderr)
            return EXIT_CONFIG
    logs.configure(machine=config.machine)
    try:
        asyncio.run(_run(config))
    except EnrolRefused as error:
        logging.getLogger("workers.agent").error("%s", error)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
