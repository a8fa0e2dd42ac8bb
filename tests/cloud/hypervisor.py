"""Boots what was bought: every running instance becomes its user data as a process, with a metadata service of its own.

Ended instances lose their processes at once, as a pulled plug. `notice` announces a spot interruption and pulls it. A
guest's directory is called by the machine id it is tagged with where `by_machine` says so; `instance` in it names the
instance, whose mark all its processes carry.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.drills.scene import INSTANCE_MARK as MARK
from infra.local.process import find_marked, identity_of, kill_marked
from tests.cloud.ec2 import REGION, Ec2
from tests.cloud.imds import Imds, signed

_ROOT = Path(__file__).resolve().parents[2]
_PASS = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
_PASS_PREFIXES = ("VLLM_", "HF_", "OMP_", "MKL_", "TORCH")


@dataclass
class Guest:
    imds: Imds
    process: subprocess.Popen[bytes]
    var: Path


class Hypervisor:
    """`start()`, `stop()`. `guests` by instance id."""

    def __init__(
        self, ec2: Ec2, root: Path, environ: dict[str, str] | None = None, *, by_machine: bool = False
    ) -> None:
        self.ec2, self.root, self.environ, self.by_machine = ec2, root, environ or {}, by_machine
        self.guests: dict[str, Guest] = {}
        self.booted: list[str] = []  # each time: one that was stopped boots again
        self.failure: Exception | None = None  # the first one; told at the end, not kept by a dead thread
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        for ref in list(self.guests):
            self._end(ref)
        if self.failure is not None:
            raise self.failure

    def ref_of(self, machine_id: str) -> str:
        """The instance with this tag that runs now. KeyError without one."""
        for ref in list(self.guests):
            for instance in self.ec2.instances("running"):
                if instance.id == ref and _tags(instance).get("corral:machine") == machine_id:
                    return ref
        raise KeyError(machine_id)

    def notice(self, ref: str, in_s: float) -> None:
        """A spot interruption: announced now by its metadata service, carried out then."""
        self.guests[ref].imds.interrupt(in_s)
        self.pull(ref, in_s)

    def pull(self, ref: str, in_s: float) -> None:
        """The plug, then."""

        def pull() -> None:
            for instance in self.ec2.instances():
                if instance.id == ref and instance.state != "terminated":
                    instance.terminate()

        timer = threading.Timer(in_s, pull)
        timer.daemon = True
        timer.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            try:
                self._turn()
            except Exception as error:
                if "changed size during iteration" not in str(error):  # moto's tables: looked at again
                    self.failure = self.failure or error

    def _turn(self) -> None:
        running = {i.id: i for i in self.ec2.instances("running")}
        for ref, instance in running.items():
            is_tagged = "corral:machine" in _tags(instance)  # a moment after it is made
            if is_tagged and ref not in self.guests:
                self._boot(ref, instance)
        for ref in [ref for ref in self.guests if ref not in running]:
            self._end(ref)

    def _boot(self, ref: str, instance: Any) -> None:
        self.booted.append(ref)
        tags = _tags(instance)
        document = {
            "instanceId": ref,
            "instanceType": instance.instance_type,
            "availabilityZone": instance.placement.zone,
            "region": REGION,
            "accountId": self.ec2.account,
            "imageId": self.ec2.ami,
            "pendingTime": "2026-01-01T00:00:00Z",
        }
        identity = signed(document)
        paths = {f"/meta-data/tags/instance/{k}": v for k, v in tags.items()}
        paths["/dynamic/instance-identity/document"] = identity["document"]
        paths["/dynamic/instance-identity/signature"] = identity["signature"]
        paths["/meta-data/instance-id"] = ref
        imds = Imds(paths)
        var = self.root / (tags["corral:machine"] if self.by_machine else ref)
        var.mkdir(parents=True, exist_ok=True)  # one that was stopped has its disk
        (var / "instance").write_text(ref)
        script = var / "user-data"
        script.write_text(instance.user_data.decode())
        passed = {k: v for k, v in os.environ.items() if k in _PASS or k.startswith(_PASS_PREFIXES)}
        with (var / "console.log").open("ab") as console:
            process = subprocess.Popen(
                ["/bin/bash", str(script)],
                env={
                    **passed,
                    **self.environ,
                    MARK: ref,
                    "PYTHONPATH": str(_ROOT),
                    "AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url,
                    "CORRAL_MACHINE_VAR": str(var),
                },
                cwd=var,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        agent = identity_of(process.pid)
        if agent is not None:  # user data ends in the agent, by exec
            record = {"pid": agent.pid, "start_time": agent.start_ticks}
            (var / "agent.pid").write_text(json.dumps(record))
        self.guests[ref] = Guest(imds, process, var)

    def _end(self, ref: str) -> None:
        guest = self.guests.pop(ref)
        deadline_s = time.monotonic() + 10
        kill_marked(f"{MARK}={ref}")
        while find_marked(f"{MARK}={ref}") and time.monotonic() < deadline_s:
            kill_marked(f"{MARK}={ref}")
            time.sleep(0.02)
        guest.process.wait(10)
        guest.imds.close()


def _tags(instance: Any) -> dict[str, str]:
    return {t["key"]: t["value"] for t in instance.get_tags()}
