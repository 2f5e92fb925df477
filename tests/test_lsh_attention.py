"""LshAttention on the CPU against the NumPy reference: every instruction set, cache type and index; growth, forks, rewinds."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lsh_op
import numpy as np
import pytest
from lsh_op import Case
from lsh_reference import Hashing, Step
from span_op import bfloat16

from attnspan.planner import lsh
from attnspan.planner.rules import LshParams

ISAS = lsh_op.isas()
MEANS = 19
"""Where the header of a state holds the number of means, in words of 32 bits."""
W128 = np.random.default_rng(3).standard_normal((16, 128), np.float32)
# Output and log-sum-exp. A wrongly drawn key or weight moves both by far more; in fp32 log u is interpolated.
TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 4e-3, bfloat16: 2e-2}


def hashing(index: str, dim: int = 16, kv_heads: int = 2, bits: int = 4, tables: int = 12, least: int = 2) -> Hashing | None:
    """One that draws a sixth of random keys or so, every KV head by another threshold."""
    if index == "exact":
        return None
    rng = np.random.default_rng(dim)
    if index == "tables":
        return Hashing("tables", rng.standard_normal((dim, bits * tables), np.float32), bits, tables, least)
    if index == "sketch":
        return Hashing("sketch", rng.choice([-1.0, 1.0], (dim, 4)), fraction=0.15)
    size = int(index.removeprefix("signature"))
    most = tuple(int(size / 2 - size**0.5 * (0.5 + 0.1 * h)) for h in range(kv_heads))
    return Hashing("signature", rng.standard_normal((dim, size), np.float32), max_hamming=most)


def check(got: dict[str, np.ndarray], want: list[Step | None], sampled: bool | None = None) -> None:
    """The node gave what the references gave; `sampled`: whether some key must have been drawn, or the call be exact."""
    for b, step in enumerate(want):
        assert step is not None
        if sampled is not None:
            assert all((drawn is not None and len(drawn) > 0) == sampled for drawn in step.drawn)
        tolerance = TOLERANCE[got["output"].dtype]
        error = np.abs(got["output"][b].astype(np.float64) - step.output).max()
        assert error <= tolerance * max(1.0, float(np.abs(step.output).max()))
        some = np.isfinite(step.lse)  # all but of queries without a key
        np.testing.assert_array_equal(np.isneginf(got["lse"][b]), ~some)
        largest = float(np.abs(step.lse[some]).max(initial=1.0))
        assert np.abs(got["lse"][b][some] - step.lse[some]).max(initial=0.0) <= 1e-3 * largest


def grow(case: Case, chunks: list[int]) -> None:
    """Runs chunks of random tokens and checks all but the long; single tokens must be sampled once anything is indexed."""
    for count in chunks:
        got, want = case.step(case.tokens(count), compared=count < 100)
        if count < 100:
            check(got, want, count == 1 and case.hashing is not None and case.reference[0].indexed > case.sink)


def test_the_planner_knows_the_size_of_a_state() -> None:
    for kv, dim, capacity in ((1, 24, 64), (3, 80, 4160), (8, 128, 131072)):
        tables = LshParams("tables", 64, bits=10, tables=150, min_collisions=2)
        signature = LshParams("signature", 64, signature_bits=128, max_hamming=47)
        for params, hashes in (
            (tables, Hashing("tables", np.empty((dim, 1500)), 10, 150)),
            (signature, Hashing("signature", np.empty((dim, 128)))),
            (LshParams("exact", 64), None),
        ):
            assert lsh.state_bytes(params, kv, dim, capacity) == lsh_op.state_bytes(hashes, kv, dim, capacity)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", ["sketch", "tables", "signature64", "signature128", "signature256", "exact"])
@pytest.mark.parametrize("cache", [np.float32, np.float16, bfloat16, np.int8], ids=str)
def test_types(isa: str, index: str, cache: Any) -> None:
    for activation in (np.float32, np.float16 if cache == np.float16 else bfloat16):
        grow(Case(hashing(index), activation=activation, cache=cache, isa=isa), [337, 1, 1, 40, 1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", ["sketch", "tables", "signature64", "signature128"])
@pytest.mark.parametrize("dim", [8, 20, 24, 64, 80, 128])
def test_shapes(isa: str, index: str, dim: int) -> None:
    """Groups of every size that the kernels tell apart, sinks and windows at their edges, odd lengths."""
    for i, (group, kv, sink, window) in enumerate(
        ((1, 1, 0, 1), (3, 2, 4, 64), (4, 1, 64, 1), (7, 3, 64, 64), (2, 1, 1, 300), (5, 1, 63, 7))
    ):
        case = Case(
            hashing(index, dim, kv), heads=group * kv, kv_heads=kv, dim=dim, capacity=640, sink=sink, window=window, isa=isa
        )
        grow(case, [sink + window + 257 + i * 3, 1, 2, 1])


@pytest.mark.parametrize("index", ["sketch", "tables", "signature128"])
@pytest.mark.parametrize("attributes", [{"softcap": 3.0}, {"scale": 0.9}, {"dense_below": 401}, {"dense_below": -1}], ids=str)
def test_attributes(index: str, attributes: dict[str, Any]) -> None:
    case = Case(hashing(index), attributes=attributes)
    low = attributes.get("dense_below", 0)
    if low == -1:  # the library's own: such a short row is exact
        for reference in case.reference:
            reference.dense_below = case.capacity
    for count in (399, 1, 1, 1):
        got, want = case.step(case.tokens(count))
        check(got, want, count == 1 and low != -1 and case.reference[0].length >= low)


@pytest.mark.parametrize("isa", ISAS)
def test_index_exact_is_exact_attention(isa: str) -> None:
    """So is any index whose threshold is the whole signature."""
    everything = Hashing("signature", np.ones((16, 64), np.float32), max_hamming=(64, 64))
    cases = [Case(h, isa=isa) for h in (None, everything)]
    for case in cases:
        check(*case.step(case.tokens(500)), False)
        grow(case, [1, 1])
    tokens = cases[0].tokens(1)
    (exact, _), (all_drawn, step) = (case.step(tokens) for case in cases)
    assert step[0] is not None
    assert step[0].drawn[0].tolist() == list(range(4, 487))  # type: ignore[union-attr]
    np.testing.assert_allclose(all_drawn["output"], exact["output"], atol=1e-5)
    np.testing.assert_allclose(all_drawn["lse"], exact["lse"], atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("bits", "tables", "least"), [(1, 1024, 4), (1, 3, 1), (15, 90, 1), (12, 250, 1), (7, 241, 3), (11, 64, 1)]
)
def test_tables(isa: str, bits: int, tables: int, least: int) -> None:
    """Codes that cross words, counts beyond a byte, buckets that are nearly all empty."""
    case = Case(hashing("tables", 16, 2, bits, tables, least), isa=isa)
    case.offset *= 0
    tokens = case.tokens(400)
    tokens["key"][0, 100:104] = np.tile(tokens["query"][0, 390:394, :16], 2)  # found by those four
    check(*case.step(tokens), False)
    for i in range(390, 394):
        again = {name: x[:, i : i + 1].copy() for name, x in tokens.items()}
        got, want = case.step(again)
        check(got, want)
        assert want[0] is not None
        assert i - 290 in want[0].drawn[0]  # type: ignore[operator]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", ["sketch", "tables", "signature128"])
def test_numbers_at_their_limits(isa: str, index: str) -> None:
    """Scores hundreds apart, keys equal and opposite to the query, without length, equal to the mean; a query without length."""
    for scale in (0.25, 40.0):
        case = Case(hashing(index), isa=isa, attributes={"scale": scale})
        case.offset *= 0
        tokens = case.tokens(400)
        case.step(tokens)
        for shape in ("equal", "opposite", "nought"):
            step = case.tokens(1)
            for past in (7, 130, 250):  # as if the keys had been indexed so: the mean moves, and is any
                step["query"][0, 0, :16] = {"equal": 1, "opposite": -1, "nought": 0}[shape] * tokens["key"][0, past, :16]
                got, want = case.step(step)
                check(got, want)
    alike = Case(hashing(index), isa=isa)
    tokens = {name: np.full_like(x, 0.5) for name, x in alike.tokens(400).items()}
    for count in (400, 1):
        got = lsh_op.run(alike.session, alike.feeds({n: x[:, :count] for n, x in tokens.items()}, [400 * (count == 1)]))
        assert np.isfinite(got["output"]).all()
    np.testing.assert_allclose(got["output"], 0.5, rtol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", ["tables", "signature"])
def test_keys_that_are_nearly_the_query(isa: str, index: str) -> None:
    """Where the probability is steep in the cosine, and rounding of the cosine counts."""
    steep = {"tables": hashing("tables", bits=15, tables=8), "signature": Hashing("signature", W128, max_hamming=(10, 7))}
    case = Case(steep[index], isa=isa)
    case.offset *= 0
    tokens = case.tokens(400)
    query = 1.5 * case.rng.standard_normal(16)
    near = case.rng.permutation(380)[:60] + 4
    away = 10 ** case.rng.uniform(-3, -0.7, (60, 1)) * case.rng.standard_normal((60, 16))
    tokens["key"][0, near, :16] = query + away * np.linalg.norm(query) / 4
    case.step(tokens, compared=False)
    step = case.tokens(1)
    step["query"][0, 0] = np.tile(query, 4)
    got, want = case.step(step)
    check(got, want)
    assert want[0] is not None
    assert len(want[0].drawn[0]) > 20  # type: ignore[arg-type]


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64"])
def test_ragged_rows_are_the_rows_alone(index: str) -> None:
    alone = [Case(hashing(index), seed=seed) for seed in range(4)]
    for case, count in zip(alone, (1, 290, 555, 900), strict=True):
        case.step(case.tokens(count))
    batch = Case(hashing(index), rows=4)
    batch.past = {name: np.concatenate([case.past[name] for case in alone]) for name in batch.past}
    for count in (1, 1, 9, 1):
        each = [case.tokens(count) for case in alone]
        together = {name: np.concatenate([tokens[name] for tokens in each]) for name in each[0]}
        lengths = [case.reference[0].length for case in alone]
        got = lsh_op.run(batch.session, batch.feeds(together, lengths))
        for b, (case, tokens) in enumerate(zip(alone, each, strict=True)):
            one, want = case.step(tokens)
            check(one, want)
            for name, array in one.items():
                np.testing.assert_allclose(got[name][b : b + 1], array, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64", "exact"])
def test_forks_threads_and_copies_agree_to_the_bit(index: str) -> None:
    """In place or not, on one thread or two, and from a copied state on: the same bytes. The copies then go their own ways."""
    case = Case(hashing(index))
    case.step(case.tokens(400))
    fork, single = deepcopy((case.past, case.reference)), Case(hashing(index), threads=1)
    single.past, single.reference = deepcopy(fork)
    for count in (1, 33, 1):
        tokens, kept = case.tokens(count), deepcopy(case.past)
        apart, _ = case.step(tokens, in_place=False)
        inside, want = single.step(tokens)
        check(inside, want)
        for name, array in apart.items():
            np.testing.assert_array_equal(array.view(np.uint8), inside[name].view(np.uint8), err_msg=name)
        assert kept["past_kv"].any()
    case.past, case.reference = fork
    grow(case, [1, 5, 1])


def test_caches_are_left_alone_when_not_bound_in_place() -> None:
    case = Case(hashing("signature64"))
    case.step(case.tokens(400))
    before, given = deepcopy(case.past), case.past
    got, _ = case.step(case.tokens(3), in_place=False)
    for name, array in before.items():
        np.testing.assert_array_equal(given[name], array)
        assert not np.array_equal(got["present" + name.removeprefix("past")], array)


@pytest.mark.parametrize("index", ["sketch", "signature64"])
def test_signatures_and_sketches_rewind(index: str) -> None:
    """Back by some tokens, behind the last mean, and to nothing; what comes then overwrites what was."""
    case = Case(hashing(index), capacity=1600)
    grow(case, [500, 1, 300, 1, 700, 1])
    for length in (1400, 1350, 490):
        case.reference[0].rewind(length)
        grow(case, [1, 1, 7, 1])
    case.reference[0].rewind(0)
    case.reference[0] = type(case.reference[0])(case.hashing, 4, 2, 16, 1600, sink=4, window=16)
    grow(case, [350, 1])


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64"])
@pytest.mark.parametrize("count", [400, 900])
def test_a_row_that_starts_again_knows_nothing_of_the_one_before(index: str, count: int) -> None:
    """Of tables: what the first row sorted is left in the buffer, while nothing of the second is sorted yet."""
    case = Case(hashing(index), capacity=4096)
    grow(case, [3000, 1])
    case.reference[0] = type(case.reference[0])(case.hashing, 4, 2, 16, 4096, sink=4, window=16)
    grow(case, [count, 1, 1])


def test_means_of_a_row_that_goes_back_and_forth() -> None:
    """They begin as the row doubles, not as keys come in: five times as many keys as tokens come here."""
    case = Case(hashing("sketch"), capacity=2200)
    case.step(case.tokens(500), compared=False)
    for length in range(500, 2000, 50):
        case.reference[0].rewind(length)
        case.step(case.tokens(250), compared=False)
    found = case.past["past_state"][0].view(np.uint32)[MEANS]
    assert found == 3  # from 500, 1000 and 2000 tokens on


@pytest.mark.parametrize(("name", "value"), [("window", 16.0), ("window", "16"), ("guard", 1), ("softcap", "3")])
def test_attributes_of_another_type_are_refused(name: str, value: Any) -> None:
    kind = "an integer" if name == "window" else "a float"
    with pytest.raises(Exception, match=f"LshAttention: attribute {name} must be {kind}"):
        lsh_op.session(4, 2, hashing("sketch"), **{name: value})


@pytest.mark.parametrize("back", [[3], [600] * 8])
def test_a_rewound_row_still_has_a_fair_mean(back: list[int]) -> None:
    """Gone keys must not weigh on the means to come: sampling errs as little as in a row that never went back."""
    error = []  # medians: a single key that was drawn against the odds moves a mean
    for lengths in ([], back):
        case = Case(hashing("signature128"), capacity=4096)
        case.offset *= 3
        case.step(case.tokens(1000), compared=False)
        for length in lengths:
            case.reference[0].rewind(length)
            case.step(case.tokens(900), compared=False)
        case.step(case.tokens(2100 - case.reference[0].length), compared=False)
        case.reference[0].dense_below = case.capacity  # the truth
        both = [case.step(case.tokens(1)) for _ in range(60)]
        error.append(np.median([np.abs(got["lse"][0] - want[0].lse) for got, want in both if want[0]]))
    assert 0 < error[1] < 1.5 * error[0] < 0.1, error


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64"])
def test_thousands_of_tokens_generated_from_nothing(index: str) -> None:
    """Every step is indexed as it leaves the window. A needle planted on the way is drawn, and found, at the end."""
    case = Case(hashing(index, 8, 1, 4, 24), heads=2, kv_heads=1, dim=8, capacity=3072)
    needle = case.tokens(1)
    for i in range(3000):
        tokens = case.tokens(1)
        if i == 1500:
            tokens["key"] = 4 * needle["query"][..., :8] + case.offset[None].astype(np.float32)
            tokens["value"] = needle["value"]
        got, want = case.step(tokens, compared=i % 50 == 0 or 260 < i < 290)
        if want[0] is not None:
            check(got, want, i >= 275)
    got, want = case.step({**needle, "value": -needle["value"]})
    check(got, want, True)
    assert want[0] is not None
    assert 1500 in want[0].drawn[0]  # type: ignore[operator]
    np.testing.assert_allclose(got["output"][0, 0, :8], needle["value"][0, 0], atol=0.1)


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64"])
@pytest.mark.parametrize("start", [65468, 66268])
def test_past_a_segment(index: str, start: int) -> None:
    """Ids are 16-bit within segments of 65536 tokens. The caches come filled, the state empty: the first step indexes all."""
    case = Case(hashing(index, 8, 1, 6, 12), heads=3, kv_heads=1, dim=8, capacity=66816)
    case.preload(start)
    for i in range(120):
        got, want = case.step(case.tokens(1), compared=i in (0, 1, 60, 90, 119))
        if want[0] is not None:
            check(got, want, True)
    assert want[0] is not None
    assert want[0].drawn[0].max() > start - 16  # type: ignore[union-attr]


@pytest.mark.parametrize("start", [65400, 65700])
def test_one_bucket_holds_a_segment(start: int) -> None:
    """Two tables give all keys one code: their buckets would begin at 0 and end at 65536, which 16 bits cannot tell apart."""
    hashed = hashing("tables", 8, 1, 6, 12)
    assert hashed is not None
    hashed.projection[:, :12] = np.eye(8, dtype=np.float32)[:, 7:]
    case = Case(hashed, heads=3, kv_heads=1, dim=8, capacity=66816)
    case.offset[:, 7] = 0
    case.preload(start, zero=7)
    for i, sign in enumerate([-1.0, 1.0] + 150 * [-1.0]):
        tokens = case.tokens(1)
        tokens["key"][..., 7] = 0
        tokens["query"].reshape(3, 8)[:, 7] = sign  # above 0: the codes that no key has
        got, want = case.step(tokens, compared=i in (0, 1, 151))
        if want[0] is not None:
            check(got, want, True)
            assert all((len(drawn) > start - 100) == (sign < 0) for drawn in want[0].drawn)


def test_offsets_beyond_32_bits() -> None:
    """Rows of 2 GiB (untouched pages cost nothing): the second begins beyond 2^31 bytes, the third beyond 2^31 ids."""
    case = Case(hashing("tables", 8, 1, 2, 1024, 4), heads=2, kv_heads=1, dim=8, capacity=2**20, rows=3)
    assert case.past["past_state"].nbytes > 3 * 2**31
    grow(case, [300, 1, 40, 1])
