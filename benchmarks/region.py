"""A simulated EC2 region beside a private stack that buys its machines there: what drills with `--region` run in.

moto's EC2, EventBridge and SQS behind our fault layer, a real S3 server, and a hypervisor that turns every instance
into a real agent with its own metadata service (tests/cloud). It has weather: the cheapest zone is sold out, one
purchase is throttled, the answer to another is lost, and lists trail. Needs the development packages.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks.stack import BenchStack, bench_stack
from infra.drills.scene import REGION_FILE
from infra.local.privatefile import write_private_json
from tests.cloud.ec2 import REGION, ZONES, Ec2, Fault
from tests.cloud.hypervisor import Hypervisor
from tests.cloud.imds import certificate
from tests.cloud.s3 import s3_server

TYPE: Final = "g6.xlarge"
KEEP_WARM_S: Final = 5.0
PASSWORD_S: Final = 60.0  # life of machines' Redis passwords: replaced after half of it, under the streams
GIVEN_BACK_WITHIN_S: Final = 90.0
_WARNING: Final = "EC2 Spot Instance Interruption Warning"


@dataclass
class Region:
    """The region, and the environment of a stack that buys there."""

    ec2: Ec2
    hypervisor: Hypervisor
    environ: dict[str, str]
    events: Any

    def notice(self, machine: str, in_s: float, *, centrally: bool) -> None:
        """To the machine, or to the queue only; the plug is pulled then in either case."""
        ref = self.hypervisor.ref_of(machine)
        if not centrally:
            return self.hypervisor.notice(ref, in_s)
        detail = json.dumps({"instance-id": ref, "instance-action": "terminate"})
        self.events.put_events(Entries=[{"Source": "aws.ec2", "DetailType": _WARNING, "Detail": detail}])
        return self.hypervisor.pull(ref, in_s)

    def weather(self) -> None:
        """What the next purchases meet; the same before every drill."""
        self.ec2.sell([f"spot/{ZONES[0]}/{TYPE}"])
        self.ec2.visible_after_s = 2.0
        self.ec2.faults += [
            Fault("CreateFleet", code="RequestLimitExceeded", status=503),
            Fault("CreateFleet", lose_reply=True),
        ]


@contextmanager
def region_for(var: Path) -> Iterator[Region]:
    """A region whose machines' directories lie in `var`, as those of the local provider do."""
    ec2 = Ec2()
    ec2.start()
    ec2.boot_s = 0.3
    ec2.spot_usd |= {(TYPE, zone): 0.3 + n / 100 for n, zone in enumerate(ZONES)}
    sqs, events = ec2.client("sqs"), ec2.client("events")
    queue = sqs.create_queue(QueueName="notices")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    events.put_rule(Name="spot", EventPattern=json.dumps({"source": ["aws.ec2"]}), State="ENABLED")
    events.put_targets(Rule="spot", Targets=[{"Id": "q", "Arn": arn}])
    pem = var / "identity.pem"
    pem.write_bytes(certificate())
    with tempfile.TemporaryDirectory(prefix="corral-s3-") as root, s3_server(Path(root)) as s3:
        environ = {
            **ec2.environ,
            **s3,  # the simulated EC2 takes any credentials
            "CORRAL_PROVIDER": "aws",
            "CORRAL_MAX_MACHINES": "4",
            "CORRAL_MACHINE_KEEP_WARM_S": f"{KEEP_WARM_S:g}",
            "CORRAL_WARM_LADDER": "0",  # which would keep one for minutes, where boots were slow: a busy computer
            "CORRAL_STOPPED_NANO_PER_H": "0",  # nothing stays in reserve: what is left at the end is an orphan
            "CORRAL_MACHINE_PASSWORD_S": f"{PASSWORD_S:g}",
            "CORRAL_AWS_REGION": REGION,
            "CORRAL_AWS_SUBNETS": ",".join(f"{zone}={subnet}" for zone, subnet in ec2.subnets.items()),
            "CORRAL_AWS_AMI": ec2.ami,
            "CORRAL_AWS_INSTANCE_TYPES": TYPE,
            "CORRAL_AWS_SECURITY_GROUPS": ec2.group,
            "CORRAL_AWS_AGENT_COMMAND": f"{sys.executable} -m workers.agent",
            "CORRAL_AWS_QUEUE_URL": queue,
            "CORRAL_AWS_IDENTITY_CERTIFICATE": str(pem),
        }
        hypervisor = Hypervisor(ec2, var / "machines", by_machine=True)
        hypervisor.start()
        region = Region(ec2, hypervisor, environ, events)
        region.weather()
        with _orders(region, var):
            try:
                yield region
            finally:
                hypervisor.stop()
                ec2.stop()


@contextmanager
def _orders(region: Region, var: Path) -> Iterator[None]:
    """The one thing a drill asks of a region, over HTTP, since it runs in a process of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            order = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            try:
                region.notice(order["machine"], float(order["in_s"]), centrally=order["centrally"])
                self.send_response(200)
            except KeyError:
                self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    write_private_json(var / REGION_FILE, {"url": f"http://127.0.0.1:{server.server_port}"})
    yield
    server.shutdown()
    server.server_close()


@contextmanager
def region_stack() -> Iterator[tuple[BenchStack, Region]]:
    """A private stack from nothing, its first machine bought in a region of its own by its first question."""
    found: list[Region] = []
    with ExitStack() as opened:  # outlives the stack that buys there

        def env_of(var: Path) -> Mapping[str, str]:
            found.append(opened.enter_context(region_for(var)))
            return found[0].environ

        with bench_stack("toy", env_of=env_of) as stack:
            yield stack, found[0]


def account(stack: BenchStack, region: Region) -> dict[str, Any]:
    """What was bought, and that nothing is left: after everything was given up, by the control worker's own doing.

    `problems` names whatever is wrong: a machine that nobody gave back, one that no row knows, two for one command.
    """
    deadline_s = time.monotonic() + GIVEN_BACK_WITHIN_S
    while region.ec2.alive() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    left = region.ec2.alive()
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5) as connection:
        rows = connection.execute(
            "SELECT provider_ref, replace(command_id::text, '-', ''), offering, state FROM autoscaler_machine"
        ).fetchall()
    tokens = Counter(
        tag["value"] for i in region.ec2.instances() for tag in i.get_tags() if tag["key"] == "corral:token"
    )
    known = {ref for ref, *_ in rows if ref}
    unknown = sorted(i.id for i in region.ec2.instances() if i.id not in known)
    twice = sorted(token for token, n in tokens.items() if n > 1)
    problems = [f"machine {ref} was never given back" for ref in left]
    problems += [f"machine {ref} is in no row: an orphan" for ref in unknown]
    problems += [f"command {token} bought {tokens[token]} machines" for token in twice]
    calls = Counter(action for action, _ in region.ec2.calls)
    return {
        "n_bought": len(region.ec2.instances()),
        "offerings": dict(Counter(offering for _, _, offering, _ in rows if offering)),
        "n_fetched_weights": len(list(stack.var.glob("machines/*/models/*/model.safetensors"))),
        "n_left": len(left),
        "n_unknown": len(unknown),
        "n_bought_twice": len(twice),
        "n_create_fleet_calls": calls["CreateFleet"],
        "n_terminate_calls": calls["TerminateInstances"],
        "weather": f"spot in {ZONES[0]} sold out, one purchase throttled, one answer lost, lists 2 s late, "
        f"machines' passwords replaced every {PASSWORD_S / 2:g} s",
        "problems": problems,
    }


def account_line(found: Mapping[str, Any]) -> str:
    offerings = ", ".join(f"{n} {name}" for name, n in sorted(found["offerings"].items()))
    return (
        f"{found['n_bought']} machines bought ({offerings}) by {found['n_create_fleet_calls']} calls, "
        f"{found['n_fetched_weights']} fetched weights from S3; "
        f"{found['n_bought_twice']} bought twice, {found['n_unknown']} unknown, {found['n_left']} left at the end"
    )
