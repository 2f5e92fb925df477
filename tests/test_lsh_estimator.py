"""The estimator of LSH-sampled attention, without the op: how often keys are drawn, how far the result is from exact attention.

Everything is random over projections: a repetition draws a new one. Seeds are fixed, bounds are 4 standard errors or a
p-value of 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from lsh_kinds import DIM, KINDS, clustered, keys_of, repeated
from lsh_reference import (
    Array,
    Floats,
    Hashing,
    cosines,
    estimate,
    exact_attention,
    scores_of,
    top_k_attention,
    window_attention,
)  # fmt: skip
from scipy import stats


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_drawn_as_often_as_predicted(kind: str) -> None:
    """One key at each cosine, a new projection each time: independent counts, so chi-square has one degree for each."""
    rng = np.random.default_rng(1)
    hashing, dim, times = replace(KINDS[kind], projection=KINDS[kind].projection[:3]), 3, 300
    cosine = np.array([-0.99, -0.5, -0.2, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.99, 0.997, 0.9999])
    u = np.exp(hashing.log_inclusion(cosine))
    query = rng.standard_normal(dim)
    across = np.linalg.svd(query[None])[2][1]  # at a right angle to the query
    keys = 5 * (cosine[:, None] * query / np.linalg.norm(query) + np.sqrt(1 - cosine[:, None] ** 2) * across)
    np.testing.assert_allclose(cosines(query, keys), cosine, atol=1e-12)
    counts = np.zeros(len(cosine))
    for i, key in enumerate(keys):
        for fresh in repeated(hashing, rng, times):
            counts[i] += fresh.draws(fresh.marks(query), fresh.marks(key[None]))[0]
    told = (u * times > 4) & ((1 - u) * times > 4)
    chi2 = ((counts - u * times)[told] ** 2 / (times * u * (1 - u))[told]).sum()
    assert told.sum() >= 2
    assert stats.chi2.sf(chi2, told.sum()) > 1e-4
    for count, p in zip(counts[~told], u[~told], strict=True):  # a count where the normal law does not hold: its own tail
        assert min(stats.binom.cdf(count, times, p), stats.binom.sf(count - 1, times, p)) > 1e-5


def test_projections_of_the_planner_draw_as_predicted() -> None:
    """Its seeds are as good as fresh randomness, its values, exact in bfloat16, as good as any."""
    from attnspan.planner import lsh

    rng, times, cosine = np.random.default_rng(15), 400, np.array([0.2, 0.3, 0.4, 0.5])
    pair = np.linalg.qr(rng.standard_normal((DIM, 2)))[0].T
    keys = cosine[:, None] * pair[0] + np.sqrt(1 - cosine[:, None] ** 2) * pair[1]
    for kind in ("tables(8,75)", "signature(128,47)"):
        hashing = KINDS[kind]
        columns = hashing.projection.shape[1]
        counts = np.zeros(len(cosine))
        for seed in range(times):
            fresh = replace(hashing, projection=lsh.projection(DIM, columns, seed))
            counts += fresh.draws(fresh.marks(pair[0]), fresh.marks(keys))
        for count, u in zip(counts, np.exp(hashing.log_inclusion(cosine)), strict=True):
            assert stats.binomtest(int(count), times, u).pvalue > 1e-4


@pytest.mark.parametrize("distribution", ["random", "clustered"])
@pytest.mark.parametrize(
    "kind", ["tables(10,150)", "tables(2,3), one", "tables(5,40), four", "signature(64,22)", "signature(128,47)"]
)
def test_frequencies_by_cosine(distribution: str, kind: str) -> None:
    """Keys share their projection, so that draws of one repetition depend on each other: each repetition is one observation of
    the share drawn in each bin of cosines, and their mean is normal."""
    rng = np.random.default_rng(2)
    keys, _, query = keys_of(distribution, rng, 600)
    centred = keys - keys.mean(0)
    cosine = cosines(query, centred)
    u = np.exp(KINDS[kind].log_inclusion(cosine))
    bins = np.digitize(cosine, np.quantile(cosine, np.linspace(0, 1, 9)[1:-1]))
    share = np.array([
        np.bincount(bins, h.draws(h.marks(query), h.marks(centred)) - u, 8) for h in repeated(KINDS[kind], rng, 120)
    ])  # fmt: skip
    # What draws independent of each other would have is the least error there is; in a bin where all is rare, none may be seen.
    error = np.maximum(share.std(0, ddof=1), np.sqrt(np.bincount(bins, u * (1 - u), 8))) / math.sqrt(len(share))
    assert np.abs(share.mean(0) / error).max() < 4
    assert np.bincount(bins, u, 8).sum() > 3


def errors(hashing: Hashing, keys: Array, values: Array, query: Array, mean: Array, times: int, weighted: bool = True) -> Floats:
    """Error vector of the output, relative to the length of the exact one, of each repetition. [times, dim]"""
    rng = np.random.default_rng(3)
    scale = 1 / math.sqrt(DIM)
    want, _ = exact_attention(query, keys, values, scale)
    got = []
    for h in repeated(hashing, rng, times):
        output, _, drawn = estimate(h, query, keys, values, mean, scale)
        if not weighted:
            output, _ = exact_attention(query, keys[drawn], values[drawn], scale)
        got.append((output - want) / np.linalg.norm(want))
    return np.array(got)


@pytest.mark.parametrize("distribution", ["random", "clustered"])
def test_bias_and_variance_shrink_with_the_budget(distribution: str) -> None:
    keys, values, query = keys_of(distribution, np.random.default_rng(4), 1200)
    mean = keys.mean(0)
    for family in (
        [Hashing("tables", np.empty((DIM, 7 * count)), 7, count) for count in (20, 60, 180)],
        [Hashing("signature", np.empty((DIM, 128)), max_hamming=(most,)) for most in (44, 50, 57)],
        [Hashing("signature", np.empty((DIM, bits)), max_hamming=(most,)) for bits, most in ((64, 21), (128, 50), (256, 111))],
    ):
        each = [errors(hashing, keys, values, query, mean, 40) for hashing in family]
        spread = [float(e.std(0).mean()) for e in each]
        bias = [float(np.linalg.norm(e.mean(0))) for e in each]
        assert spread[0] > 1.2 * spread[1] > 1.4 * spread[2]
        assert bias[2] < bias[0]
        assert bias[2] < 3 * np.linalg.norm(each[2].std(0)) / math.sqrt(40)  # no bias left that 40 repetitions could show


@pytest.mark.parametrize("shift", ["none", "mean", "half the mean", "another"])
@pytest.mark.parametrize("kind", ["tables(5,40), four", "signature(64,22)"])
def test_any_mean_is_right(shift: str, kind: str) -> None:
    """The weighted sums are unbiased whatever is taken from the keys before they are hashed; their mean is merely better."""
    rng = np.random.default_rng(5)
    keys, values, query = clustered(rng, 600, DIM)
    query *= 0.5  # so that the many keys with a small u count
    keys -= 0.8 * keys.mean(0)
    mean = {"none": 0, "mean": 1, "half the mean": 0.5, "another": 0}[shift] * keys.mean(0)
    mean = mean + (shift == "another") * 0.3 * rng.standard_normal(DIM)
    score = scores_of(query, keys, 1 / math.sqrt(DIM))
    weight = np.exp(score - score.max())
    sums = []
    for h in repeated(KINDS[kind], rng, 150):
        drawn = h.draws(h.marks(query), h.marks(keys - mean))
        raised = weight[drawn] * np.exp(-h.log_inclusion(cosines(query, keys[drawn] - mean)))
        sums.append(np.append(raised @ values[drawn], raised.sum()))
    got, error = np.mean(sums, 0), np.std(sums, 0, ddof=1) / math.sqrt(len(sums))
    want = np.append(weight @ values, weight.sum())
    z = (got - want) / error
    assert np.abs(z).max() < 4
    assert stats.chi2.sf(z[-1] ** 2, 1) > 1e-4
    assert error[-1] < 0.25 * want[-1]  # the test can tell: a factor of two in u would show


def test_centring_matters() -> None:
    """Keys far from the origin, as real ones are: without a mean they all lie on one side of every plane."""
    keys, _, query = clustered(np.random.default_rng(6), 1000, DIM)
    query = query - 2 * keys.mean(0)  # the common part of the keys points away from the query
    raw, centred = (np.exp(KINDS["tables(10,150)"].log_inclusion(cosines(query, keys - m))).sum() for m in (0, keys.mean(0)))
    assert raw < 0.2 * centred


@pytest.mark.parametrize("kind", ["tables(8,75)", "tables(10,150)", "signature(128,47)", "signature(256,105)"])
def test_weights_matter(kind: str) -> None:
    """Dropping -log u costs far more than sampling itself."""
    keys, values, query = clustered(np.random.default_rng(7), 3000, DIM)
    rms = [np.sqrt((errors(KINDS[kind], keys, values, query, keys.mean(0), 25, w) ** 2).sum(1).mean()) for w in (True, False)]
    assert rms[0] < 0.75 * rms[1]


def test_against_top_k_and_a_window_of_the_same_budget() -> None:
    """A flat head, whose values go with the scores and whose topics drift: neither the highest scores nor the last keys are a
    sample of it."""
    keys, values, query = clustered(np.random.default_rng(8), 3000, DIM)
    query *= 0.25
    keys = keys[np.argsort(keys[:, 0])]
    scale, mean, hashing = 1 / math.sqrt(DIM), keys.mean(0), KINDS["tables(8,75)"]
    score = scores_of(query, keys, scale)
    values += 0.5 * ((score - score.mean()) / score.std() + np.linspace(-1, 1, len(keys)))[:, None]
    count = round(float(np.exp(hashing.log_inclusion(cosines(query, keys - mean))).sum()))
    want, want_lse = exact_attention(query, keys, values, scale)
    sampled = np.sqrt((errors(hashing, keys, values, query, mean, 25) ** 2).sum(1).mean())
    assert count < 400
    for other in (top_k_attention, window_attention):
        output, lse = other(query, keys, values, scale, count)
        assert np.linalg.norm(output - want) / np.linalg.norm(want) > sampled
        assert lse < want_lse
        output, lse = other(query, keys, values, scale, len(keys))
        np.testing.assert_allclose((*output, lse), (*want, want_lse), rtol=1e-12)


@pytest.mark.parametrize("kind", ["tables(2,3), one", "tables(8,75)", "signature(64,22)", "signature(128,47)"])
@pytest.mark.parametrize("nought", ["key", "query"])
def test_a_vector_without_length(kind: str, nought: str) -> None:
    """It has no bit set, any other vector half of them: it is drawn as an orthogonal one."""
    rng = np.random.default_rng(11)
    vector = {"key": np.zeros(DIM), "query": np.zeros(DIM), "other": rng.standard_normal(DIM)}
    query, key = (vector["other"], vector["key"]) if nought == "key" else (vector["query"], vector["other"])
    assert cosines(query, key[None]).tolist() == [0]
    times = 600
    drawn = [h.draws(h.marks(query), h.marks(key[None]))[0] for h in repeated(KINDS[kind], rng, times)]
    p = float(np.exp(KINDS[kind].log_inclusion(np.zeros(1)))[0])
    assert stats.binomtest(int(np.sum(drawn)), times, p).pvalue > 1e-4
