"""The surface around generation: probes, metrics, CORS, request ids, the graceful end."""

import asyncio

import httpx
import pytest

from tests.controlplane.gateway.harness import CHAT, Job, Machine, Running, running, text_of, until


async def test_probes(gw: Running) -> None:
    assert (await gw.http.get("/healthz")).json() == {"status": "ok"}
    assert (await gw.http.get("/readyz")).json() == {"status": "ready"}
    assert (await gw.http.head("/healthz")).status_code == 200
    gw.gateway.draining = True
    response = await gw.http.get("/readyz")
    assert (response.status_code, response.json()["failing"]) == (503, ["draining"])


async def test_metrics_count_outcomes_by_code(gw: Running, machine: Machine) -> None:
    await gw.post(CHAT)
    await gw.post({**CHAT, "temperature": 9})
    text = (await gw.http.get("/metrics")).text
    assert 'corral_gateway_requests_total{code="",endpoint="chat",gateway="gw-test",status="200"} 1.0' in text
    assert 'code="invalid_value",endpoint="chat",gateway="gw-test",status="400"} 1.0' in text
    assert 'corral_gateway_tokens_total{gateway="gw-test",kind="completion"} 3.0' in text
    assert 'corral_gateway_ttft_seconds_count{gateway="gw-test"} 1.0' in text
    assert 'corral_gateway_redis_up{gateway="gw-test"} 1.0' in text
    assert "Hello" not in text


async def test_console_may_call_from_the_browser(gw: Running, machine: Machine) -> None:
    origin = {"origin": "http://console.test"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = await gw.http.options("/v1/chat/completions", headers={**origin, **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "http://console.test"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for body in (CHAT, {**CHAT, "stream": True}, {**CHAT, "temperature": 9}):
        response = await gw.post(body, **origin)
        assert response.headers["access-control-allow-origin"] == "http://console.test"
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "origin"


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "http://console.test.evil"])
async def test_other_origins_get_no_permission(gw: Running, machine: Machine, origin: str) -> None:
    preflight = await gw.http.options(
        "/v1/chat/completions", headers={"origin": origin, "access-control-request-method": "POST"}
    )
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in (await gw.post(CHAT, origin=origin)).headers


async def test_request_ids_are_unique_and_on_every_response(gw: Running, machine: Machine) -> None:
    responses = [await gw.post(CHAT), await gw.post(b"{"), await gw.http.get("/nowhere")]
    ids = [response.headers["x-request-id"] for response in responses]
    assert len(set(ids)) == 3
    assert all(len(i) == 36 and i.startswith("req_") for i in ids)


async def test_too_many_requests_at_once_are_shed(gw: Running) -> None:
    gw.gateway.app.n_in_flight = gw.gateway.config.max_in_flight
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "gateway_overloaded")


async def test_running_stream_may_finish_within_the_grace(redis_url: str) -> None:
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("before ")
        await go.wait()
        await job.emit("after")
        await job.finish()

    async with running(redis_url, shutdown_grace_s=10) as gw:
        machine = Machine(redis_url)
        machine.behaviour = wait
        await machine.start()
        async with gw.stream(CHAT) as events:
            await events.next()
            await events.next()
            gw.server.stop()
            await until(lambda: gw.gateway.draining)
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient() as another:
                    await another.get(gw.url + "/healthz")
            go.set()
            chunks = await events.rest()
            assert text_of(chunks) == "after"
            assert chunks[-1] == "[DONE]"
        await machine.stop()


async def test_beyond_the_grace_streams_may_be_collected_elsewhere_and_plain_requests_are_cancelled(
    redis_url: str,
) -> None:
    async def endless(job: Job) -> None:
        await job.emit("before ")
        await job.cancelled.wait()

    async with running(redis_url, shutdown_grace_s=0.2) as gw:
        machine = Machine(redis_url)
        machine.behaviour = endless
        await machine.start()
        async with gw.stream(CHAT) as events:
            await events.next()
            await events.next()
            plain = asyncio.ensure_future(gw.post(CHAT))
            await until(lambda: len(machine.jobs) == 2)
            gw.server.stop()
            assert (await events.rest())[-1]["error"]["code"] == "gateway_stopping"
            assert (await plain).json()["error"]["code"] == "gateway_stopping"
        await until(machine.jobs[1].cancelled.is_set)
        assert not machine.jobs[0].cancelled.is_set()
        await machine.stop()
