"""The script a new machine runs at its first start: it starts the agent, and holds no secret.

User data can be read by everyone who may describe the instance; the machine proves itself by its signed instance
identity instead (workers/agent/imds.py). The same for every machine of a pool: its id is a tag.
"""

from __future__ import annotations

import shlex

from infra.providers.aws.config import AwsConfig
from infra.providers.base import LaunchSpec

_SCRIPT = """\
#!/bin/bash
# Starts the Corral agent of this machine. No secret is in here.
set -euo pipefail
umask 077
export {exports}
if [ -d /run/systemd/system ] && [ "$(id -u)" = 0 ]; then
  mkdir -p "$CORRAL_MACHINE_VAR" /etc/corral
  printf '%s\\n' {pairs} > /etc/corral/agent.env
  cat > /etc/systemd/system/corral-agent.service <<'UNIT'
[Unit]
Description=Corral agent
After=network-online.target
Wants=network-online.target
[Service]
EnvironmentFile=/etc/corral/agent.env
ExecStart={command}
Restart=always
RestartSec=2
KillMode=mixed
TimeoutStopSec=30
[Install]
WantedBy=multi-user.target
UNIT
  systemctl daemon-reload
  systemctl enable --now corral-agent.service
else
  mkdir -p "$CORRAL_MACHINE_VAR"
  exec {command}
fi
"""


def user_data(spec: LaunchSpec, config: AwsConfig, var_dir: str = "/var/lib/corral") -> str:
    """The script for machines of this spec, whatever their id."""
    environ = {
        "CORRAL_MACHINE_ID": "imds",
        "CORRAL_ENROL_URL": spec.enrol_url,
        "CORRAL_CELL": spec.cell,
        "CORRAL_ENGINE": spec.engine,
        "CORRAL_MACHINE_REDIS": spec.redis,
        "CORRAL_TAG_PREFIX": config.tag_prefix,
        "CORRAL_MODEL_SHARE": config.model_share,
        "CORRAL_MODEL_CACHE_GIB": config.model_cache_gib,
    }
    pairs = [f"{name}={value}" for name, value in environ.items() if value]
    exports = [f"{name}={shlex.quote(value)}" for name, value in environ.items() if value]
    return _SCRIPT.format(
        exports=" ".join([*exports, f"CORRAL_MACHINE_VAR=${{CORRAL_MACHINE_VAR:-{shlex.quote(var_dir)}}}"]),
        pairs=" ".join(shlex.quote(pair) for pair in [*pairs, f"CORRAL_MACHINE_VAR={var_dir}"]),
        command=config.agent_command,
    )
