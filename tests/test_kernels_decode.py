"""span_decode against the NumPy reference: every edge of the ring, ragged rows, and the split over workers."""

import numpy as np
import pytest
import torch
from kernel_cases import FP8, Case, array, check, check_caches

from attnspan.plugins.trt_sparse_attn.kernels import span_attention, span_decode
from attnspan.plugins.trt_sparse_attn.kernels.common import HEAD_DIMS
from attnspan.plugins.trt_sparse_attn.kernels.span_decode import BLOCK_P

CAPACITY = [192, 130]
EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 130, 191, 192, 193, 320, 321, 1000]
"""Before, at and past sinks, capacities, and whole turns of the rings."""


def run(case: Case, **options: object) -> None:
    output, lse = span_decode(**case.of(), **case.options, return_lse=True, **options)
    case.check(output, lse)


def test_every_edge_of_the_ring_in_one_ragged_batch() -> None:
    run(Case(EDGES, [CAPACITY] * len(EDGES), CAPACITY))


def test_spans_below_capacity_read_a_part_of_the_ring() -> None:
    run(Case(EDGES, [[128 + i, 129 - i % 2] for i in range(len(EDGES))], CAPACITY))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_sizes_and_types(dim: int, dtype: torch.dtype) -> None:
    run(Case([70, 300], [[150, 128], [192, 129]], CAPACITY, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_caches(dtype: torch.dtype) -> None:
    run(Case([0, 70, 300], [[150, 128]] * 3, CAPACITY, dtype=dtype, fp8=True))


@pytest.mark.parametrize("group", [1, 3, 8, 17])
def test_groups_of_query_heads(group: int) -> None:
    run(Case([300, 5], [[192, 130], [150, 128]], CAPACITY, group=group))


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"scale": 0.7}, {"softcap": 20.0, "scale": 0.3}, {"sink": 4}, {"sink": 0}])
def test_scores_and_sinks(options: dict[str, float]) -> None:
    run(Case([40, 300], [[192, 130], [150, 128]], CAPACITY, **options))


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 64])
def test_any_number_of_workers_gives_the_same(workers: int) -> None:
    """One long head among short ones: its tiles are shared out, and parts of several pairs fall to one worker."""
    run(Case([900, 3, 0], [[800, 128, 128], [128, 128, 128], [800, 128, 128]], [800, 128, 128]), workers=workers)


def test_more_pairs_than_are_counted_at_a_time() -> None:
    pairs = 2 * BLOCK_P + 6
    lengths = [(37 * i) % 150 for i in range(pairs // 2)]
    run(Case(lengths, [CAPACITY] * len(lengths), CAPACITY, group=1), workers=9)


def test_rows_without_a_new_token_give_zeros_and_leave_their_caches() -> None:
    case = Case([300, 0, 70], [[192, 130]] * 3, CAPACITY, new=[0, 0, 1])
    want = case.reference()
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    assert not array(output)[:2].any()
    assert np.isneginf(array(lse)[:2]).all()
    check_caches(case, want)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_step_writes_the_new_token_to_its_slot(fp8: bool) -> None:
    lengths = EDGES[1::2]
    case = Case(lengths, [CAPACITY] * len(lengths), CAPACITY, fp8=fp8, dtype=torch.bfloat16)
    want = case.reference()
    output, lse = span_attention(**case.of(), **case.options, return_lse=True)
    check(case, want, output, lse)
    check_caches(case, want)


def test_without_update_the_caches_stay() -> None:
    case = Case([64], [[192, 130]], CAPACITY)
    before = {name: case.inputs[name].clone().view(torch.int16) for name in ("key_cache", "value_cache")}
    assert isinstance(span_decode(**case.of(), **case.options), torch.Tensor)
    assert all(torch.equal(before[name], case.inputs[name].view(torch.int16)) for name in before)


def test_slots_outside_the_span_are_not_read() -> None:
    """Of a full ring in the past all but the span in force holds NaN."""
    case = Case([300], [[140]], [192])
    for name in ("key_cache", "value_cache"):
        cache = case.inputs[name]
        kept = [*range(64), *(64 + (p - 64) % 128 for p in range(300 - 75, 300))]
        rest = torch.tensor([s for s in range(192) if s not in kept])
        cache[0, rest] = float("nan")
    run(case)


def test_large_scores_do_not_overflow() -> None:
    case = Case([300, 10], [[192, 130]] * 2, CAPACITY)
    case.inputs["query"] *= 200
    case.inputs["key"] *= 20
    output, lse = span_decode(**case.of(), **case.options, return_lse=True)
    assert torch.isfinite(output).all()
    np.testing.assert_allclose(array(lse), case.reference()["lse"], rtol=2e-3)


def test_large_queries_with_an_fp8_cache() -> None:
    """The products are in fp16, which bfloat16 queries may exceed."""
    case = Case([300], [[192, 130]], CAPACITY, dtype=torch.bfloat16, fp8=True, scale=1e-6)
    case.inputs["query"] *= 1e6
    run(case)


def test_keys_in_their_stored_form() -> None:
    """An e4m3 cache holds 448 at most: the new token's own key and value are clipped, too."""
    case = Case([0], [[192, 130]], CAPACITY, fp8=True)
    case.inputs["value"] *= 100
    output = span_decode(**case.of(), **case.options)
    limit = 448 * array(case.inputs["value_scale"]).max()
    assert case.inputs["key_cache"].dtype == FP8
    assert 0.9 * limit < np.abs(array(output)).max() <= 1.001 * limit


def test_a_span_over_the_capacity_counts_as_the_capacity() -> None:
    case = Case([300, 100], [[192, 130]] * 2, CAPACITY)
    want = case.reference()
    case.inputs["span"] += 1000
    check(case, want, span_decode(**case.of(), **case.options))
