"""What the kernels refuse before anything is launched, and their table of ahead-of-time variants."""

import re
from typing import Any

import pytest
import torch
from kernel_cases import Case

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.kernels import ring_update, span_decode, span_prefill
from attnspan.plugins.trt_sparse_attn.kernels.checks import values
from attnspan.plugins.trt_sparse_attn.kernels.common import SHARED_BYTES, tile_dim
from attnspan.plugins.trt_sparse_attn.kernels.variants import variants

CAPACITY = [192, 130]


def call(tokens: int = 1, **change: Any) -> None:
    case = Case([70], [[192, 130]], CAPACITY, tokens=tokens)
    (span_decode if tokens == 1 else span_prefill)(**{**case.of(), **case.options, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "query has shape [1, 1, 256]: must be [batch, tokens, 3 heads * dim]"),
        ({"num_heads": 8}, "head_dim is 32: must be one of 64, 80, 96, 128, 256"),
        ({"query": torch.zeros(1, 1, 256)}, "query's type is torch.float32: must be one of torch.float16, torch.bfloat16"),
        ({"key": torch.zeros(1, 1, 64).half()}, "key has shape [1, 1, 64]: must be [1, 1, 128]"),
        ({"key": torch.zeros(1, 1, 256).half()[..., ::2]}, "key has strides (256, 256, 2): must be contiguous"),
        ({"value": torch.zeros(1, 1, 128)}, "value is torch.float32: must be torch.float16"),
        ({"key_cache": torch.zeros(1, 322, 64)}, "key_cache's type is torch.float32: must be one of torch.float16, torch.float8"),
        ({"value_cache": torch.zeros(1, 300, 64).half()}, "value_cache has shape [1, 300, 64]: must be [1, 322, 64]"),
        ({"length": torch.zeros(1)}, "length is torch.float32: must be torch.int32"),
        ({"span": torch.zeros(1, 3, dtype=torch.int32)}, "span has shape [1, 3]: must be [1, kv_heads], kv_heads a divisor of 4"),
        ({"span": torch.zeros(1, 2, dtype=torch.int64)}, "span is torch.int64: must be torch.int32"),
        ({"sink": 100}, "key_cache holds 322 slots for 2 heads: each needs 100 sinks and 64 more at least"),
        ({"softcap": -1.0}, "sink is 64, softcap -1.0, scale None: sink and softcap must be 0 or more, scale above 0"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"key_scale": torch.ones(2)}, "key_scale is given for a torch.float16 cache: goes with torch.float8_e4m3fn"),
        ({"key_cache": None}, "key_cache is missing"),
        ({"length": None}, "value_cache, length, capacity or offset is missing"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        call(**change)
    assert "\n" not in str(caught.value)


def test_decode_takes_one_token() -> None:
    case = Case([70], [[192, 130]], CAPACITY, tokens=2)
    with pytest.raises(UserError, match="query holds 2 tokens a row: span_decode takes 1"):
        span_decode(**case.of(), **case.options)


def test_tensors_of_a_device_without_kernels_are_refused() -> None:
    case = Case([70], [[192, 130]], CAPACITY)
    meta = {name: x.to("meta") for name, x in case.of("query", "span").items()}
    with pytest.raises(UserError, match="tensors are on meta: must be on cuda"):
        ring_update(**meta)
    with pytest.raises(UserError, match=r"key is on meta, value on c.*: tensors must be on one device"):
        span_decode(**{**case.of(), **{"key": case.inputs["key"].to("meta")}}, **case.options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": [-1]}, "length is [-1]: must be 0 or more"),
        ({"span": [[192, 131]], "length": [131]}, "span of row 0, KV head 1 is 131: must be from 128 to its capacity 130"),
        ({"span": [[127, 130]]}, "span of row 0, KV head 0 is 127: must be from 128 to its capacity 192"),
        ({"offset": [0, 191]}, "heads must fill 322 slots in order"),
        ({"capacity": [192, 131]}, "heads must fill 322 slots in order"),
    ],
)
def test_values_that_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"length": [0], "span": [[192, 130]], "capacity": CAPACITY, "offset": [0, 192]}
    values(**{name: torch.tensor(x, dtype=torch.int32) for name, x in good.items()}, slots=322)
    with pytest.raises(UserError, match=re.escape(message)):
        values(**{name: torch.tensor(x, dtype=torch.int32) for name, x in (good | change).items()}, slots=322)


@pytest.mark.parametrize("arch", list(SHARED_BYTES))
def test_variants_name_every_argument_of_their_kernel(arch: int) -> None:
    table = variants(arch)
    assert len({v.name for v in table}) == len(table)
    for v in table:
        assert v.name.isidentifier()
        assert list(v.signature) == list(v.kernel.arg_names)
        assert {n for n, t in v.signature.items() if t == "constexpr"} == set(v.constexprs)
        assert set(v.divisible) == {n for n, t in v.signature.items() if t.startswith("*")}
    fp8 = [v for v in table if "fp8" in v.name]
    assert bool(fp8) == (arch >= 89)
    assert all(v.signature["key_cache"] == "*fp8e4nv" and v.signature["key_scale"] == "*fp32" for v in fp8)


@pytest.mark.parametrize("arch", list(SHARED_BYTES))
def test_tiles_fit_in_shared_memory(arch: int) -> None:
    """Queries, and the tiles of keys and values that are held at a time; the build checks what the compiler makes of it."""
    for v in variants(arch):
        if v.name.startswith(("span_prefill", "span_decode")):
            size = 1 if v.name.startswith("span_decode") and "fp8" in v.name else 2
            rows, keys = v.constexprs.get("BLOCK_M", 16), v.constexprs["BLOCK_N"]
            assert (rows * 2 + 2 * (v.num_stages - 1) * keys * size) * tile_dim(v.constexprs["D"]) <= SHARED_BYTES[arch], v.name
