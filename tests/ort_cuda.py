"""The ops for ONNX Runtime's CUDA provider in its CPU wheel, with a CUDA runtime that writes launches down."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
import trt_launch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor
from trt_launch import ROOT, Library

from attnspan.export.ops import DOMAIN, IR_VERSION, OPSET, VERSION
from attnspan.plugins.trt_sparse_attn.kernels.common import FP8
from attnspan.plugins.trt_sparse_attn.schema import Op

TYPES = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16, FP8: TensorProto.FLOAT8E4M3FN,
         torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32}  # fmt: skip


def ort_include() -> Path | None:
    """ONNX Runtime's headers: those named, else those that the package was built with."""
    places = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR")]
    for cmake in sorted(ROOT.glob("build/*/CMakeCache.txt")):
        found = re.search(r"^ONNXRUNTIME_INCLUDE_DIR:\w+=(.+)$", cmake.read_text(), re.MULTILINE)
        places.append(found and found.group(1))
    folders = [Path(place) for place in places if place]
    return next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)


class OrtLibrary(Library):
    """A library that ONNX Runtime loads, and the device of its CUDA runtime."""

    def __init__(self, path: Path) -> None:
        self.path, self.c = path, ctypes.CDLL(str(path))
        self.c.fake_log.restype = ctypes.c_char_p
        self.device(90)

    def session(self, model: ModelProto) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what a test provokes
        options.register_custom_ops_library(str(self.path))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@cache
def library() -> OrtLibrary:
    """The ops on the CPU provider, compiled once a process."""
    out = trt_launch.folder() / "libort_cuda.so"
    flags = ("-O0", "-shared", "-Wl,-Bsymbolic", f"-isystem{ort_include()}", '-DATTNSPAN_ORT_PROVIDER="CPUExecutionProvider"')
    trt_launch.compile_cpp(out, "ort_cuda_shim.cc", *flags, more=("ort_ops.cc",))
    return OrtLibrary(out)


def model(op: Op, attributes: Mapping[str, Any], inputs: Sequence[torch.dtype], outputs: Sequence[torch.dtype]) -> ModelProto:
    """One node; shapes are unknown until it runs. Outputs are the first of the op."""
    ins, outs = ([port.name for port in ports] for ports in (op.inputs[: len(inputs)], op.outputs[: len(outputs)]))
    node = helper.make_node(op.name, ins, outs, name="node", domain=DOMAIN, **attributes)
    values = [
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in zip(names, kinds, strict=True)]
        for names, kinds in ((ins, inputs), (outs, outputs))
    ]
    graph = helper.make_graph([node], "node", *values)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION)


def run(
    library: OrtLibrary, op: Op, attributes: Mapping[str, Any], inputs: Sequence[Tensor], outputs: Sequence[Tensor],
    session: ort.InferenceSession | None = None,
) -> ort.InferenceSession:  # fmt: skip
    """One call of one node, its inputs and outputs bound to these tensors."""
    session = session or library.session(model(op, attributes, [t.dtype for t in inputs], [t.dtype for t in outputs]))
    binding = session.io_binding()
    for port, tensor in zip(op.inputs, inputs, strict=False):
        binding.bind_input(port.name, "cpu", 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for port, tensor in zip(op.outputs, outputs, strict=False):
        binding.bind_output(port.name, "cpu", 0, TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    session.run_with_iobinding(binding)
    return session
