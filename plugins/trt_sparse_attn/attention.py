"""Runs a transformers causal LM under a plan: `use_plan(model, plan)`, then `model(...)` and `model.generate(...)` as ever.

The model's attention becomes the op `attnspan::span_attention`, and its cache a ring per KV head: memory and time follow the kept
tokens. Heads of mode `dense` and `lsh` keep, and attend to, everything. Batches may be padded on either side.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from attnspan.planner.errors import UserError
from attnspan.planner.plan import Plan
from attnspan.planner.rules import BLOCK, MIN_SPAN
from attnspan.plugins.trt_sparse_attn.torch_ops import span_attention, span_prefill

__all__ = ["NAME", "SpanCache", "use_plan"]

NAME = "attnspan"
"""Name of the attention in transformers' AttentionInterface."""


class SpanCache(Cache):  # type: ignore[misc]
    """Keys and values of a batch under a plan: per layer two tensors [batch, slots, dim], made when the layer is first run.

    length [batch] int32: tokens that each row holds, padding not counted.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(layers=[])
        self.plan = plan
        self.seen = 0  # columns of input so far, with padding: bounds every length without asking the device
        self.length: Tensor | None = None
        self.tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The key and value cache of a layer, of the type and on the device of `like` [batch, .., dim]."""
        if layer not in self.tensors:
            slots = int(self.plan.capacities()[layer].sum())
            shape = (like.shape[0], slots, like.shape[-1])
            self.tensors[layer] = (like.new_empty(shape), like.new_empty(shape))
        return self.tensors[layer]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: the attention reads the old ones from the rings, then writes the new ones there."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input so far, which transformers counts positions and masks by."""
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that fit."""
        return self.plan.n_max

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was."""
        self.tensors = {layer: (k[beam_idx], v[beam_idx]) for layer, (k, v) in self.tensors.items()}
        self.length = None if self.length is None else self.length[beam_idx]

    def crop(self, tokens_to_remove: int) -> None:
        """Rings do not go back: what they held before is overwritten."""
        raise UserError(
            f"{tokens_to_remove} tokens cannot be dropped: the rings have overwritten older ones; do not use assisted decoding"
        )

    def reset(self) -> None:
        """Forgets all rows. Slots need no clearing: each is written before it is read."""
        self.seen, self.length = 0, None


@dataclass
class _Call:
    """What the layers of one forward pass share.

    spans [layers, batch, kv_heads]; first [batch]: columns of padding before a row's tokens, None for none; count [batch]:
    tokens of each row, None for all; tokens: columns of the call.
    """

    spans: Tensor
    cache: SpanCache | None
    first: Tensor | None
    count: Tensor | None
    tokens: int


_call: ContextVar[_Call | None] = ContextVar("_call", default=None)


class _Runner:
    """The plan on the model's device, and the hooks that surround its forward pass."""

    def __init__(self, plan: Plan, config: Any) -> None:
        self.plan, self.config = plan, config
        self.rules = torch.tensor([[(r.alpha, r.beta) for r in layer] for layer in plan.rules], dtype=torch.float64)
        self.layout: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rules [layers, kv_heads, 2], capacities and offsets [layers, kv_heads]."""
        if device not in self.layout:
            capacity = torch.from_numpy(self.plan.capacities())
            offset = (capacity.cumsum(1) - capacity).int()
            self.layout[device] = (self.rules.to(device), capacity.to(device), offset.to(device))
        return self.layout[device]

    def spans(self, length: Tensor) -> Tensor:
        """Spans in force for rows of `length` [batch] tokens, int32 [layers, batch, kv_heads]; as planner.rules.span_tokens."""
        rules, _, _ = self.on(length.device)
        n = length.double()[None, :, None]
        wanted = torch.minimum(rules[:, None, :, 0] + rules[:, None, :, 1] * n, n)
        return (BLOCK * torch.ceil(wanted / BLOCK)).clamp_min(MIN_SPAN).int()

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a forward pass: a cache of ours, and the lengths and spans of its rows."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            raise UserError("neither input_ids nor inputs_embeds is given: pass one of them")
        batch, tokens = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, SpanCache):
            if cache is not None and cache.get_seq_length():
                raise UserError(f"past_key_values is a {type(cache).__name__} that holds tokens: must be a SpanCache or None")
            wanted = kwargs.get("use_cache")
            cache = SpanCache(self.plan) if (self.config.use_cache if wanted is None else wanted) else None
            kwargs = {**kwargs, "past_key_values": cache}
        seen = 0 if cache is None else cache.seen
        if seen + tokens > self.plan.n_max:
            raise UserError(
                f"{seen} tokens and {tokens} more make {seen + tokens}: the plan is for n_max = {self.plan.n_max}; "
                "plan for more with --n-max"
            )
        first, count = _rows(kwargs.get("attention_mask"), tokens)
        length = torch.zeros(batch, dtype=torch.int32, device=ids.device)
        if cache is not None:
            length = cache.length = length if cache.length is None else cache.length
        _call.set(_Call(self.spans(length + (tokens if count is None else count)), cache, first, count, tokens))
        return args, kwargs

    def end(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        """After it, also when it failed: the rows have grown."""
        call = _call.get()
        _call.set(None)
        if call is not None and call.cache is not None and output is not None:
            assert call.cache.length is not None
            call.cache.length = call.cache.length + (call.tokens if call.count is None else call.count)
            call.cache.seen += call.tokens

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, softcap: float | None
    ) -> Tensor:
        """query [batch, heads, tokens, dim], key and value [batch, kv_heads, tokens, dim] -> [batch, tokens, heads, dim]."""
        call = _call.get()
        if call is None:
            raise UserError("the model is called from inside: call the module that use_plan was given")
        batch, heads, tokens, dim = query.shape
        layer = module.layer_idx
        flat = [x.transpose(1, 2).reshape(batch, tokens, -1) for x in (query, key, value)]
        if call.first is not None:  # kernels take rows that begin with their first token
            column = torch.arange(tokens, device=query.device)
            forth = ((column + call.first[:, None]) % tokens)[..., None]
            flat = [x.gather(1, forth.expand(x.shape)) for x in flat]
        fixed = {"num_heads": heads, "sink": self.plan.sink, "scale": scaling, "softcap": softcap or 0.0}
        fixed["new_tokens"] = call.count
        if call.cache is None:
            output, _ = span_prefill(*flat, None, None, None, call.spans[layer], None, None, **fixed)
        else:
            _, capacity, offset = self.on(query.device)
            numbers = (call.cache.length, call.spans[layer], capacity[layer], offset[layer])
            output, _ = span_attention(*flat, *call.cache.of(layer, key), *numbers, **fixed)
        if call.first is not None:
            back = ((column - call.first[:, None]) % tokens)[..., None]
            output = output.gather(1, back.expand(output.shape))
        return output.view(batch, tokens, heads, dim)


def _rows(mask: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """Where the tokens of each row begin among the new columns, and how many they are; None where no row is padded."""
    if mask is None:
        return None, None
    if mask.dim() != 2:
        raise UserError(f"attention_mask has shape {list(mask.shape)}: must be [batch, tokens], padding on one side")
    there = mask[:, -tokens:].bool()
    count = there.sum(1, dtype=torch.int32)
    if tokens == 1:
        return None, count
    if bool(there.all()):  # waits for the device, once per chunk
        return None, None
    first = there.int().argmax(1)
    column = torch.arange(tokens, device=mask.device)
    if not torch.equal(there, (column >= first[:, None]) & (column < (first + count)[:, None])):
        raise UserError("attention_mask has gaps inside a row: must be padding on one side")
    return first, count


_runners: weakref.WeakKeyDictionary[Any, _Runner] = weakref.WeakKeyDictionary()
"""Runner of each attention module."""


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, scaling: float | None = None,
    softcap: float | None = None, sliding_window: int | None = None, s_aux: Any = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls."""
    if module not in _runners:
        raise UserError(f"attention {NAME!r} has no plan: call use_plan(model, plan)")
    if sliding_window is not None or s_aux is not None:
        what = "sink weights" if s_aux is not None else f"a sliding window of {sliding_window}"
        raise UserError(f"layer {module.layer_idx} has {what}: attnspan runs full attention only")
    return _runners[module].attend(module, query, key, value, scaling, softcap), None


def use_plan(model: Any, plan: Plan) -> None:
    """Makes a transformers causal LM, in fp16 or bf16, attend and cache as the plan says, from its next call on.

    A second call replaces the plan. Spans follow each row's length. UserError when the plan was not made for such a model; what
    the kernels do not take (head_dim, type, a device without them) is a UserError of the first forward pass.
    """
    from attnspan.planner.shape import ModelShape

    config = model.config.get_text_config()
    shape = ModelShape.from_config(config.to_dict(), plan.model.id)
    plan.check_model(shape)
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    runner = _Runner(plan, config)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            _runners[module] = runner
    for handle in getattr(model, "_attnspan_hooks", ()):
        handle.remove()
    model._attnspan_hooks = (
        model.register_forward_pre_hook(runner.begin, with_kwargs=True),
        model.register_forward_hook(runner.end, always_call=True),
    )
