"""A checkpoint as a PyTorch model whose attention this package can cut and watch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from attnspan.calibration.attention import Setting, attention, hook
from attnspan.planner.errors import UserError
from attnspan.planner.shape import ModelShape
from attnspan.runtime.tokenizer import Tokenizer

WEIGHTS = ("*.safetensors", "*.bin")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(path: str | Path, dtype: str = "bf16", device: str = "cpu") -> tuple[Any, ModelShape]:
    """The causal LM in a Hugging Face folder or a .gguf file, its weights frozen and its attention hooked, and its shape.

    UserError when it cannot be loaded, has attention that this package cannot take the place of (latent attention, layers without
    attention), or caps or slides its attention by itself.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}; change --dtype")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device is {device!r}: PyTorch sees no GPU here; use --device cpu")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = Path(path)
    folder, file = _place(source)
    shape = read_shape(source)
    if file:
        file["quantization_config"] = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], **file)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{source}: transformers cannot load it: {error}") from None
    model.requires_grad_(False)
    model.eval().to(device)
    _check_hook(model, shape)
    return model, shape


def read_shape(path: str | Path) -> ModelShape:
    """The shape of a model from its config alone; UserError as in `load_model`, as far as a config tells."""
    source = Path(path)
    config = _config(source)
    model_id = source.stem if source.is_file() else source.resolve().name
    shape = ModelShape.from_config(config.to_dict(), model_id)
    windows = {getattr(config, "sliding_window", None)} if getattr(config, "use_sliding_window", True) else set()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or windows - {None}:
        raise UserError(f"{source} has attention of its own kinds ({', '.join(sorted(kinds))}, sliding_window {windows}): "
                        "only models whose every layer attends to all tokens can be calibrated")  # fmt: skip
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap:
        raise UserError(f"{source} has attn_logit_softcapping {cap}: models that cap their scores cannot be calibrated")
    return shape


def _check_hook(model: Any, shape: ModelShape) -> None:
    """One short pass: did every layer attend through us?"""
    try:
        hook(model)
        with torch.inference_mode(), attention(Setting()) as setting:
            model(torch.zeros(1, 4, dtype=torch.int64, device=model.device), use_cache=False, logits_to_keep=1)
        missing = sorted(set(range(shape.layers)) - setting.seen)
    except (ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{shape.id}: its attention cannot be hooked ({type(model).__name__}): {error}") from None
    if missing:
        raise UserError(f"{shape.id}: the attention of layers {missing} cannot be hooked ({type(model).__name__})")


def _place(source: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and extra arguments that transformers wants for a folder or a .gguf file."""
    if source.is_file():
        return source.parent, {"gguf_file": source.name}
    if not (source / "config.json").is_file():
        raise UserError(f"{source} is no model: must be a Hugging Face folder with config.json, or a .gguf file")
    return source, {}


def _config(source: Path) -> Any:
    folder, file = _place(source)
    try:
        return AutoConfig.from_pretrained(folder, **file)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: transformers cannot read its config: {error}") from None


def model_limit(path: str | Path) -> int | None:
    """The longest text a model was made for, in tokens, None when its config does not tell."""
    limit = getattr(_config(Path(path)).get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def weights_id(path: str | Path) -> str:
    """What tells the weights of a checkpoint from others without reading them: a hash of names, bytes and times of its files."""
    source = Path(path)
    files = [source] if source.is_file() else sorted(file for suffix in WEIGHTS for file in source.glob(suffix))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def load_tokenizer(path: str | Path, scratch: Path) -> Tokenizer:
    """The tokenizer of a model; one that is not in the form of tokenizer.json (a .gguf file's) is written to `scratch` first."""
    source = Path(path)
    folder, file = _place(source)
    if not file and (folder / "tokenizer.json").is_file():
        return Tokenizer(folder)
    if not (scratch / "tokenizer.json").is_file():
        try:
            AutoTokenizer.from_pretrained(folder, **file).save_pretrained(scratch)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{source} has no tokenizer that transformers can read: {error}") from None
    return Tokenizer(scratch)
