"""Weights of a checkpoint under the names and in the shapes of Llama, without reading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.source import Weights
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

Config = Mapping[str, Any]


def rows(tensor: ir.TensorProtocol, first: int, end: int) -> ir.TensorProtocol:
    """Rows [first, end) of `tensor`: a piece of the same file where it lies in one, else cut when they are read."""
    dtype, shape = tensor.dtype, ir.Shape([end - first, *tensor.shape[1:]])
    each = tensor.nbytes // tensor.shape[0]
    if isinstance(tensor, ir.ExternalTensor):
        start = (tensor.offset or 0) + first * each
        return ir.ExternalTensor(tensor.location, start, (end - first) * each, dtype, shape=shape, name=tensor.name)
    return ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(tensor.numpy()[first:end])), dtype, shape, name=tensor.name)


def plus_one(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """1 + `tensor`, in fp32: rounded to 16 bits, small weights would be lost beside the 1."""
    shape = ir.Shape(tensor.shape)
    return ir.LazyTensor(lambda: ir.tensor(1 + tensor.numpy().astype(np.float32)), ir.DataType.FLOAT, shape, name=tensor.name)


def unfused(weights: Weights, config: Config) -> Weights:
    """`qkv_proj` as q, k and v, `gate_up_proj` as gate and up (Phi-3)."""
    shape = ModelShape.from_config(config)
    assert shape.head_dim is not None  # from_config derives it
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
    parts: dict[str, dict[str, int]] = {
        "qkv_proj": {name: count * shape.head_dim for name, count in heads.items()},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), int(config.get("intermediate_size") or 0)),
    }
    found: dict[str, ir.TensorProtocol] = {}
    for name, tensor in weights.items():
        block, _, kind = name.rpartition(".")
        place, _, fused = block.rpartition(".")
        if fused not in parts:
            found[name] = tensor
            continue
        wanted = sum(parts[fused].values())
        if tensor.shape[0] != wanted:
            raise UserError(f"weight {name!r} has {tensor.shape[0]} rows, {wanted} by config.json; check MODEL")
        first = 0
        for part, size in parts[fused].items():
            found[f"{place}.{part}.{kind}"] = rows(tensor, first, first + size)
            first += size
    return found


def norms_plus_one(weights: Weights, _: Config) -> Weights:
    """Every norm's weight with 1 added (Gemma stores what it differs from 1 by)."""
    return {name: plus_one(x) if name.endswith("norm.weight") else x for name, x in weights.items()}


def renamed(*pairs: tuple[str, str]) -> Callable[[Weights, Config], Weights]:
    """A function that replaces patterns in the weights' names, in order."""

    def rename(weights: Weights, _: Config) -> Weights:
        found = {}
        for name, tensor in weights.items():
            for pattern, new in pairs:
                name = re.sub(pattern, new, name)
            found[name] = tensor
        return found

    return rename
