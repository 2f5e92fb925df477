"""Peak memory and time of the influence profile by length of the text.

    python benchmarks/profile_memory.py MODEL [--lengths 2048,4096,8192,16384] [--dtype bf16]

One process a length: load the model, profile one document of prose whose last 48 tokens are the answer, print the peak above the
loaded model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from attnspan.calibration.items import Item
from attnspan.calibration.loading import load_model, load_tokenizer
from attnspan.calibration.profile import profile_item
from attnspan.calibration.texts import load
from attnspan.runtime.memory import peak_rss_bytes

ANSWER = 48


def measure(model_path: Path, length: int, dtype: str) -> dict[str, float]:
    """Bytes above the loaded model, seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens = load_tokenizer(model_path, Path(scratch)).encode(load("moby_dick")[: 8 * length])[:length]
    assert len(tokens) == length
    model, _ = load_model(model_path, dtype)
    loaded, start = peak_rss_bytes(), time.monotonic()
    profile_item(model, Item(np.array(tokens), np.arange(length - ANSWER, length), "memory", length))
    return {"tokens": length, "loaded": loaded, "above": peak_rss_bytes() - loaded, "seconds": time.monotonic() - start}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", default="2048,4096,8192,16384")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.one, args.dtype)))
        return
    print("| tokens | model loaded, MB | peak above it, MB | kB a token | seconds |\n|---|---|---|---|---|")
    for word in args.lengths.split(","):
        command = [sys.executable, __file__, str(args.model), "--dtype", args.dtype, "--one", word]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        each = row["above"] / row["tokens"] / 1e3
        print(
            f"| {row['tokens']} | {row['loaded'] / 1e6:.0f} | {row['above'] / 1e6:.0f} | {each:.0f} | {row['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
