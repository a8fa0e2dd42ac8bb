"""Spot notices by EventBridge and SQS: heard for our machines, once, whatever else is in the queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from django.utils import timezone

from autoscaler import notices
from autoscaler.models import Machine, MachineState
from infra.providers.aws.clients import Clients
from infra.providers.aws.provider import AwsProvider
from infra.providers.base import ProviderError
from tests.autoscaler.conftest import Scaling, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.conftest import aws_config
from tests.cloud.ec2 import Ec2

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])


@pytest.fixture
def house(scaling: Scaling, ec2: Ec2, region: tuple[Ec2, Clients]) -> Iterator[tuple[Scaling, Any]]:  # noqa: F811
    """(scaling with a running machine, EventBridge) whose rule leads to our queue."""
    sqs, events = ec2.client("sqs"), ec2.client("events")
    url = sqs.create_queue(QueueName="notices")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.put_rule(Name="spot", EventPattern=json.dumps({"source": ["aws.ec2"]}), State="ENABLED")
    events.put_targets(Rule="spot", Targets=[{"Id": "q", "Arn": arn}])
    provider = AwsProvider(aws_config(ec2, CORRAL_AWS_QUEUE_URL=url), region[1], "c0", sleep=lambda _: None)
    scaling.configure(provider="aws")
    scaling.house = replace(scaling.house, provider=provider)
    scaling.queue("a")
    scaling.tick()
    Machine.objects.update(state=MachineState.READY, ready_at=timezone.now())
    yield scaling, events
    sqs.delete_queue(QueueUrl=url)


def _say(events: Any, kind: str, ref: str, **detail: str) -> None:
    answer = events.put_events(
        Entries=[
            {"Source": "aws.ec2", "DetailType": kind, "Detail": json.dumps({"instance-id": ref, **detail})}
        ]
    )
    assert answer["FailedEntryCount"] == 0


def test_a_warning_orders_the_replacement_and_is_taken_once(house: tuple[Scaling, Any]) -> None:
    scaling, events = house  # noqa: F811
    machine = scaling.machine()
    _say(
        events,
        "EC2 Spot Instance Interruption Warning",
        machine.provider_ref,
        **{"instance-action": "terminate"},
    )
    _say(events, "EC2 Instance State-change Notification", machine.provider_ref, state="running")
    _say(events, "EC2 Spot Instance Interruption Warning", "i-somebodys")
    assert notices.heed(scaling.house) == {scaling.deployment.id}
    leaving = scaling.machine()
    assert leaving.state == MachineState.DRAINING
    assert leaving.ends_at is not None
    assert 60 < (leaving.ends_at - timezone.now()).total_seconds() <= 121
    assert notices.heed(scaling.house) == set()
    scaling.tick()
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 2


def test_advice_becomes_a_warning_when_one_follows(house: tuple[Scaling, Any]) -> None:
    scaling, events = house  # noqa: F811
    machine = scaling.machine()
    _say(events, "EC2 Instance Rebalance Recommendation", machine.provider_ref)
    notices.heed(scaling.house)
    advised = scaling.machine().ends_at
    _say(
        events,
        "EC2 Spot Instance Interruption Warning",
        machine.provider_ref,
        **{"instance-action": "terminate"},
    )
    notices.heed(scaling.house)
    warned = scaling.machine().ends_at
    assert advised is not None and warned is not None
    assert (advised - warned).total_seconds() > 600


@pytest.mark.parametrize(
    "body", ["not json", "[]", '{"source": "aws.ec2"}', '{"time": "2026-11-20T10:00:00Z"}']
)
def test_what_is_no_notice_is_thrown_away(house: tuple[Scaling, Any], ec2: Ec2, body: str) -> None:
    scaling, _ = house  # noqa: F811
    sqs = ec2.client("sqs")
    url = sqs.get_queue_url(QueueName="notices")["QueueUrl"]
    sqs.send_message(QueueUrl=url, MessageBody=body)
    assert notices.heed(scaling.house) == set()
    attributes = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    left = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=attributes)["Attributes"]
    assert set(left.values()) == {"0"}


def test_a_queue_that_is_not_there_is_an_error_in_our_words(house: tuple[Scaling, Any], ec2: Ec2) -> None:
    scaling, _ = house  # noqa: F811
    sqs = ec2.client("sqs")
    gone = sqs.create_queue(QueueName="gone")["QueueUrl"]
    sqs.delete_queue(QueueUrl=gone)
    provider = scaling.house.provider
    lost = AwsProvider(aws_config(ec2, CORRAL_AWS_QUEUE_URL=gone), provider._clients, "c0")  # type: ignore[attr-defined]
    with pytest.raises(ProviderError, match="spot notices"):
        notices.heed(replace(scaling.house, provider=lost))
