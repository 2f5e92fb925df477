"""Memory and speed of exporting large checkpoints, on random weights of a real model's shape, made on the spot.

    python benchmarks/export_size.py 8b [--weights int4] [--layers N] [--folder DIR]
    python benchmarks/export_size.py 1b --verify-tokens 256

A checkpoint of the shape is written as bf16 safetensors in shards (one random block, over and over), exported in a process of its
own, and deleted together with the artefact. 8b takes 16 GB of disk for the checkpoint, and for the artefact 32 GB in fp32, 9 GB
in int8, 6 GB in int4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHAPES = {
    "8b": LLAMA  # Llama-3.1-8B
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False}
    | {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0, "original_max_position_embeddings": 8192}},
    "1b": LLAMA  # Llama-3.2-1B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True}
    | {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 8192}},
}
SHARD = 5_000_000_000  # bytes, as the hub has them
BLOCK = 2**24  # random numbers


def tensors(config: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of all weights by name."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    found = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = [vocab, hidden]
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": [q, hidden],
            "self_attn.k_proj": [kv, hidden],
            "self_attn.v_proj": [kv, hidden],
            "self_attn.o_proj": [hidden, q],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_checkpoint(folder: Path, config: dict[str, Any]) -> int:
    """Write config.json, shards and their index; bytes of all weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float32).astype(ml_dtypes.bfloat16).tobytes()
    shards: list[dict[str, list[int]]] = [{}]
    used = 0
    for name, shape in tensors(config).items():
        size = 2 * math.prod(shape)
        if used + size > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    weight_map, total = {}, 0
    for number, shard in enumerate(shards):
        file = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape in shard.items():
            end = at + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
            weight_map[name], at = file.name, end
        text = json.dumps(header).encode()
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for first in range(0, at, len(block)):
                stream.write(block[: at - first])
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def export(args: argparse.Namespace) -> None:
    """The child: export, then print what each stage took as one line of JSON."""
    from attnspan.cpu_runtime.library import library_path
    from attnspan.export.pipeline import Options, export_model

    start = time.perf_counter()
    done = export_model(
        Options(
            model=str(args.folder / "checkpoint"),
            out=args.folder / "artefact",
            weights=args.weights,
            cache_dtype=args.cache_dtype,
            n_max=args.n_max,
            library=library_path(),
            verify_tokens=args.verify_tokens,
        )
    )
    times = os.times()
    report = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": times.user + times.system,
        "stages": {x.name: [x.seconds, x.peak_rss] for x in done.stages},
        "artefact_bytes": sum(file["bytes"] for file in done.description["files"].values()),
        "verify": done.description.get("verify"),
    }
    print(json.dumps(report))


def main() -> None:
    """Command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, where disk or time is short")
    parser.add_argument("--weights", choices=("int4", "int8"))
    parser.add_argument("--cache-dtype", default="bf16")
    parser.add_argument("--n-max", type=int, default=8192)
    parser.add_argument("--verify-tokens", type=int, help="verify on texts of up to so many tokens (default: not at all)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder here); nothing is left in it")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        export(args)
        return
    config = dict(SHAPES[args.shape]) | ({"num_hidden_layers": args.layers} if args.layers else {})
    largest = max(math.prod(shape) for shape in tensors(config).values())
    work = Path(tempfile.mkdtemp(dir=args.folder or Path.cwd(), prefix="export-size-"))
    try:
        total = write_checkpoint(work / "checkpoint", config)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", "--folder", str(work)]
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    writing = sum(seconds for name, (seconds, _) in report["stages"].items() if name != "verify")
    peak = max(rss for name, (_, rss) in report["stages"].items() if name != "verify")
    report = {
        "shape": args.shape,
        "layers": config["num_hidden_layers"],
        "weights": args.weights or "fp32",
        "weight_bytes": total,
        "mb_per_second": round(total / 1e6 / writing, 1),
        "peak_rss_mb": round(peak / 1e6),
        "peak_rss_beyond_largest_tensor_mb": round((peak - 2 * largest) / 1e6),
        **report,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
