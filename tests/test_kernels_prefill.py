"""span_prefill against the NumPy reference: chunks at every edge of the ring, ragged chunks, and what must not be read."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from kernel_cases import Case, array, check, check_caches

from attnspan.plugins.trt_sparse_attn.kernels import span_attention, span_prefill
from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS

CAPACITY = [192, 130]
EDGES = [0, 1, 63, 64, 65, 129, 130, 191, 192, 193, 321, 1000]
PAST = ("key_cache", "value_cache", "length", "capacity", "offset")


def run(case: Case) -> None:
    output, lse = span_prefill(**case.of(), **case.options, return_lse=True)
    case.check(output, lse)


@pytest.mark.parametrize("tokens", [2, 33])
def test_every_edge_of_the_ring_in_one_ragged_batch(tokens: int) -> None:
    run(Case(EDGES, [CAPACITY] * len(EDGES), CAPACITY, tokens=tokens, group=1))


def test_spans_below_capacity() -> None:
    run(Case(EDGES, [[128 + i, 129 - i % 2] for i in range(len(EDGES))], CAPACITY, tokens=20))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_sizes_and_types(dim: int, dtype: torch.dtype) -> None:
    run(Case([30, 300], [[150, 128], [192, 129]], CAPACITY, tokens=40, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_caches(dtype: torch.dtype) -> None:
    run(Case([0, 70, 300], [[150, 128]] * 3, CAPACITY, tokens=40, dtype=dtype, fp8=True))


@pytest.mark.parametrize("group", [1, 3, 40])
def test_groups_of_query_heads(group: int) -> None:
    run(Case([300, 5], [[192, 130], [150, 128]], CAPACITY, tokens=13, group=group))


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"scale": 0.7}, {"softcap": 20.0, "scale": 0.3}, {"sink": 4}, {"sink": 0}])
def test_scores_and_sinks(options: dict[str, float]) -> None:
    run(Case([40, 300], [[192, 130], [150, 128]], CAPACITY, tokens=40, **options))


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 65, 200])
def test_without_a_past(tokens: int) -> None:
    """Chunks shorter and longer than tiles, sinks and spans."""
    case = Case([0, 0], [[128, 192], [150, 130]], [192, 192], tokens=tokens, group=1)
    output, lse = span_prefill(**case.of(*PAST), **dict.fromkeys(PAST), **case.options, return_lse=True)
    case.check(output, lse)


def test_ragged_chunks_give_zeros_beyond_their_ends() -> None:
    new = [0, 1, 40, 17, 33]
    case = Case([300, 0, 70, 150, 64], [[192, 130]] * 5, CAPACITY, tokens=40, new=new)
    for name in ("query", "key", "value"):
        for b, count in enumerate(new):
            case.inputs[name][b, count:] = float("nan")
    want = case.reference()
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    assert all(not array(output)[b, count:].any() for b, count in enumerate(new))
    check_caches(case, want)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_chunk_longer_than_the_ring_leaves_its_last_tokens(fp8: bool) -> None:
    case = Case([0, 100, 300], [[192, 130]] * 3, CAPACITY, tokens=200, group=1, fp8=fp8)
    want = case.reference()
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    check_caches(case, want)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_prompt_gives_the_same_however_it_is_cut(fp8: bool) -> None:
    """Past two turns of the smaller ring, with steps of one token among the chunks."""
    total, cuts = 260, [0, 50, 51, 64, 65, 190, 259, 260]
    case = Case([0], [[192, 130]], CAPACITY, tokens=total, group=1, fp8=fp8)
    want = case.reference()
    whole = case.of()
    length = torch.zeros_like(whole["length"])
    parts = []
    for first, last in pairwise(cuts):
        chunk = {name: whole[name][:, first:last].contiguous() for name in ("query", "key", "value")}
        parts.append(span_attention(**{**whole, **chunk, "length": length + first}, **case.options))
    check(case, want, torch.cat(parts, 1))
    check_caches(case, want)


def test_slots_outside_the_span_are_not_read() -> None:
    """Of a full ring in the past all but what the first query of the chunk sees holds NaN."""
    case = Case([300], [[140]], [192], tokens=5)
    kept = [*range(64), *(64 + (p - 64) % 128 for p in range(300 - 75, 300))]
    rest = torch.tensor([s for s in range(192) if s not in kept])
    for name in ("key_cache", "value_cache"):
        case.inputs[name][0, rest] = float("nan")
    run(case)


def test_tiles_outside_the_span_are_not_read() -> None:
    """Queries a block and a window past a NaN never meet it: weight 0 times NaN would be NaN."""
    case = Case([0], [[128]], [512], tokens=400, group=1)
    case.inputs["value"][0, 100] = float("nan")
    output = array(span_prefill(**case.of(*PAST), **dict.fromkeys(PAST), **case.options))[0]
    block = 128  # rows of a block, at most
    assert np.isnan(output[100:164]).all()
    assert np.isfinite(output[100 + 64 + block :]).all()


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(seed: int) -> None:
    random = np.random.default_rng(seed)
    kv_heads, batch, tokens = int(random.integers(1, 4)), int(random.integers(1, 4)), int(random.integers(1, 90))
    sink = int(random.choice([0, 1, 33, 64]))
    capacity = [int(random.integers(sink + 64, sink + 160)) for _ in range(kv_heads)]
    span = [[int(random.integers(sink + 1, c + 1)) for c in capacity] for _ in range(batch)]
    new = [int(random.integers(0, tokens + 1)) for _ in range(batch)] if random.random() < 0.5 else None
    length = [int(random.integers(0, 400)) for _ in range(batch)]
    case = Case(length, span, capacity, tokens, int(random.integers(1, 6)), sink=sink, new=new, seed=seed,
                fp8=bool(random.random() < 0.3), softcap=float(random.choice([0, 10])))  # fmt: skip
    want = case.reference()
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    check_caches(case, want)


@pytest.mark.parametrize("tokens", [20, 333])
def test_a_span_over_the_capacity_is_any_until_a_token_has_left_the_ring(tokens: int) -> None:
    """Then it counts as the capacity: what it asks for is not there."""
    wide = [[1192, 2**31 - 1]] * 3
    case = Case([300, 130, 0, 77], [[192, 130], *wide], CAPACITY, tokens=tokens)
    want = case.reference()
    case.inputs["span"][0] += 1000
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    check_caches(case, want)
