"""The influence of a cut, from tiles, against its definition: masked attention in fp64, differences of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspan.calibration import attention, influence, op_attention
from attnspan.calibration.attention import _Attention
from attnspan.planner.rules import SINK

DIM, SCALE = 8, 0.35


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [heads, tokens, dim] and weights [heads, tokens, tokens], with whole score matrices."""
    heads, tokens, _ = q.shape
    group = heads // k.shape[0]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    outputs, weights = [], []
    for h in range(heads):
        keep = j <= i
        if spans is not None:
            keep = keep & ((i - j < spans[h // group] - SINK) | (j < SINK))
        a = torch.softmax((q[h] @ k[h // group].t() * SCALE).masked_fill(~keep, -torch.inf), -1)
        outputs.append(a @ v[h // group])
        weights.append(a)
    return torch.stack(outputs), torch.stack(weights)


def tensors(tokens: int, kv_heads: int, group: int, seed: int) -> list[torch.Tensor]:
    """query, key, value and the gradient of the output, fp64."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(kv_heads * group, tokens, DIM), (kv_heads, tokens, DIM), (kv_heads, tokens, DIM), (kv_heads * group, tokens, DIM)]
    out = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    return [x.requires_grad_(i < 3) for i, x in enumerate(out)]


class Sums:
    """Watches the tiles of one layer."""

    def __init__(self, kv_heads: int, blocks: int, entries: bool = False) -> None:
        self.blocks, self.entries = blocks, entries
        self.joint = torch.zeros(kv_heads, blocks + 1, dtype=torch.float64)
        self.entry = torch.zeros_like(self.joint)

    def tile(self, layer: int, head: int, weight: torch.Tensor, gradient: torch.Tensor, base: torch.Tensor) -> None:
        self.joint[head] += influence.joint_rise(weight, weight * gradient, base, self.blocks).sum((0, 1))
        if self.entries:
            self.entry[head] += influence.entry_rise(weight, gradient, base, self.blocks).sum((0, 1))


SHAPES = st.tuples(st.integers(1, 400), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.booleans(), st.data())
def test_output_and_gradients_of_masked_attention(shape: tuple[int, int, int, int], cut: bool, data: st.DataObject) -> None:
    tokens, kv_heads, group, seed = shape
    q, k, v, up = tensors(tokens, kv_heads, group, seed)
    spans = data.draw(st.lists(st.sampled_from([128, 192, 256, 448]), min_size=kv_heads, max_size=kv_heads)) if cut else None
    watcher = data.draw(st.sampled_from([None, Sums(kv_heads, 8)]))
    got = _Attention.apply(q, k, v, spans, SCALE, 0, watcher)
    want, _ = reference(q, k, v, spans)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad((out * up).sum(), (q, k, v)) for out in (got, want)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.booleans())
def test_joint_rise_is_the_change_of_the_output_along_its_gradient(shape: tuple[int, int, int, int], in_force: bool) -> None:
    """Exact in the head's output: replacing one head's span changes dO . O by what the curve says, from the dense model and from
    a plan, for narrower spans and for wider ones."""
    tokens, kv_heads, group, seed = shape
    q, k, v, up = tensors(tokens, kv_heads, group, seed)
    blocks = influence.blocks_of(tokens) + seed % 2  # a nominal length may be a block longer than the text
    spans = [128 + 64 * ((seed >> h) % 3) for h in range(kv_heads)] if in_force else None
    sums = Sums(kv_heads, blocks)
    torch.autograd.grad((_Attention.apply(q, k, v, spans, SCALE, 0, sums) * up).sum(), q)
    now = (reference(q, k, v, spans)[0] * up).sum().item()
    scale = float((reference(q, k, v, None)[0] * up).detach().abs().sum()) + 1
    for h in range(kv_heads):
        for b in range(2, blocks + 1):
            other = list(spans) if spans else [10**6] * kv_heads
            other[h] = 64 * b
            change = (reference(q, k, v, other)[0] * up).sum().item() - now
            assert sums.joint[h, b].item() == pytest.approx(change, rel=1e-6, abs=1e-9 * scale)
        assert (sums.joint[h, :2] == sums.joint[h, min(2, blocks)]).all()


def test_entry_rise_is_the_papers_equation_and_its_suffix_sums() -> None:
    """E_ij from tiles against -A / (1 - A) * (G - (G o A) 1 1^T) from whole matrices; sums over masked entries by brute force."""
    tokens, kv_heads, group = 391, 2, 3
    q, k, v, up = tensors(tokens, kv_heads, group, 5)
    sums = Sums(kv_heads, 7, entries=True)
    torch.autograd.grad((_Attention.apply(q, k, v, None, SCALE, 0, sums) * up).sum(), q)
    _, a = reference(q, k, v, None)
    g = torch.stack([up[h] @ v[h // group].t() for h in range(kv_heads * group)])
    e = (-a / (1 - a).clamp_min(torch.finfo(torch.float64).eps) * (g - (g * a).sum(-1, keepdim=True))).detach().abs()
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    for h in range(kv_heads):
        for b in range(2, 8):
            masked = (j <= i) & ~((i - j < 64 * b - SINK) | (j < SINK))
            want = (e[h * group : (h + 1) * group] * masked).sum().item()
            assert sums.entry[h, b].item() == pytest.approx(want, rel=1e-6, abs=1e-12)


def test_entry_of_the_definition_is_the_difference_that_deleting_makes() -> None:
    """E_ij by deleting one entry and renormalising, first order in the output: exact for a loss linear in it."""
    q, k, v, up = tensors(130, 1, 1, 9)
    out, a = reference(q, k, v, None)
    i, j = 129, 70
    kept = a[0, i].detach().clone()
    kept[j] = 0
    change = ((kept / kept.sum()) @ v[0] - out[0, i]) @ up[0, i]
    aij = a[0, i, j]
    assert change.item() == pytest.approx((aij / (1 - aij) * (up[0, i] @ out[0, i] - up[0, i] @ v[0, j])).item(), rel=1e-9)


@pytest.mark.parametrize("rows", [1, 5, 64, 100, 128])
def test_distance_sums(rows: int) -> None:
    rng = np.random.default_rng(rows)
    for keys in (rows, rows + 63, rows + 200):
        x = np.tril(rng.normal(size=(2, keys, keys)))[:, keys - rows :]
        got = influence.distance_sums(torch.from_numpy(x)).numpy()
        want = np.zeros((2, rows, influence.blocks_of(keys)))
        for r in range(rows):
            for j in range(SINK, keys - rows + r + 1):
                want[:, r, (keys - rows + r - j) // 64] += x[:, r, j]
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_bf16_scores_are_summed_in_fp32() -> None:
    """The product on bf16 units is exact in its inputs: outputs differ from fp32 attention by one rounding of the output."""
    q, k, v = (x.detach().to(torch.bfloat16) for x in tensors(300, 2, 2, 3)[:3])
    with torch.inference_mode():
        got = _Attention.apply(q, k, v, [128, 192], SCALE, 0, None).float()
        want = _Attention.apply(q.float(), k.float(), v.float(), [128, 192], SCALE, 0, None)
    assert (got - want).abs().max() < 2**-6 * want.abs().max()


def test_tile_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, up = tensors(333, 1, 2, 1)
    seen = []
    for rows in (32, 100, 128, 512):
        monkeypatch.setattr(attention, "ROWS", rows)
        sums = Sums(1, 6, entries=True)
        torch.autograd.grad((_Attention.apply(q, k, v, None, SCALE, 0, sums) * up).sum(), q)
        seen.append(torch.cat([sums.joint, sums.entry]))
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300, 513])
@pytest.mark.parametrize("spans", [None, [128, 320]])
def test_the_deployed_op_computes_the_same(dtype: torch.dtype, tokens: int, spans: list[int] | None) -> None:
    if not op_attention.available():
        pytest.skip("the op library is not built")
    rng = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(heads, tokens, 32, generator=rng).to(dtype) for heads in (4, 2, 2))
    with torch.inference_mode():
        got = op_attention.attend(q, k, v, spans, SCALE).float()
        want = _Attention.apply(q.float(), k.float(), v.float(), spans, SCALE, 0, None)
    assert (got - want).abs().max() <= (2e-5 if dtype == torch.float32 else 2**-7 * float(want.abs().max()))
