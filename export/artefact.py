"""The writer of an artefact folder: model, weights, plan, config, tokenizer, op library and their description."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export import writer
from attnspan.export.source import Source
from attnspan.export.targets import Form, onnx_type
from attnspan.planner.hf_config import with_sparse_attention
from attnspan.planner.plan import Plan
from attnspan.planner.schema import dump

SCHEMA = 1
MODEL = "model.onnx"
DATA = "model.onnx.data"
DESCRIPTION = "attnspan.json"
PACKAGES = ("attnspan", "onnx", "onnx_ir", "onnxscript", "onnx-graphsurgeon", "transformers", "gguf")
SMALL = 256  # bytes; smaller tensors stay in model.onnx


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(int(x.const_value.nbytes) for x in model.graph.initializers.values())


def planned_files(model: ir.Model | None, source: Source, plan: Plan, form: Form, library: Path | None) -> dict[str, int | None]:
    """Sizes in bytes of the files that will be written, before any is; None where only writing tells.

    Without `model`, weights take what those of `source` do in fp32.
    """
    if model is not None:
        graph, data = writer.written_bytes(model, DATA, SMALL)
    else:
        graph, data = None, 4 * source.parameters
    sizes: dict[str, int | None] = {MODEL: graph, DATA: data}
    for name, content in _companions(source, plan, library).items():
        sizes[name] = len(content) if isinstance(content, bytes) else content.stat().st_size
    sizes |= dict.fromkeys(source.converted_files)
    nothing = {name: {"bytes": size or 0, "sha256": "0" * 64} for name, size in sizes.items()}
    sizes[DESCRIPTION] = len(_json(describe(source, plan, form, library, nothing)))
    return dict(sorted(sizes.items()))


def disk_bytes(files: Mapping[str, int | None]) -> int:
    """Bytes that files of these sizes take, a little too many."""
    return sum(size or 0 for size in files.values()) + 32_000_000


def write_model(model: ir.Model, folder: Path) -> dict[str, Any]:
    """Write model.onnx and model.onnx.data, a block in memory at a time; a progress bar when it takes seconds.

    Returns the entry of model.onnx.data in attnspan.json, by its name.
    """
    from tqdm import tqdm

    with tqdm(total=weight_bytes(model), unit="B", unit_scale=True, desc="weights", delay=2, leave=False, disable=None) as bar:
        return {DATA: writer.write_model(model, folder / MODEL, DATA, SMALL, bar.update)}


def write_companions(folder: Path, source: Source, plan: Plan, library: Path | None) -> None:
    """Write what lies beside the model: plan, config, tokenizer, generation config, op library."""
    source.convert_files(folder)
    for name, content in _companions(source, plan, library).items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def _companions(source: Source, plan: Plan, library: Path | None) -> dict[str, bytes | Path]:
    """What `write_companions` writes, or copies, by name."""
    found: dict[str, bytes | Path] = {
        "plan.json": dump(plan.to_dict()).encode(),
        "config.json": _json(with_sparse_attention(source.config)),
    }
    found |= source.side_files()
    return found | ({library.name: library} if library else {})


def describe(source: Source, plan: Plan, form: Form, library: Path | None, files: Mapping[str, Any]) -> dict[str, Any]:
    """The content of attnspan.json; `files`: the entries of all others, by name."""
    shape = source.shape
    assert shape.head_dim is not None  # a config has it
    return {
        "schema": SCHEMA,
        "target": form.target.name,
        "model_id": shape.id,
        "n_max": plan.n_max,
        "dtype": onnx_type(form.dtype).numpy().name,
        "weights": form.weights or onnx_type(form.dtype).numpy().name,
        "cache_dtype": onnx_type(form.cache_dtype).numpy().name,
        "layers": shape.layers,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": source.config["vocab_size"],
        "sink": plan.sink,
        "capacity": plan.capacities().tolist(),
        "attention": [part.describe(shape.head_dim) for part in form.parts(plan)],
        **({"chunk": form.chunk} if form.chunk is not None else {}),
        "op_library": library.name if library else None,
        "versions": _versions(),
        "files": dict(files),
        "source": {"name": source.name, "format": source.format},
    }


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write attnspan.json."""
    (folder / DESCRIPTION).write_bytes(_json(description))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def fingerprints(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all files in attnspan.json, without its own; `known`: those that need not be read."""
    files = sorted(file for file in folder.iterdir() if file.name != DESCRIPTION)
    return {file.name: known.get(file.name) or fingerprint(file) for file in files}


def fingerprint(file: Path) -> dict[str, Any]:
    """A file's entry in attnspan.json."""
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
