"""The ops under PyTorch: their schemas and fake kernels, and a graph that torch.compile makes of them."""

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, Case, check, check_caches

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn import torch_ops

CAPACITY = [192, 130]
ORDER = ("query", "key", "value", "key_cache", "value_cache", "length", "span", "capacity", "offset")


def case(tokens: int, **options: Any) -> Case:
    return Case([70, 3], [[192, 130]] * 2, CAPACITY, tokens=tokens, group=1, **options)


def arguments(name: str) -> tuple[Any, ...]:
    one, chunk = case(1), case(9)
    x = torch.randn(2, 3, 128, device=DEVICE)
    return {
        "span_prefill": (*(chunk.inputs[n] for n in ORDER), 2),
        "span_decode": (*(one.inputs[n] for n in ORDER), 2),
        "span_attention": (*(chunk.inputs[n] for n in ORDER), 2),
        "ring_update": tuple(chunk.inputs[n] for n in ORDER if n not in ("query", "span")),
        "lsh_hash": (x, torch.randn(64, 128, device=DEVICE), 2, None, None, 128),
        "merge": ([x, x], [torch.zeros(2, 2, 3, device=DEVICE)] * 2),
    }[name]


@pytest.mark.parametrize("name", torch_ops.__all__)
def test_schemas_and_fake_kernels_agree_with_what_the_kernels_do(name: str) -> None:
    inputs = arguments(name)
    if name == "merge":  # opcheck takes no lists of the same tensor
        inputs = ([x.clone() for x in inputs[0]], [x.clone() for x in inputs[1]])
    for cache in (x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3 and x.is_floating_point()):
        cache.nan_to_num_()  # opcheck compares caches before and after, and NaN is not NaN
    utils = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(getattr(torch_ops, name), inputs, test_utils=utils).values()) == {"SUCCESS"}


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_compiled_graph_updates_the_caches(tokens: int) -> None:
    """One graph without a break: aot_eager traces through the fake kernels."""
    call = case(tokens)
    want = call.reference()

    def layer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output, _ = torch.ops.attnspan.span_attention(*(inputs[n] for n in ORDER), 2)
        return output + 0

    check(call, want, torch.compile(layer, backend="aot_eager", fullgraph=True)(call.inputs))
    check_caches(call, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the values stay there")
def test_on_a_cpu_spans_are_checked_by_value() -> None:
    call = case(1)
    call.inputs["span"] += 1
    call.inputs["length"] += 192  # what a longer span needs has left the rings
    with pytest.raises(UserError, match="span of row 0, KV head 0 is 193: must be from 128 to its capacity 192"):
        torch_ops.span_decode(*(call.inputs[n] for n in ORDER), 2)
