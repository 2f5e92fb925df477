"""The guard of sampled heads: a step is exact where the draw's own estimate of its error is too large, and that is counted."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import span_op
from lsh_op import Case
from lsh_reference import Hashing
from sampled_artefacts import needs_library, opened, sample_always, tokens
from sampled_artefacts import steps as steps_of_model
from tiny_models import export_rules

from attnspan.planner.plan import Plan
from attnspan.planner.rules import HeadRule, LshParams

RNG = np.random.default_rng(0)
INDEXES = {
    "exact": None,
    "sketch": Hashing("sketch", RNG.choice([-1.0, 1.0], (16, 4)), fraction=0.15),
    "signature": Hashing("signature", RNG.standard_normal((16, 64)), max_hamming=(28, 27)),
    "tables": Hashing("tables", RNG.standard_normal((16, 48)), 4, 12, 2),
}
SAMPLING = [name for name in INDEXES if name != "exact"]


def counted(reset: bool = True) -> tuple[int, int]:
    """Steps of a KV head that had a guard, and those that it made exact."""
    out = (ctypes.c_int64 * 2)()
    ctypes.CDLL(str(span_op.library())).attnspan_lsh_guarded(out, int(reset))
    return out[0], out[1]


def steps(index: str, guard: float, count: int = 6, **options: object) -> list[dict[str, np.ndarray]]:
    """Decode steps after 700 tokens, the same of every call."""
    case = Case(INDEXES[index], attributes={"guard": guard} if guard else {}, rows=2, **options)
    case.preload(700)
    return [case.step(case.tokens(1), compared=False)[0] for _ in range(count)]


@pytest.mark.parametrize("index", SAMPLING)
def test_no_doubt_is_allowed(index: str) -> None:
    """Every head of every step is computed exactly: as index `exact` does."""
    counted()
    for got, want in zip(steps(index, 1e-9), steps("exact", 0), strict=True):
        np.testing.assert_allclose(got["output"], want["output"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["lse"], want["lse"], rtol=1e-5)
    assert counted() == (24, 24)  # six steps, two rows, two KV heads


@pytest.mark.parametrize("index", SAMPLING)
def test_any_doubt_is_allowed(index: str) -> None:
    """To the bit what it is without a guard; steps are counted, none becomes exact."""
    counted()
    for got, want in zip(steps(index, 1.0), steps(index, 0), strict=True):
        np.testing.assert_array_equal(got["output"], want["output"])
    assert counted() == (24, 0)


@pytest.mark.parametrize("index", SAMPLING)
@pytest.mark.parametrize("isa", ["", "portable"])
def test_estimate_is_of_the_size_of_the_error(index: str, isa: str) -> None:
    """The error of the sum of weights, and the guard at which a step becomes exact: within a factor of three over 48 heads."""
    exact = steps("exact", 0, 12, heads=2, isa=isa)
    drawn = steps(index, 0, 12, heads=2, isa=isa)
    error = np.array([np.expm1(a["lse"] - b["lse"]).ravel() for a, b in zip(drawn, exact, strict=True)])
    guards = np.geomspace(1e-4, 1, 25)
    estimate = np.full(error.shape, guards[-1])
    for guard in guards[::-1]:
        for i, got in enumerate(steps(index, float(guard), 12, heads=2, isa=isa)):
            kept = (got["output"] == drawn[i]["output"]).reshape(error.shape[1], -1).all(1)
            estimate[i][kept] = guard
    ratio = np.sqrt(np.mean(estimate**2) / np.mean(error**2))
    assert 1 / 3 < ratio < 3


def test_short_rows_have_nothing_to_doubt() -> None:
    counted()
    case = Case(INDEXES["sketch"], attributes={"guard": 1e-9})
    case.step(case.tokens(100))
    case.step(case.tokens(1))
    assert counted() == (0, 0)


@pytest.mark.parametrize("guard", [-0.1, 1.5, float("nan")])
def test_refusal(guard: float) -> None:
    with pytest.raises(Exception, match=r"guard is .*; allowed are 0 to 1"):
        Case(INDEXES["sketch"], attributes={"guard": guard})


@needs_library
def test_session_counts(tmp_path: Path) -> None:
    """From `plan lsh --guard` to the figures of a run; the plan file keeps the guard."""
    params = LshParams("sketch", 64, fraction=0.02, guard=1e-6)
    done = export_rules(tmp_path, [[HeadRule("lsh", lsh=params)] * 2] * 2, n_max=1024)
    sample_always(done.folder)
    session = opened(done.folder, "library")
    session.prefill(0, tokens(900))
    before = session.backend
    steps_of_model(session, 0, 3)
    after = session.backend
    for name in ("guarded_steps", "guarded_steps_exact"):
        assert after[name] - before[name] == 12  # three steps, two layers, two KV heads
    assert Plan.load(done.folder / "plan.json").rules[0][0].lsh == params
