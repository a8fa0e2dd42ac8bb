"""The fitted performance model: finds what it was not told, says what production says, leaves out the impossible."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from controlplane.policy.gpus import GPUS, gpu
from controlplane.policy.models import MODELS, model
from controlplane.policy.perfmodel import ROOFLINE, Efficiency, step_model
from controlplane.prediction.perf import data
from controlplane.prediction.perf.coefficients import Coefficients, as_json, coefficients
from controlplane.prediction.perf.data import Observation, predicted_s, read_sample
from controlplane.prediction.perf.fit import SHARES, columns, fit, shares_at
from controlplane.prediction.perf.nnls import nnls

TRUE = Efficiency(0.62, 0.71, 0.48, 0.55, 0.33, 0.8, 0.5, 0.001, 3e-5, 2e-5, 0.0, 4e-6)


def made(efficiency: Efficiency, gpus: tuple[str, ...], names: tuple[str, ...]) -> list[Observation]:
    """What an engine of that efficiency would have measured."""
    rows = []
    for card in gpus:
        for name in names:
            for dtype in ("bf16", "fp8"):
                for kind, n, n_prompt, n_output, n_context in (
                    *(("serve", n, p, o, 0) for n in (1, 8, 64) for p, o in ((256, 512), (4096, 128))),
                    *(("decode", n, 0, 0, n * c) for n in (1, 16, 128) for c in (200, 8000)),
                    *(("prefill", 1, p, 0, 0) for p in (128, 2048, 16384)),
                ):
                    for tp in (1, 4):
                        row = Observation(
                            "vllm", kind, name, card, tp, dtype, n, n_prompt, n_output, n_context, 1.0
                        )
                        step = step_model(model(name).with_dtype(dtype), gpu(card), tp, efficiency)
                        rows.append(dataclasses.replace(row, seconds=predicted_s(row, step)))
    return rows


def error(rows: list[Observation], found: Any) -> float:
    """Median absolute relative error."""
    errors = []
    for row in rows:
        step = step_model(model(row.model).with_dtype(row.dtype), gpu(row.gpu), row.tp, found(row.gpu))
        errors.append(abs(predicted_s(row, step) / row.seconds - 1))
    return float(np.median(errors))


def test_the_fit_finds_an_engine_it_was_not_told_and_predicts_a_gpu_it_never_saw() -> None:
    rows = made(TRUE, ("a100_sxm", "h100_sxm"), ("llama-3.1-8b", "llama-2-13b"))
    found = fit(rows, {})
    for name in SHARES[:3]:  # ridge holds them back, the more the less the measurements tell
        true, prior, is_now = (getattr(e, name) for e in (TRUE, ROOFLINE, found.common))
        assert abs(is_now - true) < abs(prior - true), name
    assert found.common.memory == pytest.approx(TRUE.memory, rel=0.1)
    unseen = made(TRUE, ("l40s",), ("qwen3-32b",))
    assert error(unseen, found.of) < 0.5 * error(unseen, lambda _: ROOFLINE)


def test_what_is_fitted_is_what_production_predicts() -> None:
    rows = made(TRUE, ("h200_sxm",), ("llama-3.1-8b", "qwen3-235b-a22b"))
    terms = columns(rows)
    inverse = np.array([[1 / getattr(TRUE, name) for name in SHARES]] * len(rows))
    overheads = np.array([TRUE.base_s, TRUE.layer_s, TRUE.layer_tp_s, TRUE.layer_expert_s, TRUE.seq_s])
    seconds = (shares_at(terms, inverse) * inverse).sum(axis=1) + terms.costs @ overheads
    assert seconds == pytest.approx([row.seconds for row in rows], rel=1e-9)


def test_on_the_excerpt_the_fit_is_closer_than_the_prior_also_on_a_gpu_and_a_model_it_never_saw() -> None:
    rows = read_sample()
    mine = [row for row in rows if row.engine == "vllm"]
    assert error(mine, coefficients().by_gpu.__getitem__) < 0.10 < error(mine, lambda _: ROOFLINE)
    for name, value in (("gpu", "h200_sxm"), ("model", "minimax-m2.5")):
        judged = [row for row in mine if getattr(row, name) == value]
        found = fit([row for row in rows if getattr(row, name) != value], {})
        assert error(judged, found.of) < 0.85 * error(judged, lambda _: ROOFLINE), name


def test_a_gpu_without_coefficients_gets_what_all_have_in_common() -> None:
    known = coefficients()
    assert "t4" not in known.by_gpu
    assert known.basis(gpu("t4")) == "fitted on other GPUs"
    assert known.step_model(model("llama-3.1-8b"), gpu("t4")) == step_model(
        model("llama-3.1-8b"), gpu("t4"), 1, known.common
    )
    card = gpu("h100_sxm")
    assert known.basis(card) == "fitted"
    assert known.by_gpu["h100_sxm"] != known.common
    own = step_model(model("llama-3.1-8b"), card, 2, known.by_gpu["h100_sxm"])
    assert known.step_model(model("llama-3.1-8b"), card, 2) == own


def test_series_that_beat_the_hardware_are_left_out() -> None:
    honest = made(TRUE, ("h100_sxm",), ("llama-3.1-8b",))
    cached = [
        dataclasses.replace(row, seconds=row.seconds / 20)
        for row in made(TRUE, ("a100_sxm",), ("llama-3.1-8b",))
    ]
    assert data._possible([*honest, *cached]) == honest


def test_costs_are_never_negative() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):  # columns much alike, so that what was taken in must be given up again
        few = rng.random((20, 3))
        a = few @ rng.random((3, 12)) + 0.05 * rng.random((20, 12))
        b = few @ np.array([1.0, 0.5, 2.0]) + 0.1 * rng.normal(size=20)
        x = nnls(a, b)
        assert (x >= 0).all()
        gradient = a.T @ (b - a @ x)
        assert (gradient[x == 0] <= 1e-6).all()
        assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-6


def test_the_file_is_read_as_written_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "coefficients.json"
    written = Coefficients(TRUE, {"l4": ROOFLINE})
    path.write_text(as_json(written, {"sources": []}))
    assert coefficients(path) == written
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"common": {}, "gpus": {}}))
    with pytest.raises(ValueError, match=r"broken\.json"):
        coefficients(broken)


def test_the_catalogues_are_plausible() -> None:
    for shape in MODELS.values():
        assert shape.active <= shape.n_params
        assert shape.n_params_expert < shape.n_params, shape.name
        assert 1e3 < shape.kv_bytes_per_token < 1e7, shape.name
    assert all(card.memory_bytes > 0 for card in GPUS.values())


def test_the_command_prints_residuals_and_refuses_a_folder_without_measurements(tmp_path: Path) -> None:
    out = io.StringIO()
    call_command("perf_fit", "--json", stdout=out)
    report = json.loads(out.getvalue())
    assert report["seen"][-1]["group"] == "all"
    assert report["seen"][-1]["median"] < 0.12 < report["seen"][-1]["prior"]
    assert {row["group"] for row in report["gpu_held_out"]} >= {"h100_sxm", "h200_sxm", "b200_sxm"}
    assert report["us_per_prediction"]["step"] > 0
    off = next(row for row in report["corrected"] if row["group"] == "qwen3-235b-a22b")
    assert off["median"] < 0.6 * off["before"]
    with pytest.raises(CommandError, match="e2e_silicon_samples"):
        call_command("perf_fit", "--data", tmp_path)
