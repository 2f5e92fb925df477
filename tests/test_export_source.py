"""Where models come from: shards, GGUF, the hub; and files that are broken or missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from safetensors.numpy import load_file
from tiny_models import SIZES, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from attnspan.export.gguf_source import NAMES
from attnspan.export.source import open_source
from attnspan.export.weights import cast
from attnspan.planner.errors import UserError


def test_shards_are_one_model(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "whole", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (open_source(str(x)).weights for x in (folder, tmp_path / "shards"))
    assert set(whole) == set(shards)
    for name in whole:
        np.testing.assert_array_equal(whole[name].numpy(), shards[name].numpy())


def test_safetensors_through_a_link(tmp_path: Path) -> None:
    """The hub's cache is made of links that lead out of the folder."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert open_source(str(folder)).weights["model.norm.weight"].numpy().shape == (64,)


def test_cast_reads_when_asked(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, dtype="bfloat16")
    stored = open_source(str(folder)).weights["lm_head.weight"]
    assert cast(stored, ir.DataType.BFLOAT16) is stored
    wide = cast(stored, ir.DataType.FLOAT)
    assert wide.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(wide.numpy(), stored.numpy().astype(np.float32))


def write_gguf(folder: Path, file: Path, architecture: str) -> dict[str, np.ndarray]:
    """A tiny model as llama.cpp would write it, matrices in Q8_0 or Q4_0; returns the weights it really holds."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocab = AutoTokenizer.from_pretrained(folder).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += ["Ġt"]  # one merge: transformers wants some
    tokens += [f"<unused{i}>" for i in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(SIZES["bos_token_id"])
    writer.add_eos_token_id(SIZES["eos_token_id"])

    held = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        base, kind = name.rsplit(".", 1)
        layer, _, part = base.removeprefix("model.layers.").partition(".")
        in_layer = base.startswith("model.layers.")
        gguf_name = next(k for k, v in NAMES.items() if v == (part if in_layer else base))
        gguf_name = f"blk.{layer}.{gguf_name}" if in_layer else gguf_name
        stored = weight
        if architecture == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            count = heads if part == "self_attn.q_proj" else kv_heads
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, -1)
            stored = halves.swapaxes(1, 2).reshape(weight.shape)  # convert_hf_to_gguf.py, LlamaModel.permute
        if weight.ndim == 2:
            q = GGMLQuantizationType.Q4_0 if "mlp" in name else GGMLQuantizationType.Q8_0
            blocks = quantize(stored, q)
            writer.add_tensor(f"{gguf_name}.{kind}", blocks, raw_dtype=q)
            held[name] = dequantize(quantize(weight, q), q)  # rows are quantised one by one: their order does not matter
        else:
            writer.add_tensor(f"{gguf_name}.{kind}", stored)
            held[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_hugging_face_weights(family: str, tmp_path: Path) -> None:
    """Names, order of rows and values; then the config, and the weights as transformers reads them."""
    # transformers takes every qwen3 in GGUF to have heads of 128.
    folder = save_tiny_model(tmp_path / "model", family, **({"head_dim": 128} if family == "qwen3" else {}))
    (tmp_path / "gguf").mkdir()
    held = write_gguf(folder, tmp_path / "gguf" / "tiny.gguf", family)
    source = open_source(str(tmp_path / "gguf"))
    assert set(source.weights) == set(held)
    for name, weight in held.items():
        got = source.weights[name]
        assert tuple(got.shape) == weight.shape
        np.testing.assert_array_equal(got.numpy(), weight)

    original = open_source(str(folder)).config
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
        assert source.config[key] == pytest.approx(original[key]), key
    assert source.config["rope_parameters"]["rope_theta"] == original["rope_parameters"]["rope_theta"]

    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="tiny.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    for name, weight in held.items():
        np.testing.assert_array_equal(theirs[name].numpy(), weight)


def test_gguf_tokenizer(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    write_gguf(folder, tmp_path / "tiny.gguf", "llama")
    source = open_source(str(tmp_path / "tiny.gguf"))
    (tmp_path / "out").mkdir()
    source.convert_files(tmp_path / "out")
    assert {x.name for x in (tmp_path / "out").iterdir()} >= set(source.converted_files)
    text = "Grüße, 世界!"
    want = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == want
    generation = source.side_files()["generation_config.json"]
    assert isinstance(generation, bytes)
    assert json.loads(generation)["eos_token_id"] == SIZES["eos_token_id"]


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    writer = GGUFWriter(file, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="holds a 'mamba' model; allowed are llama, qwen2, qwen3"):
        open_source(str(file))


def test_gguf_without_an_embedding(tmp_path: Path) -> None:
    file = tmp_path / "part.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"lacks token_embd\.weight; give the file of a whole MODEL"):
        open_source(str(file))


def test_broken_gguf(tmp_path: Path) -> None:
    for content in (b"", b"GGUF", b"no GGUF at all, just text" * 10):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UserError, match="not a whole GGUF file"):
            open_source(str(tmp_path / "x.gguf"))


def test_cut_safetensors(tmp_path: Path) -> None:
    file = save_tiny_model(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    for size, message in ((len(whole) - 1, "bytes, .* expected"), (100, "not a safetensors file"), (3, "not a safetensors file")):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path))


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    cases = {
        str(tmp_path): "neither a config.json nor a .gguf file",
        str(tmp_path / "file.txt"): "not a .gguf file",
        str(tmp_path / "missing"): "does not exist",
        "./missing/folder": "does not exist",
    }
    for model, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_source(model)


def test_folder_of_two_ggufs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"2 \.gguf files: name one"):
        open_source(str(tmp_path))


def test_weights_not_in_safetensors(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        open_source(str(folder))


def test_hub_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="attnspan-tests/none is neither a local folder nor to be had") as error:
        open_source("attnspan-tests/none")
    assert "\n" not in str(error.value)
