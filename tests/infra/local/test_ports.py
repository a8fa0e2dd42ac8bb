"""Ports: wishes, memory, and somebody else on the port."""

import socket
from pathlib import Path

from infra.local.ports import choose_ports, free_port, is_free


def test_wish_is_granted_when_free_and_remembered(tmp_path: Path) -> None:
    wish = free_port()
    chosen = choose_ports({"gateway": wish, "redis": None}, tmp_path / "ports.json")
    assert chosen["gateway"] == wish
    assert choose_ports({"gateway": 1, "redis": None}, tmp_path / "ports.json") == chosen


def test_taken_port_gives_way_to_another(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        (tmp_path / "ports.json").write_text(f'{{"gateway": {port}}}')
        chosen = choose_ports({"gateway": port}, tmp_path / "ports.json")
        assert chosen["gateway"] != port and is_free(chosen["gateway"])


def test_no_two_names_share_a_port(tmp_path: Path) -> None:
    wish = free_port()
    chosen = choose_ports(dict.fromkeys("abcde", wish), tmp_path / "ports.json")
    assert len(set(chosen.values())) == 5
