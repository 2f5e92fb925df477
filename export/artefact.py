"""The writer of an artefact folder: model, weights, plan, config, tokenizer, op library and their description."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export.source import Source
from attnspan.planner.hf_config import with_sparse_attention
from attnspan.planner.parts import plan_parts
from attnspan.planner.plan import Plan

SCHEMA = 1
MODEL = "model.onnx"
DATA = "model.onnx.data"
DESCRIPTION = "attnspan.json"
PACKAGES = ("attnspan", "onnx", "onnx_ir", "onnxscript", "transformers", "gguf")
SMALL = 256  # bytes; smaller tensors stay in model.onnx


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(int(x.const_value.nbytes) for x in model.graph.initializers.values())


def disk_bytes(model: ir.Model, library: Path | None) -> int:
    """Bytes that the artefact of `model` takes, a little too many: weights, graph, tokenizer, library."""
    return weight_bytes(model) + (library.stat().st_size if library else 0) + 32_000_000


def write_model(model: ir.Model, folder: Path) -> None:
    """Write model.onnx and model.onnx.data, one tensor in memory at a time; a progress bar when it takes seconds."""
    from tqdm import tqdm

    with tqdm(total=weight_bytes(model), unit="B", unit_scale=True, desc="weights", delay=2, leave=False, disable=None) as bar:

        def progress(tensor: ir.TensorProtocol, _: Any) -> None:
            bar.update(tensor.nbytes)

        ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=SMALL, callback=progress, alignment=4096)


def write_companions(folder: Path, source: Source, plan: Plan, library: Path | None) -> None:
    """Write what lies beside the model: plan, config, tokenizer, generation config, op library."""
    plan.save(folder / "plan.json")
    _write_json(folder / "config.json", with_sparse_attention(source.config))
    source.write_side_files(folder)
    if library:
        shutil.copyfile(library, folder / library.name)


def describe(folder: Path, source: Source, plan: Plan, cache_dtype: ir.DataType, library: Path | None) -> dict[str, Any]:
    """The content of attnspan.json for a folder that holds all other files."""
    shape = source.shape
    assert shape.head_dim is not None  # a config has it
    return {
        "schema": SCHEMA,
        "target": "cpu",
        "model_id": shape.id,
        "n_max": plan.n_max,
        "dtype": "float32",
        "cache_dtype": cache_dtype.numpy().name,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": source.config["vocab_size"],
        "sink": plan.sink,
        "capacity": plan.capacities().tolist(),
        "attention": [part.describe(shape.head_dim) for part in plan_parts(plan)],
        "op_library": library.name if library else None,
        "versions": _versions(),
        "files": {file.name: _fingerprint(file) for file in sorted(folder.iterdir()) if file.name != DESCRIPTION},
        "source": {"name": source.name, "format": source.format},
    }


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write attnspan.json."""
    _write_json(folder / DESCRIPTION, description)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
