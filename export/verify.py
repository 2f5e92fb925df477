"""Does an artefact compute what the original model computes under the same plan? Asked in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError


class VerificationError(Exception):
    """The artefact is not what the model is."""


@dataclass(frozen=True)
class Row:
    """What was compared for one row of the batch."""

    prompt: int  # tokens
    generated: int  # tokens, chosen by the artefact as its likeliest
    compared: int  # positions whose logits were compared: the last of the prompt, and all generated
    max_diff: float
    mean_diff: float
    max_logit: float  # largest magnitude in the reference
    same_tokens: int  # generated tokens that are the reference's choice too
    worst_choice: float  # most that the reference's logit of a generated token is below its best one
    wrapped: int  # rings that were overwritten, over all layers and KV heads


# Bounds of max_diff and mean_diff, as shares of max_logit. A key that rounds the other way in a 16-bit cache moves logits.
# For scale, SmolLM2-135M at 3,072 tokens: right 4e-5 and 3e-7 (fp32), 4e-3 and 4e-4 (bf16); a window that is one token too
# wide 2e-1 and 9e-4.
TOLERANCE = {"float32": (1e-3, 1e-5), "float16": (2e-2, 2e-3), "bfloat16": (2e-2, 2e-3)}


def require_torch() -> None:
    """UserError when what verification needs is not installed."""
    missing = [name for name in ("torch", "transformers", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; install attnspan[cpu,export], or add --no-verify")


def verify(folder: Path, model: Path, tokens: int, cache_dtype: str) -> dict[str, Any]:
    """Compare the artefact in `folder` with `model` in PyTorch, on texts of up to `tokens` tokens.

    The two never share a process, so that neither's memory or threads disturb the other's. Returns the report that
    attnspan.json keeps. VerificationError when a logit is out of tolerance, or when the comparison itself fails.
    """
    # Spinning OpenMP threads stall when the machine is shared.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "attnspan.export.verify_worker", str(folder), str(model), str(tokens), str(report)]
        status = subprocess.run(command, env=environment, check=False).returncode
        if status != 0:
            raise VerificationError(f"verification failed with status {status}, see above; --no-verify keeps the artefact")
        rows = [Row(**row) for row in json.loads(report.read_text(encoding="utf-8"))]
    worst, mean = TOLERANCE[cache_dtype]
    for row in rows:
        check(row, worst, mean)
    return {"max_tolerance": worst, "mean_tolerance": mean, "rows": [asdict(row) for row in rows]}


def check(row: Row, worst: float, mean: float) -> None:
    """VerificationError when a row is out of tolerance (shares of its largest logit)."""
    for name, value, bound in (
        ("largest difference of a logit", row.max_diff, worst),
        ("mean difference of logits", row.mean_diff, mean),
        ("distance of a chosen token from the best", row.worst_choice, worst),
    ):
        if not value <= bound * row.max_logit:  # a NaN fails
            raise VerificationError(
                f"the artefact differs from the model: {name} is {value:.3g} after a prompt of {row.prompt} tokens, "
                f"allowed is {bound * row.max_logit:.3g}; nothing was kept, --no-verify keeps the artefact"
            )


def text(report: dict[str, Any]) -> str:
    """A report in words."""
    rows = [Row(**row) for row in report["rows"]]
    lines = ["verified against PyTorch:"]
    for row in rows:
        lines.append(
            f"  {row.prompt:6} tokens + {row.generated}: {row.compared} logits rows, largest difference {row.max_diff:.2g}, "
            f"mean {row.mean_diff:.2g} (logits up to {row.max_logit:.3g}); {row.same_tokens}/{row.generated} tokens the same"
        )
    wrapped = max(row.wrapped for row in rows)
    if wrapped:
        lines.append(f"  {wrapped} rings were overwritten at least once")
    else:
        lines.append("  no ring was overwritten: every head has room for the longest text; a larger --verify-tokens tests that")
    return "\n".join(lines)
