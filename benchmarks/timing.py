"""`manage.py bench timing`: whether the time of a refusal tells why a key was refused.

On one connection, in random order: a public part that never was; a wrong secret behind a public part that is cached,
and behind one that is not; a good secret of the wrong kind. Every text is sent once, as who guesses would. Each kind is
held beside the first by Mann-Whitney and Kolmogorov-Smirnov, adjusted for their number (Holm); two controls say what
the test can see: a text refused before, which is answered from memory, and the smallest shift that would be noticed.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics
from collections.abc import Callable
from typing import Any

import uvloop

from benchmarks.keycheck import goal_lines
from benchmarks.keyrows import copies, new_key, pepper_of
from benchmarks.probe import Probe
from benchmarks.stack import bench_stack
from benchmarks.twosample import compare, holm, smallest_seen
from controlplane import ids
from controlplane.tenants import api_keys

N_EACH, N_WARM = 1_500, 200
LEVEL = 0.01
SHIFTS_US = (1, 2, 5, 10, 20, 50, 100, 200, 500)
UNKNOWN = "unknown public part"
KINDS = (
    UNKNOWN,
    "wrong secret, part in use",
    "wrong secret, part not in use",
    "good secret of the wrong kind",
)
CONTROL = "control: refused before"


def measure(*, repeats: int = 1, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Both surfaces; returns the report that `--json` prints."""
    progress("starting a private stack with the toy engine")
    n = N_EACH * repeats
    with bench_stack("toy") as stack:
        made = stack.manage_json("create_token", "bench-timing")
        token_id = str(ids.from_text(ids.Prefix.MANAGEMENT_TOKEN, made["id"]))
        key_id, used_key = new_key(stack, "bench-timing")
        pepper = pepper_of(stack)
        keys = copies(stack, "tenants_apikey", key_id, api_keys.INFERENCE, 2 * n)
        tokens = copies(stack, "tenants_managementtoken", token_id, api_keys.MANAGEMENT, 2 * n)
        web = int(stack.facts.console_url.rsplit(":", 1)[1].split("/")[0])
        surfaces = {
            "/v1/models": (stack.port, used_key, keys[:n], tokens[:n], api_keys.INFERENCE),
            "/api/v1/projects": (web, str(made["token"]), tokens[n:], keys[n:], api_keys.MANAGEMENT),
        }
        report: dict[str, Any] = {"assumptions": {
            "each": n, "level": LEVEL, "repeats": repeats,
            "tests": "Mann-Whitney U and Kolmogorov-Smirnov, two-sided, Holm-adjusted over the kinds",
        }}  # fmt: skip
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for path, (port, used, unused, other_kind, kind) in surfaces.items():
                progress(f"{path}: {len(KINDS) + 1} kinds of refusal, {n} of each")
                texts = {
                    KINDS[0]: [api_keys.generate(pepper, kind).plaintext for _ in range(n)],
                    KINDS[1]: [_spoilt(used) for _ in range(n)],
                    KINDS[2]: [_spoilt(each) for each in unused],
                    KINDS[3]: other_kind,
                    CONTROL: [api_keys.generate(pepper, kind).plaintext] * n,
                }
                report[path] = _judged(runner.run(_times(port, path, used, texts)))
    report["goals"] = [
        {"figure": f"{path}: {name}", "reached": row["indistinguishable"]}
        for path in surfaces for name, row in report[path]["beside"].items() if name != CONTROL
    ]  # fmt: skip
    return report


def _spoilt(key: str) -> str:
    """The same public part, another secret."""
    return f"{key[: -api_keys.SECRET_LENGTH]}{secrets.token_urlsafe(32)}"


async def _times(port: int, path: str, used: str, texts: dict[str, list[str]]) -> dict[str, list[float]]:
    """Microseconds of every refusal by kind. The used key is used all the while, so its public part stays cached."""
    probe = await Probe.open(port)
    order = [(kind, text) for kind, each in texts.items() for text in each]
    random.Random(7).shuffle(order)
    found: dict[str, list[float]] = {kind: [] for kind in texts}
    warm = [secrets.token_urlsafe(32) for _ in range(N_WARM)]
    for text in warm:
        await probe.timed(path, used[: -api_keys.SECRET_LENGTH] + text)
    for at, (kind, text) in enumerate(order):
        if at % 20 == 0:
            status, _ = await probe.timed(path, used)
            if status != 200:
                raise RuntimeError(f"{path}: the good key was answered {status}")
        status, microseconds = await probe.timed(path, text)
        if status != 401:
            raise RuntimeError(f"{path}, {kind}: answered {status}, not 401")
        found[kind].append(microseconds)
    probe.close()
    return found


def _judged(times: dict[str, list[float]]) -> dict[str, Any]:
    """Each kind beside the unknown one."""
    base = times[UNKNOWN]
    compared = {kind: compare(base, values) for kind, values in times.items() if kind != UNKNOWN}
    real = [kind for kind in compared if kind != CONTROL]
    adjusted = holm(
        [compared[kind].p_mann_whitney for kind in real]
        + [compared[kind].p_kolmogorov_smirnov for kind in real]
    )
    rows = {}
    for kind, found in compared.items():
        p_values = (
            [found.p_mann_whitney, found.p_kolmogorov_smirnov]
            if kind == CONTROL
            else [adjusted[real.index(kind)], adjusted[len(real) + real.index(kind)]]
        )
        rows[kind] = {
            "median_us": round(found.medians[1], 1),
            "median_difference_us": round(found.median_difference, 2),
            "difference_95_us": [round(value, 2) for value in found.difference_95],
            "auc": round(found.auc, 4),
            "p_mann_whitney": float(f"{p_values[0]:.3g}"),
            "p_kolmogorov_smirnov": float(f"{p_values[1]:.3g}"),
            "indistinguishable": min(p_values) >= LEVEL,
        }
    return {
        "median_us": round(statistics.median(base), 1),
        "smallest_shift_seen_us": smallest_seen(base * 2, LEVEL / len(adjusted), SHIFTS_US),
        "beside": rows,
    }


def as_text(report: dict[str, Any]) -> str:
    assumed = report["assumptions"]
    lines = [f"{assumed['each']} refusals of each kind in random order; {assumed['tests']}; level {LEVEL}"]
    for path, found in report.items():
        if not path.startswith("/"):
            continue
        lines += [
            "",
            f"{path}: {UNKNOWN}: median {found['median_us']} µs; "
            f"a shift of {found['smallest_shift_seen_us']} µs would be seen",
            f"{'beside it':<32}{'median µs':>10}{'difference, 95 %':>26}{'AUC':>8}{'p (MW)':>10}{'p (KS)':>10}",
        ]
        for kind, row in found["beside"].items():
            low, high = row["difference_95_us"]
            verdict = "indistinguishable" if row["indistinguishable"] else "DISTINGUISHABLE"
            between = f"{row['median_difference_us']:+.1f} ({low:+.1f} to {high:+.1f})"
            lines.append(
                f"{kind:<32}{row['median_us']:>10.1f}{between:>26}{row['auc']:>8.3f}{row['p_mann_whitney']:>10.3g}"
                f"{row['p_kolmogorov_smirnov']:>10.3g}  {verdict}"
            )
    return "\n".join([*lines, "", *goal_lines(report["goals"])])
