"""A drill's results as one JSON object and as a table for people. Called by `manage.py drill`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from infra.drills.catalog import Drill
from infra.drills.run import Result
from infra.drills.verdict import over_repeats


def over(
    name: str, drill: Drill, engine: str, results: Sequence[Result], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The report over all runs. `recovery`: median over runs of the median stream, and the worst stream of all."""
    recovery = over_repeats([result.verdict for result in results])
    problems = [f"run {n}: {p}" for n, r in enumerate(results, 1) for p in r.verdict.problems]
    limit_s = drill.recovery_limit_s if engine == "toy" else 0.0
    median_s = recovery["recovery_median_s"]
    if limit_s and median_s is not None and median_s > limit_s:
        problems.append(f"the next token came after {median_s:.2f} s (median), allowed {limit_s:g} s")
    totals = {
        key: sum(getattr(result.verdict, key) for result in results)
        for key in (
            *("n_streams", "n_finished", "n_failed", "n_failed_retryably", "n_equal"),
            *("n_tokens_lost", "n_tokens_duplicated"),
            *("n_billed_once", "n_billed_twice", "n_not_billed", "n_interrupted", "n_went_on", "n_401"),
        )
    }
    return {
        "drill": name,
        "passed": not problems,
        "engine": engine,
        "n_runs": len(results),
        "totals": totals,
        **{key: None if value is None else round(value, 3) for key, value in recovery.items()},
        "recovery_limit_s": limit_s or None,
        "problems": problems,
        "facts": dict(facts),
        "runs": [result_json(result) for result in results],
    }


def result_json(result: Result) -> dict[str, Any]:
    return {
        "fault": result.strike.what,
        "notes": result.strike.notes,
        "reference_s": round(result.reference_s, 2),
        "run_s": round(result.run_s, 2),
        "tokens_per_s_each": round(result.tokens_per_s, 1),
        "passed": result.verdict.passed,
        "beside": asdict(result.probes) if result.probes else None,
        **{
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in asdict(result.verdict).items()
        },
    }


def as_table(report: Mapping[str, Any]) -> str:
    """What a person wants to know, one line each."""
    totals, facts = report["totals"], report["facts"]
    n = totals["n_streams"]
    last = report["runs"][-1]
    fate = f"{totals['n_finished']} of {n} finished, {totals['n_failed']} failed"
    if totals["n_failed_retryably"]:
        fate += f" ({totals['n_failed_retryably']} with a retryable error)"
    rows = [
        ("drill", f"{report['drill']}: {'PASSED' if report['passed'] else 'FAILED'}"),
        ("fault", last["fault"] or "none was made"),
        (
            "load",
            f"{facts['n_streams']} streams of {facts['n_tokens']} tokens, {report['engine']} engine, "
            f"{last['tokens_per_s_each']:g} tokens/s each; runs: {report['n_runs']}",
        ),
        ("streams", fate),
        ("text", f"{totals['n_equal']} of {n} equal to the undisturbed run"),
        ("tokens", f"{totals['n_tokens_lost']} lost, {totals['n_tokens_duplicated']} duplicated"),
        (
            "bills",
            f"{totals['n_billed_once']} billed once, {totals['n_billed_twice']} twice, "
            f"{totals['n_not_billed']} not at all",
        ),
        ("next token", _next_token(report)),
        *_beside(last["beside"]),
        *_lag(last["spent_lag_nano"]),
        *((name, str(value)) for name, value in last["notes"].items() if name != "n_streams_running"),
        *([("region", report["region"]["line"])] if "region" in report else []),
        *([("weather", report["region"]["weather"])] if "region" in report else []),
        *(
            [("ran", ", ".join(f"{k} {v}" for k, v in facts["running"].items()))]
            if "running" in facts
            else []
        ),
        ("versions", ", ".join(f"{name} {value}" for name, value in facts["versions"].items())),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    lines += [f"  problem: {problem}" for problem in report["problems"]]
    return "\n".join(lines)


def _next_token(report: Mapping[str, Any]) -> str:
    """How soon streams went on, said so that a stream which did not go on is no stream that went on at once."""
    totals, n = report["totals"], report["totals"]["n_streams"]
    silence_s = max(run["silence_worst_s"] for run in report["runs"])
    if not totals["n_went_on"]:
        return "none: no stream went on after the fault"
    if report["recovery_median_s"] is None:
        text = f"no pause: {totals['n_went_on']} of {n} streams went on"
    else:
        text = (
            f"{report['recovery_median_s']:.2f} s after the fault (median), {report['recovery_worst_s']:.2f} s worst; "
            f"{totals['n_interrupted']} of {n} streams paused, {silence_s:.2f} s at most"
        )
    n_ended = n - totals["n_went_on"]
    return f"{text}; {n_ended} did not go on" if n_ended else text


def _beside(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The requests beside the streams, where there were any."""
    if found is None:
        return []
    return [
        (
            "beside",
            f"{found['n']} short requests, {found['n_refused']} told to try again, {found['n_401']} with a 401; "
            f"served again {found['back_s']:.2f} s after the fault, slowest {found['slowest_s']:.2f} s",
        )
    ]


def _lag(nano: int) -> list[tuple[str, str]]:
    return [("budget", f"its counter misses {nano} nano-dollars that are booked")] if nano else []
