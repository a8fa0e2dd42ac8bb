"""Configuration of the GPU side: what the agent reads once, what it hands to a front, and where files lie.

The only reader of the environment in workers/. The agent builds `AgentConfig` at start; a front gets
`FrontConfig` as one JSON document from its agent through the zygote (it holds the machine's Redis password:
never to be logged or written to disk by the front).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from workers.contract import ReplicaSpec
from workers.keys import DEFAULT_CELL, RETENTION_MS, USAGE_STREAM_MAX, MachineKeys

EXIT_OK: Final = 0
EXIT_FAILED: Final = 3  # the outcome file says why


class ConfigError(ValueError):
    """A knob is missing or out of range; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class MachineDirs:
    """Files of one machine under its data directory. `run` and `spool` survive an agent's restart."""

    root: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def spool(self) -> Path:
        return self.root / "spool"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def credentials(self) -> Path:
        return self.root / "credentials.json"

    @property
    def enrolling(self) -> Path:
        """What an enrolment was begun with, until its answer is in `credentials`."""
        return self.root / "enrolling.json"

    @property
    def password(self) -> Path:
        """The machine's Redis password, once the one of its enrolment was replaced."""
        return self.root / "redis-password"

    @property
    def notice(self) -> Path:
        """Written by whoever takes the machine away (workers/agent/notice.py)."""
        return self.root / "notice.json"

    def record(self, replica_id: str) -> Path:
        """The agent's note of a replica it started: pid, start time, phase."""
        return self.run / f"{replica_id}.json"

    def log(self, replica_id: str) -> Path:
        return self.logs / f"{replica_id}.log"

    def outcome(self, replica_id: str) -> Path:
        """Written by a front that fails: code and sentence."""
        return self.run / f"{replica_id}.outcome"

    def beat(self, replica_id: str) -> Path:
        """Rewritten by a live front every beat (workers/beat.py)."""
        return self.run / f"{replica_id}.beat"

    def spool_file(self, replica_id: str) -> Path:
        return self.spool / f"{replica_id}.spool"

    def create(self) -> None:
        for path in (self.root, self.run, self.spool, self.logs):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)


class ServeTuning(msgspec.Struct, frozen=True, kw_only=True):
    """Knobs of serving with the reason for each default."""

    # A plain answer is flushed after so many tokens or so long: what a crash loses of it is made anew in a second or
    # two, and most answers need one flush only.
    coalesce_tokens: int = 64
    coalesce_s: float = 1.0
    # Beyond this a prompt is tokenised off the loop: 8 KB cost some 4 ms, about half an engine step.
    inline_prompt_bytes: int = 8192
    # Flushes to one gateway are so far apart, shorter than an engine step; what gathers in between leaves together,
    # which is what keeps an engine that is faster than its readers cheap, and a Redis which is slow because it is busy
    # sees no more than 250 flushes a second. With an end in them, which somebody waits for, flushes leave at once while
    # so few are under way. In any case no more are than the last number.
    flush_spacing_s: float = 0.004
    flush_depth_ends: int = 3
    flush_depth_far: int = 32
    # Entries of one flush: bounds what one script call costs Redis (some 5 µs each).
    flush_max_entries: int = 512
    # Tokens that may wait for one gateway while Redis is slow or away; beyond it generations are held back.
    max_pending_tokens: int = 32_768
    # A flush or claim refused for other reasons than absence is tried so often before its requests are given
    # up.
    max_refusals: int = 5
    beat_s: float = 0.5
    # Long enough to outlive a Redis hiccup; observers judge by `seq`, not by expiry.
    heartbeat_life_ms: int = 10_000
    # Usage not acknowledged for so long is announced again, then at doubling intervals up to the last.
    republish_after_s: float = 10.0
    republish_max_s: float = 600.0
    republish_per_beat: int = 100
    # A usage record is some 350 bytes: 8 MiB are 24,000 requests that intake has not booked.
    spool_max_bytes: int = 8 << 20
    # An engine with work that has not stepped for max(this, 4 × its usual step) is hung. It is looked at every half
    # second and taken over in some 0.3 s: so the next token comes within 5 s of a silent death.
    hang_s: float = 4.0
    # An answer whose money is used up waits so long for more (others may return what they hold, or the gateway has
    # died and nobody answers); then it ends with `budget`. It keeps its slot meanwhile.
    budget_patience_s: float = 5.0
    # A request for an adapter that the machine was not told of yet (it was registered a moment ago), or that waits for
    # a place in the engine's memory, waits so long for it.
    adapter_patience_s: float = 30.0
    journal_life_ms: int = RETENTION_MS
    # Of a project that keeps nothing: only as long as its gateway may need to fill a gap of the running answer.
    zero_retention_journal_life_ms: int = 30_000
    usage_stream_max: int = USAGE_STREAM_MAX


class FrontConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a replica front is told. `model_dir` is empty for the toy engine."""

    cell: str
    machine: str
    redis_url: str
    var_dir: str
    spec: ReplicaSpec
    model_dir: str = ""
    # The machine's model store, which adapters come from and go to.
    model_cache: str = ""
    model_cache_bytes: int | None = None
    # Its weights are still being fetched: load them as they come (workers/modelcache/arrival.py).
    arriving: bool = False
    # Milliseconds per stage before the fork, e.g. {"fetch": 12}.
    stages_ms: dict[str, int] = {}
    tuning: ServeTuning = ServeTuning()
    # Opens what was sealed for this machine (workers/sealed.py).
    box_key: str = ""

    @property
    def keys(self) -> MachineKeys:
        return MachineKeys(self.cell, self.machine)

    @property
    def dirs(self) -> MachineDirs:
        return MachineDirs(Path(self.var_dir))

    @property
    def replica(self) -> str:
        return self.spec.replica


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What `python -m workers.agent` was told. `proof` is single-use and worthless once enrolled."""

    machine: str
    enrol_url: str
    var_dir: Path
    model_cache: Path
    cell: str = DEFAULT_CELL
    # host:port of the cell's Redis when it differs from what enrolment says (a tunnel); else empty.
    redis: str = ""
    engine: str = "vllm"
    proof: str = field(default="", repr=False)
    # Prefix of the tags that an EC2 machine reads its id from; empty where the id was given.
    tag_prefix: str = ""
    model_cache_bytes: int | None = None  # what model versions may take of the disk; None: what it has
    # host and port at which siblings fetch model versions; None: they do not. Host `imds`: this instance's private one.
    model_share: tuple[str, int] | None = None

    @classmethod
    def from_args(cls, argv: Sequence[str], env: Mapping[str, str] = os.environ) -> AgentConfig:
        """Options win over environment; the proof comes only from CORRAL_ENROL_PROOF (never on a command
        line, which every user of the machine can read). ConfigError names what is wrong.
        """
        parser = argparse.ArgumentParser(prog="python -m workers.agent", description="Corral machine agent")
        parser.add_argument("--machine-id", default=env.get("CORRAL_MACHINE_ID", ""))
        parser.add_argument("--enrol-url", default=env.get("CORRAL_ENROL_URL", ""))
        parser.add_argument("--var", default=env.get("CORRAL_MACHINE_VAR", ""))
        parser.add_argument("--model-cache", default=env.get("CORRAL_MODEL_CACHE", ""))
        parser.add_argument("--model-cache-gib", default=env.get("CORRAL_MODEL_CACHE_GIB", ""))
        parser.add_argument("--model-share", default=env.get("CORRAL_MODEL_SHARE", ""), help="host:port")
        parser.add_argument("--cell", default=env.get("CORRAL_CELL", DEFAULT_CELL))
        parser.add_argument("--redis", default=env.get("CORRAL_MACHINE_REDIS", ""), help="host:port")
        parser.add_argument(
            "--engine", default=env.get("CORRAL_ENGINE", "vllm"), choices=("vllm", "toy", "upstream")
        )
        options = parser.parse_args(list(argv))
        is_ec2 = options.machine_id == "imds"
        if not options.machine_id or not options.machine_id.isalnum():
            raise ConfigError(
                "--machine-id: give the id under which this machine was launched (32 hex digits), or imds on EC2"
            )
        if urlsplit(options.enrol_url).scheme not in ("http", "https"):
            raise ConfigError("--enrol-url: give the http(s) URL of the control plane's enrolment endpoint")
        if not options.var:
            raise ConfigError("--var: give a directory that this machine may write, kept across restarts")
        try:
            gib = float(options.model_cache_gib or "inf")
        except ValueError:
            gib = 0.0
        if not gib > 0:
            raise ConfigError(f"--model-cache-gib {options.model_cache_gib!r}: give GiB above 0, or nothing")
        var_dir = Path(options.var).absolute()
        return cls(
            machine=options.machine_id,
            enrol_url=options.enrol_url,
            var_dir=var_dir,
            model_cache=Path(options.model_cache).absolute() if options.model_cache else var_dir / "models",
            cell=options.cell,
            redis=options.redis,
            engine=options.engine,
            proof=env.get("CORRAL_ENROL_PROOF", ""),
            tag_prefix=env.get("CORRAL_TAG_PREFIX", "corral") if is_ec2 else "",
            model_cache_bytes=None if math.isinf(gib) else int(gib * 2**30),
            model_share=_share(options.model_share),
        )

    @property
    def dirs(self) -> MachineDirs:
        return MachineDirs(self.var_dir)


def _share(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not host or host == "*" or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"--model-share {text!r}: give the address siblings reach this machine at, host:port, or imds:port on EC2"
        )
    return host, int(port)
