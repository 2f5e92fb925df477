"""What is known about the attention of a layer of a foreign graph, and small questions to its nodes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


class MatchError(Exception):
    """Why a node is no attention that can be lifted."""


@dataclass(frozen=True)
class Rotary:
    """RoPE inside an attention op: tables [positions, rotary_dim / 2]."""

    cos: ir.Value
    sin: ir.Value
    interleaved: int


@dataclass(frozen=True)
class Core:
    """The attention of one layer. `flat`: tensors are [batch, tokens, heads * dim], else [batch, heads, tokens, dim].

    query holds keys and values, too, when key is None. window: the last tokens that are seen, None for all.
    """

    node: ir.Node
    output: ir.Value
    flat: bool
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past: tuple[ir.Value, ir.Value] | None
    present: tuple[ir.Value, ...]
    heads: int
    kv_heads: int
    dim: int
    scale: float
    softcap: float = 0.0
    window: int | None = None
    rotary: Rotary | None = None


class Inputs:
    """Inputs of a node by number; None for those left out."""

    def __init__(self, node: ir.Node) -> None:
        self.values = list(node.inputs)

    def __getitem__(self, i: int) -> ir.Value | None:
        return self.values[i] if i < len(self.values) else None


def int_of(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def float_of(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.as_float())


def pair(
    past_key: ir.Value | None, past_value: ir.Value | None, present_key: ir.Value | None, present_value: ir.Value | None
) -> tuple[tuple[ir.Value, ir.Value] | None, tuple[ir.Value, ...]]:
    """Caches and what they become, of both keys and values or of neither."""
    if past_key is None or past_value is None or present_key is None or present_value is None:
        if past_key is not past_value:
            raise MatchError("only one of its keys and values is cached")
        return None, ()
    return (past_key, past_value), (present_key, present_value)
