"""Queries, keys and values of some layers of a model over a long text: what `attnspan bench lsh` measures on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface

from attnspan.calibration.attention import NAME as EXACT
from attnspan.calibration.attention import Setting, attention
from attnspan.planner.files import whole_file
from attnspan.planner.shape import ModelShape

__all__ = ["capture", "save_capture"]

NAME = "attnspan_capture"
FORMAT, VERSION = "attnspan-capture", 1

Arrays = dict[str, npt.NDArray[Any]]


class _DoneError(Exception):
    """The last wanted layer was reached: the rest of the model need not run."""


def capture(model: Any, tokens: npt.NDArray[np.int64], layers: list[int], queries: int) -> Arrays:
    """q_LAYER [heads, queries, head_dim] of the last `queries` tokens, k_LAYER and v_LAYER [kv_heads, tokens, head_dim] of all,
    after RoPE, as the model's attention gets them; and `scale`, which multiplies the scores.

    One dense pass over a hooked model (`load_model`) up to the last of the layers; memory is linear in the tokens. Models in fp16
    give fp16, all others bits of bfloat16 as uint16.
    """
    out: Arrays = {}
    exact = AttentionInterface()[EXACT]
    with tqdm(total=max(layers) + 1, desc="capture", unit=" layers", disable=None) as bar:

        def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, scaling: float, **more: Any) -> Any:
            layer = module.layer_idx
            if layer in layers:
                out[f"q_{layer}"], out[f"k_{layer}"], out[f"v_{layer}"] = map(_array, (query[0, :, -queries:], key[0], value[0]))
                out["scale"] = np.array(scaling, np.float64)
            bar.update()
            if layer == max(layers):
                raise _DoneError
            return exact(module, query, key, value, *rest, scaling=scaling, **more)

        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, lambda *_, **__: None)
        model.set_attn_implementation(NAME)
        try:
            ids = torch.from_numpy(tokens)[None].to(model.device)
            with torch.inference_mode(), attention(Setting()):
                model(ids, use_cache=False, logits_to_keep=1)
        except _DoneError:
            pass
        finally:
            model.set_attn_implementation(EXACT)
    return out


def _array(x: Any) -> npt.NDArray[Any]:
    """A tensor as fp16, or as bits of bfloat16."""
    if x.dtype == torch.float16:
        return np.asarray(x.cpu().numpy()).copy()
    wide = x.float().cpu().numpy()
    return np.ascontiguousarray(wide.astype(ml_dtypes.bfloat16)).view(np.uint16)


def rope_of(config: Any) -> dict[str, Any]:
    """What a model's config says of its rotary embedding."""
    names = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings")
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def save_capture(
    file: Path, shape: ModelShape, layers: list[int], arrays: Arrays, rope: dict[str, Any], text: dict[str, Any]
) -> None:
    """Write arrays of `capture` and their metadata as .npz, whole. text: where the tokens come from."""
    first = layers[0]
    meta = {
        "format": FORMAT, "version": VERSION, "model": shape.id, "config_hash": shape.config_hash, "layers": layers,
        "tokens": arrays[f"k_{first}"].shape[1], "queries": arrays[f"q_{first}"].shape[1], "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_dim": arrays[f"k_{first}"].shape[2], "scale": float(arrays["scale"]),
        "dtype": "float16" if arrays[f"k_{first}"].dtype == np.float16 else "bfloat16", "rope": rope, "text": text,
    }  # fmt: skip
    stored = {name: array for name, array in arrays.items() if name != "scale"}
    with whole_file(file) as out:
        np.savez(out, meta=np.array(json.dumps(meta)), **stored)  # type: ignore[arg-type]
