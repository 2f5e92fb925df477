"""SpanAttention on the CPU against the NumPy reference: every instruction set this machine has, odd shapes, every edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import span_op
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import span_attention_reference
from span_op import bfloat16


def isas() -> list[str]:
    """The instruction sets this processor runs, asked of the library itself."""
    try:
        span_op.session(1, [128], isa="none")
    except Exception as e:
        return str(e).split("this processor runs: ")[1].split()
    raise AssertionError("an unknown ATTNSPAN_ISA was accepted")


ISAS = isas()
# (output, lse): the reference computes in float64 from the same stored keys, so only fp32 arithmetic and the rounding of the
# output to its own type remain.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 2e-3, bfloat16: 1.6e-2}


def make(
    rng: np.random.Generator,
    *,
    batch: int,
    tokens: int,
    heads: int,
    capacity: list[int],
    dim: int,
    length: list[int],
    span: list[list[int]],
    activation: Any = np.float32,
    cache: Any = np.float32,
) -> dict[str, np.ndarray]:
    activation, cache = np.dtype(activation), np.dtype(cache)
    kv, slots = len(capacity), sum(capacity)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    def stored(*shape: int) -> np.ndarray:
        return rng.integers(-127, 128, shape, np.int8) if cache == np.int8 else normal(*shape).astype(cache)

    feeds = {
        "query": normal(batch, tokens, heads * dim).astype(activation),
        "key": normal(batch, tokens, kv * dim).astype(activation),
        "value": normal(batch, tokens, kv * dim).astype(activation),
        "past_key": stored(batch, slots, dim),
        "past_value": stored(batch, slots, dim),
        "length": np.array(length, np.int32),
        "span": np.array(span, np.int32).reshape(batch, kv),
    }
    if cache == np.int8:
        feeds["key_scale"] = rng.uniform(0.01, 0.03, kv).astype(np.float32)
        feeds["value_scale"] = rng.uniform(0.01, 0.03, kv).astype(np.float32)
    return feeds


def check(
    feeds: dict[str, np.ndarray],
    heads: int,
    capacity: list[int],
    sink: int = 64,
    isa: str = "",
    in_place: bool = True,
    threads: int = 2,
    **attributes: float,
) -> None:
    want_out, want_key, want_value, want_lse = span_attention_reference(
        **feeds, capacity=capacity, sink=sink, scale=attributes.get("scale", 0.0), softcap=attributes.get("softcap", 0.0)
    )
    dtype = feeds["query"].dtype
    sess = span_op.session(
        heads, capacity, activation=dtype, cache=feeds["past_key"].dtype, sink=sink, isa=isa, threads=threads, **attributes
    )
    got = span_op.run(sess, {k: v.copy() for k, v in feeds.items()}, in_place)
    np.testing.assert_array_equal(got["present_key"].view(np.uint8), want_key.view(np.uint8))
    np.testing.assert_array_equal(got["present_value"].view(np.uint8), want_value.view(np.uint8))
    scale = max(1.0, float(np.abs(want_out).max()))
    assert np.abs(got["output"].astype(np.float64) - want_out).max() <= TOLERANCE[dtype] * scale
    assert np.abs(got["lse"] - want_lse).max() <= 5e-5 * max(1.0, float(np.abs(want_lse).max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256, 20])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_shapes(isa: str, dim: int, tokens: int) -> None:
    rng = np.random.default_rng(dim * 1000 + tokens)
    for heads, kv in ((1, 1), (3, 1), (4, 1), (8, 8), (8, 4), (3, 3), (12, 4), (6, 3), (5, 1)):
        capacity = [int(c) for c in rng.integers(128, 300, kv)]
        feeds = make(
            rng,
            batch=2,
            tokens=tokens,
            heads=heads,
            capacity=capacity,
            dim=dim,
            length=[0, 271],
            span=[[int(rng.integers(65, c + 1)) for c in capacity] for _ in range(2)],
        )
        check(feeds, heads, capacity, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_long(isa: str, tokens: int) -> None:
    """Decode over several work chunks and a ring that is read in two runs; a prefill chunk longer than some rings."""
    rng = np.random.default_rng(tokens)
    capacity = [2048, 128, 1472, 640]
    feeds = make(
        rng,
        batch=2,
        tokens=tokens,
        heads=8,
        capacity=capacity,
        dim=64,
        length=[5000, 700],
        span=[[2048, 128, 1400, 129], [1111, 65, 1472, 640]],
    )
    check(feeds, 8, capacity, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cache", [np.float32, np.float16, bfloat16, np.int8], ids=str)
@pytest.mark.parametrize("activation", [np.float32, np.float16, bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_types(isa: str, cache: Any, activation: Any, tokens: int) -> None:
    rng = np.random.default_rng(7)
    capacity = [192, 320]
    feeds = make(
        rng,
        batch=3,
        tokens=tokens,
        heads=6,
        capacity=capacity,
        dim=96,
        length=[0, 150, 400],
        span=[[192, 70], [128, 320], [65, 256]],
        activation=activation,
        cache=cache,
    )
    check(feeds, 6, capacity, isa=isa)


CAPACITY = 192  # sink 64, so the ring proper has 128 slots
EDGES = [0, 1, 62, 63, 64, 65, CAPACITY - 2, CAPACITY - 1, CAPACITY, CAPACITY + 1, CAPACITY + 127, CAPACITY + 128, 10_000]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 64, 129])
def test_edges(isa: str, tokens: int) -> None:
    """Empty cache, last sink, exactly full ring, wrap by one, a whole turn; spans from one window token to the capacity."""
    rng = np.random.default_rng(11)
    for span in (65, 66, 127, 128, 191, 192):
        feeds = make(
            rng, batch=len(EDGES), tokens=tokens, heads=2, capacity=[CAPACITY], dim=64, length=EDGES, span=[[span]] * len(EDGES)
        )
        check(feeds, 2, [CAPACITY], isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("attributes", [{"softcap": 5.0}, {"scale": 0.3}, {"sink": 0}, {"sink": 1}, {"sink": 100}], ids=str)
def test_attributes(isa: str, tokens: int, attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(13)
    feeds = make(
        rng, batch=2, tokens=tokens, heads=4, capacity=[160, 256], dim=80, length=[90, 300], span=[[160, 101], [130, 256]]
    )
    check(feeds, 4, [160, 256], isa=isa, **attributes)


def test_chunks_do_not_change_the_result() -> None:
    """A prompt cut into pieces gives the same output, bit for bit in the cache: every key is seen in its stored form."""
    rng = np.random.default_rng(17)
    capacity = [128, 384]
    whole = make(rng, batch=1, tokens=500, heads=4, capacity=capacity, dim=64, length=[0], span=[[128, 384]], cache=bfloat16)
    sess = span_op.session(4, capacity, cache=bfloat16)
    want = span_op.run(sess, {k: v.copy() for k, v in whole.items()})
    past = {k: whole[k].copy() for k in ("past_key", "past_value")}
    outputs, start = [], 0
    for size in (1, 2, 61, 1, 127, 128, 129, 51):
        part = {k: whole[k][:, start : start + size] for k in ("query", "key", "value")}
        feeds = {**part, **past, "length": np.array([start], np.int32), "span": whole["span"]}
        outputs.append(span_op.run(sess, feeds)["output"])
        start += size
    assert start == 500
    # Matrix units take queries and weights as two bf16 parts, 16 of 24 bits: the tile a row falls into may move the rest.
    np.testing.assert_allclose(np.concatenate(outputs, 1), want["output"], atol=1e-5)
    np.testing.assert_array_equal(past["past_key"].view(np.uint16), want["present_key"].view(np.uint16))


def test_caches_are_copied_when_not_bound_in_place() -> None:
    rng = np.random.default_rng(19)
    feeds = make(rng, batch=1, tokens=3, heads=2, capacity=[128], dim=64, length=[127], span=[[128]])
    before = feeds["past_key"].copy()
    check(feeds, 2, [128], in_place=False)
    np.testing.assert_array_equal(feeds["past_key"], before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    kv, group, dim = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)) * 8
    sink = draw(st.sampled_from([0, 3, 64]))
    capacity = [draw(st.integers(sink + 1, 400)) for _ in range(kv)]
    batch, tokens = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 66, 130]))
    length = [draw(st.integers(0, 1000)) for _ in range(batch)]
    span = [[draw(st.integers(sink + 1, c)) for c in capacity] for _ in range(batch)]
    cache = draw(st.sampled_from([np.float32, bfloat16, np.float16, np.int8]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    feeds = make(
        rng, batch=batch, tokens=tokens, heads=kv * group, capacity=capacity, dim=dim, length=length, span=span, cache=cache
    )
    check(feeds, kv * group, capacity, sink=sink, isa=draw(st.sampled_from(ISAS)), threads=draw(st.integers(1, 2)))


GOOD: dict[str, Any] = dict(
    batch=2, tokens=3, heads=4, capacity=[128, 192], dim=64, length=[5, 200], span=[[128, 192], [65, 100]]
)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda x: x[..., :-1], "query has shape"),
        ("query", lambda x: x[0], "query has shape"),
        ("key", lambda x: x[:, :2], "key has shape"),
        ("value", lambda x: x[..., :64], "value has shape"),
        ("past_key", lambda x: x[:, :-1], "past_key has shape"),
        ("past_value", lambda x: x[:1], "past_value has shape"),
        ("past_key", lambda x: x[..., :32], "past_key has shape"),
        ("length", lambda x: x[:1], "length has shape"),
        ("length", lambda x: -x, "length of row 0 is -5"),
        ("length", lambda x: x + np.int32(2**31 - 203), "length of row 1"),
        ("span", lambda x: x[:, :1], "span has shape"),
        ("span", lambda x: x * 2, "span of row 1, KV head 0 is 130; allowed are 65 to the head's capacity 128"),
        ("span", lambda x: x - 64, "span of row 0, KV head 0 is 64; allowed are 65 to"),
        ("span", lambda x: -x, "span of row 0, KV head 0 is -128"),
    ],
)
def test_malformed_tensors_are_errors(name: str, change: Any, message: str) -> None:
    feeds = make(np.random.default_rng(0), **GOOD)
    feeds[name] = np.ascontiguousarray(change(feeds[name]))
    with pytest.raises(Exception, match=r"attnspan\.SpanAttention") as error:
        span_op.session(4, [128, 192], shapes=False).run(None, feeds)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"capacity": [128], "kv_num_heads": 2}, "capacity has 1 entries; kv_num_heads is 2"),
        ({"capacity": [64, 128]}, "a capacity is 64; it must be above sink (64)"),
        ({"kv_num_heads": 3}, "num_heads is 4 and kv_num_heads 3"),
        ({"sink": -1}, "sink is -1"),
        ({"softcap": -1.0}, "softcap must be at least 0"),
    ],
)
def test_malformed_attributes_are_errors(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=r"attnspan\.SpanAttention") as error:
        span_op.session(4, **({"capacity": [128, 192]} | attributes))
    assert message in str(error.value)


def test_int8_needs_scales() -> None:
    feeds = make(np.random.default_rng(0), **GOOD, cache=np.int8)
    del feeds["value_scale"]
    with pytest.raises(Exception, match="value_scale is missing"):
        span_op.session(4, [128, 192], cache=np.int8, drop=("value_scale",)).run(None, feeds)
