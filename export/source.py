"""Where a model comes from: a Hugging Face folder, a GGUF file or a hub id, read without loading the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from attnspan.export.safetensors_source import check_tied, read_safetensors
from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json
from attnspan.planner.plan import ModelShape

Weights = Mapping[str, ir.TensorProtocol]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Source:
    """A model on disk: its Hugging Face config and its weights by Hugging Face name, each read when it is used."""

    name: str
    path: Path
    format: str  # safetensors or gguf
    config: dict[str, Any]
    weights: Weights

    @property
    def shape(self) -> ModelShape:
        """The attention shape that plans are checked against."""
        return ModelShape.from_config(self.config, model_id=self.name)

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(math.prod(int(n) for n in x.shape) for x in self.weights.values())

    def side_files(self) -> dict[str, bytes | Path]:
        """The tokenizer's files and generation_config.json by name, as far as the source has them: content, or file to copy."""
        names = () if self.format == "gguf" else TOKENIZER_FILES
        found: dict[str, bytes | Path] = {name: self.path / name for name in names if (self.path / name).is_file()}
        given = self.path / "generation_config.json"
        tokens = {key: self.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: value for key, value in tokens.items() if value is not None}
        found[given.name] = given if given.is_file() else (json.dumps(known, indent=2) + "\n").encode()
        return found

    @property
    def converted_files(self) -> tuple[str, ...]:
        """Names of the tokenizer's files that `convert_files` writes."""
        return ("tokenizer.json", "tokenizer_config.json") if self.format == "gguf" else ()

    def convert_files(self, folder: Path) -> None:
        """Write the tokenizer's files that are not to be had by copying into `folder`."""
        if self.format == "gguf":
            from attnspan.export.gguf_source import write_tokenizer

            write_tokenizer(self.path, folder)


def open_source(model: str) -> Source:
    """Open MODEL: a Hugging Face folder, a .gguf file, a folder with one .gguf file, or an id on the Hugging Face hub.

    UserError when it is none of these, or when a file is missing or broken. Only headers are read.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is not a .gguf file; MODEL must be a Hugging Face folder, a .gguf file or a hub id")
        return _open_gguf(path)
    name = path.resolve().name
    if not path.is_dir():
        name, path = model, _download(model)
    if (path / "config.json").is_file():
        config = dict(read_json(path / "config.json"))
        weights = read_safetensors(path)
        check_tied(config, weights)
        return Source(name, path, "safetensors", config, weights)
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return _open_gguf(gguf[0])
    found = f"{len(gguf)} .gguf files: name one" if gguf else "neither a config.json nor a .gguf file"
    raise UserError(f"{path} holds {found}; MODEL must be a Hugging Face folder, a .gguf file or a hub id")


def read_model(model: str) -> tuple[ModelShape, int | None]:
    """Attention shape of MODEL, and the longest text it was made for in tokens; a config.json alone is enough."""
    path = Path(model)
    if path.name.endswith(".json") or (path / "config.json").is_file():
        config = read_json(path if path.is_file() else path / "config.json")
        shape = ModelShape.from_config(path)
    else:
        source = open_source(model)
        config, shape = source.config, source.shape
    limit = config.get("max_position_embeddings")
    return shape, limit if isinstance(limit, int) else None


def _open_gguf(path: Path) -> Source:
    from attnspan.export.gguf_source import read_gguf

    config, weights = read_gguf(path)
    return Source(path.stem, path, "gguf", config, weights)


def _download(model: str) -> Path:
    """The local snapshot of a hub id, downloaded when it is not there."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UserError(f"{model} does not exist; MODEL must be a Hugging Face folder, a .gguf file or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.model", "merges.txt", "chat_template.jinja"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(
            f"{model} is gated: accept its terms on its page of the Hugging Face hub and log in (`hf auth login`, or HF_TOKEN), "
            "or give MODEL as a folder"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{model} is neither a local folder nor a model of the Hugging Face hub that you may see; check the name, "
            "or log in (`hf auth login`, or HF_TOKEN) if it is private"
        ) from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{model} is neither a local folder nor to be had from the Hugging Face hub ({reason}); "
            "give MODEL as a folder or a .gguf file, or go online"
        ) from None
