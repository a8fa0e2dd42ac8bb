"""When the benchmarks of cells, far Redis and clients say that a promise was kept."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from benchmarks import cells, clients, delay
from benchmarks.delayproxy import DelayProxy


def kept(rows: list[dict[str, Any]]) -> list[bool]:
    return [row["reached"] for row in rows]


@pytest.mark.parametrize(
    ("near_ms", "gap_ms", "reached"),
    [(20.0, 25.0, [True, True]), (20.0, 25.1, [False, False]), (27.0, 26.0, [False, True])],
)
def test_a_far_redis_may_lengthen_gaps_by_five_ms(near_ms: float, gap_ms: float, reached: list[bool]) -> None:
    arms = {name: {"gap_p99_ms": {"median": value}} for name, value in (("0", near_ms), ("40", gap_ms))}
    assert kept(delay.goals(arms)) == reached


def test_each_cost_of_a_client_is_judged_by_itself() -> None:
    good = {
        "left_steps_most": 1, "queued_gone_ms": 250.0, "gateway_kib_per_slow_client": 512.0,
        "gap_p99_ms_without": 10.0, "gap_p99_ms_with_slow": 12.0, "slow_got_everything": clients.N_SLOW,
    }  # fmt: skip
    worse = {
        "left_steps_most": 2, "queued_gone_ms": 251.0, "gateway_kib_per_slow_client": 513.0,
        "gap_p99_ms_with_slow": 12.1, "slow_got_everything": clients.N_SLOW - 1,
    }  # fmt: skip

    def judged(values: dict[str, float]) -> list[bool]:
        return kept(
            clients.goals({name: {"median": v, "min": v, "max": v, "n": 1} for name, v in values.items()})
        )

    assert judged(good) == [True] * 5
    for n, (name, value) in enumerate(worse.items()):
        assert judged(good | {name: value}) == [at != n for at in range(5)], name


def test_cells_are_judged_by_each_limit_and_by_whose_streams_a_lost_redis_touched() -> None:
    cases = [{"limit": "rpm", "served": 60, "allowed": 60, "passed": True},
             {"limit": "budget", "served": 2, "allowed": 1, "passed": False}]  # fmt: skip
    lost = {"streams_each": 16, "other_cell_equal": 16, "bereaved_told_to_retry": 15, "bereaved_finished": 1}
    assert kept(cells.goals(cases, lost)) == [True, False, True, True]
    assert kept(cells.goals([], lost | {"other_cell_equal": 15})) == [False, True]
    assert kept(cells.goals([], lost | {"bereaved_finished": 0})) == [True, False]


def test_the_proxy_delivers_everything_in_order_and_closes_after_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        got = bytearray()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(4096):
                    got.extend(data)
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        sent = bytes(range(256)) * 200
        with (
            DelayProxy(server.getsockname, 10) as proxy,
            socket.create_connection(("127.0.0.1", proxy.port), 5) as client,
        ):
            client.settimeout(5)
            client.sendall(sent)
            back = b""
            while len(back) < len(sent):
                back += client.recv(65_536)
            proxy.delay_ms = 0  # a shorter delay may not overtake
            client.shutdown(socket.SHUT_WR)
            thread.join(5)
            assert proxy.n_bytes == 2 * len(sent)
        assert bytes(got) == back == sent and not thread.is_alive()
