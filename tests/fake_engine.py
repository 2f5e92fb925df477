"""An engine for tests without a GPU: model.onnx of an artefact in ONNX Runtime, behind the protocol of a TensorRT engine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from attnspan.plugins.trt_sparse_attn.execution import Profile, Tensor
from attnspan.runtime.artefact import Artefact

# Numbers are onnx.TensorProto.DataType.
_TYPES = {"float": ("float32", 1), "float16": ("float16", 10), "bfloat16": ("bfloat16", 16),
          "int32": ("int32", 6), "int64": ("int64", 7)}  # fmt: skip
TWO = (Profile(0, (1, 1), (2, 64), (1, 64)), Profile(1, (1, 4), (1, 1), (1, 1)))
"""Prefill and decode."""


class FakeEngine:
    """Runs on the CPU, at the addresses that it is given, as TensorRT would; refuses what TensorRT refuses. calls: (profile,
    batch, tokens, kept) of each."""

    label, plugin = "engine/fake.engine", "none"
    device = torch.device("cpu")

    def __init__(self, artefact: Artefact, library: Path, profiles: Sequence[Profile] = TWO) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(str(artefact.folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.profiles = profiles
        self.calls: list[tuple[int, int, int, int]] = []
        self.tensors: dict[str, Tensor] = {}
        self.types: dict[str, int] = {}
        for is_input, ports in ((True, self.session.get_inputs()), (False, self.session.get_outputs())):
            for port in ports:
                dtype, self.types[port.name] = _TYPES[port.type.removeprefix("tensor(").removesuffix(")")]
                shape = tuple(x if isinstance(x, int) else -1 for x in port.shape)
                if port.name == "span":
                    shape = (artefact.layers, *shape[1:])
                self.tensors[port.name] = Tensor(dtype, shape, is_input, on_host=port.name == "logits_to_keep")

    def context(self, profile: int) -> FakeContext:
        return FakeContext(self, self.profiles[profile])


class FakeContext:
    def __init__(self, engine: FakeEngine, profile: Profile) -> None:
        self.engine, self.profile = engine, profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = self.engine.tensors[name]
        assert wanted.is_input
        if len(shape) != len(wanted.shape) or any(b not in (-1, a) for a, b in zip(shape, wanted.shape, strict=True)):
            raise RuntimeError(f"{name} of shape {shape}")
        self.shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        assert address % 16 == 0
        assert name in self.engine.tensors
        self.addresses[name] = address

    def enqueue(self, stream: int) -> None:
        assert stream == 0
        kept = int(ctypes.cast(self.addresses["logits_to_keep"], ctypes.POINTER(ctypes.c_int64))[0])
        batch, tokens = self.shapes["input_ids"]
        if not self.profile.takes(batch, tokens, kept):
            raise RuntimeError(f"batch {batch}, tokens {tokens}, kept {kept} are outside of the profile")
        self.engine.calls.append((self.profile.index, batch, tokens, kept))
        binding = self.engine.session.io_binding()
        for name, tensor in self.engine.tensors.items():
            if tensor.is_input:
                shape = self.shapes[name]
                binding.bind_input(name, "cpu", 0, self.engine.types[name], shape, self.addresses[name])
            else:
                past = self.shapes.get(name.replace("present_", "past_"))
                shape = (batch, kept, tensor.shape[2]) if past is None else past
                binding.bind_output(name, "cpu", 0, self.engine.types[name], shape, self.addresses[name])
        self.engine.session.run_with_iobinding(binding)


def as_tensorrt(artefact: Artefact) -> Artefact:
    """An artefact of target `cpu` that calls itself one of target `tensorrt`: their models have the same inputs and outputs."""
    import dataclasses

    return dataclasses.replace(artefact, target="tensorrt")


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random ids of bytes."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, count)]
