"""Spot notices as AWS tells them centrally: EventBridge writes them to an SQS queue, from which they are taken here.

The second witness beside each machine's own metadata service: it also speaks for a machine whose agent does not. A
message is deleted only when it has been dealt with; whatever is not about an instance of ours is deleted unread.
Called by autoscaler/notices.py in the control worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import structlog
from botocore.exceptions import BotoCoreError, ClientError

from infra.providers.aws.failures import as_provider_error
from infra.providers.base import CentralNotice

log = structlog.get_logger("corral.aws")

MAX_MESSAGES: Final = 10  # of one call; SQS allows no more
MAX_CALLS: Final = 20  # of one pass
NOTICE_S: Final = 120.0  # from the warning to the end, by AWS's documentation
REBALANCE_S: Final = 900.0  # advice has no end; the machine is replaced first, and drained within this long
INTERRUPTION: Final = "EC2 Spot Instance Interruption Warning"
REBALANCE: Final = "EC2 Instance Rebalance Recommendation"


def receive(sqs: Any, queue_url: str) -> Iterator[CentralNotice]:
    """What waits in the queue, a bounded number. Raises ProviderError when SQS cannot be asked."""
    for _ in range(MAX_CALLS):
        try:
            answer = sqs.receive_message(
                QueueUrl=queue_url, MaxNumberOfMessages=MAX_MESSAGES, WaitTimeSeconds=0
            )
        except (ClientError, BotoCoreError) as error:
            raise as_provider_error(error, "reading spot notices") from None
        messages = answer.get("Messages", [])
        for message in messages:
            found = _read(message)
            if found is None:
                forget(sqs, queue_url, message["ReceiptHandle"])
            else:
                yield found
        if len(messages) < MAX_MESSAGES:
            return


def forget(sqs: Any, queue_url: str, receipt: str) -> None:
    """It was dealt with. A failure only makes it come again, and everything may be done twice."""
    try:
        sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=receipt)
    except (ClientError, BotoCoreError) as error:
        log.warning("notice.not_deleted", error=type(error).__name__)


def _read(message: dict[str, Any]) -> CentralNotice | None:
    try:
        event = json.loads(message["Body"])
        kind = event["detail-type"]
        if event["source"] != "aws.ec2" or kind not in (INTERRUPTION, REBALANCE):
            return None
        at_s = datetime.fromisoformat(event["time"]).timestamp()
        is_advice = kind == REBALANCE
        grace_s = 0.0 if event["detail"].get("instance-action") == "hibernate" else NOTICE_S
        return CentralNotice(
            ref=str(event["detail"]["instance-id"]),
            ends_at_s=at_s + (REBALANCE_S if is_advice else grace_s),
            is_advice=is_advice,
            receipt=message["ReceiptHandle"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("notice.unreadable")
        return None
