"""Caches of target `portable`: their parts, and chunks that never lose a key that is still seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan
from attnspan.planner.portable import chunks, portable_parts
from attnspan.planner.rules import SINK, HeadRule, LshParams


def plan_of(*layers: list[HeadRule], n_max: int = 1000) -> Plan:
    kv_heads = len(layers[0])
    return Plan(ModelShape("tiny", len(layers), 2 * kv_heads, kv_heads, 16, None), n_max, layers)


def test_heads_of_one_rule_are_one_part() -> None:
    narrow, wide, dense = HeadRule("span", 192, 0.0), HeadRule("span", 64, 0.25), HeadRule("dense")
    parts = portable_parts(plan_of([wide, narrow, wide, dense], [narrow] * 4), 100)
    assert [(part.layer, part.name, part.heads) for part in parts] == [
        (0, "0", (0, 2)),
        (0, "0.1", (1,)),
        (0, "0.2", (3,)),
        (1, "1", (0, 1, 2, 3)),
    ]
    # Windows of 320 - 64 and 192 - 64 tokens, rings of 4 and 3 chunks of 100; what is dense never wraps.
    assert [part.capacity for part in parts] == [(464, 464), (364,), (1000,), (364,) * 4]
    assert parts[0].cache_shape(16) == (2, 464, 16)
    assert parts[0].describe(16) == {
        "layer": 0,
        "op": "Attention",
        "kv_heads": [0, 2],
        "capacity": [464, 464],
        "cache_shape": [2, 464, 16],
        "key": "key.0",
        "value": "value.0",
    }


def test_equal_capacities_of_unlike_rules_stay_apart() -> None:
    """Their spans in force differ at shorter lengths."""
    rules = [HeadRule("span", 512, 0.0), HeadRule("span", 0, 0.5)]
    parts = portable_parts(plan_of(rules, n_max=1024), 64)
    assert [part.capacity for part in parts] == [(576,), (576,)]


def test_layers_with_a_window_have_no_sinks() -> None:
    plan = dataclasses.replace(plan_of([HeadRule("dense")] * 2, [HeadRule("dense")] * 2), windows=(100, None))
    parts = portable_parts(plan, 64)
    assert [(part.sink, part.capacity) for part in parts] == [(0, (64 + 192,) * 2), (64, (1000,) * 2)]
    assert parts[0].describe(16)["sink"] == 0


def test_what_standard_onnx_cannot_do_is_refused() -> None:
    sampled = HeadRule("lsh", lsh=LshParams("exact", window=64))
    with pytest.raises(UserError, match=r"KV head 1 of layer 0 has mode 'lsh'.*--target cpu"):
        portable_parts(plan_of([HeadRule("dense"), sampled]), 64)
    for wrong in (0, -1, 2**21, 1.5, True):
        with pytest.raises(UserError, match=r"chunk is .*: must be an integer from 1 to 1048576; change --chunk"):
            portable_parts(plan_of([HeadRule("dense")]), wrong)  # type: ignore[arg-type]


def test_chunks() -> None:
    assert chunks(0, 300, 100, 100, 64) == [(0, 100), (100, 164), (164, 264), (264, 300)]
    assert chunks(0, 164, 200, 100, 64) == [(0, 100), (100, 164)]
    assert chunks(10, 90, 200, 100, 64) == [(0, 90)]  # a chunk may reach from the sinks into the ring
    assert chunks(150, 250, 100, 100, 64) == [(0, 14), (14, 114), (114, 214), (214, 250)]
    assert chunks(164, 100, 100, 100, 64) == [(0, 100)]
    assert chunks(70, 40, 16, 100, 64) == [(0, 16), (16, 32), (32, 40)]
    assert chunks(5, 1, 1, 1, 64) == [(0, 1)]


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(2, 12).map(lambda blocks: 64 * blocks),
    chunk=st.integers(1, 300),
    most=st.integers(1, 300),
    n_max=st.integers(128, 1200),
    texts=st.lists(st.integers(1, 700), min_size=1, max_size=4),
)
def test_a_chunk_finds_all_that_it_sees(capacity: int, chunk: int, most: int, n_max: int, texts: list[int]) -> None:
    """Write texts as the graph does, one slot after another, and look for the keys of every query's widest window."""
    plan = plan_of([HeadRule("span", capacity, 0.0)], n_max=n_max)
    slots, window = portable_parts(plan, chunk)[0].capacity[0], plan.spans(n_max)[0, 0] - SINK
    ring = slots - SINK
    held = np.full(slots, -1)
    length = 0
    for total in texts:
        total = min(total, n_max - length)
        cut = chunks(length, total, most, chunk, SINK)
        assert [start for start, _ in cut] + [total] * bool(total) == [0] * bool(total) + [end for _, end in cut]
        for start, end in cut:
            first, count = length + start, end - start
            assert 0 < count <= min(most, chunk)
            slot = first if first < SINK else SINK + (first - SINK) % ring
            assert slot + count <= slots  # a linear write; beyond the end it would be lost
            held[slot : slot + count] = np.arange(first, first + count)
            for query in (first, first + count // 2, first + count - 1):
                seen = np.arange(query + 1)
                seen = seen[(seen < SINK) | (query - seen < window)]
                assert np.isin(seen, held).all()
        length += total
