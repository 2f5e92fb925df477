"""Weights of a Hugging Face folder, referenced where they lie in its safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import onnx_ir as ir

from attnspan.planner.errors import UserError

DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def read_safetensors(folder: Path) -> dict[str, ir.TensorProtocol]:
    """Every tensor of a folder's model.safetensors or of all shards of its model.safetensors.index.json, by name.

    UserError when files are missing, cut short or of a type other than fp32, fp16 and bf16.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; MODEL must hold its weights as safetensors")
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def _read_file(file: Path) -> dict[str, ir.TensorProtocol]:
    """Tensors of one file. Layout: 8-byte little-endian header length, JSON header, data."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
    except (struct.error, ValueError):
        raise UserError(f"{file} is not a safetensors file; download MODEL again") from None
    header.pop("__metadata__", None)
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{file}: {name} is {entry['dtype']}; weights must be {', '.join(DTYPES)}")
        if 8 + length + end > size:
            raise UserError(f"{file} has {size} bytes, {8 + length + end} expected; download MODEL again")
        # An absolute location without base_dir: the hub's cache holds symlinks, which onnx_ir refuses below a base_dir.
        where, shape = str(file.resolve()), ir.Shape(entry["shape"])
        tensors[name] = ir.ExternalTensor(where, 8 + length + begin, end - begin, DTYPES[entry["dtype"]], name=name, shape=shape)
    return tensors
