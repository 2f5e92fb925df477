"""merge against one softmax over all keys."""

import numpy as np
import pytest
import torch
from kernel_cases import DEVICE, array

from attnspan.planner.errors import UserError
from attnspan.plugins.trt_sparse_attn.kernels import merge

BATCH, TOKENS, HEADS = 2, 5, 3


Parts = tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray, np.ndarray]


def parts(counts: list[int], dim: int, dtype: torch.dtype) -> Parts:
    """Attention over `counts` keys each, and over all of them: outputs, lses, output [batch, tokens, heads, dim], lse."""
    random = np.random.default_rng(0)
    score = random.standard_normal((BATCH, HEADS, TOKENS, sum(counts))) * 10
    value = random.standard_normal((sum(counts), dim))
    ends = np.cumsum([0, *counts])

    def attend(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore"):
            lse = np.log(np.exp(score[..., first:last]).sum(-1))
        weight = np.exp(score[..., first:last] - np.where(np.isfinite(lse), lse, 0)[..., None])
        return (weight @ value[first:last]).transpose(0, 2, 1, 3), lse

    each = [attend(ends[i], ends[i + 1]) for i in range(len(counts))]
    outputs = [torch.tensor(o.reshape(BATCH, TOKENS, -1), dtype=dtype, device=DEVICE) for o, _ in each]
    return outputs, [torch.tensor(lse, dtype=torch.float32, device=DEVICE) for _, lse in each], *attend(0, ends[-1])


@pytest.mark.parametrize("counts", [[7], [3, 4], [1, 20, 0, 2], [0, 0]])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_parts_give_the_whole(counts: list[int], dtype: torch.dtype, limit: float) -> None:
    outputs, lses, want, want_lse = parts(counts, 80, dtype)
    output, lse = merge(outputs, lses)
    assert output.dtype == dtype
    assert np.abs(array(output).reshape(want.shape) - want).max() <= limit * max(np.abs(want).max(), 1)
    np.testing.assert_allclose(array(lse), want_lse, atol=1e-4)


def test_an_empty_part_may_hold_anything() -> None:
    outputs, lses, want, _ = parts([5, 0], 64, torch.float32)
    outputs[1][:] = float("nan")
    np.testing.assert_allclose(array(merge(outputs, lses)[0]).reshape(want.shape), want, atol=1e-5)


def test_far_apart_parts_do_not_overflow() -> None:
    outputs, lses, _, _ = parts([5, 5], 64, torch.float32)
    output, lse = merge(outputs, [lses[0] + 500, lses[1] - 500])
    np.testing.assert_allclose(array(output), array(outputs[0]), atol=1e-6)
    np.testing.assert_allclose(array(lse), array(lses[0] + 500))


def test_what_does_not_fit_is_refused() -> None:
    outputs, lses, _, _ = parts([5, 5], 64, torch.float32)
    with pytest.raises(UserError, match="2 outputs and 1 lses"):
        merge(outputs, lses[:1])
    with pytest.raises(UserError, match=r"lse has shape \[2, 5, 3\]: must be \[2, 3, 5\]"):
        merge(outputs, [lses[0], lses[1].transpose(1, 2).contiguous()])
