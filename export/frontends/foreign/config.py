"""The config of an ONNX file's model: config.json beside it, or what genai_config.json tells of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json

GENAI = "genai_config.json"
FROM_DECODER = {
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden_size": "hidden_size",
}
FROM_MODEL = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def read_config(file: Path) -> tuple[Path, dict[str, Any], bool]:
    """The folder with the config and tokenizer of an ONNX file (its own, or the one above), the config, and whether it is the
    model's own config.json. The config is empty when there is none."""
    folders = (file.parent, file.parent.parent)
    for folder in folders:
        if (folder / "config.json").is_file():
            config = dict(read_json(folder / "config.json"))
            nested = config.get("text_config")
            return folder, dict(nested) if "num_hidden_layers" not in config and isinstance(nested, dict) else config, True
    for folder in folders:
        if (folder / GENAI).is_file():
            return folder, _from_genai(read_json(folder / GENAI), folder / GENAI), False
    return file.parent, {}, False


def _from_genai(content: Mapping[str, Any], where: Path) -> dict[str, Any]:
    model = content.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise UserError(f"{where} lacks 'model' with a 'decoder': must be what onnxruntime-genai's model builder writes")
    config = {ours: decoder[theirs] for theirs, ours in FROM_DECODER.items() if theirs in decoder}
    config |= {key: model[key] for key in FROM_MODEL if key in model}
    if "context_length" in model:
        config["max_position_embeddings"] = model["context_length"]
    if "type" in model:
        config["model_type"] = model["type"]
    return config
