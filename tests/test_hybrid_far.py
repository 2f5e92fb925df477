"""LshAttention of what a span leaves out, by the reference: steps, chunks, queries that come hashed, both halves together."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import span_op
from lsh_op import Case, run
from lsh_reference import merge
from reference import span_attention_reference
from span_op import bfloat16
from test_hybrid_ops import session
from test_lsh_attention import ISAS, check, hashing


def merge_session(heads: int) -> ort.InferenceSession:
    inputs = dict.fromkeys(("output_a", "lse_a", "output_b", "lse_b"), np.float32)
    return session("MergeAttention", inputs, dict.fromkeys(("output", "lse"), np.float32), {}, num_heads=heads)


def far_case(index: str, spans: list[list[int]], **options: Any) -> Case:
    return Case(hashing(index), rows=len(spans), spans=spans, **options)


def grow(case: Case, chunks: list[int]) -> None:
    """Runs chunks of random tokens and checks all but the long."""
    for count in chunks:
        got, want = case.step(case.tokens(count), compared=count < 100)
        if count < 100:
            check(got, want)


@pytest.mark.parametrize(
    ("index", "isa"), [*((x, isa) for x in ("sketch", "tables") for isa in ISAS), ("signature64", ""), ("exact", "")]
)
def test_steps_and_chunks(isa: str, index: str) -> None:
    """Two KV heads of three rows: spans of the window, less, more (into what is indexed), one token, and of everything."""
    spans = [[4 + 16, 4 + 3], [4 + 150, 4 + 1], [4 + 337 + 50, 4 + 100]]
    case = far_case(index, spans, isa=isa)
    grow(case, [70])
    got, _ = case.step(case.tokens(267), compared=False)
    assert np.isneginf(got["lse"][2, :2]).all()  # nothing is far yet: zeros, whatever the index
    assert not got["output"][2, :, : 2 * case.dim].any()
    for count in (1, 1, 9, 1):
        got, want = case.step(case.tokens(count))
        check(got, want)
        assert np.isneginf(got["lse"][2, :2]).all()
        assert not got["output"][2, :, : 2 * case.dim].any()
    if index != "exact":
        assert all(drawn is not None and len(drawn) for drawn in want[0].drawn)


@pytest.mark.parametrize("index", ["tables", "sketch"])
@pytest.mark.parametrize("cache", [np.float16, bfloat16, np.int8], ids=str)
def test_types(index: str, cache: Any) -> None:
    for activation in (np.float32, np.float16 if cache == np.float16 else bfloat16):
        grow(far_case(index, [[4 + 16, 4 + 40]], activation=activation, cache=cache), [337, 1, 40, 1])


@pytest.mark.parametrize(("group", "kv", "sink", "dim"), [(1, 1, 0, 8), (3, 2, 4, 20), (7, 3, 64, 80)])
def test_shapes(group: int, kv: int, sink: int, dim: int) -> None:
    """Chunks of several tasks; spans that end inside a tile of keys, and behind the chunk."""
    case = Case(hashing("signature64", dim, kv), heads=group * kv, kv_heads=kv, dim=dim, capacity=1024, sink=sink, window=7,
                spans=[[sink + (7, 65, 400)[h % 3] for h in range(kv)]])  # fmt: skip
    grow(case, [90, sink + 470, 90, 1, 2, 1])


def test_a_row_that_drew_nothing_has_no_far_keys() -> None:
    """Not one key is near enough: the lse is -inf, and MergeAttention takes the other part alone."""
    strict = hashing("signature128")
    assert strict is not None
    case = Case(type(strict)(strict.index, strict.projection, max_hamming=(0, 0)), spans=[[20, 20]])
    grow(case, [337])
    got, want = case.step(case.tokens(1))
    check(got, want)
    assert np.isneginf(got["lse"]).all()
    assert not got["output"].any()


@pytest.mark.parametrize("index", ["tables", "signature64", "signature256"])
@pytest.mark.parametrize("spans", [None, [[20, 30], [90, 20]]], ids=["all", "far"])
def test_queries_may_come_hashed(index: str, spans: list[list[int]] | None) -> None:
    """The same to the bit; codes of another query draw other keys, and any numbers will do."""
    given, own = (Case(hashing(index), rows=2, spans=spans, coded=coded) for coded in (True, False))
    for count in (337, 1, 5, 1, 1):
        got, _ = given.step(given.tokens(count), compared=False)
        want, steps = own.step(own.tokens(count), compared=count < 100)
        if count < 100:
            check(want, steps)
        for name, array in got.items():
            np.testing.assert_array_equal(array, want[name])
    feeds, right = given.feeds(given.tokens(1)), run(given.session, given.feeds(given.tokens(1)), in_place=False)
    feeds["query_codes"] = ~feeds["query_codes"]
    wrong = run(given.session, feeds, in_place=False)
    assert np.isfinite(wrong["output"]).all()
    assert np.abs(wrong["output"] - right["output"]).max() > 0.1


@pytest.mark.parametrize(
    ("index", "tokens", "span"),
    [*((x, 1, s) for x in ("sketch", "tables", "signature64") for s in (20, 13)), ("exact", 1, 37), ("exact", 50, 350)],
)
def test_both_halves_are_the_whole(index: str, tokens: int, span: int) -> None:
    """SpanAttention under a span, and the far part, merged, are what one node gives. A span of more than sinks and window is
    nearer to exact attention, unless that is what the node does."""
    whole, far = Case(hashing(index), rows=2), far_case(index, [[span, 20]] * 2)
    for case in (whole, far):
        case.step(case.tokens(340), compared=False)
    past, new = whole.past["past_kv"].copy(), whole.tokens(tokens)
    one, _ = whole.step(new, compared=False)
    half, _ = far.step(new, compared=False)
    split = past.reshape(2, whole.kv_heads * whole.capacity, 2, whole.dim)
    near, _, _, near_lse = span_attention_reference(
        **new, past_key=split[:, :, 0], past_value=split[:, :, 1], length=np.array([340, 340]), span=np.array([[span, 20]] * 2),
        capacity=[whole.capacity] * 2, sink=4,
    )  # fmt: skip
    near, other, both = (x.reshape(2, tokens, 4, whole.dim).astype(np.float64) for x in (near, half["output"], one["output"]))
    for b, t, h in np.ndindex(2, tokens, 4):
        output, lse = merge([(near[b, t, h], near_lse[b, h, t]), (other[b, t, h], half["lse"][b, h, t])])
        np.testing.assert_allclose(both[b, t, h], output, atol=1e-5)
        np.testing.assert_allclose(one["lse"][b, h, t], lse, atol=1e-5)


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64", "exact"])
@pytest.mark.parametrize("cache", [np.float32, bfloat16], ids=str)
def test_a_span_of_nothing_is_no_span(index: str, cache: Any) -> None:
    """To the bit, in chunks and steps; heads beside it are far parts as ever."""
    mixed = [[0, 23], [20, 0]]
    whole = Case(hashing(index), rows=2, cache=cache)
    none, half, far = (far_case(index, spans, cache=cache) for spans in ([[0, 0]] * 2, mixed, [[20, 23]] * 2))
    for count in (70, 300, 1, 9, 1, 1, 1):
        new = whole.tokens(count)
        want, zero, got, other = (case.step(new, compared=False)[0] for case in (whole, none, half, far))
        for name, array in want.items():
            np.testing.assert_array_equal(zero[name], array)
            picked = array.copy()
            heads = (np.s_[:, 32:], np.s_[:, :32]) if name == "output" else (np.s_[2:], np.s_[:2])
            if name in ("output", "lse"):
                for row in (0, 1):
                    picked[row][heads[row]] = other[name][row][heads[row]]
            np.testing.assert_array_equal(got[name], picked)


@pytest.mark.parametrize("index", ["sketch", "tables", "signature64", "exact"])
@pytest.mark.parametrize("window", [16, 60])
def test_the_node_without_span_is_its_halves_to_the_bit(index: str, window: int) -> None:
    """SpanAttention in a ring of whole blocks of 64, the far part and MergeAttention: steps before and after laps of the ring."""
    span, ring = 4 + window, 64
    whole, far = Case(hashing(index), rows=2, window=window), far_case(index, [[span, span]] * 2, window=window)
    near, merged = span_op.session(4, [ring] * 2, sink=4), merge_session(4)
    caches = {name: np.zeros((2, 2 * ring, 16), np.float32) for name in ("past_key", "past_value")}
    drawn = 0.0
    for count in (20, 1, 1, 60, 500, *[1] * 130):
        new, length = whole.tokens(count), whole.reference[0].length
        want, got = (case.step(new, compared=False)[0] for case in (whole, far))
        spans = np.full((2, 2), span if count == 1 else 0, np.int32)
        part = span_op.run(near, {**new, **caches, "length": np.full(2, length, np.int32), "span": spans})
        if count > 1:
            assert not part["output"].any()
            assert np.isneginf(part["lse"]).all()
            continue
        feeds = {"output_a": part["output"], "lse_a": part["lse"], "output_b": got["output"], "lse_b": got["lse"]}
        both = merged.run(None, feeds)
        np.testing.assert_array_equal(both[0], want["output"])
        np.testing.assert_array_equal(both[1], want["lse"])
        drawn = max(drawn, float(np.exp(got["lse"] - want["lse"]).max()))
    assert 0.1 < drawn < 1


def test_a_part_alone_passes_through_the_merge() -> None:
    rng = np.random.default_rng(0)
    output, lse = rng.standard_normal((2, 3, 20), np.float32), rng.standard_normal((2, 4, 3), np.float32)
    output[0, 0, 0] = -0.0
    none = {"output": np.full_like(output, np.nan), "lse": np.full_like(lse, -np.inf)}
    for first, second in (("a", "b"), ("b", "a")):
        feeds = {f"output_{first}": output, f"lse_{first}": lse, f"output_{second}": none["output"], f"lse_{second}": none["lse"]}
        got = merge_session(4).run(None, feeds)
        assert got[0].tobytes() == output.tobytes()
        np.testing.assert_array_equal(got[1], lse)


@pytest.mark.parametrize(
    ("index", "change", "words"),
    [
        ("exact", {"span": np.array([[4, 20]], np.int32)}, r"span of row 0, KV head 0 is 4; it must be above sink \(4\), or 0"),
        ("exact", {"span": np.array([[0, 1]], np.int32)}, r"span of row 0, KV head 1 is 1; it must be above sink \(4\), or 0"),
        ("exact", {"span": np.array([[-1, 20]], np.int32)}, r"span of row 0, KV head 0 is -1; it must be above sink \(4\), or 0"),
        ("exact", {"span": np.zeros((1, 3), np.int32)}, r"span has shape \[1, 3\]; it must be \[1, 2\]"),
        ("tables", {"query_codes": np.zeros((1, 1, 4, 5), np.int32)}, r"has shape \[1, 1, 4, 5\]; it must be \[1, 1, 4, 6\]"),
        ("sketch", {"query_codes": np.zeros((1, 1, 4, 2), np.int32)}, "query_codes is given; it belongs to index signature"),
        ("exact", {"query_codes": np.zeros((1, 1, 4, 2), np.int32)}, "query_codes is given; it belongs to index signature"),
    ],
)
def test_what_does_not_fit_is_refused(index: str, change: dict[str, np.ndarray], words: str) -> None:
    case = far_case(index, [[20, 20]], coded="query_codes" in change)
    case.coded = False
    with pytest.raises(Exception, match=words):
        run(case.session, case.feeds(case.tokens(1)) | change)


@pytest.mark.parametrize("tokens", [1, 2, 90])
def test_a_span_over_the_capacity_sees_everything(tokens: int) -> None:
    """While nothing has left the ring: it is as good as a longer ring. A chunk may go past the ring's end, a step may not."""
    rng, capacity, longer = np.random.default_rng(0), [70, 80], [400, 400]
    lengths = [0, 3, 70 - (tokens == 1)]
    feeds = {
        "query": rng.standard_normal((3, tokens, 4 * 16), np.float32),
        "key": rng.standard_normal((3, tokens, 2 * 16), np.float32),
        "value": rng.standard_normal((3, tokens, 2 * 16), np.float32),
        "length": np.array(lengths, np.int32),
        "span": np.full((3, 2), 300, np.int32),
    }
    past = [rng.standard_normal((3, 150, 16), np.float32) for _ in range(2)]
    caches = {"past_key": past[0], "past_value": past[1]}
    wide = [np.concatenate([x[:, :70], np.zeros((3, 330, 16)), x[:, 70:], np.zeros((3, 320, 16))], 1) for x in past]
    want = span_attention_reference(**feeds, past_key=wide[0], past_value=wide[1], capacity=longer, sink=4)
    rings = span_attention_reference(
        **feeds | {"span": np.full((3, 2), 60, np.int32)}, **caches, capacity=capacity, sink=4
    )  # fmt: skip
    sess = span_op.session(4, capacity, sink=4)
    got = span_op.run(sess, {**feeds, **{name: x.copy() for name, x in caches.items()}})
    np.testing.assert_allclose(got["output"], want[0], atol=1e-5)
    np.testing.assert_allclose(got["lse"], want[3], atol=1e-5)
    np.testing.assert_array_equal(got["present_key"], rings[1])
    np.testing.assert_array_equal(got["present_value"], rings[2])
    feeds["length"][2] += 1
    with pytest.raises(Exception, match=r"of row 2, KV head 0 is 300; allowed are 5 to the head's capacity 70, and 0 for none$"):
        span_op.run(sess, {**feeds, **caches})
    feeds["span"][:] = 4
    with pytest.raises(Exception, match=r"0 is 4; allowed are 5 .* 70, more while nothing has left its ring, and 0 for none"):
        span_op.run(sess, {**feeds, **caches})
