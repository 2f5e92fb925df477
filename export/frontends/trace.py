"""The front end that traces a transformers model: for families that `build` does not know, and the oracle of those it does.

The model runs unmodified; its attention is one custom op of torch, which becomes the `Attention` node of the normal form.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from attnspan.export.frontends.build import END
from attnspan.export.graph import WINDOW
from attnspan.export.ops import IR_VERSION, OPSET
from attnspan.planner.errors import UserError

NAME = "attnspan_trace"
op = Opset("", OPSET)


@dataclass
class _Call:
    """The forward pass that is being traced: pasts of each layer, logits wanted, presents so far."""

    pasts: list[Tensor]
    keep: Tensor
    presents: list[Tensor] = field(default_factory=list)


_call: ContextVar[_Call] = ContextVar("call")
_windows: ContextVar[dict[int, int | None]] = ContextVar("windows")
"""Window of each layer of the model that is being traced. Not an attribute of a module: those are not kept."""


@torch.library.custom_op("attnspan::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention on [batch, tokens, heads * dim] and caches [batch, kv_heads, past, dim]; only ever traced."""
    raise NotImplementedError


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, past, dim = past_key.shape
    shape = (batch, kv_heads, past + key.shape[1], dim)
    return torch.empty_like(query), past_key.new_empty(shape), past_value.new_empty(shape)


@torch.library.custom_op("attnspan::keep_last", mutates_args=())
def _keep_last(hidden: Tensor, count: Tensor) -> Tensor:
    """The last `count` [1] positions of hidden [batch, tokens, features]; only ever traced."""
    raise NotImplementedError


@_keep_last.register_fake
def _(hidden: Tensor, count: Tensor) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return hidden.new_empty(hidden.shape[0], kept, hidden.shape[2])


def _to_attention(
    query: Any, key: Any, value: Any, past_key: Any, past_value: Any, heads: int, kv_heads: int, scale: float, softcap: float
) -> Any:
    counts = {"is_causal": 1, "q_num_heads": heads, "kv_num_heads": kv_heads}
    return op.Attention(query, key, value, None, past_key, past_value, **counts, scale=scale, softcap=softcap)


def _to_slice(hidden: Any, count: Any) -> Any:
    end, axis = op.Constant(value_ints=[END]), op.Constant(value_ints=[1])
    return op.Slice(hidden, op.Neg(count), end, axis)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls: query [batch, heads, tokens, dim], key and value [batch, kv_heads, ...]."""
    if s_aux is not None:
        raise UserError(f"layer {module.layer_idx} of MODEL has sink weights, which no op of ours has; give another MODEL")
    call = _call.get()
    _windows.get()[module.layer_idx] = sliding_window
    flat = [x.transpose(1, 2).flatten(2) for x in (query, key, value)]
    past = call.pasts[2 * module.layer_idx : 2 * module.layer_idx + 2]
    output, *present = torch.ops.attnspan.attention(*flat, *past, query.shape[1], key.shape[1], scaling, softcap or 0.0)
    call.presents += present
    return output.unflatten(2, (query.shape[1], -1)), None


class _Wrapper(torch.nn.Module):
    """A model with the inputs and outputs of the normal form."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, pasts: list[Tensor]) -> Any:
        call = _Call(pasts, logits_to_keep)
        token = _call.set(call)
        try:
            logits = self.model(input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            _call.reset(token)
        return logits, call.presents


class _Head(torch.nn.Module):
    """The head of a model, for the wanted positions only; what the model does to logits comes after it."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Any:
        return self.head(torch.ops.attnspan.keep_last(hidden, _call.get().keep))


def trace(model: PreTrainedModel) -> ir.Model:
    """The normal form (see `build`) of a transformers causal LM, with its weights in memory.

    Masks of the model's own are dropped: every layer attends to all that came before; metadata say which windows it has.
    UserError for attention with weights for sinks.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    config = model.config
    layers = config.num_hidden_layers
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = [f"{kind}.{i}" for i in range(layers) for kind in ("key", "value")]

    # One tensor each: the same one twice would be traced as one input.
    pasts = [torch.zeros(2, config.num_key_value_heads, 5, dim, dtype=model.dtype) for _ in kinds]
    ids = torch.zeros(2, 3, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC
    tokens = {0: dynamic, 1: dynamic}
    windows: dict[int, int | None] = {}
    _windows.set(windows)
    wrapper = _Wrapper(model).eval()
    head, model.lm_head = model.lm_head, _Head(model.lm_head)
    program = torch.onnx.export(
        wrapper,
        (ids, ids.clone(), torch.ones(1, dtype=torch.int64), pasts),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(tokens, tokens, None, [{0: dynamic, 2: dynamic} for _ in kinds]),
        input_names=["input_ids", "position_ids", "logits_to_keep", *(f"past_{kind}" for kind in kinds)],
        output_names=["logits", *(f"present_{kind}" for kind in kinds)],
        custom_translation_table={
            torch.ops.attnspan.attention.default: _to_attention,
            torch.ops.attnspan.keep_last.default: _to_slice,
        },
        verbose=False,
    )
    model.lm_head = head
    traced: ir.Model = program.model
    traced.ir_version = IR_VERSION
    attentions = [node for node in traced.graph if node.op_type == "Attention"]
    if len(attentions) != layers:
        raise ValueError(f"{len(attentions)} attentions were traced, the model has {layers} layers")
    for i, node in enumerate(attentions):
        node.name = f"layers.{i}.attention"
        window = windows.get(i)
        if window is not None:
            node.metadata_props[WINDOW] = str(window)
    return traced
