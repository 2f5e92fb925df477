"""The front end for existing ONNX files: their attention is recognised and lifted into the normal form (see `build`).

Files of onnxruntime-genai's model builder, of optimum-onnx and of `torch.onnx`, whose attention is one op or in parts. What
cannot be lifted is named, and then nothing has been written. Weights stay where they are, quantised ones as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export.frontends.foreign.config import read_config
from attnspan.export.frontends.foreign.core import Core
from attnspan.export.frontends.foreign.lift import Lifter, find_positions, take_batch_from_ids
from attnspan.export.frontends.foreign.match import Matcher
from attnspan.export.frontends.foreign.ops import normalise
from attnspan.export.frontends.foreign.probe import Probe
from attnspan.export.source import Source
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape

PROTOBUF_LIMIT = 2**31  # bytes
LONGEST = 8192  # tokens, of masks that are looked at where no config says how long texts may be
MASK_LIMIT = 131072
NAMED = 3  # problems that a message lists
INPUTS = {"input_ids", "attention_mask", "position_ids"}


@dataclass(frozen=True)
class Lifted:
    """A normal form made of a foreign file. `windows`: of each layer, None where all tokens are seen."""

    model: ir.Model
    shape: ModelShape
    windows: tuple[int | None, ...]
    longest: int | None
    """Tokens that its RoPE tables reach; None: no tables."""


@dataclass(frozen=True)
class ForeignSource(Source):
    """An ONNX file with its config and tokenizer. `known`: its shape, whose hash is None unless a config.json was there."""

    file: Path
    known: ModelShape

    @property
    def shape(self) -> ModelShape:
        """The attention shape that plans are checked against."""
        return self.known


def is_onnx(model: str) -> bool:
    """Whether MODEL is an ONNX file, or a folder whose model is one."""
    return _file(Path(model)) is not None


def open_onnx(model: str) -> tuple[ForeignSource, Lifted]:
    """Read an ONNX file, or the folder of one, and lift it. Only the graph is read, no weights.

    UserError when it is broken or incomplete, has an opset that is not supported, or attention that cannot be lifted.
    """
    file = _file(Path(model))
    if file is None:
        raise UserError(f"{model} is neither an ONNX file nor a folder with one; change MODEL")
    loaded = _load(file)
    folder, config, whole = read_config(file)
    lifted = lift(loaded, config)
    shape = replace(lifted.shape, id=folder.resolve().name if file.stem == "model" else file.stem)
    full = _complete(config, lifted)
    if whole:
        shape = ModelShape.from_config(full, model_id=shape.id)
    return ForeignSource(shape.id, folder, "onnx", full, {}, file, shape), lifted


def lift(model: ir.Model, config: Mapping[str, Any] | None = None) -> Lifted:
    """Turn a foreign graph into the normal form, in place. config: of the model, as far as it is known; wins over guesses.

    UserError names the nodes that cannot be lifted; the model is then of no use, the file it came from untouched.
    """
    config = config or {}
    normalise(model)
    graph = model.graph
    roles = _roles(graph)
    logits = _logits(graph)
    kv_heads, dim = _cache_shape(roles, config)
    limit = config.get("max_position_embeddings")
    probe = Probe(graph, graph.opset_imports, roles, (kv_heads, dim))
    matcher = Matcher(probe, config.get("num_attention_heads"), kv_heads, dim, min(limit or LONGEST, MASK_LIMIT))
    cores = matcher.cores()
    _check(graph, cores, matcher, roles, config)
    cached = "past" in roles.values()
    take_batch_from_ids(probe)
    positions = find_positions(probe, logits, cores, cached)
    tables = [int(core.rotary.cos.shape[0]) for core in cores if core.rotary is not None]
    shape = ModelShape("unknown", len(cores), cores[0].heads, cores[0].kv_heads, cores[0].dim)
    windows = tuple(core.window for core in cores)
    Lifter(model).lift(cores, positions, logits)
    return Lifted(model, shape, windows, min(tables) if tables else None)


def _file(path: Path) -> Path | None:
    """The ONNX file that MODEL means."""
    if path.is_dir():
        if (path / "config.json").is_file() and list(path.glob("*.safetensors*")):
            return None
        files = [x for x in (path / "model.onnx", path / "onnx" / "model.onnx") if x.is_file()]
        return files[0] if files else None
    return path if path.suffix == ".onnx" else None


def _load(file: Path) -> ir.Model:
    """The graph of a file, its weights left on disk. UserError when they are not all there."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; MODEL must be an ONNX file, a Hugging Face folder, a .gguf file or a hub id")
    if file.stat().st_size >= PROTOBUF_LIMIT:
        raise UserError(f"{file} has {file.stat().st_size} bytes, protobuf allows 2 GB; save it with external data")
    try:
        model: ir.Model = ir.load(file)
    except Exception as error:  # protobuf and onnx_ir raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is no ONNX model ({reason}); change MODEL") from None
    for name, x in model.graph.initializers.items():
        tensor = x.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = Path(str(tensor.location))
            if location.is_absolute() or ".." in location.parts:
                raise UserError(f"weight {name!r} of {file} lies in '{location}', which must be below the folder of the file")
            data = Path(tensor.path)
            if not data.is_file():
                raise UserError(f"weight {name!r} of {file} lies in {data}, which does not exist; put it there")
            end = (tensor.offset or 0) + int(tensor.nbytes)
            if data.stat().st_size < end:
                raise UserError(f"{data} has {data.stat().st_size} bytes, weight {name!r} ends at {end}; fetch it again")
    return model


def _roles(graph: ir.Graph) -> dict[ir.Value, str]:
    """What the inputs are for. UserError when there is no input_ids."""
    roles = {x: x.name for x in graph.inputs if x.name in INPUTS}
    roles |= {x: "past" for x in graph.inputs if x.shape is not None and len(x.shape) == 4 and x not in roles}
    if "input_ids" not in roles.values():
        names = ", ".join(x.name for x in list(graph.inputs)[:4])
        raise UserError(f"the graph has no input 'input_ids' (but {names}, ...); export a decoder with its embedding")
    return roles


def _logits(graph: ir.Graph) -> ir.Value:
    """The output of that name, for every position."""
    named = [x for x in graph.outputs if x.name == "logits"]
    if not named:
        names = ", ".join(x.name for x in list(graph.outputs)[:4])
        raise UserError(f"the graph has no output 'logits' (but {names}, ...); export a decoder with its language-model head")
    shape = named[0].shape
    if shape is not None and (len(shape) != 3 or shape[1] == 1):
        raise UserError(f"output 'logits' is {list(shape)}, must be of every position; export without pruning the head")
    return named[0]


def _cache_shape(roles: Mapping[ir.Value, str], config: Mapping[str, Any]) -> tuple[int, int]:
    """KV heads and size of a head: the caches', else the config's. UserError when neither says."""
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or (config["hidden_size"] // heads if heads and "hidden_size" in config else None)
    for x, role in roles.items():
        if role == "past":
            kv_heads = x.shape[1] if isinstance(x.shape[1], int) else kv_heads
            dim = x.shape[3] if isinstance(x.shape[3], int) else dim
            break
    if not kv_heads or not dim:
        raise UserError("the graph does not say how many KV heads it has and how large; put the model's config.json beside it")
    return int(kv_heads), int(dim)


def _check(
    graph: ir.Graph, cores: list[Core], matcher: Matcher, roles: Mapping[ir.Value, str], config: Mapping[str, Any]
) -> None:
    """UserError unless there is one attention for each layer and each cache, and no other."""
    layers = config.get("num_hidden_layers")
    caches = [x for x, role in roles.items() if role == "past"]
    used = {x for core in cores for x in core.past or ()}
    lines = [f"node {node.name!r} ({node.op_type}): {why}" for node, why in matcher.problems]
    lines += [f"input {x.name!r}: no attention that uses it was found" for x in caches if x not in used and not lines]
    presents = {x for core in cores for x in core.present}
    for x in graph.outputs:
        if re.match("present|past", x.name or "") and x not in presents and not lines:
            lines.append(f"output {x.name!r}: no attention gives it")
    if not lines and not cores:
        lines.append("it has no attention")
    if not lines and layers is not None and layers != len(cores):
        lines.append(f"it has {len(cores)} attentions, config.json says num_hidden_layers {layers}")
    for core in cores:
        if not lines and (core.heads % core.kv_heads or core.heads != cores[0].heads or core.kv_heads != matcher.kv_heads):
            lines.append(f"node {core.node.name!r} has {core.heads} query and {core.kv_heads} KV heads, others have others")
    if lines:
        more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        raise UserError(f"the ONNX graph cannot be lifted: {'; '.join(lines[:NAMED])}{more}")


def _complete(config: Mapping[str, Any], lifted: Lifted) -> dict[str, Any]:
    """The config with what the graph says."""
    shape = lifted.shape
    found: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": next(x for x in lifted.model.graph.outputs if x.name == "logits").shape[2],
    }
    if lifted.longest is not None:
        found["max_position_embeddings"] = min(lifted.longest, config.get("max_position_embeddings") or lifted.longest)
    if not isinstance(found["vocab_size"], int):
        found["vocab_size"] = config.get("vocab_size")
        if found["vocab_size"] is None:
            raise UserError("the graph does not say how large its vocabulary is; put the model's config.json beside it")
    return dict(config) | found
