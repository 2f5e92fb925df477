"""The mathematics of index `sketch`: rotations, estimates, probabilities, and the attention that is estimated with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sketch_reference as sketch
from hypothesis import given, settings
from hypothesis import strategies as st
from lsh_kinds import DIM, keys_of
from lsh_reference import Floats, Hashing, attend, estimate, exact_attention, hamming, scores_of, top_k_attention
from lsh_reference import signs as simhash
from scipy import stats

SCALE = DIM**-0.5


def signs(rng: np.random.Generator, dim: int = DIM) -> np.ndarray:
    return rng.choice([-1.0, 1.0], (dim, sketch.ROUNDS))


def estimated(query: Floats, keys: Floats, turn: np.ndarray) -> np.ndarray:
    """Estimated products of a query with keys, less their mean and with it again."""
    mean = keys.mean(0)
    level, factor = sketch.encode(keys, mean, turn)
    return factor * sketch.products(query.astype(np.float32), level, turn) + mean @ query


def sampled(
    query: Floats, keys: Floats, values: Floats, fraction: float, turn: np.ndarray, length: int
) -> tuple[Floats, np.ndarray, np.ndarray]:
    """Attention by sketches: output, which were drawn, log p of all."""
    y = sketch.SHARPNESS * estimated(query * SCALE, keys, turn).astype(np.float32)
    positions = np.arange(len(keys))
    drawn, log_p = sketch.draws(y, y[: len(y) // 64 * 64], positions, fraction, length, 0)
    return attend(scores_of(query, keys[drawn], SCALE) - log_p[drawn], values[drawn])[0], drawn, log_p


@settings(max_examples=40, deadline=None)
@given(dim=st.integers(4, 160), seed=st.integers(0, 2**32 - 1))
def test_rotations_keep_products(dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 3, dim)).astype(np.float32)
    turn = signs(rng, dim)
    np.testing.assert_allclose(sketch.rotate(a, turn) @ sketch.rotate(b, turn).T, a @ b.T, atol=1e-4 * dim)


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_estimates_are_right_on_average(dim: int) -> None:
    """Over rotations: no bias; errors as of two bits a dimension, a third of a product's usual size."""
    rng = np.random.default_rng(dim)
    keys, query = rng.standard_normal((200, dim)) * np.exp(rng.standard_normal((200, 1))), rng.standard_normal(dim)
    truth = keys @ query
    size = np.linalg.norm(keys - keys.mean(0), axis=1) * np.linalg.norm(query) / math.sqrt(dim)
    error = np.stack([(estimated(query, keys, signs(rng, dim)) - truth) / size for _ in range(400)])
    assert abs(error.mean()) < 0.01
    assert np.abs(error.mean(0)).max() < 0.12  # five deviations of a mean of 400
    assert 0.25 < error.std() < 0.45


def test_thresholds_are_even() -> None:
    """Any start gives every threshold the same chance, and 64 neighbours lie evenly."""
    t = np.exp(sketch.log_thresholds().astype(np.float64))
    assert len(t) == sketch.THRESHOLDS + sketch.GROUP
    ranks = np.arange(sketch.THRESHOLDS) + 0.5
    np.testing.assert_allclose(np.sort(t[: sketch.THRESHOLDS]), ranks / sketch.THRESHOLDS, rtol=1e-5)
    np.testing.assert_array_equal(t[: sketch.GROUP], t[sketch.THRESHOLDS :])
    runs = np.lib.stride_tricks.sliding_window_view(t, sketch.GROUP)
    below = (runs < 0.25).sum(1)
    assert below.min() >= 14
    assert below.max() <= 18
    starts = [sketch.start(n, head, group) for n in range(40) for head in range(8) for group in range(64)]
    assert stats.kstest(np.array(starts) / sketch.THRESHOLDS, "uniform").pvalue > 0.01


@pytest.mark.parametrize("distribution", ["random", "clustered"])
@pytest.mark.parametrize("fraction", [0.02, 0.2])
def test_keys_are_drawn_as_often_as_they_claim(distribution: str, fraction: float) -> None:
    """Chi-square over bins of p, over many steps: each step draws anew, with the same probabilities."""
    rng = np.random.default_rng(5)
    keys, values, query = keys_of(distribution, rng, 2048)
    turn, count, steps = signs(rng), np.zeros(2048), 500
    for length in range(2048, 2048 + steps):
        _, drawn, log_p = sampled(query, keys, values, fraction, turn, length)
        count += drawn
    p = np.exp(log_p.astype(np.float64))
    assert (count[p == 1] == steps).all()
    bins = np.digitize(p, np.quantile(p[p < 1], np.linspace(0, 1, 13)[1:-1]))
    expected = np.bincount(bins, p * steps * (p < 1), 13)
    got = np.bincount(bins, count * (p < 1), 13)
    spread = np.bincount(bins, p * (1 - p) * steps * (p < 1), 13)
    used = spread > 0
    assert stats.chi2.sf(((got - expected)[used] ** 2 / spread[used]).sum(), used.sum()) > 1e-3
    assert 0.8 * fraction < p.mean() < 1.25 * fraction


@pytest.mark.parametrize("distribution", ["random", "clustered"])
def test_the_estimate_is_right_and_errs_less_with_more(distribution: str) -> None:
    rng = np.random.default_rng(9)
    keys, values, query = keys_of(distribution, rng, 4096)
    exact = exact_attention(query, keys, values, SCALE)[0]
    turn, error, bias = signs(rng), [], []
    for fraction in (0.01, 0.04, 0.16):
        outputs = np.stack([sampled(query, keys, values, fraction, turn, n)[0] for n in range(120)])
        error.append(np.linalg.norm(outputs - exact, axis=1).mean() / np.linalg.norm(exact))
        bias.append(np.linalg.norm(outputs.mean(0) - exact) / np.linalg.norm(exact))
    assert error[1] < 0.7 * error[0]
    assert error[2] < 0.6 * error[1]
    assert all(b < 0.35 * e for b, e in zip(bias, error, strict=True))
    assert error[0] < 0.3


@pytest.mark.parametrize("distribution", ["random", "clustered"])
def test_against_top_k_and_signatures_of_the_same_budget(distribution: str) -> None:
    """At 2 % sketches (18 bytes a key) err less than signatures (32), and than exact Top-K where many keys matter a little."""
    rng = np.random.default_rng(11)
    error = np.zeros(3)
    for _ in range(12):
        keys, values, query = keys_of(distribution, rng, 8000)
        exact = exact_attention(query, keys, values, SCALE)[0]
        output, drawn, _ = sampled(query, keys, values, 0.02, signs(rng), 8000)
        projection, mean = rng.standard_normal((DIM, 256)), keys.mean(0)
        far = np.sort(hamming(simhash(query, projection), simhash(keys - mean, projection)))
        hashing = Hashing("signature", projection, max_hamming=(int(far[drawn.sum()]),))
        hashed = estimate(hashing, query, keys, values, mean, SCALE)
        assert hashed[2].sum() >= drawn.sum()
        top = top_k_attention(query, keys, values, SCALE, int(drawn.sum()))[0]
        error += [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (output, top, hashed[0])]
    assert error[0] < (0.6 if distribution == "clustered" else 1.2) * error[1]
    assert error[0] < 0.9 * error[2]


def test_edges() -> None:
    rng = np.random.default_rng(3)
    keys, values, query = keys_of("random", rng, 512)
    keys[7] = keys.mean(0)  # after that it has nearly no length
    for q in (query, 0 * query, 1e6 * query):
        output, drawn, _ = sampled(q, keys, values, 0.05, signs(rng), 512)
        assert np.isfinite(output).all()
        assert drawn.any()
    level, factor = sketch.encode(np.ones((3, DIM)), np.ones(DIM), signs(rng))
    assert (factor == 0).all()
    assert sketch.products(query, level, signs(rng)).shape == (3,)
