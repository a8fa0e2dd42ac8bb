"""Ports: wishes, memory, somebody else on the port, and another stack that starts at the same instant."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.ports import claimed_ports, free_port, is_free
from infra.local.stackconfig import ROOT

# Says its ports once told to go, and holds them until its input ends.
STACK = """
import json, sys
from pathlib import Path
from infra.local.ports import claimed_ports
print("ready", flush=True)
sys.stdin.readline()
with claimed_ports({"gateway": int(sys.argv[1]), "web": int(sys.argv[2])}, Path(sys.argv[3])) as ports:
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
"""


def test_wish_is_granted_when_free_and_remembered(tmp_path: Path) -> None:
    wish = free_port()
    with claimed_ports({"gateway": wish, "redis": None}, tmp_path / "ports.json") as chosen:
        assert chosen["gateway"] == wish
    with claimed_ports({"gateway": 1, "redis": None}, tmp_path / "ports.json") as again:
        assert again == chosen


def test_taken_port_gives_way_to_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        (tmp_path / "ports.json").write_text(f'{{"gateway": {port}}}')
        with claimed_ports({"gateway": port}, tmp_path / "ports.json") as chosen:
            assert chosen["gateway"] != port and is_free(chosen["gateway"])


def test_no_two_names_share_a_port(tmp_path: Path) -> None:
    wish = free_port()
    with claimed_ports(dict.fromkeys("abcde", wish), tmp_path / "ports.json") as chosen:
        assert len(set(chosen.values())) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="claims are abstract sockets, which only Linux has")
def test_stacks_that_start_at_once_get_ports_of_their_own_and_a_dead_ones_are_free(tmp_path: Path) -> None:
    wishes = [str(free_port()), str(free_port())]
    stacks = [
        subprocess.Popen(
            [sys.executable, "-c", STACK, *wishes, str(tmp_path / f"{n}.json")],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for n in range(4)
    ]  # fmt: skip
    try:
        for stack in stacks:
            assert stack.stdout and stack.stdout.readline() == "ready\n"
        for stack in stacks:  # nobody listens on any of them, so all are free for everybody who only looks
            assert stack.stdin
            stack.stdin.write("go\n")
            stack.stdin.flush()
        ports = [json.loads(stack.stdout.readline()) for stack in stacks if stack.stdout]
        taken = [port for chosen in ports for port in chosen.values()]
        assert len(set(taken)) == 2 * len(stacks), ports
        assert {int(wish) for wish in wishes} <= set(taken), "whoever was first got them"
    finally:
        for stack in stacks:
            stack.kill()
            stack.communicate()
    with claimed_ports({"gateway": int(wishes[0])}, tmp_path / "next.json") as chosen:
        assert chosen == {"gateway": int(wishes[0])}
