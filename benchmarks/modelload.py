"""`manage.py bench modelload`: from a real S3 server into an engine's memory, stage by stage and all at once.

Alone: the download (the same connections and ranges, nothing hashed), the verification (the same pieces, as many at
once, from the page cache), the load (the loader's tensors copied into memory that is there, from the page cache). At
once: ModelStore.ensure in this process while the loader in another takes each tensor when its bytes are verified, as
agent and engine core do. The stages of a pair run in a changing order on the same file and server.

Server, fetcher and loader share this computer's cores: where the download alone keeps them busy, more at once cannot
cost nothing. `--link-mb-s` gives it a link of that speed, by reading no faster (TCP then holds the server back, and
waiting costs no CPU): so it is where the server is another computer.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.stats import summary
from infra import objectstore
from infra.objectstore import Place, publish, signed_urls
from tests.cloud.s3 import s3_server
from workers.engine.arriving import tensors
from workers.modelcache import line
from workers.modelcache.arrival import Arrival
from workers.modelcache.line import Line
from workers.modelcache.manifest import MANIFEST_NAME, FileEntry, Manifest, hash_file
from workers.modelcache.pieces import PIECE_BYTES, PIECES_NAME, pieces_of
from workers.modelcache.store import ModelStore
from workers.modelcache.transfer import Tuning

GOAL: Final = 1.15
N_SHARDS, TENSOR_BYTES = 2, 8 << 20
PLACE: Final = Place("models", "bench")
_STAGES: Final = ("download", "verify", "load", "overlapped")


def measure(
    *,
    repeats: int = 7,
    size_mib: int = 512,
    link_mb_s: float = 0.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `--json` prints. Raises RuntimeError where what was loaded is not the file."""
    with _link(link_mb_s * 1e6):
        report = _measure(repeats, size_mib, progress)
    report["assumptions"]["link_mb_s"] = link_mb_s
    return report


def _measure(repeats: int, size_mib: int, progress: Callable[[str], None]) -> dict[str, Any]:
    root = Path(tempfile.mkdtemp(prefix="modelload"))
    try:
        progress(f"making {size_mib} MiB of safetensors and an S3 server")
        origin = ModelStore(root / "origin")
        manifest = _make(origin, size_mib)
        with s3_server(root / "s3") as environ, _in_environment(environ), _loader() as loader:
            publish(origin.path(manifest.digest), manifest, PLACE, lambda name, size: None)
            urls = signed_urls(PLACE, manifest.digest, [entry.name for entry in manifest.files])
            bench = _Bench(root, origin, manifest, urls, loader)
            bench.overlapped()  # the server's and everybody's first time
            pairs = []
            for n in range(repeats):
                order = _STAGES[n % 4 :] + _STAGES[: n % 4]
                pair = {stage: getattr(bench, stage)() for stage in order}
                pairs.append(pair)
                progress(f"{n + 1}/{repeats}: " + ", ".join(f"{s} {pair[s]:.2f} s" for s in _STAGES))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return _report(manifest, pairs)


class _Bench:
    """Each method does one stage once and answers its seconds."""

    def __init__(
        self, root: Path, origin: ModelStore, manifest: Manifest, urls: dict[str, list[str]], loader: Any
    ) -> None:
        self._root, self._origin, self._manifest, self._urls, self._loader = (
            root, origin, manifest, urls, loader,
        )  # fmt: skip
        self._whole = origin.path(manifest.digest)
        self._pieces = json.loads((self._whole / PIECES_NAME).read_bytes())["files"]

    def download(self) -> float:
        """Every byte of every weights file to its place, by as many connections as a transfer has."""
        target = self._fresh("download")
        began_s = time.monotonic()
        for entry in self._weights():
            descriptor = os.open(target / entry.name, os.O_RDWR | os.O_CREAT, 0o600)
            os.posix_fallocate(descriptor, 0, entry.size_bytes)
            starts = iter(range(0, entry.size_bytes, PIECE_BYTES))
            lock = threading.Lock()

            def stream(
                entry: FileEntry = entry,
                descriptor: int = descriptor,
                starts: Iterator[int] = starts,
                lock: threading.Lock = lock,
            ) -> None:
                kept = Line()
                while True:
                    with lock:
                        start = next(starts, None)
                    if start is None:
                        break
                    end = min(start + PIECE_BYTES, entry.size_bytes)
                    kept.fetch(self._urls[entry.name][0], start, end, descriptor, entry.name)
                kept.close()

            threads = [threading.Thread(target=stream) for _ in range(Tuning().n_streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os.close(descriptor)
        return self._done(target, began_s)

    def verify(self) -> float:
        """SHA-256 of every piece, side by side."""
        began_s = time.monotonic()

        def one(entry: FileEntry, n: int) -> bool:
            with (self._whole / entry.name).open("rb") as file:
                file.seek(n * PIECE_BYTES)
                digest, n_left = hashlib.sha256(), PIECE_BYTES
                while n_left and (block := file.read(min(1 << 20, n_left))):
                    digest.update(block)
                    n_left -= len(block)
            return bool(digest.hexdigest() == self._pieces[entry.name][n])

        work = [(entry, n) for entry in self._weights() for n in range(len(self._pieces[entry.name]))]
        with ThreadPoolExecutor(Tuning().n_streams) as pool:
            if not all(pool.map(lambda each: one(*each), work)):
                raise RuntimeError("a piece is not what it should be")
        return time.monotonic() - began_s

    def load(self) -> float:
        """The loader of the engine over a version that is whole."""
        began_s = time.monotonic()
        self._loader.send(str(self._whole))
        return self._loaded_s(began_s)

    def overlapped(self) -> float:
        """Fetch, verify and load at once; from nothing to loaded and verified."""
        target = self._fresh("overlapped")
        store = ModelStore(target)
        began_s = time.monotonic()
        fetching = threading.Thread(
            target=store.ensure,
            args=(self._manifest.digest, PLACE.uri, None, self._urls, ()),
            kwargs={"on_open": lambda path: self._loader.send(str(path))},
        )
        fetching.start()
        seconds = self._loaded_s(began_s)
        fetching.join()
        self._done(target, began_s)
        return seconds

    def _loaded_s(self, began_s: float) -> float:
        checksum = self._loader.recv()
        seconds = time.monotonic() - began_s
        if checksum != self._manifest.n_params:
            raise RuntimeError(f"{checksum} of {self._manifest.n_params} elements were loaded")
        return seconds

    def _weights(self) -> list[FileEntry]:
        return [entry for entry in self._manifest.files if entry.name.endswith(".safetensors")]

    def _fresh(self, name: str) -> Path:
        target = self._root / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return target

    @staticmethod
    def _done(target: Path, began_s: float) -> float:
        seconds = time.monotonic() - began_s
        shutil.rmtree(target)  # its dirty pages with it: nobody's write-back disturbs the next
        return seconds


def _make(store: ModelStore, size_mib: int) -> Manifest:
    """A version of random bfloat16 weights in two shards."""
    shard_bytes = (size_mib << 20) // N_SHARDS
    dice = random.Random(11)
    with store.incoming("bench") as staging:
        (staging / "config.json").write_text('{"dtype": "bfloat16"}')
        (staging / "tokenizer.json").write_text("{}")
        n_params = 0
        for shard in range(1, N_SHARDS + 1):
            n_tensors = max(shard_bytes // TENSOR_BYTES, 1)
            header = {
                f"shard{shard}.layer{n:03}": {
                    "dtype": "BF16",
                    "shape": [TENSOR_BYTES // 4096, 2048],
                    "data_offsets": [n * TENSOR_BYTES, (n + 1) * TENSOR_BYTES],
                }
                for n in range(n_tensors)
            }
            head = json.dumps(header).encode()
            path = staging / f"model-{shard:05}-of-{N_SHARDS:05}.safetensors"
            with path.open("wb") as file:
                file.write(struct.pack("<Q", len(head)) + head)
                for _ in range(n_tensors):
                    file.write(dice.randbytes(TENSOR_BYTES))
            n_params += n_tensors * TENSOR_BYTES // 2
        pieces = pieces_of(sorted(staging.glob("*.safetensors")))
        assert pieces is not None
        (staging / PIECES_NAME).write_bytes(pieces.to_bytes())
        entries = tuple(
            FileEntry(name=path.name, size_bytes=path.stat().st_size, sha256=hash_file(path))
            for path in sorted(staging.iterdir())
            if path.name != MANIFEST_NAME
        )
        manifest = Manifest(
            files=entries, architecture="bench", licence="CC0-1.0", n_params=n_params, max_model_len=1
        )
        store.adopt(staging, manifest)
    return manifest


@contextmanager
def _in_environment(environ: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environ}
    os.environ.update(environ)
    objectstore._client.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        objectstore._client.cache_clear()


@contextmanager
def _link(bytes_per_s: float) -> Iterator[None]:
    """All connections together bring no more than this; 0: as it comes."""
    if not bytes_per_s:
        yield
        return
    write, lock, free_at_s = line._write, threading.Lock(), 0.0

    def paced(descriptor: int, block: memoryview, at: int, name: str) -> None:
        nonlocal free_at_s
        with lock:
            now_s = time.monotonic()
            free_at_s = max(free_at_s, now_s - 0.05) + len(block) / bytes_per_s
            wait_s = free_at_s - now_s
        write(descriptor, block, at, name)
        if wait_s > 0:
            time.sleep(wait_s)

    line._write = paced
    try:
        yield
    finally:
        line._write = write


@contextmanager
def _loader() -> Iterator[Any]:
    """A process with torch imported that loads a directory when told its path; it answers the elements loaded."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_load_forever, args=(theirs,), daemon=True)
    process.start()
    ours.recv()
    try:
        yield ours
    finally:
        process.kill()
        process.join(10)


def _load_forever(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    memory: dict[str, Any] = {}
    pipe.send("ready")
    while True:
        directory = Path(pipe.recv())
        n_loaded = 0
        for name, tensor in tensors(Arrival(directory), sorted(directory.glob("*.safetensors"))):
            if name not in memory:  # the model's parameters, made before its weights are loaded
                memory[name] = torch.zeros_like(tensor)
            memory[name].copy_(tensor)
            n_loaded += tensor.numel()
        pipe.send(n_loaded)


def _report(manifest: Manifest, pairs: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [p["overlapped"] / max(p[stage] for stage in _STAGES[:3]) for p in pairs]
    apart = [p["overlapped"] / sum(p[stage] for stage in _STAGES[:3]) for p in pairs]
    low, high = _interval(ratios)
    slowest = statistics.median(max(_STAGES[:3], key=p.__getitem__) == "download" for p in pairs)
    return {
        "assumptions": {
            "n_bytes": manifest.size_bytes,
            "pairs": len(pairs),
            "n_streams": Tuning().n_streams,
            "piece_bytes": PIECE_BYTES,
            "cores": os.cpu_count(),
            "server": "SeaweedFS on the same computer",
        },
        **{f"{stage}_s": summary([p[stage] for p in pairs]) for stage in _STAGES},
        "slowest_stage": "download" if slowest > 0.5 else "verify or load",
        "overlapped_to_slowest": {**summary(ratios), "low_95": round(low, 3), "high_95": round(high, 3)},
        "overlapped_to_one_after_the_other": summary(apart),
        "goals": [
            {"figure": "overlapped_to_slowest", "goal_at_most": GOAL,
             "median": round(statistics.median(ratios), 3), "reached": statistics.median(ratios) <= GOAL},
        ],
    }  # fmt: skip


def _interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median, by bootstrap with a fixed seed."""
    dice = random.Random(1)
    found = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(2000))
    return found[50], found[1949]


def as_text(report: dict[str, Any]) -> str:
    told, ratio = report["assumptions"], report["overlapped_to_slowest"]
    mb = told["n_bytes"] / 1e6
    lines = [
        f"{mb:.0f} MB in {told['n_streams']} streams, {told['pairs']} interleaved pairs, {told['cores']} cores, "
        f"{told['server']}" + (f", a link of {told['link_mb_s']:g} MB/s" if told["link_mb_s"] else "")
    ]
    for stage in _STAGES:
        s = report[f"{stage}_s"]
        name = {"overlapped": "all three at once"}.get(stage, f"{stage} alone")
        lines.append(
            f"  {name:18} {s['median']:.2f} s ({s['min']:.2f} to {s['max']:.2f}), {mb / s['median']:.0f} MB/s"
        )
    apart = report["overlapped_to_one_after_the_other"]["median"]
    goal = report["goals"][0]
    lines += [
        f"  at once / slowest stage alone: {ratio['median']:.2f} "
        f"(95 %: {ratio['low_95']:.2f} to {ratio['high_95']:.2f}); / one after the other: {apart:.2f}",
        f"goal ≤ {GOAL}: " + ("reached" if goal["reached"] else "NOT reached"),
    ]
    return "\n".join(lines)
