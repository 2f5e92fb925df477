"""Weights of a Hugging Face folder, referenced where they lie in its safetensors files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.weights import by_rows
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
PACKED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "SCB")
"""How the tensors of quantised checkpoints are called (GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes)."""

LFS = b"version https://git-lfs"


def read_safetensors(folder: Path) -> dict[str, ir.TensorProtocol]:
    """Every tensor of a folder's model.safetensors or of all shards of its model.safetensors.index.json, by name.

    UserError when files or tensors are missing, cut short, packed, or of a type other than fp32, fp16 and bf16 (a mix is fine).
    """
    index = folder / "model.safetensors.index.json"
    named: Mapping[str, str] = {}
    files = [folder / "model.safetensors"]
    if index.is_file():
        named = _weight_map(index)
        files = [folder / name for name in sorted(set(named.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        why = f"{index.name} names {'it' if len(missing) == 1 else 'them'}; download MODEL again" if named else ""
        raise UserError(f"{folder} lacks {', '.join(missing)}; {why or 'MODEL must hold its weights as safetensors'}")
    tensors = {name: tensor for file in files for name, tensor in _read_file(file).items()}
    absent = sorted(set(named) - set(tensors))
    if absent:
        raise UserError(f"{index} puts {absent[0]} into {named[absent[0]]}, which lacks it; download MODEL again")
    return tensors


def check_tied(config: Mapping[str, Any], weights: Mapping[str, ir.TensorProtocol]) -> None:
    """UserError when a config ties the head to the embedding, and the weights hold a head that is another one."""
    embedding, head = (weights.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    if not config.get("tie_word_embeddings") or embedding is None or head is None:
        return
    same = tuple(embedding.shape) == tuple(head.shape) and embedding.dtype == head.dtype
    if same:
        (rows, step), (others, _) = by_rows(embedding), by_rows(head)
        count = int(embedding.shape[0])
        parts = ((first, min(first + step, count)) for first in range(0, count, step))
        same = all(np.array_equal(rows(*part).view(np.uint8), others(*part).view(np.uint8)) for part in parts)
    if not same:
        raise UserError(
            "config.json says tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight; "
            "set tie_word_embeddings to false, or leave lm_head.weight out of MODEL"
        )


def _weight_map(index: Path) -> Mapping[str, str]:
    """The files of all weights by an index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map; download MODEL again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index} names {name!r}: must be a file beside it; download MODEL again")
    return names


def _pointer(file: Path) -> str:
    with file.open("rb") as stream:
        return " but a pointer of Git LFS (`git lfs pull` fetches it)" if stream.read(len(LFS)) == LFS else ""


def _read_file(file: Path) -> dict[str, ir.TensorProtocol]:
    """Tensors of one file. Layout: 8-byte little-endian header length, JSON header, data."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
    except (struct.error, ValueError):
        raise UserError(f"{file} is not a safetensors file{_pointer(file)}; download MODEL again") from None
    except PermissionError:
        raise UserError(f"{file} may not be read; change its permissions, or MODEL") from None
    header.pop("__metadata__", None)
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if name.endswith(PACKED):
            raise UserError(f"{file}: {name} is of a quantised checkpoint; give the original fp32, fp16 or bf16 MODEL, or a GGUF")
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; weights must be {', '.join(DTYPES)}")
        dtype = DTYPES[entry["dtype"]]
        if 8 + length + end > size:
            raise UserError(f"{file} has {size} bytes, {8 + length + end} expected; download MODEL again")
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            shape = entry["shape"]
            raise UserError(f"{file}: {name} has {end - begin} bytes, its shape {shape} says otherwise; download MODEL again")
        # An absolute location without base_dir: the hub's cache holds symlinks, which onnx_ir refuses below a base_dir.
        where, shape = str(file.resolve()), ir.Shape(entry["shape"])
        tensors[name] = ir.ExternalTensor(where, 8 + length + begin, end - begin, dtype, name=name, shape=shape)
    return tensors
