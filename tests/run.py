"""`make test`: formatting, lint, types and layering first (seconds), then pytest over a few processes, because most
tests wait more than they work; prints where the time went.

Stops at the first stage that fails and exits with its status. `--full` adds the suites marked `full`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TYPED = ["controlplane", "workers", "autoscaler", "billing", "infra", "benchmarks"]
# Of the tests, each with its Postgres and Redis; with more, the stacks they start would get in each other's way.
MAX_PROCESSES = 4


def stages(full: bool, lint_only: bool) -> list[tuple[str, list[str]]]:
    lint = [
        ("ruff format", [str(BIN / "ruff"), "format", "--check", "--quiet", "."]),
        ("ruff check", [str(BIN / "ruff"), "check", "--quiet", "."]),
        ("import-linter", [str(BIN / "lint-imports"), "--no-cache"]),
        ("mypy", [str(BIN / "mypy"), *TYPED]),
    ]
    if lint_only:
        return lint
    select = [] if full else ["-m", "not full"]
    spread = ["-n", str(min(os.cpu_count() or 1, MAX_PROCESSES))]
    return [*lint, ("pytest", [sys.executable, "-m", "pytest", *spread, *select])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long suites too")
    parser.add_argument("--lint-only", action="store_true", help="no tests")
    args = parser.parse_args()
    for name, argv in stages(args.full, args.lint_only):
        started_s = time.monotonic()
        print(f"==> {name}", flush=True)
        code = subprocess.run(argv, cwd=ROOT, check=False).returncode
        elapsed_s = time.monotonic() - started_s
        print(f"    {name}: {'ok' if code == 0 else f'failed ({code})'} in {elapsed_s:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
