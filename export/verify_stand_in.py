"""What is run in place of an artefact that ONNX Runtime cannot run on a CPU as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from attnspan.cpu_runtime.library import library_path
from attnspan.export.artefact import DESCRIPTION, MODEL, fingerprint, write_description
from attnspan.export.ops import DOMAIN
from attnspan.export.rewrite.cpu import add_functions
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


@contextmanager
def stand_in(folder: Path) -> Iterator[Path]:
    """An artefact that ONNX Runtime runs on a CPU: `folder` itself, or one over the same weights, removed at the end.

    Plugin nodes become ops of target `cpu`: of the op library, or with a body. ONNX Runtime has no bfloat16 arithmetic on CPUs:
    a model in bfloat16 is replaced by its twin in fp32, of the same weights, with a cache in fp32.
    """
    info = dict(read_json(folder / DESCRIPTION))
    if info["target"] != "tensorrt" and info["dtype"] != "bfloat16":
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.verify-") as scratch:
        twin = Path(scratch)
        for name in info["files"]:
            if name != MODEL:
                _link(folder / name, twin / name)
        model = ir.load(folder / MODEL)
        if info["dtype"] == "bfloat16":
            widen(model)
            info["cache_dtype"] = "float32"
        if info["target"] == "tensorrt":
            for node in model.graph:
                if node.domain == DOMAIN:
                    node.resize_outputs(3)  # without `lse`, as the function of the op
            add_functions(model)
            info["target"], info["op_library"] = "cpu", _link_library(twin)
        ir.save(model, twin / MODEL)  # weights stay references to the file that they are in
        info["files"] = info["files"] | {MODEL: fingerprint(twin / MODEL)}
        write_description(twin, info)
        yield twin


def widen(model: ir.Model) -> None:
    """Let a bfloat16 model compute in fp32, in place: weights are cast in the graph, the file that they are in stays as it is."""
    graph = model.graph
    casts = []
    for weight in list(graph.initializers.values()):
        if weight.dtype == BFLOAT16:
            wide = ir.Value(name=f"{weight.name}.wide", type=ir.TensorType(FLOAT), shape=weight.shape)
            weight.replace_all_uses_with(wide)
            casts.append(ir.node("Cast", [weight], {"to": FLOAT}, outputs=[wide]))
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    for x in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if x.dtype == BFLOAT16:
            x.dtype = FLOAT
    graph.insert_before(graph[0], casts)


def _link(file: Path, to: Path) -> None:
    """The same file at another place: large ones need not be copied where the file system has links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def _link_library(folder: Path) -> str | None:
    try:
        library = library_path()
    except UserError:  # the bodies of the ops serve, slowly
        return None
    shutil.copyfile(library, folder / library.name)
    return library.name
