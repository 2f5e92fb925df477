"""The `cpu` artefact for onnxruntime-genai: a graph over the same weights that it can feed, and its genai_config.json.

genai binds token ids, an attention mask and caches of four axes, of one type; it allocates those whose shapes are fixed once, and
gives the same memory as past and present. So `genai.onnx` has, instead of `length`, `span` and `logits_to_keep`, the input
`attention_mask` [batch, total] int64: lengths are counted from it, spans follow from lengths by the plan's rules, and the last
position gets logits. Caches are `past_key_values.{i}.key|value` [batch, slots, 1, head_dim], presents `present.{i}.key|value`.

A ring that has wrapped cannot go back, but genai can: one more pair of caches, numbered after the last layer, keeps how many
tokens there are. A call at fewer than that fails where a ring has wrapped, by a length that the op refuses; so does a call at
more (genai leaves out the last generated token when a prompt is appended after it), and a padded row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from attnspan.export.graph import Recorder, value
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.parts import refuse_sampled
from attnspan.planner.plan import Plan
from attnspan.planner.rules import BLOCK, MIN_SPAN

__all__ = ["CONFIG", "GRAPH", "REWOUND", "SKIPPED", "check_genai", "rewrite_genai", "spans", "write_genai"]

CONFIG = "genai_config.json"
GRAPH = "genai.onnx"
REWOUND = -(2**30)
"""The length that stands for a row that was taken back although its rings have wrapped."""
SKIPPED = -(2**29)
"""The length that stands for a row one of whose tokens was never computed."""
BITS = 32  # of the number of tokens that the last pair of caches holds
PASTS = {kind: f"past_key_values.%d.{kind}" for kind in ("key", "value")}
PRESENTS = {kind: f"present.%d.{kind}" for kind in ("key", "value")}


def check_genai(target: str, plan: Plan) -> None:
    """UserError, with the reason, for what onnxruntime-genai cannot carry."""
    if target != "cpu":
        raise UserError(f"--genai with --target {target}: onnxruntime-genai loads what target 'cpu' writes; drop one of the two")
    refuse_sampled(
        plan,
        "onnxruntime-genai keeps keys and values of one type, and no index beside them; change --plan to heads of mode 'span' "
        "and 'dense', or drop --genai",
    )


def write_genai(folder: Path, plan: Plan, config: Mapping[str, Any], library: str) -> None:
    """Write genai.onnx and genai_config.json beside the model.onnx of target `cpu` in `folder`.

    config: the model's Hugging Face config. library: file name of the op library, which lies in `folder`, too.
    """
    model = ir.load(folder / "model.onnx")
    rewrite_genai(model, plan)
    ir.save(model, folder / GRAPH)
    (dim,) = {int(x.shape[3]) for x in model.graph.inputs if x.name == PASTS["key"] % 0}  # a plan need not know it
    content = genai_config(folder, plan, config, library, dim)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def rewrite_genai(model: ir.Model, plan: Plan) -> None:
    """Turn the `cpu` form into what genai feeds, in place."""
    graph, record = model.graph, Recorder("genai")
    given = {str(x.name): x for x in graph.inputs}
    mask = value("attention_mask", ir.DataType.INT64, ["batch", "total"])
    total = record.op("ReduceSum", mask, [1], keepdims=0)
    cached = record.op("Sub", total, record.op("Shape", given["input_ids"], start=1, end=2))
    past, present = _caches(graph, plan)
    past += (mark := _mark(given["past_key.0"].dtype, "past", PASTS, plan.model.layers))
    present += (marked := _mark(given["past_key.0"].dtype, "present", PRESENTS, plan.model.layers))

    length = _checked(record, cached, mark[0], int(plan.capacities().min()))
    given["length"].replace_all_uses_with(length)
    given["span"].replace_all_uses_with(spans(record, total, plan))
    given["logits_to_keep"].replace_all_uses_with(record.constant([1]))
    bits = record.op("Mod", record.op("Div", record.op("Unsqueeze", total, [1, 2, 3]), _powers()), np.array(2))
    for output in marked:
        record.op("Cast", bits, output=output, to=output.dtype)

    logits = graph.outputs[0]
    logits.shape = ir.Shape(["batch", 1, logits.shape[2]])  # by which genai knows that it gets those of one position
    graph.inputs[:] = [given["input_ids"], mask, *past]
    graph.outputs[:] = [logits, *present]
    for node in reversed(record.nodes):
        graph.insert_before(graph[0], node)
    for initializer in record.initializers.values():
        graph.register_initializer(initializer)
    graph.name = "genai"
    model.functions.clear()  # they may write a present before they have read the past, which is the same memory here


def _caches(graph: ir.Graph, plan: Plan) -> tuple[list[ir.Value], list[ir.Value]]:
    """The pasts and presents of all layers, renamed and with four axes."""
    found: tuple[list[ir.Value], list[ir.Value]] = ([], [])
    for values, when, names, into in (
        (graph.inputs, "past", PASTS, found[0]),
        (graph.outputs, "present", PRESENTS, found[1]),
    ):
        by_name = {x.name: x for x in values}
        for i in range(plan.model.layers):
            for kind, name in names.items():
                x = by_name[f"{when}_{kind}.{i}"]
                batch, slots, dim = x.shape
                x.name, x.shape = name % i, ir.Shape([batch, slots, 1, dim])
                into.append(x)
    return found


def _mark(dtype: ir.DataType, when: str, names: Mapping[str, str], number: int) -> list[ir.Value]:
    return [value(name % number, dtype, ["batch", 1, 1, BITS]) for name in names.values()]


def _powers() -> np.ndarray:
    return 2 ** np.arange(BITS, dtype=np.int64)


def _checked(record: Recorder, cached: ir.Value, mark: ir.Value, least: int) -> ir.Value:
    """`cached` [batch] as int32; REWOUND in rows that had more tokens before, and more than the least ring takes; SKIPPED in rows
    that had fewer.

    Taking back the last token alone is allowed, as what it displaced is out of the window at its own place, too: genai does so
    when asked for one more token after the end.
    """

    def both(x: ir.Value, y: ir.Value) -> ir.Value:
        return record.op("And", x, y)

    bits = record.op("Mul", record.op("Cast", mark, to=ir.DataType.INT64), _powers())
    had = record.op("ReduceSum", bits, [1, 2, 3], keepdims=0)
    back = record.op("Greater", had, record.op("Add", cached, np.array(1)))
    begun = record.op("Greater", cached, np.array(0))
    wrapped = record.op("Greater", had, np.array(least))
    length = record.op("Where", record.op("Less", had, cached), np.array(SKIPPED), cached)
    length = record.op("Where", both(both(back, begun), wrapped), np.array(REWOUND), length)
    return record.op("Cast", length, to=ir.DataType.INT32)


def spans(record: Recorder, total: ir.Value, plan: Plan) -> ir.Value:
    """Spans in force of rows that have `total` [batch] int64 tokens, as `Plan.spans` says: int32 [layers, batch, kv_heads]."""
    rules = np.array([[(rule.alpha, rule.beta) for rule in layer] for layer in plan.rules], np.float64)
    n = record.op("Unsqueeze", record.op("Cast", total, to=ir.DataType.DOUBLE), [0, 2])
    wanted = record.op("Add", record.op("Mul", n, rules[:, None, :, 1]), rules[:, None, :, 0])
    blocks = record.op("Ceil", record.op("Div", record.op("Min", wanted, n), np.array(float(BLOCK))))
    span = record.op("Max", record.op("Mul", blocks, np.array(float(BLOCK))), np.array(float(MIN_SPAN)))
    limited = record.op("Min", span, plan.limits[:, None, None].astype(np.float64))
    return record.op("Cast", limited, to=ir.DataType.INT32)


def genai_config(folder: Path, plan: Plan, config: Mapping[str, Any], library: str, head_dim: int) -> dict[str, Any]:
    """The content of genai_config.json. Token ids are those of generation_config.json, else those of the config."""
    file = folder / "generation_config.json"
    tokens = dict(config) | {name: x for name, x in (read_json(file) if file.is_file() else {}).items() if x is not None}
    ends = tokens.get("eos_token_id")
    stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ids = {"bos_token_id": tokens.get("bos_token_id"), "eos_token_id": stops or None}
    pad = tokens.get("pad_token_id")
    ids["pad_token_id"] = pad if pad is not None else stops[0] if stops else None
    shape = plan.model
    return {
        "model": {
            "type": "decoder",
            "context_length": plan.n_max,
            "vocab_size": config["vocab_size"],
            **{name: x for name, x in ids.items() if x is not None},
            "decoder": {
                "filename": GRAPH,
                "session_options": {"custom_ops_library": library, "provider_options": []},
                **({"hidden_size": config["hidden_size"]} if "hidden_size" in config else {}),
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "num_hidden_layers": shape.layers,
                "head_size": head_dim,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": PASTS["key"],
                    "past_value_names": PASTS["value"],
                },
                "outputs": {"logits": "logits", "present_key_names": PRESENTS["key"], "present_value_names": PRESENTS["value"]},
            },
        },
        "search": {"do_sample": False, "num_beams": 1, "max_length": plan.n_max, "past_present_share_buffer": True},
    }
