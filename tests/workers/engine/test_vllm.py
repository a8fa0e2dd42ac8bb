"""The vLLM adapter on the real engine (CPU, tiny model); the checks themselves are in vllm_scenarios.py."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.workers.engine import vllm_scenarios
from tests.workers.waiting import until
from workers.agent.zygote_client import Zygote
from workers.agent.zygote_protocol import ChildExit, ForkSpec
from workers.modelcache.tiny import make_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

SCENARIOS = "tests.workers.engine.vllm_scenarios"


class Lab:
    """A zygote with vLLM for this module, and the tiny model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model_dir = make_tiny_model(directory / "tiny")
        self.zygote_pid = 0

    def run(self, entry: str, model_dir: Path | None = None) -> tuple[ChildExit, str]:
        """Run a scenario to its end; how it ended, and its log."""
        return asyncio.run(self._run(entry, model_dir or self.model_dir))

    async def zygote(self) -> Zygote:
        """A connection to this lab's zygote, started if need be."""
        zygote = await Zygote.start(
            self.directory / "z.sock",
            log=self.directory / "zygote.log",
            preimport=(SCENARIOS,),
            orphan_s=60.0,
        )
        self.zygote_pid = zygote.pid
        assert "vllm" in zygote.engines, zygote.missing
        return zygote

    async def _run(self, entry: str, model_dir: Path) -> tuple[ChildExit, str]:
        zygote = await self.zygote()
        log = self.directory / f"{entry}.log"
        argument: dict[str, object] = {"model_dir": str(model_dir), "file": str(self.directory / "results")}
        spec = ForkSpec(entry=f"{SCENARIOS}:{entry}", tag=entry, argument=argument, log=str(log))
        pid = await zygote.fork(spec)
        async with asyncio.timeout(800):
            async for ended in zygote.exits():
                if ended.pid == pid:
                    break
        await zygote.close()
        return ended, log.read_text()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("vllm"))
    yield lab
    if lab.zygote_pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(lab.zygote_pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def results(lab: Lab) -> dict[str, str]:
    ended, log = lab.run("run")
    assert ended.code == 0, log[-5000:]
    return json.loads((lab.directory / "results").read_text())


@pytest.mark.parametrize("name", vllm_scenarios.checks())
def test_engine(results: dict[str, str], name: str) -> None:
    assert results[name] == "ok"


def test_an_engine_is_not_made_beside_another_thread(lab: Lab) -> None:
    ended, log = lab.run("run_with_second_thread")
    assert ended.code == 0, log[-5000:]
    assert "EngineCore" not in log


def test_damaged_weights_fail_the_constructor(lab: Lab) -> None:
    broken = Path(shutil.copytree(lab.model_dir, lab.directory / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ended, log = lab.run("run_with_bad_model", broken)
    assert ended.code == 0, log[-5000:]
    assert "refused: " in log


async def test_when_the_zygote_dies_the_core_dies_with_its_front(lab: Lab) -> None:
    """Nobody is left to clean up: front and core must go by themselves."""
    zygote = await lab.zygote()
    file = lab.directory / "core_pid"
    argument: dict[str, object] = {"model_dir": str(lab.model_dir), "file": str(file)}
    await zygote.fork(ForkSpec(entry=f"{SCENARIOS}:run_and_wait", tag="wait", argument=argument))
    async with asyncio.timeout(60):
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.05)
    core = Path("/proc") / file.read_text()
    assert core.exists()
    os.kill(zygote.pid, signal.SIGKILL)
    await until(lambda: not core.exists() or " Z " in (core / "stat").read_text(), "the core is gone")
    await zygote.close()
