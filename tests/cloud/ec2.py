"""moto's EC2 as a server on loopback, behind a layer that has what moto lacks.

Capacity by offer (spot or on-demand, zone, type), client tokens that are kept, lost answers, delays, throttling,
pending and stopping states that last, stops and starts that are refused where EC2 refuses them, a list that trails,
spot prices. One account per instance, so that tests do not see each other's machines.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import parse_qs, urlencode
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import boto3
from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "us-east-1"
ZONES = ("us-east-1a", "us-east-1b", "us-east-1c")
_NS = "http://ec2.amazonaws.com/doc/2016-11-15/"
_OVERRIDE = re.compile(r"LaunchTemplateConfigs\.1\.Overrides\.(\d+)\.(\w+)")
_STATE_CODES = {"pending": 0, "running": 16, "stopping": 64, "stopped": 80}
_accounts = itertools.count(1)


@dataclass
class Fault:
    """What happens to the next `times` calls of `action`. Without a code the call is only slow, or its answer lost."""

    action: str
    times: int = 1
    code: str = ""
    status: int = 400
    delay_s: float = 0.0
    lose_reply: bool = False


@dataclass
class Sold:
    """Capacity of one offer; None: any number."""

    n_left: int | None = None
    code: str = "InsufficientInstanceCapacity"


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


@dataclass
class Ec2:
    """`start()`, then `environ` for boto3; everything else may be changed at any time."""

    boot_s: float = 0.0
    stop_s: float = 0.0  # what stopping takes
    start_s: float | None = None  # what starting one again takes; None: as long as a boot
    visible_after_s: float = 0.0  # DescribeInstances trails a launch by so much
    faults: list[Fault] = field(default_factory=list)
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    capacity: dict[str, Sold] = field(default_factory=dict)  # offering name -> what is left
    spot_usd: dict[tuple[str, str], float] = field(default_factory=dict)  # (type, zone) -> price
    subnets: dict[str, str] = field(default_factory=dict)  # zone -> id

    def start(self) -> None:
        """The server, for as many tests as one likes, with `reset` between them."""
        self.account = f"{next(_accounts):012d}"
        self._lock = threading.RLock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

        self._born_s: dict[str, float] = {}
        self._replies: dict[tuple[str, str], tuple[dict[str, str], bytes]] = {}
        ec2 = self.client("ec2")
        self.vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        for n, zone in enumerate(ZONES):
            subnet = ec2.create_subnet(VpcId=self.vpc, CidrBlock=f"10.0.{n}.0/24", AvailabilityZone=zone)
            self.subnets[zone] = subnet["Subnet"]["SubnetId"]
        self.group = ec2.create_security_group(GroupName="g", Description="g", VpcId=self.vpc)["GroupId"]
        self.ami = "ami-0123456789abcdef0"
        self.calls.clear()

    def reset(self) -> None:
        """As after `start`: an account with a network in it and nothing else."""
        self.boot_s = self.stop_s = self.visible_after_s = 0.0
        self.start_s = None
        self._born_s.clear()
        backend = get_backend("ec2")[self.account][REGION]
        for kept in (
            *(self.faults, self.capacity, self.calls, self.spot_usd, self._replies),
            *(
                backend.reservations,
                backend.fleets,
                backend.launch_templates,
                backend.launch_template_name_to_ids,
            ),
        ):
            cast(Any, kept).clear()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.account,  # moto takes a key of twelve digits for the account
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str) -> Any:
        found = boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.url,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        found.meta.events.register(
            "before-sign.*",
            lambda request, **_: request.headers.add_header("x-moto-account-id", self.account),
        )
        return found

    # -- what tests ask

    def instances(self, *states: str) -> list[Any]:
        """moto's own records, in these states (all when none is named)."""
        backend = get_backend("ec2")[self.account][REGION]
        # Locked: nobody sees an instance of a fleet half made, running before it is pending. And snapshots: the
        # server's other threads add to both while we look.
        with self._lock:
            found = [i for r in list(backend.reservations.values()) for i in list(r.instances)]
            states_now = [i.state for i in found]
        return [i for i, state in zip(found, states_now, strict=True) if not states or state in states]

    def alive(self) -> list[str]:
        return [i.id for i in self.instances("pending", "running", "stopping", "stopped")]

    def count(self, action: str) -> int:
        return sum(1 for name, _ in self.calls if name == action)

    def sell(
        self, names: Iterable[str], n: int | None = 0, code: str = "InsufficientInstanceCapacity"
    ) -> None:
        for name in names:
            self.capacity[name] = Sold(n, code)

    # -- the layer

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        auth = environ.get("HTTP_AUTHORIZATION", "")
        environ["HTTP_X_MOTO_ACCOUNT_ID"] = self.account
        if "/ec2/aws4_request" not in auth:
            return cast(Iterable[bytes], self._moto(environ, start_response))
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        form = {k: v[0] for k, v in parse_qs(body.decode(), keep_blank_values=True).items()}
        action = form["Action"]
        with self._lock:
            self.calls.append((action, form))
            fault = next((f for f in self.faults if f.action == action and f.times > 0), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.delay_s:
            time.sleep(fault.delay_s)
        if fault is not None and fault.code:
            return _error(start_response, fault.status, fault.code)
        status, headers, reply = self._answer(action, form, environ)
        if fault is not None and fault.lose_reply:
            return _error(start_response, 500, "InternalError")  # done, and nobody hears of it
        start_response(status, headers)
        return [reply]

    def _answer(
        self, action: str, form: dict[str, str], environ: dict[str, Any]
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        if action == "DescribeSpotPriceHistory":
            return _xml(self._price_history(form))
        if action == "DescribeInstances":
            with self._lock:  # nothing that is between two states of moto's
                listed = self._ask_moto(form, environ)
            return self._without_newborn(*listed) if self.visible_after_s else listed
        if action in ("StopInstances", "StartInstances"):
            with self._lock:
                return self._stop_or_start(action, form, environ)
        if action != "CreateFleet":
            return self._ask_moto(form, environ)
        with self._lock:
            token = form["ClientToken"]
            asked = {k: v for k, v in form.items() if k != "Action"}
            known = self._replies.get((action, token))
            if known is not None:
                if known[0] != asked:
                    return _error_reply(400, "IdempotentParameterMismatch")
                return _xml(known[1].decode())
            reply = self._create_fleet(form, environ)
            if reply[0].startswith("200"):
                self._replies[action, token] = (asked, reply[2])
            return reply

    def _create_fleet(
        self, form: dict[str, str], environ: dict[str, Any]
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        lifecycle = form["TargetCapacitySpecification.DefaultTargetCapacityType"]
        overrides: dict[int, dict[str, str]] = {}
        for key, value in form.items():
            match = _OVERRIDE.fullmatch(key)
            if match:
                overrides.setdefault(int(match[1]), {})[match[2]] = value
        zones = {subnet: zone for zone, subnet in self.subnets.items()}
        errors, chosen = [], None
        for _, override in sorted(overrides.items(), key=lambda item: float(item[1].get("Priority", 0))):
            name = f"{lifecycle}/{zones[override['SubnetId']]}/{override['InstanceType']}"
            sold = self.capacity.get(name, Sold())
            if sold.n_left == 0:
                errors.append((override, sold.code))
            elif chosen is None:
                chosen = override
                if sold.n_left is not None:
                    sold.n_left -= 1
        listed = "".join(_fleet_error(o, lifecycle, code) for o, code in errors)
        if chosen is None:
            return _xml(
                f'<CreateFleetResponse xmlns="{_NS}"><requestId>{uuid.uuid4()}</requestId>'
                f"<fleetId>fleet-{uuid.uuid4()}</fleetId><errorSet>{listed}</errorSet><fleetInstanceSet/>"
                "</CreateFleetResponse>"
            )
        kept = {k: v for k, v in form.items() if not _OVERRIDE.fullmatch(k)}
        kept |= {f"LaunchTemplateConfigs.1.Overrides.1.{k}": v for k, v in chosen.items()}
        before = {i.id for i in self.instances()}
        status, headers, reply = self._ask_moto(kept, environ)
        for instance in self.instances():
            if instance.id not in before:
                self._born_s[instance.id] = time.monotonic()
                self._boot(instance)
        text = reply.decode()
        if listed and "<errorSet" in text:
            text = re.sub(
                r"<errorSet\s*/>|<errorSet>.*?</errorSet>", f"<errorSet>{listed}</errorSet>", text, flags=re.S
            )
        elif listed:
            text = text.replace(
                "</CreateFleetResponse>", f"<errorSet>{listed}</errorSet></CreateFleetResponse>"
            )
        return status, headers, text.encode()

    def _stop_or_start(
        self, action: str, form: dict[str, str], environ: dict[str, Any]
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        """As EC2 does: a change of state takes time, is refused in the midst of another, and what is so already stays
        so. A start needs room in the zone; a spot machine of a one-time request is not stopped."""
        is_stop = action == "StopInstances"
        wanted = {v for k, v in form.items() if k.startswith("InstanceId.")}
        found = [i for i in self.instances() if i.id in wanted]
        before = {i.id: i.state for i in found}
        for instance in found:
            if instance.state not in ("running", "stopping", "stopped") and (
                is_stop or instance.state != "pending"
            ):
                return _error_reply(400, "IncorrectInstanceState")
            if is_stop and instance.lifecycle == "spot":
                return _error_reply(400, "UnsupportedOperation")
            if not is_stop and instance.state == "stopping":
                return _error_reply(400, "IncorrectInstanceState")
            name = f"on-demand/{instance.placement.zone}/{instance.instance_type}"
            sold = self.capacity.get(name, Sold())
            if not is_stop and instance.state == "stopped" and sold.n_left == 0:
                return _error_reply(500, sold.code)
        reply = self._ask_moto(form, environ)
        for instance in found:
            is_done = before[instance.id] in (("stopping", "stopped") if is_stop else ("pending", "running"))
            if is_done:
                self._put(instance, before[instance.id])
            elif is_stop:
                self._pass_through(instance, "stopping", "stopped", self.stop_s)
            else:
                takes_s = self.boot_s if self.start_s is None else self.start_s
                self._pass_through(instance, "pending", "running", takes_s)
        return reply

    def _without_newborn(
        self, status: str, headers: list[tuple[str, str]], reply: bytes
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        """A fleet of ours has one instance, so that its reservation is hidden with it."""
        now_s = time.monotonic()
        hidden = {ref for ref, at_s in self._born_s.items() if now_s - at_s < self.visible_after_s}
        root = ElementTree.fromstring(reply)
        for listed in root.iter(f"{{{_NS}}}reservationSet"):
            for item in list(listed):
                if hidden & {found.text for found in item.iter(f"{{{_NS}}}instanceId")}:
                    listed.remove(item)
        return status, headers, ElementTree.tostring(root)

    def _boot(self, instance: Any) -> None:
        self._pass_through(instance, "pending", "running", self.boot_s)

    def _pass_through(self, instance: Any, meanwhile: str, then: str, for_s: float) -> None:
        """Into one state for so long, then into the other unless something else became of it. No time: as moto does."""
        if not for_s:
            return
        self._put(instance, meanwhile)

        def arrive() -> None:
            with self._lock:
                if instance.state == meanwhile:
                    self._put(instance, then)

        timer = threading.Timer(for_s, arrive)
        timer.daemon = True
        timer.start()

    def _put(self, instance: Any, state: str) -> None:
        instance._state.name, instance._state.code = state, _STATE_CODES[state]

    def _price_history(self, form: dict[str, str]) -> str:
        wanted = {v for k, v in form.items() if k.startswith("InstanceType.")}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        items = "".join(
            f"<item><instanceType>{escape(t)}</instanceType><productDescription>Linux/UNIX</productDescription>"
            f"<spotPrice>{usd:.6f}</spotPrice><timestamp>{now}</timestamp><availabilityZone>{z}</availabilityZone></item>"
            for (t, z), usd in sorted(self.spot_usd.items())
            if t in wanted
        )
        return (
            f'<DescribeSpotPriceHistoryResponse xmlns="{_NS}"><requestId>r</requestId>'
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken/></DescribeSpotPriceHistoryResponse>"
        )

    def _ask_moto(
        self, form: dict[str, str], environ: dict[str, Any]
    ) -> tuple[str, list[tuple[str, str]], bytes]:
        from io import BytesIO

        body = urlencode(form).encode()
        environ = {**environ, "wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        got: list[Any] = []
        parts = self._moto(environ, lambda status, headers, *_: got.extend((status, headers)))
        return got[0], [h for h in got[1] if h[0].lower() != "content-length"], b"".join(parts)


def _fleet_error(override: dict[str, str], lifecycle: str, code: str) -> str:
    return (
        "<item><launchTemplateAndOverrides><overrides>"
        f"<instanceType>{override['InstanceType']}</instanceType><subnetId>{override['SubnetId']}</subnetId>"
        f"</overrides></launchTemplateAndOverrides><lifecycle>{lifecycle}</lifecycle><errorCode>{code}</errorCode>"
        f"<errorMessage>simulated</errorMessage></item>"
    )


def _xml(text: str) -> tuple[str, list[tuple[str, str]], bytes]:
    return "200 OK", [("Content-Type", "text/xml")], text.encode()


def _error_reply(status: int, code: str) -> tuple[str, list[tuple[str, str]], bytes]:
    body = (
        f"<Response><Errors><Error><Code>{code}</Code><Message>simulated</Message></Error></Errors>"
        "<RequestID>r</RequestID></Response>"
    )
    return f"{status} X", [("Content-Type", "text/xml")], body.encode()


def _error(start_response: Callable[..., Any], status: int, code: str) -> Iterable[bytes]:
    line, headers, body = _error_reply(status, code)
    start_response(line, headers)
    return [body]
