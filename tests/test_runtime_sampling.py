"""Sampling against distributions worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.runtime.sampling import Sampler, Sampling

LOGITS = np.log(np.array([0.05, 0.4, 0.15, 0.3, 0.1], dtype=np.float32))


def drawn(sampling: Sampling, logits: np.ndarray = LOGITS, times: int = 4000) -> np.ndarray:
    """Share of each token in many draws."""
    sampler = Sampler(sampling, len(logits))
    return np.bincount([sampler.pick(logits) for _ in range(times)], minlength=len(logits)) / times


def test_temperature_0_is_greedy_and_takes_the_first_of_equals() -> None:
    sampler = Sampler(Sampling(), 4)
    assert sampler.pick(np.array([0, 2, 2, 1], dtype=np.float32)) == 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0, seed=1), [0.05, 0.4, 0.15, 0.3, 0.1]),
        (Sampling(temperature=0.5, seed=1), [0.0088, 0.5614, 0.0789, 0.3158, 0.0351]),
        (Sampling(temperature=1.0, top_k=2, seed=1), [0, 0.5714, 0, 0.4286, 0]),
        (Sampling(temperature=1.0, top_p=0.7, seed=1), [0, 0.5714, 0, 0.4286, 0]),
        (Sampling(temperature=1.0, top_p=0.71, seed=1), [0, 0.4706, 0.1765, 0.3529, 0]),
        (Sampling(temperature=1.0, min_p=0.3, seed=1), [0, 0.4706, 0.1765, 0.3529, 0]),
        # top-p is taken of what top-k leaves: 0.5714 of it is the first token.
        (Sampling(temperature=1.0, top_k=2, top_p=0.57, seed=1), [0, 1, 0, 0, 0]),
        (Sampling(temperature=1e-9, seed=1), [0, 1, 0, 0, 0]),
        (Sampling(temperature=5e-324, seed=1), [0, 1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    # 4000 draws: three standard deviations are at most 0.024.
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.03)
    assert not drawn(sampling)[np.array(expected) == 0].any()


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), 3)
    logits = np.array([3.0, 2.0, -1.0], dtype=np.float32)
    assert sampler.pick(logits) == 0
    sampler.observe([0])
    assert sampler.pick(logits) == 1  # 1.5, 2, -1
    sampler.observe([1])
    assert sampler.pick(logits) == 0  # 1.5, 1, -1
    assert sampler.pick(np.array([-1.0, -1.5, -1.8], dtype=np.float32)) == 2  # -2, -3, -1.8


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_extreme_penalties_keep_large_logits_finite(penalty: float) -> None:
    sampler = Sampler(Sampling(repetition_penalty=penalty), 3)
    sampler.observe([0])
    assert sampler.pick(np.array([1e4, 2e4, -1e4], dtype=np.float32)) == (0 if penalty < 1 else 1)


def test_seed_repeats_and_rows_differ() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    logits = np.zeros(1000, dtype=np.float32)
    draws = [[Sampler(sampling, 1000, row).pick(logits) for row in range(4)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.sampled_from([1, 2, 7, 1500]),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_a_token_outside_the_filters_is_never_drawn(seed: int, vocab: int, top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab).astype(np.float32)
    sampler = Sampler(Sampling(1.0, top_k, top_p, min_p, seed=seed), vocab)
    p = np.exp(logits.astype(np.float64))
    order = np.argsort(-p, kind="stable")
    order = order[: top_k or vocab]
    mass = p[order] / p[order].sum()
    order = order[np.cumsum(mass) - mass < top_p + 1e-6]
    allowed = {int(token) for token in order if p[token] >= (min_p - 1e-6) * p.max()}
    assert all(sampler.pick(logits) in allowed for _ in range(20))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.5}, "--top-p"),
        ({"min_p": 2.0}, "--min-p"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"repetition_penalty": 5e-324}, "--repetition-penalty"),
        ({"repetition_penalty": 101.0}, "--repetition-penalty"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_out_of_range_name_the_option(wrong: dict, name: str) -> None:
    with pytest.raises(UserError, match=name):
        Sampling(**wrong)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(RuntimeError, match="usable"):
        Sampler(Sampling(), 3).pick(np.array([0, bad, 1], dtype=np.float32))
