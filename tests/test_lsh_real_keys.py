"""The estimator and the op on keys of the demo model over a book, after RoPE: nothing about them is Gaussian."""

from __future__ import annotations

import math
from pathlib import Path

import demo_model
import numpy as np
import pytest
from lsh_kinds import KINDS, repeated
from lsh_op import Case
from lsh_reference import Floats, Hashing, cosines, estimate, exact_attention, window_attention
from span_op import bfloat16

from attnspan.cpu_runtime.lsh_keys import Capture, from_bf16
from attnspan.export.cli import main

pytestmark = pytest.mark.model

TOKENS, LAYERS, DIM = 2048, (3, 12, 21), 64
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    file = tmp_path_factory.mktemp("keys") / "keys.npz"
    layers = ",".join(map(str, LAYERS))
    arguments = ["--builtin", "--tokens", str(TOKENS), "--layers", layers, "--queries", "8", "--dtype", "fp32", "-o", str(file)]
    assert main(["capture", str(demo_model.gguf()), *arguments]) == 0
    return Capture.load(Path(file))


def arrays(keys: Capture, layer: int) -> tuple[Floats, Floats, Floats]:
    """q [9, 8, 64], k and v [3, tokens, 64]."""
    q, k, v = (from_bf16(keys.arrays[f"{name}_{layer}"]).astype(np.float64) for name in "qkv")
    assert (q.shape, k.shape, v.shape) == ((9, 8, DIM), (3, TOKENS, DIM), (3, TOKENS, DIM))
    return q, k, v


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["tables(8,75)", "signature(128,47)"])
def test_frequencies(keys: Capture, layer: int, kind: str) -> None:
    """Shares drawn in bins of cosines, as in test_lsh_estimator; sinks are left out as the op does."""
    q, k, _ = arrays(keys, layer)
    rng = np.random.default_rng(layer)
    for head in (1, 7):
        query, centred = q[head, -1], k[head // 3, 64:] - k[head // 3, 64:].mean(0)
        cosine = cosines(query, centred)
        u = np.exp(KINDS[kind].log_inclusion(cosine))
        bins = np.digitize(cosine, np.quantile(cosine, np.linspace(0, 1, 9)[1:-1]))
        share = np.array([
            np.bincount(bins, h.draws(h.marks(query), h.marks(centred)) - u, 8) for h in repeated(KINDS[kind], rng, 80)
        ])  # fmt: skip
        error = np.maximum(share.std(0, ddof=1), np.sqrt(np.bincount(bins, u * (1 - u), 8))) / math.sqrt(len(share))
        assert np.abs(share.mean(0) / error).max() < 4


@pytest.mark.parametrize("layer", LAYERS)
def test_error(keys: Capture, layer: int) -> None:
    """Over all heads it falls with the budget, and is below that of a window of the same size, unless nearly nothing is drawn.
    Sinks and window are exact."""
    q, k, v = arrays(keys, layer)
    rng = np.random.default_rng(20)
    rms = []
    for most in (44, 49, 54):
        hashing = Hashing("signature", np.empty((DIM, 128)), max_hamming=(most,))
        errors = []
        for head in range(9):
            key, value = k[head // 3], v[head // 3]
            want, _ = exact_attention(q[head, -1], key, value, SCALE)
            for h in repeated(hashing, rng, 5):
                got, drawn = with_static_tokens(h, q[head, -1], key, value)
                other, _ = window_attention(q[head, -1], key, value, SCALE, 128 + drawn, sink=64)
                errors.append([np.linalg.norm(x - want) / np.linalg.norm(want) for x in (got, other)])
        rms.append(np.sqrt(np.mean(np.square(errors), 0)))
    assert rms[0][0] > rms[1][0] > rms[2][0]
    assert all(sampled < 0.75 * window for sampled, window in rms[1:])


def with_static_tokens(hashing: Hashing, query: Floats, key: Floats, value: Floats) -> tuple[Floats, int]:
    """Sinks and the last 64 tokens exactly, the rest sampled; and how many were drawn."""
    between = slice(64, len(key) - 64)
    static = np.r_[0:64, len(key) - 64 : len(key)]
    output, lse, drawn = estimate(hashing, query, key[between], value[between], key[between].mean(0), SCALE)
    exact, exact_lse = exact_attention(query, key[static], value[static], SCALE)
    part = 1 / (1 + np.exp(exact_lse - lse))
    return part * output + (1 - part) * exact, int(drawn.sum())


@pytest.mark.parametrize("layer", LAYERS)
def test_centring_is_essential(keys: Capture, layer: int) -> None:
    """Queries look away from the mean of the keys: without taking it off, every head draws far fewer."""
    q, k, _ = arrays(keys, layer)
    kind = KINDS["tables(10,150)"]
    drawn = np.array([
        [np.exp(kind.log_inclusion(cosines(q[head, -1], k[head // 3, 64:] - m))).mean() for m in (0, k[head // 3, 64:].mean(0))]
        for head in range(9)
    ])  # fmt: skip
    assert drawn[:, 0].mean() < 0.5 * drawn[:, 1].mean()
    assert drawn[:, 1].min() > 0.01


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["tables(8,75)", "signature(128,47)"])
@pytest.mark.parametrize("cache", [np.float32, bfloat16], ids=str)
def test_the_op(keys: Capture, layer: int, kind: str, cache: type) -> None:
    """The last tokens one by one, against the reference: nine query heads, three KV heads."""
    q, k, v = arrays(keys, layer)
    hashing = KINDS[kind]
    if hashing.index == "signature":
        hashing = Hashing("signature", hashing.projection, max_hamming=(47, 50, 53))
    case = Case(hashing, heads=9, kv_heads=3, dim=DIM, capacity=TOKENS, cache=cache, sink=64, window=64)

    def tokens(first: int, last: int) -> dict[str, np.ndarray]:
        query = q[:, first - TOKENS + 8 :][:, : last - first] if first >= TOKENS - 8 else np.zeros((9, last - first, DIM))
        each = {"query": query, "key": k[:, first:last], "value": v[:, first:last]}
        return {n: x.swapaxes(0, 1).reshape(1, last - first, -1).astype(np.float32) for n, x in each.items()}

    case.step(tokens(0, TOKENS - 8), compared=False)
    for at in range(TOKENS - 8, TOKENS):
        got, want = case.step(tokens(at, at + 1))
        assert want[0] is not None
        assert sum(len(drawn) for drawn in want[0].drawn if drawn is not None) > 90
        assert np.abs(got["output"][0] - want[0].output).max() <= 1e-3 * np.abs(want[0].output).max()
        assert np.abs(got["lse"][0] - want[0].lse).max() <= 1e-3
