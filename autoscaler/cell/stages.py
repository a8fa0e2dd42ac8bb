"""What a deployment without a ready replica is waiting for, as its clients are told."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from autoscaler.cell.connection import Connection
from workers.contract import Stage
from workers.keys import RETENTION_MS

_json = msgspec.json.Encoder()


class Stages(Connection):
    """The last one is kept for whoever begins to wait later."""

    def publish_stage(self, stage: Stage) -> None:
        """Tell waiting clients, and whoever begins to wait later."""
        key = self.keys.stage(stage.deployment)
        fields = {
            "stage": stage.stage,
            "eta_ms": "" if stage.eta_ms is None else stage.eta_ms,
            "code": stage.code,
            "message": stage.message,
            "retry_after_s": "" if stage.retry_after_s is None else stage.retry_after_s,
            "at_ms": stage.at_ms,
        }
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.hset(key, mapping=cast(dict[Any, Any], fields))
        pipeline.pexpire(key, RETENTION_MS)
        pipeline.publish(self.keys.stage_channel, _json.encode(stage))
        pipeline.execute()

    def last_stage(self, deployment: str) -> tuple[str, str]:
        """(stage, code) as last published; ('', '') when there is none."""
        stage, code, _ = self.last_told(deployment)
        return stage, code

    def last_told(self, deployment: str) -> tuple[str, str, str]:
        """(stage, code) as last published, and starts as last told; each '' when there is none."""
        asked = self.redis.hmget(self.keys.stage(deployment), "stage", "code", "starts")
        stage, code, starts = ((value or b"").decode() for value in cast(list[bytes | None], asked))
        return stage, code, starts

    def tell_starts(self, deployment: str, starts: str) -> None:
        """Which replicas are being started (controlplane/policy/coming.py: text); gateways look at once."""
        key = self.keys.stage(deployment)
        pipeline = self.redis.pipeline(transaction=False)
        pipeline.hset(key, "starts", starts)
        pipeline.pexpire(key, RETENTION_MS)
        pipeline.publish(self.keys.route_channel, deployment)
        pipeline.execute()

    def forget_stage(self, deployment: str) -> None:
        self.redis.delete(self.keys.stage(deployment))
