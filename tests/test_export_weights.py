"""Weights on their way from the checkpoint to the artefact: in blocks, once, hashed; what is wrong with a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny_model

from attnspan.export import weights, writer
from attnspan.export.source import open_source
from attnspan.export.weights import Blocks, by_rows, cast, convert
from attnspan.planner.errors import UserError

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def external(folder: Path, array: np.ndarray, dtype: ir.DataType, offset: int = 12) -> ir.ExternalTensor:
    (folder / "tensor").write_bytes(bytes(offset) + array.tobytes())
    return ir.ExternalTensor(str(folder / "tensor"), offset, array.nbytes, dtype, name="w", shape=ir.Shape(array.shape))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_bf16_widens_exactly(bits: list[int]) -> None:
    x = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(convert(x, FLOAT).view(np.uint32), np.array(bits, np.uint32) << 16)


def test_a_file_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 20)
    x = np.random.default_rng(0).normal(size=(11, 7)).astype(np.float32)
    stored = external(tmp_path, x.astype(ml_dtypes.bfloat16), BFLOAT16)
    wide = cast(stored, FLOAT)
    assert isinstance(wide, Blocks)
    assert [len(block) for block in wide.blocks()] == [2, 2, 2, 2, 2, 1]
    want = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(wide.numpy(), want)
    with (tmp_path / "out").open("wb") as file:
        wide.tofile(file)
        cast(wide, BFLOAT16).tofile(file)
    assert (tmp_path / "out").read_bytes() == want.tobytes() + x.astype(ml_dtypes.bfloat16).tobytes()
    (tmp_path / "tensor").write_bytes(b"0" * 20)
    with pytest.raises(UserError, match="cut short while it was read"):
        wide.numpy()


def test_lazy_tensors_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK", 2)
    calls: list[int] = []

    def compute() -> ir.TensorProtocol:
        calls.append(1)
        return ir.tensor(np.ones((9, 2), np.float32))

    lazy = ir.LazyTensor(compute, FLOAT, ir.Shape([9, 2]), name="w")
    assert by_rows(lazy)[1] == 9
    np.testing.assert_array_equal(cast(lazy, FLOAT16).numpy(), np.ones((9, 2), np.float16))
    assert len(calls) == 1


def test_fp16_overflow_names_the_weight() -> None:
    large = ir.tensor(np.array([[1.0, -7e4]], np.float32), name="model.norm.weight")
    with pytest.raises(UserError, match=r"'model.norm.weight' has numbers up to 7e\+04, fp16 ends at 65504; use --dtype bf16"):
        cast(large, FLOAT16).numpy()
    infinite = np.array([[np.inf]], np.float32)  # as it was given
    np.testing.assert_array_equal(convert(infinite, FLOAT16), infinite.astype(np.float16))


def model_of(tensors: dict[str, ir.TensorProtocol]) -> ir.Model:
    made = [ir.Value(name=n, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape), const_value=t) for n, t in tensors.items()]
    graph = ir.Graph([], [], nodes=[], initializers=made, opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=12)


def test_writer(tmp_path: Path) -> None:
    """Order and alignment, small tensors inside, equal content once, hash of what is in the file."""
    rng = np.random.default_rng(0)
    big, odd = rng.normal(size=(65, 33)).astype(np.float32), rng.integers(0, 255, (301,), np.uint8)
    (tmp_path / "in").mkdir()
    stored = external(tmp_path / "in", big.astype(ml_dtypes.bfloat16), BFLOAT16)
    blocks = Blocks(lambda first, end: big[first:end], FLOAT, big.shape, 7, "big")
    (tmp_path / "in2").mkdir()
    small = external(tmp_path / "in2", np.arange(4, dtype=np.float32), FLOAT)
    tensors: dict[str, ir.TensorProtocol] = {
        "odd": ir.tensor(odd),
        "big": blocks,
        "small": small,
        "view": blocks.reshaped(65, 3, 11, name="view"),
        "stored": stored,
        "scalar": ir.tensor(np.float32(3)),
    }
    model = model_of(tensors)
    written: list[int] = []
    entry = writer.write_model(model, tmp_path / "m.onnx", "m.data", 256, written.append)
    data = (tmp_path / "m.data").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert sum(written) == len(data)
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())

    got = {name: x.const_value for name, x in ir.load(tmp_path / "m.onnx").graph.initializers.items()}
    assert {name for name, x in got.items() if isinstance(x, ir.ExternalTensor)} == {"odd", "big", "view", "stored"}
    assert got["big"].offset == got["view"].offset == 4096
    assert got["stored"].offset % 4096 == 0
    for name, want in (("odd", odd), ("big", big), ("view", big.reshape(65, 3, 11)), ("stored", big.astype(ml_dtypes.bfloat16))):
        np.testing.assert_array_equal(got[name].numpy(), want)
    np.testing.assert_array_equal(got["small"].numpy(), np.arange(4))
    assert len(data) == got["stored"].offset + stored.nbytes


def test_writer_leaves_the_model_on_errors(tmp_path: Path) -> None:
    def broken(*_: int) -> np.ndarray:
        raise UserError("no")

    tensors = {"a": ir.tensor(np.zeros(100, np.float32)), "b": Blocks(broken, FLOAT, (100, 3), 9, "b")}
    model = model_of(tensors)
    with pytest.raises(UserError, match="no"):
        writer.write_model(model, tmp_path / "m.onnx", "m.data", 256)
    assert not (tmp_path / "m.onnx").exists()
    assert model.graph.initializers["b"].const_value is tensors["b"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tied model in one file."""
    return save_tiny_model(tmp_path / "model", "qwen2")


def shard(folder: Path, change: Any = None) -> None:
    """Split a checkpoint into two shards; `change` alters the index."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    files = {"one.safetensors": names[: len(names) // 2], "two.safetensors": names[len(names) // 2 :]}
    for file, some in files.items():
        save_file({name: held[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    if change:
        change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_index_names_missing_shards(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks two\.safetensors; model\.safetensors\.index\.json names it; download"):
        open_source(str(checkpoint))


def test_index_names_missing_tensors(checkpoint: Path) -> None:
    shard(checkpoint, lambda index: index["weight_map"].update({"model.more.weight": "one.safetensors"}))
    with pytest.raises(UserError, match=r"puts model\.more\.weight into one\.safetensors, which lacks it"):
        open_source(str(checkpoint))


@pytest.mark.parametrize("content", [{}, *({"weight_map": x} for x in ({}, [1], {"a": "../x"}, {"a": 3}))])
def test_broken_index(checkpoint: Path, content: dict[str, Any]) -> None:
    shard(checkpoint, lambda index: (index.clear(), index.update(content)))
    with pytest.raises(UserError, match=r"has no weight_map|must be a file beside it"):
        open_source(str(checkpoint))


def rewrite(folder: Path, **changed: np.ndarray) -> None:
    save_file(load_file(folder / "model.safetensors") | changed, folder / "model.safetensors")


def test_tied_weights_stored_twice(checkpoint: Path) -> None:
    embedding = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(checkpoint, **{"lm_head.weight": embedding})
    assert "lm_head.weight" in open_source(str(checkpoint)).weights
    other = embedding.copy()
    other[-1, -1] += 1
    rewrite(checkpoint, **{"lm_head.weight": other})
    with pytest.raises(UserError, match=r"tie_word_embeddings, but lm_head\.weight is not model\.embed_tokens\.weight"):
        open_source(str(checkpoint))


def test_mixed_types_are_taken(checkpoint: Path) -> None:
    held = load_file(checkpoint / "model.safetensors")
    half = {name: x.astype(np.float16) for name, x in held.items() if "mlp" in name}
    rewrite(checkpoint, **half)
    got = open_source(str(checkpoint)).weights
    assert {x.dtype for x in got.values()} == {FLOAT, FLOAT16}
    for name, x in half.items():
        np.testing.assert_array_equal(cast(got[name], FLOAT).numpy(), x.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("model.layers.0.mlp.up_proj.qweight", np.zeros((4, 4), np.int32), "is of a quantised checkpoint; give the original"),
        ("model.layers.0.mlp.up_proj.weight", np.zeros((4, 4), np.int8), "is I8; weights must be F32, F16, BF16"),
    ],
)
def test_quantised_checkpoints(checkpoint: Path, name: str, x: np.ndarray, message: str) -> None:
    rewrite(checkpoint, **{name: x})
    with pytest.raises(UserError, match=message):
        open_source(str(checkpoint))


def test_shape_and_bytes_disagree(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"shape":[64]', b'"shape":[63]', 1))
    with pytest.raises(UserError, match=r"has 256 bytes, its shape \[63\] says otherwise"):
        open_source(str(checkpoint))
