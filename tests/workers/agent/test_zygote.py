"""The zygote: forks cleanly, outlives its agent, takes everything with it, and never forks with a second
thread.

The last tests hold the riskiest joint together: zygote, Celery front and engine core (benchmarks/joint.py).
"""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks import joint
from tests.workers.waiting import until
from workers.agent import zygote_client
from workers.agent.zygote_client import Zygote, ZygoteGone, ZygoteRefused
from workers.agent.zygote_protocol import ChildExit, ForkSpec
from workers.engine.base import EngineProfile
from workers.engine.forking import thread_names

CHILDREN = "tests.workers.agent.zygote_children"


@asynccontextmanager
async def a_zygote(directory: Path, **options) -> AsyncIterator[Zygote]:
    """A toy zygote, ended afterwards whatever happened to it."""
    options = {"engines": ("toy",), "orphan_s": 30.0, "preimport": (CHILDREN,), **options}
    zygote = await Zygote.start(directory / "z.sock", log=directory / "zygote.log", **options)
    try:
        yield zygote
    finally:
        await zygote.close()
        if alive(zygote.pid):
            os.kill(zygote.pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spec(entry: str, tag: str = "r1", **argument) -> ForkSpec:
    return ForkSpec(entry=f"{CHILDREN}:{entry}", tag=tag, argument=argument)


async def next_exit(zygote: Zygote) -> ChildExit:
    async with asyncio.timeout(15):
        exits = zygote.exits()
        ended = await anext(exits)
        await exits.aclose()
        return ended


async def waiting_child(zygote: Zygote, tmp_path: Path, tag: str = "r1", **argument) -> int:
    """A child that has begun to wait; the pid it wrote (its own, or its grandchild's)."""
    file = tmp_path / f"{tag}.pid"
    await zygote.fork(spec("wait", tag, file=str(file), **argument))
    await until(lambda: file.exists() and file.read_text(), "the child waits")
    return int(file.read_text())


async def test_a_child_is_a_clean_process_of_its_own(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        pid = await zygote.fork(
            ForkSpec(
                entry=f"{CHILDREN}:tell",
                tag="r1",
                argument={"file": str(tmp_path / "facts"), "code": 7, "nested": {"a": [1]}},
                env={"CORRAL_TEST": "yes"},
                log=str(tmp_path / "child.log"),
            )
        )
        ended = await next_exit(zygote)
        assert (ended.pid, ended.tag, ended.code, ended.signum) == (pid, "r1", 7, None)
        assert ended.describe() == "exited with code 7"
        assert ended.max_rss_kb > 1000
        facts = json.loads((tmp_path / "facts").read_text())
        assert facts["pid"] == facts["sid"] == pid
        assert facts["ppid"] == zygote.pid
        assert facts["env"] == "yes"
        assert facts["argument"]["nested"] == {"a": [1]}
        assert facts["default_signals"] == [True, True, True]
        assert facts["sockets"] == []
        assert facts["threads"] == 1
        assert set((tmp_path / "child.log").read_text().split("\n")) >= {"said on stdout", "said on stderr"}
        assert thread_names(zygote.pid) == ["corral-zygote"]


async def test_a_failing_entry_ends_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        for entry in (f"{CHILDREN}:fail", "no_such_module:x", "json:no_such_function"):
            await zygote.fork(ForkSpec(entry=entry, tag="r1", log=str(tmp_path / "child.log")))
            assert (await next_exit(zygote)).code == 1
    log = (tmp_path / "child.log").read_text()
    assert all(s in log for s in ("made to fail", "no_such_module", "no_such_function"))


async def test_a_log_that_cannot_be_opened_fails_the_child_alone(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        log = str(tmp_path / "no" / "such" / "directory")
        await zygote.fork(ForkSpec(entry=f"{CHILDREN}:wait", tag="r1", log=log))
        assert (await next_exit(zygote)).code == 1
        assert log in (tmp_path / "zygote.log").read_text()


async def test_a_killed_child_is_reported_with_its_signal(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        pid = await zygote.fork(spec("wait"))
        await zygote.kill(pid, signal.SIGKILL)
        ended = await next_exit(zygote)
        assert (ended.code, ended.signum, ended.describe()) == (None, signal.SIGKILL, "killed by SIGKILL")


async def test_a_signal_right_after_the_fork_hits_the_child_alone(tmp_path: Path) -> None:
    """Before it has shed the zygote's handlers, it would take SIGTERM for an order to end all replicas."""
    async with a_zygote(tmp_path) as zygote:
        bystander = await waiting_child(zygote, tmp_path, "bystander")
        for _ in range(30):
            pid = await zygote.fork(spec("wait"))
            await zygote.kill(pid, signal.SIGTERM)
            assert (await next_exit(zygote)).signum == signal.SIGTERM
        assert alive(bystander)


async def test_sigterm_ends_the_zygote_and_its_replicas(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        pid = await waiting_child(zygote, tmp_path)
        os.kill(zygote.pid, signal.SIGTERM)
        await until(lambda: not alive(pid) and not alive(zygote.pid), "both are gone")
        assert [alive(pid), alive(zygote.pid)] == [False, False]


async def test_only_living_children_can_be_killed(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    async with a_zygote(tmp_path) as zygote:
        with pytest.raises(ZygoteRefused, match=str(stranger.pid)):
            await zygote.kill(stranger.pid, signal.SIGKILL)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


async def test_a_tag_runs_once(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        pid = await zygote.fork(spec("wait"))
        with pytest.raises(ZygoteRefused, match="r1"):
            await zygote.fork(spec("wait"))
        await zygote.kill(pid, signal.SIGKILL)
        await next_exit(zygote)
        await zygote.fork(spec("wait"))


async def test_many_forks_at_once_are_told_apart(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        specs = [spec("tell", f"r{i}", file=str(tmp_path / f"f{i}"), code=i) for i in range(20)]
        pids = await asyncio.gather(*(zygote.fork(s) for s in specs))
        ended = [await next_exit(zygote) for _ in specs]
    assert {(e.pid, e.tag, e.code) for e in ended} == {(p, f"r{i}", i) for i, p in enumerate(pids)}


async def test_it_refuses_to_fork_with_a_second_thread(tmp_path: Path) -> None:
    async with a_zygote(tmp_path, preimport=("tests.workers.agent.starts_a_thread",)) as zygote:
        with pytest.raises(ZygoteRefused, match="single-threaded"):
            await zygote.fork(spec("wait"))


async def test_replicas_outlive_the_agent_and_are_adopted(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as first:
        pid = await waiting_child(first, tmp_path)
        dying = await waiting_child(first, tmp_path, "r2")
        await first.close()
        os.kill(dying, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{dying}").exists(), "the zygote has reaped it")
        async with a_zygote(tmp_path) as second:  # start() finds the living one
            assert second.pid == first.pid
            assert [(c.pid, c.tag) for c in second.adopted] == [(pid, "r1")]
            missed = await next_exit(second)
            assert (missed.pid, missed.tag, missed.signum) == (dying, "r2", signal.SIGKILL)


async def test_an_exit_that_was_noted_is_not_told_again(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as first:
        exits = first.exits()
        for tag in ("r1", "r2"):
            await first.fork(spec("tell", tag, file=str(tmp_path / tag)))
            await anext(exits)  # asking for the next one notes the one before
        await exits.aclose()
        await first.close()
        async with a_zygote(tmp_path) as second:
            assert (await next_exit(second)).tag == "r2"


async def test_a_new_agent_takes_over_from_one_that_still_lives(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as first:
        second = await Zygote.connect(tmp_path / "z.sock")
        with pytest.raises(ZygoteGone):
            await first.fork(spec("wait"))
        await second.fork(spec("wait"))
        await second.close()


async def test_when_the_zygote_dies_its_replicas_die(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        pid = await waiting_child(zygote, tmp_path, stubborn=True)
        os.kill(zygote.pid, signal.SIGKILL)
        with pytest.raises(ZygoteGone):
            await next_exit(zygote)
        await until(lambda: not alive(pid), "the replica is gone")
        with pytest.raises(ZygoteGone):
            await zygote.fork(spec("wait"))


async def test_a_question_the_zygote_cannot_answer_any_more_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_zygote(tmp_path) as zygote:
        os.kill(zygote.pid, signal.SIGSTOP)
        monkeypatch.setattr(zygote_client, "_ANSWER_S", 0.05)
        with pytest.raises(ZygoteGone, match="not answered"):
            await zygote.fork(spec("wait"))
        monkeypatch.undo()
        question = asyncio.create_task(zygote.fork(spec("wait", "r2")))
        await asyncio.sleep(0)
        os.kill(zygote.pid, signal.SIGKILL)
        with pytest.raises(ZygoteGone, match="ended"):
            await question


@pytest.mark.parametrize("family", ["session", "strangers"])
async def test_what_a_replica_started_ends_with_it(tmp_path: Path, family: str) -> None:
    async with a_zygote(tmp_path) as zygote:
        grandchild = await waiting_child(zygote, tmp_path, family=family)
        (pid,) = (c.pid for c in (await Zygote.connect(tmp_path / "z.sock")).adopted)
        os.kill(pid, signal.SIGKILL)
        # Gone entirely, not a zombie: the zygote is its reaper.
        await until(lambda: not Path(f"/proc/{grandchild}").exists(), "the grandchild is gone")
        assert alive(zygote.pid)


async def test_alone_for_too_long_it_ends_everything(tmp_path: Path) -> None:
    async with a_zygote(tmp_path, orphan_s=0.2) as zygote:
        pid = await waiting_child(zygote, tmp_path)
        await zygote.close()
        await until(lambda: not alive(pid), "the replica is gone")
        await until(lambda: not (tmp_path / "z.sock").exists(), "the zygote has taken its socket away")
        await until(lambda: not alive(zygote.pid), "the zygote is gone")
        assert not alive(pid)


async def test_shutdown_asks_first_and_kills_after_the_grace(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        polite = await waiting_child(zygote, tmp_path, "r1")
        stubborn = await waiting_child(zygote, tmp_path, "r2", stubborn=True)
        await zygote.shutdown(grace_s=0.3)
        assert not alive(polite)
        assert not alive(stubborn)
        assert not alive(zygote.pid)
        with pytest.raises(ZygoteGone):
            await zygote.fork(spec("wait"))


async def test_a_zygote_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ZygoteGone, match="no_such_module_anywhere"):
        async with a_zygote(tmp_path, preimport=("no_such_module_anywhere",)):
            pass


async def test_a_socket_deeper_than_the_kernel_allows_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with a_zygote(deep) as zygote:
        await zygote.fork(spec("tell", file=str(tmp_path / "facts")))
        assert (await next_exit(zygote)).code == 0


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as first:
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: not alive(first.pid), "it is dead")
        assert (tmp_path / "z.sock").exists()
        async with a_zygote(tmp_path) as second:
            assert second.pid != first.pid


async def test_nonsense_is_answered_and_survived(tmp_path: Path) -> None:
    async with a_zygote(tmp_path) as zygote:
        zygote._writer.write(b'{"op": 3}\nnot json\n{"op":"dance","seq":999}\n')
        await zygote.fork(spec("tell", file=str(tmp_path / "facts")))
        assert (await next_exit(zygote)).code == 0


async def test_the_joint_holds_with_the_toy_engine(tmp_path: Path, redis_url: str) -> None:
    profile = EngineProfile(engine="toy", max_num_seqs=512, max_model_len=100_000, toy_step_ms=5.0)
    figures = await joint.measure(redis_url, tmp_path, profile)
    assert figures.n_in_flight == 512
    hold_together(figures, n=512)


@pytest.mark.engine
@pytest.mark.timeout(240)
async def test_the_joint_holds_with_the_real_engine(tmp_path: Path, redis_url: str) -> None:
    from workers.modelcache.tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "tiny")
    profile = EngineProfile(max_model_len=4096, max_num_seqs=512, kv_cache_bytes=512 << 20)
    figures = await joint.measure(redis_url, tmp_path, profile, str(model))
    hold_together(figures, n=512)
    # At the fork of the core: our one thread and libzmq's, which run no Python.
    (names,) = figures.threads_at_core_fork
    assert [n for n in names if not n.startswith("ZMQbg/")] == ["corral-replica"]


def hold_together(figures: joint.JointFigures, n: int) -> None:
    assert figures.zygote_threads == ["corral-zygote"]
    assert figures.n_in_flight == figures.n_active_seen == n
    assert figures.n_served == n
    assert figures.n_distinct > 0.9 * n  # streams were not mixed up
    assert figures.n_revoked_running == n
    assert figures.n_revoked_queued_served == 0
    assert figures.n_running_at_sigterm == figures.n_requeued == 64
    assert figures.n_running_at_sigkill == figures.n_unacked_after_kill == 64
    assert figures.n_lost == 0
    assert figures.exits == ["front-1 exited with code 0", "front-2 killed by SIGKILL"]
