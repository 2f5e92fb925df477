"""Which front end a model takes: `build` for the families it knows, `trace` for the others that transformers has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from attnspan.export.frontends import decoder
from attnspan.export.frontends.build import build
from attnspan.export.frontends.families import FAMILIES
from attnspan.export.frontends.family import GLOBAL, LOCAL, Config
from attnspan.export.graph import WINDOW
from attnspan.export.source import Source
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KNOWN = f"families that need no tracing are {', '.join(FAMILIES)}"
_BY_LENGTH = ("dynamic", "longrope")
"""Types of RoPE whose frequencies a trace would take from the length of its example."""


def layer_windows(config: Config) -> list[int | None]:
    """Tokens that each layer of a model lets a token see, itself included, [layers]; None: all.

    UserError for layers of a kind that is neither full nor sliding attention, and for a model that transformers does not know.
    """
    if config.get("model_type") in FAMILIES:
        return decoder.layer_windows(config)
    full = _full_config(config)
    window = getattr(full, "sliding_window", None) if getattr(full, "use_sliding_window", True) else None
    count = ModelShape.from_config(config).layers
    types = (getattr(full, "layer_types", None) or [LOCAL if window else GLOBAL] * count)[:count]
    strange = sorted(set(types) - {GLOBAL, LOCAL})
    if strange:
        raise UserError(f"MODEL has layers of type {', '.join(strange)}; allowed are {GLOBAL} and {LOCAL}")
    return [window if kind == LOCAL else None for kind in types]


def is_traced(config: Config) -> bool:
    """Whether the graph of a model is traced, which reads its weights."""
    return config.get("model_type") not in FAMILIES


def normal_form(source: Source, n_max: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """The normal form of a model in `dtype`, right for texts of up to `n_max` tokens.

    Weights stay on disk where `build` knows the family; else the model is loaded, in fp32. UserError as of both front ends.
    """
    if not is_traced(source.config):
        return build(source.config, source.weights, n_max, dtype)
    if dtype != ir.DataType.FLOAT:
        raise UserError(f"model_type is {source.config.get('model_type')!r}, which is traced, in fp32 only; {_KNOWN}")
    windows = layer_windows(source.config)
    model = _trace(_load(source))
    for i, node in enumerate(node for node in model.graph if node.op_type == "Attention"):
        if node.metadata_props.get(WINDOW) != (None if windows[i] is None else str(windows[i])):
            raise UserError(f"layer {i} of MODEL has a window of its own that its config.json does not say; {_KNOWN}")
    return model


def _full_config(config: Config) -> Any:
    kind = config.get("model_type")
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UserError(f"model_type is {kind!r}, which needs transformers and PyTorch; install attnspan[export]") from None
    try:
        return AutoConfig.for_model(**{"model_type": "", **config})
    except (ValueError, TypeError):
        raise UserError(f"model_type is {kind!r}, which transformers does not know; {_KNOWN}") from None


def _load(source: Source) -> PreTrainedModel:
    """The model in PyTorch, in fp32; a source cut to its first layers gives that many."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = _full_config(source.config)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in _BY_LENGTH:
        raise UserError(f"rope_type is {rope!r}, which cannot be traced; {_KNOWN}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(source.path, config=config, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{source.path}: transformers cannot load it: {error}") from None


def _trace(model: PreTrainedModel) -> ir.Model:
    import torch

    from attnspan.export.frontends.trace import trace

    try:
        return trace(model)
    except UserError:
        raise
    except (torch.onnx.OnnxExporterError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{type(model).__name__} cannot be traced ({reason:.200}); {_KNOWN}") from None
