"""An artefact of target hybrid under ONNX Runtime's CUDA provider against the CPU provider: the same tokens, and a trace."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

PROMPT, NEW = 2500, 32
"""Tokens of the prompt, at most, and of the continuation: long enough for sampled heads to sample, from 2048 tokens on."""
LIMIT = 0.05
"""Largest difference of a logit, over the largest logit, between fp16 or bf16 on a GPU and on a CPU; of sampled steps, which may
draw other keys where a rounding decides, their median."""


def check(folder: Path, output: Path) -> dict[str, Any]:
    """Prefill and NEW greedy tokens on the CPU, the same tokens on the GPU: a row as those of the kernels' checks, and more.

    Tokens are equal where the two best on the CPU lie further apart than the providers differ. The trace of the GPU's run is
    written to `output` as hybrid-trace.json and .png. UserError, with the reason, where it cannot be run.
    """
    import numpy as np

    from attnspan.cpu_runtime.bench_trace import chrome_trace, overlap, record, table
    from attnspan.cpu_runtime.library import cuda_library_path
    from attnspan.cpu_runtime.loading import check_device
    from attnspan.cpu_runtime.session import Session
    from attnspan.planner.files import write_whole
    from attnspan.runtime.artefact import Artefact

    check_device("cuda")
    library = cuda_library_path()
    artefact = Artefact.load(folder)
    count = min(PROMPT, artefact.n_max - NEW)
    prompt: list[int] = np.random.default_rng(0).integers(0, artefact.vocab_size, count).tolist()
    tokens: list[int] = []
    logits: dict[str, list[Any]] = {}
    seconds: dict[str, float] = {}
    for device in ("cpu", "cuda"):
        # In one piece on both: an index that grows in others has other means, and draws other keys.
        session = Session(artefact, device=device, library=library, chunk=count)
        rows = [session.prefill(0, prompt)[-1]]
        began = time.monotonic()
        for i in range(NEW):
            if device == "cpu":
                tokens.append(int(rows[-1].argmax()))
            rows.append(session.decode([tokens[i]])[0])
        seconds[device] = (time.monotonic() - began) / NEW
        logits[device] = rows
    differences = [float(np.abs(a - b).max()) for a, b in zip(logits["cpu"], logits["cuda"], strict=True)]
    largest = max(float(np.abs(row).max()) for row in logits["cpu"])
    step = float(np.median(differences[1:]) if artefact.may_sample(count) else max(differences[1:]))
    error = max(differences[0], step) / largest
    same = [_same(a, b, d) for a, b, d in zip(logits["cpu"], logits["cuda"], differences, strict=True)]
    runs = record(artefact, [prompt], {"device": "cuda", "library": library})
    write_whole(output / "hybrid-trace.json", json.dumps(chrome_trace(runs, str(folder))).encode())
    both, gpu = overlap([run for run in runs if run.phase != "prefill"])
    return {
        "kernel": "hybrid", "case": f"{folder.name}: {count} tokens and {NEW} more, cuda against cpu", "error": error,
        "limit": LIMIT, "ok": all(same) and error <= LIMIT, "tokens_equal": sum(same), "tokens": len(same),
        "seconds_per_token": seconds, "gpu_at_work_while_the_cpu_samples": both / gpu if gpu else None,
        "table": table(runs).splitlines(),
    }  # fmt: skip


def _same(cpu: Any, cuda: Any, difference: float) -> bool:
    best, second = sorted(cpu)[-1], sorted(cpu)[-2]
    return bool(cpu.argmax() == cuda.argmax() or best - second <= 2 * difference)
