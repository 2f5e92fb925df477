"""The keys that `attnspan bench lsh` measures on, and what it says is drawn of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import sketch_reference as sketch

from attnspan.cpu_runtime.bench_lsh_draw import SignatureDraw, TablesDraw, relative_error, study, thresholds
from attnspan.cpu_runtime.bench_lsh_sketch import SketchDraw
from attnspan.cpu_runtime.lsh_keys import Capture, LayerKeys, captured, clustered, from_bf16, random, to_bf16
from attnspan.planner.lsh import inclusion, projection, signs
from attnspan.planner.rules import LshParams

WINDOW = SINK = 64


def spread_of(keys: LayerKeys, queries: int) -> dict[str, Any]:
    """Statistics of attention without sinks: cosines, effective sample size, mass of the heaviest keys, expected budgets."""
    cos_std, size, mass, budget = [], [], [], []
    group = keys.query.shape[1] // len(keys.key)
    indexes = [LshParams("tables", window=1, bits=k, tables=n, min_collisions=2) for k, n in ((10, 150), (9, 75), (8, 75))]
    for h, bits in enumerate(keys.key):
        key = from_bf16(bits)
        norm = np.linalg.norm(key, axis=1)
        for query in keys.query[:queries, h * group : (h + 1) * group].reshape(-1, key.shape[1]):
            score = key @ query
            cos = score / norm / np.linalg.norm(query)
            weight = np.exp((score - score.max()) * keys.scale)
            weight /= weight.sum()
            heavy = np.sort(weight)[::-1].cumsum()
            cos_std.append(cos.std())
            size.append(1 / (weight**2).sum())
            mass.append([heavy[int(share * len(heavy)) - 1] for share in (0.0002, 0.001, 0.01, 0.05, 0.2)])
            budget.append([inclusion(params, cos).mean() for params in indexes])
    return {"cos": np.mean(cos_std), "size": np.median(size), "mass": np.mean(mass, 0), "budget": 100 * np.mean(budget, 0)}


def test_clustered_keys_are_those_of_the_published_budgets() -> None:
    got = spread_of(clustered(16384, 0, 32, 8, 128), 3)
    assert got["cos"] == pytest.approx(0.103, abs=0.005)
    assert got["size"] == pytest.approx(328, rel=0.15)
    np.testing.assert_allclose(got["mass"], [0.101, 0.188, 0.399, 0.625, 0.848], rtol=0.08)
    np.testing.assert_allclose(got["budget"], [1.84, 1.63, 5.0], rtol=0.05)


def test_random_keys() -> None:
    keys = random(16384, 0, 8, 2, 128)
    got = spread_of(keys, 17)
    assert got["cos"] == pytest.approx(0.088, abs=0.002)
    assert got["size"] == pytest.approx(5961, rel=0.06)
    np.testing.assert_allclose(got["mass"], [0.005, 0.018, 0.093, 0.261, 0.564], rtol=0.15)
    assert from_bf16(keys.value).std() == pytest.approx(1, abs=0.01)


def test_keys_repeat_by_seed_and_heads_differ() -> None:
    one, same, other = (clustered(512, 64, 4, 2, 64, seed) for seed in (3, 3, 4))
    for name in ("key", "value", "query"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert (getattr(one, name) != getattr(other, name)).mean() > 0.9
    assert (one.key[0] != one.key[1]).mean() > 0.9
    np.testing.assert_array_equal(from_bf16(to_bf16(one.query)), one.query)
    short = one.cut(400)
    assert (short.context, short.key.shape) == (400, (2, 464, 64))


def test_rounding_to_bfloat16() -> None:
    x = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    x[:3] = [1.00390625, 1.01171875, -0.0]  # two ties
    np.testing.assert_array_equal(to_bf16(x), x.astype(ml_dtypes.bfloat16).view(np.uint16))


def _capture(tokens: int, queries: int, layers: list[int]) -> Capture:
    rng = np.random.default_rng(0)
    meta = {"model": "m", "layers": layers, "heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25}
    arrays: dict[str, Any] = {}
    for i in layers:
        arrays[f"q_{i}"] = rng.standard_normal((4, queries, 16)).astype(np.float16)
        arrays[f"k_{i}"], arrays[f"v_{i}"] = (to_bf16(rng.standard_normal((2, tokens, 16))) for _ in range(2))
    return Capture(Path("m.npz"), meta, arrays)


def test_captured_text_is_cut_or_repeated() -> None:
    capture = _capture(500, 100, [0, 3])
    whole = capture.joined("k")
    assert whole.shape == (4, 500, 16)
    for context in (300, 500, 1200):
        got = captured(capture, context, 50)
        np.testing.assert_array_equal(got.key[:, :64], whole[:, :64])
        near = min(context, 500) - 64
        np.testing.assert_array_equal(got.key[:, context - near : context], whole[:, 500 - near :])
        np.testing.assert_array_equal(got.key[:, context : context + 50], whole[:, 64:114])
        assert got.query.shape == (17, 8, 16)
        np.testing.assert_array_equal(got.query[-1], from_bf16(capture.joined("q"))[:, -1])
        assert got.spread <= context // 8
        assert got.scale == 0.25
    assert "repeated to 1200" in captured(capture, 1200, 50).source
    np.testing.assert_array_equal(captured(capture, 500, 0).key, whole)
    assert captured(capture, 500, 0, kv_heads=3).query.shape == (17, 6, 16)


def test_draws_are_what_they_say() -> None:
    rng = np.random.default_rng(1)
    key, query = rng.standard_normal((1000, 32)).astype(np.float32), rng.standard_normal((3, 32)).astype(np.float32)
    key[:500] += query[0]
    key, query = from_bf16(to_bf16(key)), from_bf16(to_bf16(query))
    above, w = (lambda x, w: x.astype(np.float64) @ w > 0), projection(32, 6 * 40, 0)
    tables = TablesDraw(w, 6, 40, 2, segment=400)
    tables.index(0, key)
    mask, read = tables.draw(query, 999, 30, 990)
    codes = [above(x, w).reshape(-1, 40, 6) for x in (query, key)]
    same = (codes[0][:, None] == codes[1][None]).all(-1)  # [3, 1000, 40]
    np.testing.assert_array_equal(mask, same.sum(-1)[:, 30:990] >= 2)
    buckets = [{tuple(code) for code in codes[0][:, table]} for table in range(40)]
    assert read == 2 * same.any(0).sum() + 3 * 64 * sum(map(len, buckets))
    w = projection(32, 64, 0)
    signature = SignatureDraw(w, [20])
    signature.index(0, key)
    mask, read = signature.draw(query, 999, 30, 990)
    distance = (above(query, w)[:, None] != above(key, w)[None]).sum(-1)
    np.testing.assert_array_equal(mask, distance[:, 30:990] <= 20)
    assert read == 8000


@pytest.mark.parametrize("dim", [128, 64, 80, 30, 3])
@pytest.mark.parametrize(("first", "last"), [(64, 6000), (10, 300), (64, 321)])
def test_sketches_draw_what_the_reference_does(dim: int, first: int, last: int) -> None:
    """Of few groups of tokens or many; a key without length, and one that is surely drawn. Rounding decides little."""
    rng = np.random.default_rng(dim)
    key, query = rng.standard_normal((last + 20, dim), np.float32), 2 * rng.standard_normal((2, dim), np.float32)
    signs_, scale, head, at = signs(dim, 1), dim**-0.5, 3, last + 19
    key[first + 1], key[first + 2] = 0, 8 * query[0] / (query[0] @ query[0] * scale)
    draw = SketchDraw(signs_, 0.05, scale)
    draw.index(head, key)
    mask, read = draw.draw(query, at, first, last)
    assert mask.shape == (2, last - first)
    assert read == (-(-dim // 4) + 2) * (last - first)
    level, factor = sketch.encode(key, np.zeros(dim), signs_)
    position = np.arange(first, last)
    whole = sketch.sampled_groups(-(-first // 64), last // 64)
    seen = np.concatenate([np.arange(g * 64, g * 64 + 64) for g in whole])
    for g in range(2):
        y = sketch.SHARPNESS * factor * sketch.products(query[g] * np.float32(scale), level, signs_)
        drawn, log_p = sketch.draws(y[position], y[seen], position, 0.05, at, head * 2 + g)
        apart = np.abs(draw.log_inclusion(query[g], first, last) - log_p)
        assert np.median(apart) < 1e-3
        assert (apart > 0.1).mean() < 2e-3
        assert (mask[g] != drawn).mean() < 2e-3
        assert drawn.any()
        if last > 1000:
            assert drawn.mean() == pytest.approx(0.05, abs=0.01)
    assert mask[0, 2]
    assert (mask[0] != mask[1]).any()


def test_a_query_without_length_draws_evenly() -> None:
    draw = SketchDraw(signs(16, 0), 0.1, 0.25)
    draw.index(0, np.random.default_rng(0).standard_normal((3000, 16), np.float32))
    mask, _ = draw.draw(np.zeros((1, 16), np.float32), 2999, 64, 2900)
    np.testing.assert_allclose(np.exp(draw.log_inclusion(np.zeros(16, np.float32), 64, 2900)), 0.1, rtol=0.06)
    assert mask.mean() == pytest.approx(0.1, abs=0.01)


def test_study_counts_what_sketches_draw() -> None:
    """About the fraction, of every query; the index is read once for a group."""
    keys = clustered(4096, 0, 8, 2, 128)
    draws = [SketchDraw(signs(128, 0), share, keys.scale) for share in (0.02, 0.1)]
    some, more = study(keys, SINK, WINDOW, draws, topk=True).drawn
    assert some.counts.mean() / keys.context == pytest.approx(0.02, rel=0.1)
    assert more.counts.mean() / keys.context == pytest.approx(0.1, rel=0.1)
    assert some.topk_error.mean() > more.topk_error.mean()
    position = keys.context - 1 - keys.stride * np.arange(17)[::-1]
    np.testing.assert_array_equal(some.bytes, 2 * 34 * (position + 1 - WINDOW - SINK))
    fixed = 2 * (SINK + WINDOW)
    assert (some.rows <= some.counts.sum(1) + fixed).all()
    assert (some.rows >= some.counts.reshape(17, 2, 4).max(2).sum(1) + fixed).all()


def test_study() -> None:
    keys = replace(random(600, 10, 4, 2, 32), stride=3)
    most = SignatureDraw(projection(32, 64, 0), [64, 64])
    few = SignatureDraw(projection(32, 64, 0), [28, 28])
    got = study(keys, SINK, WINDOW, [most, few], topk=True)
    position = keys.context - 1 - 3 * np.arange(17)[::-1]
    sizes = np.zeros(4)
    for j, at in enumerate(position):
        key, value = (from_bf16(x).astype(np.float64)[:, : at + 1].repeat(2, 0) for x in (keys.key, keys.value))
        score = np.einsum("hd,htd->ht", keys.query[j], key) * keys.scale
        weight = np.exp(score - score.max(1, keepdims=True))
        want = np.einsum("ht,htd->hd", weight, value) / weight.sum(1, keepdims=True)
        assert relative_error(got.exact[j], want).max() < 1e-5
        sizes += weight.sum(1) ** 2 / (weight**2).sum(1) / 17
    np.testing.assert_allclose(got.weighty, sizes, rtol=1e-4)
    everything, some = got.drawn
    np.testing.assert_array_equal(everything.counts, np.repeat(position[:, None] + 1 - WINDOW - SINK, 4, 1))
    np.testing.assert_array_equal(everything.rows, 2 * (position + 1))
    assert everything.topk_error.max() < 1e-5
    assert 0 < some.counts.mean() < everything.counts.mean() / 2
    assert some.topk_error.min() > 1e-3


def test_thresholds_meet_the_share() -> None:
    keys = clustered(4096, 0, 8, 2, 128)
    matrix = projection(128, 256, 0)
    for per_head in (False, True):
        most = thresholds(keys, SINK, WINDOW, matrix, 0.05, per_head)
        counts = study(keys, SINK, WINDOW, [SignatureDraw(matrix, most)], topk=False).drawn[0].counts / keys.context
        assert counts.mean() == pytest.approx(0.05, rel=0.15)
        if per_head:
            assert np.abs(counts.reshape(17, 2, 4).mean((0, 2)) - 0.05).max() < 0.01
        else:
            assert len(set(most)) == 1
