"""Why a replica could not start or go on: stable codes, a sentence, and the file that tells the agent.

Codes: invalid_profile, engine_missing, bad_weights, out_of_memory, engine_died, engine_hung, loop_hung,
redis_refused, consumer_died, start_failed. The agent adds the model store's, and start_timeout, fork_failed,
fetch_failed, front_hung, killed, crashed, lost, no_room, zygote_gone. Control shows them to tenants.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from workers.engine.base import EngineDead, ProfileError
from workers.redis_client import RedisError

_MAX_MESSAGE: Final = 500
_LOG_TAIL_BYTES: Final = 65_536
_MEMORY: Final = re.compile(
    r"out of memory|cannot allocate memory|not enough memory|no available memory|OutOfMemoryError|MemoryError"
    r"|larger than the (?:available|maximum)|less than (?:desired|requested)|KV cache is needed",
    re.IGNORECASE,
)
_WEIGHTS: Final = re.compile(
    r"safetensor|incomplete metadata|header ?too|invalid header|state_dict|config\.json|tokenizer"
    r"|size mismatch|must match the size|no such file|not a valid|weights|architectures",
    re.IGNORECASE,
)
# A frame of a traceback: whatever the exception says, weights were being copied into the model.
_LOADING_FRAME: Final = re.compile(r"\bin \w*(?:load_weights|weight_loader|load_\w+_weight)\b")


class ReplicaFailure(Exception):  # noqa: N818 - a verdict on the replica
    """The replica cannot go on; `code` is stable, `message` is a sentence for a tenant."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message[:_MAX_MESSAGE]


class Outcome(msgspec.Struct):
    """Content of a replica's outcome file."""

    code: str
    message: str


def write_outcome(path: Path, failure: ReplicaFailure) -> None:
    """Before exiting; whole or not at all."""
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(msgspec.json.encode(Outcome(failure.code, failure.message)))
    scratch.rename(path)


def read_outcome(path: Path) -> Outcome | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    except (OSError, msgspec.MsgspecError):
        return None


def classify(error: BaseException, log_path: Path | None = None) -> ReplicaFailure:
    """The failure behind an exception of engine construction or start.

    A forked engine core reports its reason on stderr only, hence the look at the end of our own log.
    """
    if isinstance(error, ReplicaFailure):
        return error
    sentence = f"{type(error).__name__}: {_short(str(error))}"
    if isinstance(error, ProfileError):
        return ReplicaFailure("invalid_profile", str(error))
    if isinstance(error, ImportError):
        return ReplicaFailure("engine_missing", f"the engine is not installed on this machine: {error}")
    if isinstance(error, MemoryError):
        return ReplicaFailure("out_of_memory", sentence)
    if isinstance(error, RedisError):
        return ReplicaFailure("redis_refused", sentence)
    if isinstance(error, EngineDead):
        return ReplicaFailure("engine_died", sentence)
    cause, trace = _last_cause(log_path)
    reason = cause or sentence
    if _MEMORY.search(str(error)) or _MEMORY.search(reason):
        return ReplicaFailure("out_of_memory", f"the model does not fit this machine's memory: {reason}")
    if _WEIGHTS.search(str(error)) or _WEIGHTS.search(reason) or _LOADING_FRAME.search(trace):
        return ReplicaFailure("bad_weights", f"the engine cannot load the weights of this model: {reason}")
    return ReplicaFailure("start_failed", reason)


def check_model_dir(model_dir: Path, *, arriving: bool = False) -> None:
    """A second's glance that saves a slow and obscure failure: are the files of a model there, and whole?

    ReplicaFailure `bad_weights` names the file at fault. Reads headers only; of weights that are `arriving`, nothing:
    who loads them looks at each when its header is there.
    """
    for name in ("config.json", "tokenizer.json"):
        _check_json(model_dir / name)
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise ReplicaFailure(
            "bad_weights", "the model has no .safetensors file: push one and create a version"
        )
    if not arriving:
        for shard in shards:
            check_safetensors(shard)


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ReplicaFailure("bad_weights", f"the model has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ReplicaFailure("bad_weights", f"{path.name} cannot be read: {type(error).__name__}") from None


def check_safetensors(path: Path) -> dict[str, int]:
    """Eight bytes of header length, a JSON header, and exactly as many bytes as its offsets say.

    Where each tensor ends in the file, by name; ReplicaFailure `bad_weights`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if not 2 <= n_header <= min(size - 8, 100_000_000):
            raise ReplicaFailure("bad_weights", f"{path.name} is damaged: its header length makes no sense")
        try:
            header: dict[str, Any] = json.loads(file.read(n_header))
            end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ReplicaFailure("bad_weights", f"{path.name} is damaged: its header is not valid") from None
    if 8 + n_header + end != size:
        raise ReplicaFailure(
            "bad_weights", f"{path.name} is damaged: {size} bytes, its header speaks of {8 + n_header + end}"
        )
    return {n: 8 + n_header + t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"}


def _last_cause(log_path: Path | None) -> tuple[str, str]:
    """The last line of the log that reads like an exception, and the traceback above it; empty if there is none."""
    if log_path is None:
        return "", ""
    try:
        with log_path.open("rb") as file:
            file.seek(max(0, log_path.stat().st_size - _LOG_TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return "", ""
    found = re.finditer(r"^(?:.*?\s)?([\w.]*(?:Error|Exception|Failure): \S.*)$", tail, re.MULTILINE)
    causes = [match for match in found if "See root cause above" not in match[1]]
    if not causes:
        return "", ""
    above = tail[: causes[-1].start()]
    return _short(causes[-1][1]), above[max(0, above.rfind("Traceback (most recent call last)")) :]


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
