"""Spans of a rule, and what a rule refuses."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule, LshParams, span_tokens

ALPHAS = st.integers(-8192, 16384)
EIGHTHS = st.integers(0, 8)
LENGTHS = st.integers(0, 200_000)


def reference_span(alpha: int, eighths: int, n: int) -> int:
    """The rule in exact arithmetic."""
    wanted = min(alpha + Fraction(eighths, 8) * n, Fraction(n))
    return max(128, 64 * math.ceil(wanted / 64))


@pytest.mark.parametrize(
    ("alpha", "beta", "n", "span"),
    [
        (0, 0.5, 8192, 4096),
        (0, 1, 8192, 8192),
        (-1024, 1, 8192, 7168),
        (-1024, 1, 1000, 128),  # below the smallest span
        (8192, 0, 2048, 2048),  # never longer than the sequence
        (0, 0.5, 1000, 512),  # 500 rounded up
        (0, 0.125, 0, 128),
        (0, 1, 129, 192),  # rounding passes n by up to 63 tokens
    ],
)
def test_span_examples(alpha: float, beta: float, n: int, span: int) -> None:
    assert HeadRule("span", alpha, beta).span(n) == span


@given(ALPHAS, EIGHTHS, LENGTHS)
def test_span_matches_exact_arithmetic(alpha: int, eighths: int, n: int) -> None:
    assert int(span_tokens(alpha, eighths / 8, n)) == reference_span(alpha, eighths, n)


@given(st.floats(-1e5, 1e5), st.floats(0, 1), LENGTHS, LENGTHS)
def test_span_is_monotonic_blocked_and_bounded(alpha: float, beta: float, n: int, m: int) -> None:
    short, long = sorted((n, m))
    spans = span_tokens(alpha, beta, [short, long])
    assert spans.dtype == np.int32
    assert spans[0] <= spans[1]
    assert (spans % 64 == 0).all()
    assert (spans >= 128).all()
    assert spans[1] <= max(128, long + 63)


def test_span_tokens_broadcasts() -> None:
    spans = span_tokens(np.zeros((3, 2, 1)), np.array([[0.25], [0.5]]), np.array([1024, 2048, 4096, 8192]))
    assert spans.shape == (3, 2, 4)
    assert spans[2, 1].tolist() == [512, 1024, 2048, 4096]


def test_the_longest_length_fits_int32() -> None:
    assert int(span_tokens(2.0**30, 1.0, 2**30)) == 2**30


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "windowed"}, "span, dense, lsh"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": math.nan}, "beta is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"alpha": "64"}, "alpha is '64'"),
        ({"alpha": True}, "alpha is True"),
        ({"mode": "dense", "beta": 0.5}, "mode 'dense'"),
        ({"mode": "lsh"}, "lsh is None"),
        ({"mode": "span", "lsh": LshParams("exact", 64)}, "mode 'lsh' only"),
    ],
)
def test_rule_refuses(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        HeadRule(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"index": "tree", "window": 64}, "sketch, signature, tables, exact"),
        ({"index": "exact", "window": 0}, "window is 0"),
        ({"index": "exact", "window": 64, "bits": 10}, "does not take it"),
        ({"index": "exact", "window": 64, "guard": 0.5}, "guard is 0.5: index 'exact' does not take it; remove --guard"),
        ({"index": "exact", "window": 64, "min_inclusion": 0.1}, "index 'exact' does not take it; remove --min-inclusion"),
        ({"index": "tables", "window": 64, "bits": 10, "tables": 150}, "min_collisions is None"),
        ({"index": "tables", "window": 64, "bits": 10, "tables": 4, "min_collisions": 5}, "from 1 to 4"),
        ({"index": "tables", "window": 64, "bits": 10, "tables": 9, "min_collisions": 5}, "to 4; change --min-collisions"),
        ({"index": "tables", "window": 64, "bits": 0, "tables": 4, "min_collisions": 2}, "bits is 0"),
        ({"index": "tables", "window": 64, "bits": 16, "tables": 4, "min_collisions": 2}, "bits is 16.*1 to 15; change --bits"),
        ({"index": "tables", "window": 64, "bits": 9, "tables": 1025, "min_collisions": 2}, "1 to 1024; change --tables"),
        ({"index": "signature", "window": 64, "signature_bits": 100, "max_hamming": 9}, "is 100: must be 64, 128 or 256"),
        ({"index": "signature", "window": 64, "signature_bits": 128, "max_hamming": 129}, "from 0 to 128; change --max-hamming"),
        ({"index": "signature", "window": 64, "signature_bits": 64, "max_hamming": 65}, "from 0 to 64"),
        ({"index": "sketch", "window": 64, "fraction": 0}, "fraction is 0.0: must be above 0 and at most 0.5; change --fraction"),
        ({"index": "sketch", "window": 64, "fraction": 1e-50}, "fraction is 1e-50: must be above 0"),
        ({"index": "sketch", "window": 64, "fraction": 0.6}, "fraction is 0.6: must be a number from 0 to 0.5"),
        ({"index": "sketch", "window": 64, "fraction": math.nan}, "fraction is nan"),
        ({"index": "sketch", "window": 64, "fraction": True}, "fraction is True"),
        ({"index": "sketch", "window": 64, "fraction": "0.1"}, "fraction is '0.1'"),
        ({"index": "sketch", "window": 64, "min_inclusion": 0.05}, "min_inclusion is 0.05: index 'sketch' does not take it"),
        ({"index": "sketch", "window": 64, "min_inclusion": -1}, "min_inclusion is -1: must be a number from 0 to 1"),
        ({"index": "sketch", "window": 64, "max_hamming": 0}, "max_hamming is 0: index 'sketch' does not take it"),
        ({"index": "sketch", "window": 64, "bits": 0}, "bits is 0: index 'sketch' does not take it"),
        ({"index": "exact", "window": 64, "fraction": 0.02}, "index 'exact' does not take it; remove --fraction"),
        ({"index": "exact", "window": 64, "seed": -1}, "seed is -1"),
        ({"index": "exact", "window": 64, "min_inclusion": 1.5}, "min_inclusion is 1.5: must be a number from 0 to 1"),
    ],
)
def test_lsh_refuses(values: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LshParams(**values)  # type: ignore[arg-type]


def test_the_fraction_of_a_sketch() -> None:
    """It has a default, and an integer is a number; other indexes have none."""
    assert LshParams("sketch", 64).fraction == 0.02
    assert LshParams("sketch", 64) == LshParams("sketch", 64, fraction=0.02, min_inclusion=0)
    assert LshParams("sketch", 64, fraction=0.5).fraction == 0.5
    assert LshParams("exact", 64).fraction is None
