"""Webhooks against a real receiver: signed, at least once under one id, retried, given up, replayed."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from django.conf import settings
from django.core import mail
from django.db import connection, transaction
from django.utils import timezone

from controlplane.errors import InvalidInputError
from controlplane.outbound import allowed_networks
from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from controlplane.webhooks import sending, services
from controlplane.webhooks.catalogue import CATALOGUE
from controlplane.webhooks.models import Delivery, Endpoint, EndpointState, Event, State
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World


@dataclass
class Receiver:
    """Takes calls; `statuses` are the answers to come, then 200."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    hangs: threading.Event | None = None

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.seen]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.seen.append(({k.lower(): v for k, v in self.headers.items()}, body))
            if made.hangs is not None:
                made.hangs.wait(20)
            status = made.statuses.pop(0) if made.statuses else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", made.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(settings, "ENV", replace(settings.ENV, outbound_allow=allowed_networks("127.0.0.1")))
    yield made
    if made.hangs is not None:
        made.hangs.set()
    server.shutdown()
    server.server_close()


def endpoint(world: World, receiver: Receiver, *events: str) -> tuple[Endpoint, str]:
    return services.create_endpoint(
        organization_id=world.organization.id, url=receiver.url, events=events or ["key.created"]
    )


def make_key(world: World, name: str = "program") -> None:
    key_services.create_api_key(organization_id=world.organization.id, project_id=world.project.id, name=name)


def send_due() -> int:
    """What the control worker does in a second."""
    with acting_as("corral_operator"):
        return sending.send_due()


def due_now() -> None:
    with acting_as("corral_operator"):
        Delivery.objects.filter(state=State.PENDING).update(next_at=timezone.now() - timedelta(seconds=1))


def only(world: World) -> Delivery:
    with tenant(world.organization.id):
        return Delivery.objects.select_related("event").get(endpoint__isnull=False)


def verified(headers: dict[str, str], body: bytes, secret: str) -> bool:
    """As the receiver's side of Standard Webhooks is described, written anew here."""
    key = base64.b64decode(secret.split("_", 1)[1])
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}".encode()
    expected = "v1," + base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode()
    return expected in headers["webhook-signature"].split(" ")


def test_an_event_is_signed_and_says_what_happened(world: World, receiver: Receiver) -> None:
    _, secret = endpoint(world, receiver)
    make_key(world, "backend")
    assert send_due() == 1
    ((headers, body),) = receiver.seen
    assert verified(headers, body, secret) and not verified(headers, body + b" ", secret)
    told = json.loads(body)
    assert (told["type"], told["data"]["name"]) == ("key.created", "backend")
    assert headers["webhook-id"].startswith("evt_") and headers["content-type"] == "application/json"
    assert abs(int(headers["webhook-timestamp"]) - timezone.now().timestamp()) < 60
    row = only(world)
    assert (row.state, row.n_attempts, row.last_status) == (State.DELIVERED, 1, 200)
    assert send_due() == 0


def test_the_signature_is_the_one_of_the_specifications_example() -> None:
    from controlplane.webhooks.signing import signature

    body = b'{"test": 2432232314}'
    found = signature(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    )
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_is_rolled_back_is_never_told(world: World, receiver: Receiver) -> None:
    endpoint(world, receiver)
    with pytest.raises(RuntimeError), transaction.atomic():
        make_key(world)
        raise RuntimeError
    assert send_due() == 0
    assert not receiver.seen


def test_two_secrets_sign_while_one_is_replaced(world: World, receiver: Receiver) -> None:
    made, old = endpoint(world, receiver)
    _, new = services.rotate_secret(organization_id=world.organization.id, endpoint_id=made.id)
    make_key(world)
    send_due()
    ((headers, body),) = receiver.seen
    assert old != new and verified(headers, body, old) and verified(headers, body, new)
    with acting_as("corral_operator"):
        EndpointState.objects.update(secret_before_until=timezone.now())
    make_key(world)
    send_due()
    headers, body = receiver.seen[-1]
    assert not verified(headers, body, old) and verified(headers, body, new)


@pytest.mark.parametrize("status", [500, 302, 404])
def test_a_refusal_is_tried_again_later_under_the_same_id(
    world: World, receiver: Receiver, status: int
) -> None:
    endpoint(world, receiver)
    receiver.statuses = [status]
    make_key(world)
    assert (send_due(), send_due()) == (1, 0)
    row = only(world)
    assert (row.state, row.last_status, row.n_attempts) == (State.PENDING, status, 1)
    assert timezone.now() < row.next_at < timezone.now() + timedelta(seconds=10)
    due_now()
    assert send_due() == 1
    assert only(world).state == State.DELIVERED
    assert len(set(receiver.ids())) == 1 and len(receiver.seen) == 2, "redirects are not followed"


def test_a_hanging_receiver_is_left_after_the_timeout(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint(world, receiver)
    receiver.hangs = threading.Event()
    monkeypatch.setattr(sending, "CALL_TIMEOUT_S", 0.2)
    make_key(world)
    send_due()
    row = only(world)
    assert row.state == State.PENDING and "within 0.2 s" in row.last_error and row.last_status is None


def test_who_is_killed_between_sending_and_marking_sends_again_with_the_same_id(
    world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint(world, receiver)
    make_key(world)

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(sending, "mark", killed)
        with acting_as("corral_operator"), pytest.raises(SystemExit):
            sending.send(sending.claim())
    assert send_due() == 0, "it is claimed for a minute"
    due_now()
    assert send_due() == 1
    assert len(receiver.seen) == 2 and len(set(receiver.ids())) == 1
    assert only(world).state == State.DELIVERED


def test_a_late_mark_of_an_earlier_try_changes_nothing(world: World, receiver: Receiver) -> None:
    endpoint(world, receiver)
    make_key(world)
    with acting_as("corral_operator"):
        first = sending.claim()
        Delivery.objects.update(next_at=timezone.now() - timedelta(seconds=1))
        second = sending.claim()
        row = only(world)
        sending.mark(row, first[row.id], sending.Outcome(True, 200))
        assert only(world).state == State.PENDING
        sending.mark(row, second[row.id], sending.Outcome(True, 200))
    assert only(world).state == State.DELIVERED


def test_gone_disables_the_endpoint_and_its_owner_is_mailed(world: World, receiver: Receiver) -> None:
    made, _ = endpoint(world, receiver)
    receiver.statuses = [410]
    make_key(world)
    send_due()
    with tenant(world.organization.id):
        made.refresh_from_db()
        assert made.disabled_at and "410" in made.disabled_reason
    assert only(world).state == State.FAILED
    send_due()
    (told,) = [m for m in mail.outbox if "webhook.disabled" in m.subject]
    assert told.to == ["alice@example.org"] and "410" in told.body
    make_key(world)
    assert send_due() == 0, "nothing more for it"
    services.update_endpoint(organization_id=world.organization.id, endpoint_id=made.id, enabled=True)
    make_key(world)
    assert send_due() == 1


def test_days_of_failure_give_up_and_disable(world: World, receiver: Receiver) -> None:
    made, _ = endpoint(world, receiver)
    receiver.statuses = [500, 500]
    make_key(world)
    send_due()
    long_ago = timezone.now() - sending.GIVE_UP - timedelta(minutes=1)
    with acting_as("corral_operator"):
        Delivery.objects.update(created_at=long_ago, next_at=long_ago)
        EndpointState.objects.update(failing_since=long_ago)
    send_due()
    with tenant(world.organization.id):
        made.refresh_from_db()
        assert "3 days" in made.disabled_reason
        assert Delivery.objects.get(event__kind="key.created").state == State.FAILED


def test_a_success_ends_the_count_of_days(world: World, receiver: Receiver) -> None:
    endpoint(world, receiver)
    receiver.statuses = [500]
    make_key(world)
    send_due()
    with tenant(world.organization.id):
        assert EndpointState.objects.get().failing_since
    make_key(world)
    send_due()
    with tenant(world.organization.id):
        assert EndpointState.objects.get().failing_since is None


def test_one_endpoint_takes_few_places_of_a_round(world: World, receiver: Receiver) -> None:
    endpoint(world, receiver)
    for n in range(6):
        make_key(world, f"k{n}")
    with acting_as("corral_operator"):
        assert len(sending.claim()) == sending.PER_ENDPOINT
        assert len(sending.claim()) == 2


def test_waits_grow_and_are_bounded() -> None:
    waits = [sending.wait_s(n) for n in range(1, 30)]
    assert waits[0] < 7 and waits[1] < waits[3] < waits[5]
    assert max(waits) <= 28_800 * 1.2
    assert len({sending.wait_s(1) for _ in range(5)}) > 1, "spread"


def test_private_addresses_are_refused_at_the_door_and_at_the_call(world: World) -> None:
    for url in (
        "http://127.0.0.1/x",
        "http://169.254.169.254/latest",
        "https://[::1]/",
        "http://localhost:80/",
    ):
        with pytest.raises(InvalidInputError) as caught:
            services.create_endpoint(organization_id=world.organization.id, url=url)
        assert caught.value.field == "url"
    made, _ = services.create_endpoint(organization_id=world.organization.id, url="https://example.org/x")
    with tenant(world.organization.id):
        Endpoint.objects.filter(id=made.id).update(url="http://127.0.0.1:9/")  # as if the name led there
    make_key(world)
    send_due()
    assert "not a public address" in only(world).last_error


def test_a_kind_is_told_once_where_it_is_said_to_be_unique(world: World, receiver: Receiver) -> None:
    endpoint(world, receiver, "key.expiring")
    data = {**CATALOGUE["key.expiring"].example()}
    with tenant(world.organization.id):
        first = services.emit(
            organization_id=world.organization.id, kind="key.expiring", data=data, fence="k1"
        )
        again = services.emit(
            organization_id=world.organization.id, kind="key.expiring", data=data, fence="k1"
        )
        assert first is not None and again is None
        assert Event.objects.filter(kind="key.expiring").count() == 1
        with pytest.raises(ValueError, match="catalogue"):
            services.emit(organization_id=world.organization.id, kind="key.created", data={"x": 1})


def test_secrets_are_sealed_and_in_no_log(world: World, receiver: Receiver) -> None:
    made, secret = endpoint(world, receiver)
    plain = base64.b64decode(secret.removeprefix("whsec_"))
    with acting_as("corral_owner"), connection.cursor() as cursor:
        cursor.execute("SELECT sealed_secret FROM webhooks_endpointstate")
        box = bytes(cursor.fetchone()[0])
        cursor.execute("SELECT changes::text FROM audit_entry WHERE thing = %s", [made.id])
        entries = " ".join(row[0] for row in cursor.fetchall())
    assert plain not in box and secret.encode() not in box
    assert entries and "sealed" not in entries and secret not in entries


def test_rest_shows_the_secret_once_lists_deliveries_and_replays(world: World, receiver: Receiver) -> None:
    from controlplane.tenants.models import Role

    api = Api(token_of(world.organization.id, Role.ADMIN))
    made = api.post("/webhooks", {"url": receiver.url, "events": ["key.created"]})
    assert made.status_code == 201 and made.body["secret"].startswith("whsec_")
    path = f"/webhooks/{made.body['id']}"
    assert "secret" not in api.get(path).body
    make_key(world)
    receiver.statuses = [500]
    send_due()
    (row,) = api.get(f"{path}/deliveries").body["data"]
    assert (row["state"], row["last_status"], row["kind"]) == ("pending", 500, "key.created")
    due_now()
    send_due()
    assert api.post(f"/deliveries/{row['id']}/replay").status_code == 201
    send_due()
    assert len(receiver.seen) == 3 and len(set(receiver.ids())) == 1
    assert api.get(f"{path}/deliveries").body["data"][0]["state"] == "delivered"
    assert api.post(f"{path}/test").status_code == 201
    send_due()
    assert json.loads(receiver.seen[-1][1])["type"] == "webhook.test"
    assert (
        api.post("/webhooks", {"url": receiver.url, "events": ["nonsense"]}).body["errors"][0]["field"]
        == "events"
    )
    assert api.call("PATCH", path, {"enabled": False}).body["enabled"] is False
    assert api.call("DELETE", path).status_code == 204


def test_the_document_describes_every_kind(world: World) -> None:
    from controlplane.api.app import api as rest

    told = rest.get_openapi_schema()["webhooks"]
    assert told.keys() == CATALOGUE.keys()
    body = told["budget.threshold"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["properties"]["data"]["required"] == list(body["examples"]["one"]["value"]["data"])


def test_a_key_that_expires_within_a_week_is_told_of_once(world: World, receiver: Receiver) -> None:
    from controlplane.tenants.models import ApiKey
    from controlplane.webhooks.tasks import tell_expiring_keys

    endpoint(world, receiver, "key.expiring")
    for name, days in (("soon", 5), ("later", 9)):
        key_services.create_api_key(
            organization_id=world.organization.id, project_id=world.project.id, name=name,
            expires_at=timezone.now() + timedelta(days=days),
        )  # fmt: skip
    with acting_as("corral_operator"):
        ApiKey.objects.update(created_at=timezone.now() - timedelta(days=30))
        for _ in range(2):
            tell_expiring_keys()
        (event,) = Event.objects.filter(kind="key.expiring")
    assert event.data["name"] == "soon"
