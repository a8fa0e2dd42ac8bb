"""A private stack of an earlier commit that goes over to this one while streams run: `manage.py drill rolling-upgrade`.

The earlier code is really checked out, into a working tree of its own, and starts the stack. The upgrade is what an
operator does: the new code in its place (`git checkout`), then `manage.py upgrade`. Needs git and the history.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import redis

from benchmarks.stack import ROOT, BenchStack, bench_stack
from billing.money import Rates, request_cost
from controlplane import ids
from infra.drills.catalog import Drill
from infra.drills.load import Target
from infra.drills.probe import EVERY_S
from infra.drills.run import Result, asks_of, run
from infra.drills.scene import DrillError, Scene
from infra.drills.verdict import Answer, Books, Row
from infra.local.environment import SAVED
from infra.local.privatefile import read_json

MODEL: Final = "upgrade"
SPARE_SLOTS: Final = 16
OUTLASTS: Final = 5.0
FAST_STEP_MS, SLOW_STEP_MS = 20.0, 110.0
WITHIN_S: Final = 60.0  # of a machine, once its successor is ordered
_BOOKED_WITHIN_S: Final = 60.0
_SERVES_WITHIN_S: Final = 120.0
_GIT_WITHIN_S: Final = 120.0


def before_last_migration() -> str:
    """The newest commit that has not this one's schema."""
    last = _git("log", "-1", "--format=%H", "--", "*/migrations/0*.py")
    return f"{last}^" if last else "HEAD~1"


def drill_upgrade(
    drill: Drill, revision: str, *, n_streams: int, n_tokens: int, say: Callable[[str], None]
) -> tuple[Result, dict[str, Any]]:
    """One run, and what ran. Raises DrillError where the earlier version cannot be had or does not start."""
    old, new = _git("rev-parse", "--short", revision), _git("rev-parse", "--short", "HEAD")
    n_migrations = len(
        _git("diff", "--name-only", "--diff-filter=A", old, new, "--", "*/migrations/0*.py").split()
    )
    facts = {
        "from": old,
        "to": new,
        "n_migrations": n_migrations,
        "n_streams": n_streams,
        "n_tokens": n_tokens,
    }
    with _checked_out(old) as tree:
        say(f"a private stack of {old}, {n_migrations} migrations behind {new}")
        started_s = time.monotonic()
        with bench_stack("toy", root=tree) as stack:
            step_ms = facts["step_ms"] = step_ms_for(time.monotonic() - started_s, n_tokens)
            return _run(drill, stack, new, n_streams, n_tokens, step_ms, say), facts


def step_ms_for(start_s: float, n_tokens: int) -> float:
    """The engine's pace at which streams outlast the upgrade on this computer, told by how long a start took on it: an
    upgrade took twice to four times that where other work kept two cores busy, and less where none did."""
    return round(min(max(1000 * OUTLASTS * start_s / n_tokens, FAST_STEP_MS), SLOW_STEP_MS), 1)


def _run(
    drill: Drill,
    stack: BenchStack,
    new: str,
    n_streams: int,
    n_tokens: int,
    step_ms: float,
    say: Callable[[str], None],
) -> Result:
    profile = {"max_num_seqs": n_streams + SPARE_SLOTS, "toy_step_ms": step_ms, "max_model_len": 32_768}
    knobs = [word for name, value in profile.items() for word in ("--profile", f"{name}={value}")]
    stack.manage("deploy", MODEL, "--model", "toy", "--min", "1", "--slo", "batch", *knobs)
    stack.manage("ask", "ready?", "--model", MODEL)
    key = stack.manage_json("create_key", "upgrade", "--budget", "1000")
    with psycopg.connect(stack.dsn("operator"), connect_timeout=5, autocommit=True) as connection:
        row = connection.execute("SELECT id FROM deployments_deployment WHERE name = %s", [MODEL]).fetchone()
    assert row is not None
    url = str((read_json(stack.var / SAVED) or {})["CORRAL_REDIS_URL"])
    scene = Scene(stack.var, url, "c0", row[0].hex, say)
    try:
        scene.wait(lambda: len(scene.routed()) == 1, "the deployment serves", _SERVES_WITHIN_S)
        scene.upgrade = lambda: _upgrade(stack, new, say)
        target = Target("127.0.0.1", stack.port, key["api_key"], model=MODEL, reconnects=drill.reconnects)
        asks = asks_of(drill, n_streams=n_streams, n_tokens=n_tokens)
        books = _Ledger(stack, scene, str(key["id"]))
        return run(drill, scene, target, asks, books.read)
    finally:
        scene.close()


def _upgrade(stack: BenchStack, new: str, say: Callable[[str], None]) -> dict[str, str]:
    """As an operator: the code, then the command of the new code."""
    _git("checkout", "--quiet", "--detach", new, cwd=stack.root)
    done = subprocess.run(
        [sys.executable, "manage.py", "upgrade", "--within-s", f"{WITHIN_S:g}"],
        cwd=stack.root, env=dict(stack.env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise DrillError(f"manage.py upgrade: {done.stderr.strip()[-1500:]}")
    steps = [
        line.strip() for line in done.stderr.splitlines() if line.startswith("  ")
    ]  # the rest are log lines
    for step in steps:
        say(step)
    return {"steps": "; ".join(steps)}


_BILLS: Final = """
SELECT u.request_id, u.n_prompt_tokens, u.n_cached_tokens, u.n_completion_tokens, u.attempts, u.cost_nano,
    p.input_nano_per_million, p.cached_nano_per_million, p.output_nano_per_million
FROM billing_usageevent u JOIN billing_priceversion p ON p.id = u.price_version_id
WHERE u.api_key_id = %s ORDER BY u.request_id
"""


def bill_of(values: Sequence[Any]) -> Row:
    """A line of `_BILLS`: what was booked, by whichever version, and what its counts cost at the price of admission.

    A free request would show nothing: DrillError.
    """
    request, n_prompt, n_cached, n_completion, attempts, cost_nano, *each = values
    due = request_cost(Rates(*each), n_prompt=n_prompt, n_cached=n_cached, n_completion=n_completion)
    if not due:
        raise DrillError(
            "requests of this stack cost nothing, so that nobody could say whether they are billed right"
        )
    return Row(request.hex, n_prompt, n_completion, attempts, cost_nano, due)


class _Ledger:
    """Bills and counters read past Django, whose models are of one version only."""

    def __init__(self, stack: BenchStack, scene: Scene, key_text: str) -> None:
        self._dsn, self._scene = stack.dsn("operator"), scene
        self._key = ids.from_text(ids.Prefix.API_KEY, key_text)
        self._seen: set[str] = set()

    def read(self, answers: Sequence[Answer], judges: bool) -> Books:
        """See run.run. Waits until what was answered is booked and nothing is held."""
        wanted = {answer.request for answer in answers if answer.finished}
        deadline_s = time.monotonic() + _BOOKED_WITHIN_S
        while True:
            books = Books(rows=self._rows(), left=self._left())
            complete = {row.request for row in books.rows} >= wanted and not books.left
            if complete or time.monotonic() > deadline_s:
                break
            time.sleep(EVERY_S)
        time.sleep(1.5)  # a second witness that booked again would have done so
        books = Books(rows=self._rows(), left=self._left())
        self._seen |= {row.request for row in books.rows}
        return books

    def _rows(self) -> tuple[Row, ...]:
        with psycopg.connect(self._dsn, connect_timeout=5) as connection:
            rows = connection.execute(_BILLS, [self._key]).fetchall()
        return tuple(bill_of(values) for values in rows if values[0].hex not in self._seen)

    def _left(self) -> tuple[str, ...]:
        keys, found = self._scene.keys, []
        try:
            for name in sorted(self._scene.redis.scan_iter(f"{keys.prefix}lim:*", count=1000)):
                conc, held = self._scene.redis.hmget(name, "conc", "held")
                if float(conc or 0) or float(held or 0):
                    found.append(f"{name.decode()}: {conc!r} in flight, {held!r} held after the end")
        except redis.RedisError as error:
            found.append(f"Redis does not answer: {type(error).__name__}")
        return tuple(found)


@contextmanager
def _checked_out(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="corral-release-") as directory:
        tree = Path(directory) / "corral"
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str, cwd: Path = ROOT) -> str:
    """What git says. DrillError where there is no git, no repository, or no such revision."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
            timeout=_GIT_WITHIN_S,
            check=False,
        )
    except FileNotFoundError:
        raise DrillError("this drill needs git, to check an earlier version out") from None
    if done.returncode:
        raise DrillError(
            f"git {words[0]}: {done.stderr.strip()[-300:]} (the drill needs the repository's history)"
        )
    return done.stdout.strip()
