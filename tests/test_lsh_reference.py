"""The reference of LshAttention, by itself: its hashes and probabilities, its edges, the state of a row."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from lsh_kinds import DIM, KINDS, clustered, signature
from lsh_reference import (
    LshReference,
    attend,
    codes,
    estimate,
    exact_attention,
    log_binomial,
    merge,
    scores_of,
    signs,
)  # fmt: skip
from scipy import stats


def test_codes_keep_every_bit() -> None:
    """A packing through fp16 loses bits from 2048 on; 15 bits make 32768 different codes, the first bit being the least."""
    for width in range(1, 16):
        every = (np.arange(2**width)[:, None] >> np.arange(width)) & 1 > 0
        np.testing.assert_array_equal(codes(every, width)[:, 0], np.arange(2**width))
        assert codes(np.ones(3 * width, bool), width).tolist() == [2**width - 1] * 3
    w = np.array([[1.0, -1, 1, 0], [1, 1, -1, 0]])
    assert signs(np.array([1.0, 1]), w).tolist() == [True, False, False, False]
    assert codes(signs(np.array([2.0, 1]), w), 2).tolist() == [1, 1]
    marks = KINDS["tables(15,4), one"].marks(np.random.default_rng(0).standard_normal((9, DIM)))
    assert (marks.max() > 2048, marks.shape) == (True, (9, 4))


def test_log_binomial_sums_its_terms() -> None:
    """Against exact integers of math.comb, and both tails of scipy's."""
    for n, p, first, last in ((1, 0.3, 1, 1), (150, 0.001, 2, 150), (256, 0.5, 0, 105), (64, 0.999, 0, 3), (1024, 0.2, 4, 1024)):
        got = log_binomial(n, np.log([p]), np.log1p([-p]), first, last)[0]
        want = math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(first, last + 1))
        np.testing.assert_allclose(np.exp(got), want, rtol=1e-10)
        np.testing.assert_allclose(np.exp(got), stats.binom.cdf(last, n, p) - stats.binom.cdf(first - 1, n, p), rtol=1e-7)


def test_inclusion_is_the_published_one() -> None:
    """Equation 10 of the paper and the binomial CDF, at the cosines of the published table, rounded as there."""
    cosine = np.array([0, 0.2, 0.4, 0.6])
    for kind, want in (
        ("tables(10,150)", [0.010, 0.087, 0.443, 0.943]),
        ("tables(8,75)", [0.035, 0.180, 0.565, 0.947]),
        ("signature(128,47)", [0.002, 0.069, 0.523, 0.968]),
        ("signature(256,105)", [0.002, 0.222, 0.923, 1.000]),
    ):
        np.testing.assert_allclose(np.exp(KINDS[kind].log_inclusion(cosine)), want, atol=6e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_inclusion_of_the_planner_is_the_same(kind: str) -> None:
    from attnspan.planner import lsh
    from attnspan.planner.rules import LshParams

    hashing, cosine = KINDS[kind], np.array([-1, -0.9, -0.3, 0, 0.05, 0.31, 0.8, 0.999, 1, 1.0000001])
    if hashing.index == "tables":
        params = LshParams("tables", 64, hashing.bits, hashing.tables, hashing.min_collisions)
    else:
        params = LshParams("signature", 64, signature_bits=hashing.projection.shape[1], max_hamming=hashing.max_hamming[0])
    got = lsh.inclusion(params, cosine)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.exp(hashing.log_inclusion(cosine)), rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_the_cosine(kind: str) -> None:
    """A key equal to the query is always drawn, with u = 1 (a cosine above 1 is rounding); its opposite is drawn never."""
    rng = np.random.default_rng(9)
    hashing, query = KINDS[kind], rng.standard_normal(DIM).astype(np.float32).astype(np.float64)
    keys = np.stack([query, 3 * query, 1e-6 * query, -query])
    assert hashing.draws(hashing.marks(query), hashing.marks(keys)).tolist() == [True, True, True, False]
    assert hashing.log_inclusion(np.array([1.0, 1 + 1e-6])).tolist() == [0, 0]
    assert hashing.log_inclusion(np.array([-1.0, -1 - 1e-6])).max() < -200
    output, lse, _ = estimate(hashing, query, keys[:1], np.ones((1, DIM)), np.zeros(DIM), 1.0)
    np.testing.assert_allclose((*output, lse), (*np.ones(DIM), query @ query), rtol=1e-12)


def test_all_bits_may_differ() -> None:
    """A threshold of the whole signature draws everything, with u = 1: exact attention."""
    rng = np.random.default_rng(10)
    keys, values, query = clustered(rng, 300, DIM)
    output, lse, drawn = estimate(signature(rng, 64, 64), query, keys, values, keys.mean(0), 0.2)
    assert drawn.all()
    want, want_lse = exact_attention(query, keys, values, 0.2)
    np.testing.assert_allclose((*output, lse), (*want, want_lse), rtol=1e-12)


def test_scores_that_differ_by_hundreds() -> None:
    """Far beyond what exp of fp32 holds: the result is finite, and the one key that counts is what is left."""
    rng = np.random.default_rng(12)
    keys, values, query = clustered(rng, 500, DIM)
    keys[77] = query
    for scale in (20.0, 2000.0):
        score = scores_of(query, keys, scale)
        assert score.max() - score.min() > 100
        for h in (KINDS["tables(10,150)"], KINDS["signature(128,47)"]):
            output, lse, drawn = estimate(h, query, keys, values, keys.mean(0), scale)
            assert drawn[np.argmax(score)]
            want, want_lse = exact_attention(query, keys, values, scale)
            np.testing.assert_allclose(output, want, rtol=1e-3, atol=1e-3)
            assert abs(lse - want_lse) < 0.1


def test_merge_is_one_softmax() -> None:
    rng = np.random.default_rng(13)
    score, values = 300 * rng.standard_normal(40), rng.standard_normal((40, 5))
    cuts = [attend(score[a:b], values[a:b]) for a, b in ((0, 7), (7, 7), (7, 31), (31, 40))]
    assert cuts[1][1] == -math.inf
    (got, lse), (want, want_lse) = merge(cuts), attend(score, values)
    np.testing.assert_allclose((*got, lse), (*want, want_lse), rtol=1e-12)


def test_a_row_grows() -> None:
    """The state: nothing is indexed before there are 256 positions to index, a new mean begins at each doubling, and prefill in
    chunks, decode steps and a rewind end with the same index."""
    rng = np.random.default_rng(14)
    hashing = replace(signature(rng, 64, 20, dim=8), max_hamming=(20, 24))
    tokens = 1300
    query, key, value = (rng.standard_normal((tokens, width * 8)) + 0.5 for width in (4, 2, 2))

    def row() -> LshReference:
        return LshReference(hashing, 4, 2, 8, 1344, sink=4, window=16)

    grown, marks = row(), []
    for i in range(tokens):
        grown.step(query[i : i + 1], key[i : i + 1], value[i : i + 1], attended=False)
        marks.append((grown.indexed, len(grown.means)))
    assert marks[274] == (4, 0)
    assert marks[275] == (260, 1)
    assert marks[276] == (261, 1)
    assert (marks[530][1], marks[531][1], marks[1043][1], marks[-1]) == (1, 2, 3, (1284, 3))
    np.testing.assert_allclose(grown.means[1], grown.keys[:, 4:516].mean(1), rtol=1e-6)
    assert grown.mean_of(np.array([4, 259, 514, 515, 1283]), 1)[:, 0].tolist() == [grown.means[i][1, 0] for i in (0, 0, 0, 1, 2)]

    whole = row()
    prefill = whole.step(query[:1299], key[:1299], value[:1299])
    assert prefill is not None
    assert prefill.drawn == [None] * 4
    assert (whole.indexed, len(whole.means)) == (1283, 1)
    last = whole.step(query[1299:], key[1299:], value[1299:])
    assert last is not None
    assert last.drawn[0] is not None
    assert 4 <= last.drawn[0].min() <= last.drawn[0].max() < 1284
    exact = exact_attention(query[-1, :8], whole.keys[0, :1300], whole.values[0, :1300], 8**-0.5)
    assert abs(last.lse[0, 0] - exact[1]) < 0.6

    whole.rewind(700)
    assert (whole.indexed, len(whole.means)) == (700, 1)
    whole.rewind(0)
    assert (whole.indexed, len(whole.means)) == (4, 0)
