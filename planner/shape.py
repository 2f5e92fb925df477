"""The shape of a model's attention, read from a Hugging Face config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.rules import check_int

HASHED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelShape:
    """Attention of a model: layers, query heads, KV heads and the size of a head.

    head_dim and config_hash are None when only the head counts are known (a published plan); config_hash is
    the first 16 hex digits of the SHA-256 of the canonical JSON of the config's structural keys. UserError on
    counts below 1 or heads that are no multiple of kv_heads.
    """

    id: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int | None = None
    config_hash: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise UserError(f"model id is {self.id!r}: must be text")
        for name in ("layers", "heads", "kv_heads"):
            check_int(f"model {name}", getattr(self, name), 1, 65536)
        if self.heads % self.kv_heads:
            raise UserError(f"model heads is {self.heads}: must be a multiple of kv_heads, {self.kv_heads}")
        if self.head_dim is not None:
            check_int("model head_dim", self.head_dim, 1, 65536)
        if self.config_hash is not None and not isinstance(self.config_hash, str):
            raise UserError(f"model config_hash is {self.config_hash!r}: must be text or null")

    @property
    def group(self) -> int:
        """Query heads that share one KV head; query head h belongs to KV head h // group."""
        return self.heads // self.kv_heads

    @classmethod
    def from_config(cls, source: str | Path | Mapping[str, Any], model_id: str | None = None) -> ModelShape:
        """Read a Hugging Face config: a dict, a config.json, or the folder that holds one.

        A nested `text_config` is used when the outer level has no layers. UserError when a key is missing.
        """
        where = "config"
        if not isinstance(source, Mapping):
            path = Path(source)
            where = str(path)
            model_id = model_id or (path.parent if path.suffix == ".json" else path).resolve().name
            source = _read_config(path)
        config: Mapping[str, Any] = source
        nested = config.get("text_config")
        if "num_hidden_layers" not in config and isinstance(nested, Mapping):
            config = nested
        try:
            layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        except KeyError as error:
            raise UserError(f"{where} lacks {error.args[0]!r}: must be the config of a causal LM") from None
        for name, value in (("num_hidden_layers", layers), ("num_attention_heads", heads)):
            check_int(f"{where}: {name}", value, 1, 65536)
        kv_heads = config.get("num_key_value_heads")
        kv_heads = heads if kv_heads is None else kv_heads
        head_dim = config.get("head_dim")
        if head_dim is None:
            hidden = check_int(f"{where}: hidden_size", config.get("hidden_size"), 1, 2**30)
            head_dim = hidden // heads
        hashed = {key: config.get(key) for key in HASHED}
        hashed |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
        canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
        return cls(
            id=model_id or str(source.get("_name_or_path") or "unknown"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            config_hash=hashlib.sha256(canonical.encode()).hexdigest()[:16],
        )


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; must be the folder of a Hugging Face model or its config.json") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): must be the config.json of a causal LM") from None
    if not isinstance(config, Mapping):
        raise UserError(f"{file} holds a {type(config).__name__}: must be a JSON object")
    return config
