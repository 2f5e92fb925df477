"""What cutting a head's span does to the loss, from what the backward pass of attention has in hand: the mathematics of one tile.

A tile is R consecutive queries of one KV head (all G query heads of its group) against every key up to the last of them. With the
weights w_ij = exp(score_ij - lse_i), where lse belongs to the keys *in force* (all of them in the dense model, those inside the
head's span when a plan is in force), the gradients g_ij = dO_i . V_j and D_i = dO_i . O_i:

    joint     a head that keeps the set K puts out sum_K w V / sum_K w, so to first order in that output the loss rises by
              sum_K w g / sum_K w - D. For one dropped set M of the dense model that is (m D - c) / (1 - m), m = sum_M w, c =
              sum_M w g.
    entry     deleting entry (i, j) alone: E_ij = A_ij / (1 - A_ij) * (D_i - g_ij)      MoA (arXiv 2406.14909), equation 14

Masks are sinks + a band, so all that a span can see are sums over the distance i - j in blocks of 64 tokens: memory is linear in
N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnspan.planner.rules import BLOCK, SINK

TINY = 1e-30
"""Smallest sum of weights that is divided by."""


def blocks_of(tokens: int) -> int:
    """Blocks of 64 tokens that hold so many."""
    return -(-tokens // BLOCK)


def distance_sums(x: Tensor) -> Tensor:
    """Sums over blocks of distance, sinks left out: x [groups, rows, keys] -> [groups, rows, blocks].

    The last key is the last row's own: row r lies at position keys - rows + r. Block k of the result sums the keys at distances
    64 k to 64 k + 63; the first 64 keys of the sequence (the sinks) are in none. Entries above the diagonal must be 0.
    """
    groups, rows, keys = x.shape
    blocks = blocks_of(keys)
    # Row r moves right by rows - 1 - r, so that columns are distances; the zeros on the left stand for keys before the first.
    pad = rows - 1 + blocks * BLOCK - keys
    wide = x.new_empty(groups, rows, pad + keys)
    wide[:, :, : pad + SINK] = 0
    wide[:, :, pad + SINK :] = x[:, :, SINK:]
    width = pad + keys
    skewed = wide.as_strided((groups, rows, blocks, BLOCK), (rows * width, width + 1, BLOCK, 1))
    return skewed.sum(-1).flip(-1)


def joint_rise(weight: Tensor, weighted: Tensor, base: Tensor, blocks: int) -> Tensor:
    """Rise of the loss by row for every span: -> [groups, rows, blocks + 1], entry b for a span of b blocks, sinks included.

    weight, weighted [groups, rows, keys]: w and w g, 0 above the diagonal; base [groups, rows]: D. Entries 0 and 1 equal entry 2:
    the sinks and one block are the least that is kept.
    """
    sums = torch.stack([distance_sums(weight), distance_sums(weighted)]).cumsum(-1)
    kept = sums + torch.stack([weight[..., :SINK].sum(-1), weighted[..., :SINK].sum(-1)])[..., None]
    rise = kept[1] / kept[0].clamp_min(TINY) - base[..., None]
    return _by_span(rise, blocks)


def entry_rise(weight: Tensor, gradient: Tensor, base: Tensor, blocks: int) -> Tensor:
    """Sum of |E_ij| over the entries that every span drops: -> [groups, rows, blocks + 1], as in `joint_rise`.

    The paper's estimator with the absolute value of its reference implementation. weight must be that of the dense model.
    """
    influence = (weight / (1 - weight).clamp_min(torch.finfo(weight.dtype).eps) * (base[..., None] - gradient)).abs()
    sums = distance_sums(influence * (weight > 0))
    dropped = sums.sum(-1, keepdim=True) - sums.cumsum(-1)
    return _by_span(dropped.clamp_min(0), blocks)


def _by_span(values: Tensor, blocks: int) -> Tensor:
    """From "the k + 1 nearest blocks are kept" to "the span has b blocks": one more for the sinks, the last repeated."""
    groups, rows, have = values.shape
    out = values.new_empty(groups, rows, blocks + 1)
    take = min(have, blocks - 1)
    out[..., 2 : take + 2] = values[..., :take]
    out[..., :2] = values[..., :1]
    out[..., take + 2 :] = values[..., -1:]
    return out
