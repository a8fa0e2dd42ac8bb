"""A simulation as one HTML file: what was assumed, a table of policies, and charts of the first run of each.

Written by `manage.py simulate --report DIR`; opens without network, script or server. The charts are also written
beside it, one SVG file each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from autoscaler.sim import svg
from autoscaler.sim.scenario import Result
from autoscaler.sim.series import Sample
from autoscaler.sim.statistics import interval

_TENANTS: Final = 12
_COLUMNS: Final = (
    ("USD", "usd", "{:,.2f}"),
    ("available", "availability", "{:.3%}"),
    ("in SLO", "slo_attainment", "{:.2%}"),
    ("TTFT p50", "ttft_p50_s", "{:.3f} s"),
    ("TTFT p99", "ttft_p99_s", "{:.2f} s"),
    ("ITL p99", "itl_p99_s", "{:.4f} s"),
    ("mean latency", "latency_mean_s", "{:.2f} s"),
    ("machines lost", "n_lost_machines", "{:.1f}"),
    ("requests", "n_requests", "{:,.0f}"),
)
_STYLE: Final = """
:root{--bg:#fbfbfa;--fg:#1d2126;--dim:#667080;--rule:#dfe3e8;--c0:#2563a8;--c1:#c2571a;--c2:#2f855a;--c3:#8a4fa3;
--c4:#b7791f;--c5:#c53030;--c6:#0f766e;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--dim:#98a2ae;--rule:#2c3238;--c0:#6aa6e8;
--c1:#f0925a;--c2:#68c494;--c3:#c296d9;--c4:#e2b354;--c5:#f08080;--c6:#4fc3b5;--c7:#a0a8b2}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1000px;padding:28px 24px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:38px 0 4px}h3{font-size:15px;margin:22px 0 2px}
p{margin:4px 0 8px;color:var(--dim)}dt{color:var(--dim)}dd{margin:0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:12px 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:5px 9px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{font-weight:600;color:var(--dim)}th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
.unit{font-style:italic}.grid{stroke:var(--rule)}.line{fill:none;stroke-width:1.7}.area{opacity:.16}
.mark{stroke:var(--c5);stroke-dasharray:3 3}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--dim)}
.legend i{display:inline-block;width:18px;border-top:3px solid var(--c);margin-right:6px;vertical-align:middle}
.legend i.dash{border-top-style:dashed}
"""


def write(
    folder: Path,
    rows: dict[str, list[Result]],
    assumptions: dict[str, str],
    ttft_target_s: float,
    notes: Sequence[str] = (),
) -> Path:
    """index.html and its charts into `folder`, made if need be. The path of the page; OSError when it cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[str, str] = {}
    page = _page(rows, assumptions, ttft_target_s, notes, charts)
    for name, drawn in charts.items():
        alone = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        alone = alone.replace(">", f"><style>{_STYLE}svg{{background:var(--bg)}}</style>", 1)
        (folder / f"{name}.svg").write_text(alone, encoding="utf-8")
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _page(
    rows: dict[str, list[Result]],
    assumptions: dict[str, str],
    ttft_target_s: float,
    notes: Sequence[str],
    charts: dict[str, str],
) -> str:
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in assumptions.items())
    body = ["<h1>Simulation</h1>", f"<dl>{listed}</dl>", _table(rows)]
    body += [f"<p>{escape(note)}</p>" for note in notes]
    firsts = {name: results[0] for name, results in rows.items()}
    has_market = any(result.usd for result in firsts.values())
    body.append("<h2>All policies</h2><p>The first run of each, on the same load.</p>")
    if has_market:
        body += _figure(
            charts, "cost", "Cost so far", [_line(firsts, name, at, _usd) for at, name in _few(firsts)], "USD"
        )
    body += _figure(
        charts,
        "slo",
        f"First token within {ttft_target_s:g} s",
        [_line(firsts, name, at, _attainment) for at, name in _few(firsts)],
        "share of the requests that ended in each interval",
        percent=True,
    )
    for at, (name, result) in enumerate(firsts.items()):
        body += _policy(charts, at, name, result, ttft_target_s)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Simulation</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(rows: dict[str, list[Result]]) -> str:
    head = "".join(f"<th>{title}</th>" for title, _, _ in _COLUMNS)
    lines = []
    for name, results in rows.items():
        cells = []
        for _, field, form in _COLUMNS:
            found = interval([float(getattr(result, field)) for result in results])
            half = f" ± {form.format(found.half)}" if found.half else ""
            cells.append(f"<td>{form.format(found.mean)}{half}</td>")
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    n = max(len(results) for results in rows.values())
    note = f"<p>Means of {n} runs and their 95 % intervals.</p>" if n > 1 else ""
    return f'<div class="wide"><table><tr><th>policy</th>{head}</tr>{"".join(lines)}</table></div>{note}'


def _policy(charts: dict[str, str], at: int, name: str, result: Result, ttft_target_s: float) -> list[str]:
    samples = result.samples
    if len(samples) < 2:
        return [f"<h2>{escape(name)}</h2><p>too short to draw</p>"]
    steps = [
        svg.Line("wanted", [(s.at_s, s.n_wanted) for s in samples], 7, is_step=True, is_dashed=True),
        svg.Line("ready", [(s.at_s, s.n_ready) for s in samples], 0, is_step=True, is_area=True),
    ]
    if any(s.n_on_demand for s in samples):
        steps.append(
            svg.Line(
                "of them on-demand", [(s.at_s, s.n_on_demand) for s in samples], 1, is_step=True, is_area=True
            )
        )
    load = [
        svg.Line("running", [(s.at_s, s.n_running) for s in samples], 2, is_area=True),
        svg.Line("waiting", [(s.at_s, s.n_queued) for s in samples], 5, is_area=True),
    ]
    body = [f"<h2>{escape(name)}</h2>"]
    body += _figure(charts, f"{at}-replicas", "Replicas against demand", steps, "machines")
    body += _figure(charts, f"{at}-load", "Requests", load, "requests")
    most = result.tenants[:_TENANTS]
    total = sum(t.n_tokens for t in result.tenants) or 1
    served = svg.bars(
        [
            (t.tenant, t.n_tokens, f"{t.n_tokens / total:.1%} of tokens, {t.n_requests:,} requests")
            for t in most
        ]
    )
    waited = svg.bars(
        [(t.tenant, t.ttft_p99_s, f"{t.ttft_p99_s:.2f} s, {t.slo_attainment:.1%} in time") for t in most],
        colour=1,
        mark=ttft_target_s,
    )
    charts[f"{at}-tenants-served"], charts[f"{at}-tenants-ttft"] = served, waited
    rest = f" (the largest {len(most)} of {len(result.tenants)})" if len(result.tenants) > len(most) else ""
    body.append(f"<h3>Service by tenant{rest}</h3>{served}")
    body.append(f"<h3>P99 to the first token by tenant</h3><p>The dashed line is the target.</p>{waited}")
    return body


def _figure(
    charts: dict[str, str],
    name: str,
    title: str,
    lines: Sequence[svg.Line],
    unit: str,
    *,
    percent: bool = False,
) -> list[str]:
    charts[name] = svg.chart(lines, unit=unit, percent=percent)
    return [f"<h3>{escape(title)}</h3>", svg.legend(lines), charts[name]]


def _few(firsts: dict[str, Result]) -> list[tuple[int, str]]:
    """As many as there are colours; the table has them all."""
    return list(enumerate(firsts))[: svg.N_COLOURS]


_Points = Callable[[Sequence[Sample]], list[tuple[float, float]]]


def _line(firsts: dict[str, Result], name: str, colour: int, points: _Points) -> svg.Line:
    return svg.Line(name, points(firsts[name].samples), colour)


def _usd(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    return [(s.at_s, s.usd) for s in samples]


def _attainment(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """In about sixty intervals, each long enough to hold some requests."""
    kept = samples[:: max(len(samples) // 60, 1)]
    found = []
    for before, after in itertools.pairwise(kept):
        n = after.n_ended - before.n_ended
        if n > 0:
            found.append((after.at_s, (after.n_in_slo - before.n_in_slo) / n))
    return found
