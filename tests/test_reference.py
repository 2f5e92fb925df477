"""The NumPy reference against itself: a result may not depend on how the text is cut."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from reference import held_positions, slot_of, span_attention_reference


def test_slots_hold_the_sinks_and_the_last_tokens() -> None:
    assert [slot_of(p, 6, 2) for p in range(9)] == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    np.testing.assert_array_equal(held_positions(9, 6, 2), [0, 1, 6, 7, 8, 5])
    np.testing.assert_array_equal(held_positions(3, 6, 2), [0, 1, 2, -1, -1, -1])


@pytest.mark.parametrize("cache", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_cuts_do_not_matter(cache: type) -> None:
    rng, capacity, tokens = np.random.default_rng(0), [12, 20], 40
    query = rng.standard_normal((1, tokens, 4 * 8))
    key, value = rng.standard_normal((2, 1, tokens, 2 * 8))
    scales = {"key_scale": np.array([0.02, 0.03]), "value_scale": np.array([0.025, 0.02])} if cache is np.int8 else {}

    def run(chunks: list[int]) -> tuple[np.ndarray, np.ndarray]:
        past_key, past_value = np.zeros((2, 1, sum(capacity), 8), cache)
        at, outputs = 0, []
        for chunk in chunks:
            part = slice(at, at + chunk)
            output, past_key, past_value, _ = span_attention_reference(
                query[:, part],
                key[:, part],
                value[:, part],
                past_key,
                past_value,
                np.array([at]),
                np.array([[9, 20]]),
                capacity,
                sink=4,
                **scales,
            )
            outputs.append(output)
            at += chunk
        return np.concatenate(outputs, 1), past_key

    whole, cache_after = run([tokens])
    for chunks in ([1] * tokens, [3, 30, 7]):
        cut, cut_cache = run(chunks)
        np.testing.assert_allclose(cut, whole, atol=1e-12)
        np.testing.assert_array_equal(cut_cache, cache_after)


def test_dense_span_is_plain_attention() -> None:
    rng = np.random.default_rng(1)
    query, key, value = rng.standard_normal((3, 1, 10, 8))
    past = np.zeros((1, 16, 8))
    output, *_ = span_attention_reference(query, key, value, past, past, np.array([0]), np.array([[16]]), [16], sink=4)
    score = np.where(np.tri(10, dtype=bool), query[0] @ key[0].T / np.sqrt(8), -np.inf)
    weight = np.exp(score - score.max(1, keepdims=True))
    np.testing.assert_allclose(output[0], weight / weight.sum(1, keepdims=True) @ value[0], atol=1e-12)
