"""Scales of int8 caches: the written model is run once on prose, and what each head stores sets its scale.

A number is stored as round(x / scale), clipped to -127..127. The scale of a head is its largest number on the prose / 127: what
is larger in a later text is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from attnspan.export.graph import Recorder, value
from attnspan.export.ops import DOMAIN
from attnspan.export.rewrite.cpu import add_functions
from attnspan.export.sample_text import sample_tokens
from attnspan.planner.parts import plan_parts
from attnspan.planner.plan import Plan

__all__ = ["TOKENS", "layer_scales", "measure_scales", "read_scales", "write_scales"]

TOKENS = 2048
"""Of prose that is run: the largest number of a head hardly grows any more after as many."""
CHUNK = 256
MODEL = "model.onnx"

Scales = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Scales of keys and of values, fp32 [kv_heads of the part], by the name of the part (planner/parts.py)."""


def measure_scales(folder: Path, plan: Plan, vocab: int, library: Path | None, tokens: int = TOKENS) -> Scales:
    """Run the artefact in `folder`, as far as it is written, on `tokens` tokens of prose with fp32 caches; its scales.

    `folder` holds model.onnx with int8 caches, its weights, and the tokenizer if there is one.
    """
    import onnxruntime as ort

    model = ir.load(folder / MODEL)
    largest = _observed(model)
    parts = [part for part in plan_parts(plan) if part.name in largest]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The graph is given as bytes: its weights are found from here.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])

    shapes = {x.name: x.shape for x in session.get_inputs()}
    caches = {
        name: np.zeros((1, *shape[1:]), np.uint8 if "state" in name else np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_")
    }
    presents = [name.replace("past_", "present_", 1) for name in caches]
    amax = [f"{kind}_amax.{part.name}" for part in parts for kind in ("key", "value")]
    found = {x.name: np.zeros(x.shape, np.float32) for x in session.get_outputs() if x.name in amax}

    ids = sample_tokens(folder, vocab, min(tokens, plan.n_max), skip=True)
    span = plan.spans(len(ids))[:, None].astype(np.int32)
    for first in range(0, len(ids), CHUNK):
        feeds = {
            "input_ids": np.array([ids[first : first + CHUNK]], np.int64),
            "length": np.array([first], np.int32),
            "span": span,
            "logits_to_keep": np.ones(1, np.int64),
        }
        results = session.run([*presents, *amax], feeds | caches)
        caches = dict(zip(caches, results, strict=False))
        for name, x in zip(amax, results[len(presents) :], strict=True):
            found[name] = np.maximum(found[name], x)
    return {part.name: (_scale(found[f"key_amax.{part.name}"]), _scale(found[f"value_amax.{part.name}"])) for part in parts}


def write_scales(folder: Path, scales: Scales) -> None:
    """Put the scales into model.onnx; the file with the weights stays as it is."""
    model = ir.load(folder / MODEL)
    for name, pair in scales.items():
        for kind, scale in zip(("key", "value"), pair, strict=True):
            x = model.graph.initializers[f"layers.{name}.{kind}_scale"]
            x.const_value = ir.tensor(scale, name=x.name)
    ir.save(model, folder / MODEL)


def read_scales(folder: Path) -> Scales:
    """The scales of the artefact in `folder`."""
    found = {}
    for node in ir.load(folder / MODEL).graph:
        if node.domain == DOMAIN:
            key, value = (x.const_value for x in node.inputs[-2:] if x is not None)
            assert key is not None
            assert value is not None
            found[str(node.name).removeprefix("layers.").removesuffix(".attention")] = (key.numpy(), value.numpy())
    return found


def layer_scales(scales: Scales, plan: Plan) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scales of keys and of values [kv_heads] of each layer, in the order of the model's heads."""
    found = [(np.ones(plan.model.kv_heads, np.float32), np.ones(plan.model.kv_heads, np.float32)) for _ in plan.rules]
    for part in plan_parts(plan):
        for whole, some in zip(found[part.layer], scales[part.name], strict=True):
            whole[list(part.heads)] = some
    return found


def _scale(largest: np.ndarray) -> np.ndarray:
    # A head that is always 0 needs a scale, too.
    scale: np.ndarray = (np.maximum(largest, 1e-6) / 127).astype(np.float32)
    return scale


def _observed(model: ir.Model) -> dict[str, ir.Node]:
    """Give the model fp32 caches, and outputs `key_amax.{part}`, `value_amax.{part}` [kv_heads]; the attentions by part."""
    graph, record, found = model.graph, Recorder("observed"), {}
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        name = str(node.name).removeprefix("layers.").removesuffix(".attention")
        found[name] = node
        heads = node.attributes["kv_num_heads"].as_int()
        for kind, at in (("key", 1), ("value", 2)):
            by_head = record.op("Reshape", record.op("Cast", node.inputs[at], to=ir.DataType.FLOAT), [0, 0, heads, -1])
            output = value(f"{kind}_amax.{name}", ir.DataType.FLOAT, [heads])
            graph.outputs.append(record.op("ReduceMax", record.op("Abs", by_head), [0, 1, 3], output=output, keepdims=0))
        for cache in (*node.inputs, *node.outputs):
            if cache is not None and cache.dtype == ir.DataType.INT8:
                cache.dtype = ir.DataType.FLOAT
        node.resize_inputs(len(node.inputs) - 2)  # the scales
    graph.extend(record.nodes)
    for initializer in record.initializers.values():
        graph.register_initializer(initializer)
    model.functions.clear()
    add_functions(model)
    return found
