"""Does an artefact compute what the original model computes under the same plan? Asked in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json


class VerificationError(Exception):
    """The artefact is not what the model is."""


@dataclass(frozen=True)
class Row:
    """What was compared for one row of the batch; differences of logits, largest of each position."""

    prompt: int  # tokens
    generated: int  # tokens, chosen by the artefact as its likeliest
    compared: int  # positions whose logits were compared: the last of the prompt, and all generated
    max_diff: float
    p99_diff: float  # 99 positions of 100 are below
    mean_diff: float  # over all logits
    max_logit: float  # largest magnitude in the reference
    exact_tokens: int  # generated tokens that are the reference's choice
    same_tokens: int  # generated tokens that are the reference's choice, or within p99 tolerance of it
    wrapped: int  # rings that were overwritten, over all layers and KV heads
    sampled: int = 0  # decode steps that may have sampled: not among the compared, their tokens are not bound
    sampled_diff: float = 0.0  # mean difference of their logits
    lost_diff: float | None = None  # of what is quantised: mean difference of the logits from those of the model as it was
    lost_tokens: int = 0  # generated tokens that are not the choice of the model as it was


@dataclass(frozen=True)
class Tolerance:
    """Bounds of p99_diff and mean_diff, as shares of max_logit.

    Keys that round the other way in a 16-bit cache move the logits a little, and now and then, where a text is at a
    tipping point, those of one position a lot: max_diff has no bound, and one generated token of a row may differ. Measured
    on SmolLM2-135M: bf16 up to 3e-3 and 4e-4; with a window one token too wide 6e-3 to 1e-2 and 3e-4 to 7e-4.
    """

    p99: float
    mean: float


TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-5),
    "float16": Tolerance(1e-2, 1e-3),
    "bfloat16": Tolerance(1e-2, 1e-3),
    "int8": Tolerance(5e-2, 5e-3),  # a key that rounds the other way is off by a step: up to what int8 costs at all
}
QUANTIZED = Tolerance(1e-1, 1e-2)
"""With quantised weights, whose products round activations to 8 bits as well."""

ROWS = 3  # of the batch that is compared
GENERATED = 32  # tokens decoded after each prompt
MAX_LOGITS = 2**25  # kept of one row, to be compared: 128 MiB in fp32
AS_IT_IS = "the artefact as it is"
PYTORCH = "PyTorch"
FILE = "the ONNX file itself in ONNX Runtime"


def require_torch() -> None:
    """UserError when what verification needs is not installed."""
    missing = [name for name in ("torch", "transformers", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; install attnspan[cpu,export], or add --no-verify")


def verify(folder: Path, model: Path, tokens: int) -> dict[str, Any]:
    """Compare the artefact in `folder` with `model` in PyTorch, or with an ONNX file, on texts of up to `tokens` tokens.

    Graphs of 16-bit types run in ONNX Runtime, too (see `verify_stand_in`), against a model with weights rounded likewise.
    Decode steps of sampled heads are estimates: they are reported, what is exact (prompts, short rows) is bound.
    The two never share a process, so that neither's memory or threads disturb the other's. Returns the report that
    attnspan.json keeps. VerificationError when a logit is out of tolerance, or when the comparison itself fails.
    """
    from attnspan.export.verify_stand_in import stand_in

    # Spinning OpenMP threads stall when the machine is shared.
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    with tempfile.TemporaryDirectory() as scratch, stand_in(folder) as runs:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "attnspan.export.verify_worker", str(runs), str(model), str(tokens), str(report)]
        description = read_json(runs / "attnspan.json")
        ran = _what_ran(read_json(folder / "attnspan.json"), description)
        # A process group of its own: Ctrl-C reaches this process only, which then kills the child.
        status = subprocess.run(command, env=environment, check=False, process_group=0).returncode
        if status != 0:
            raise VerificationError(f"verification failed with status {status}, see above; --no-verify keeps the artefact")
        rows = [Row(**row) for row in json.loads(report.read_text(encoding="utf-8"))]
    tolerance = tolerance_of(description)
    for row in rows:
        check(row, tolerance)
    against = FILE if model.suffix == ".onnx" else PYTORCH
    return {"against": against, "ran": ran, "tolerance": asdict(tolerance), "rows": [asdict(row) for row in rows]}


def tolerance_of(description: Mapping[str, Any]) -> Tolerance:
    """The bounds for an artefact with this attnspan.json."""
    from attnspan.export.quantize import WEIGHTS  # imports what the command line has no time for

    return QUANTIZED if description.get("weights") in WEIGHTS else TOLERANCE[description["cache_dtype"]]


def _what_ran(artefact: Mapping[str, Any], stand_in: Mapping[str, Any]) -> str:
    if artefact["cache_dtype"] != stand_in["cache_dtype"]:
        return f"the graph and its {artefact['dtype']} weights, computed in fp32 with an fp32 cache"
    if artefact["target"] != stand_in["target"]:
        return "the graph, with the op library in place of the plugin"
    return AS_IT_IS


def check(row: Row, tolerance: Tolerance) -> None:
    """VerificationError when a row is out of tolerance."""
    where = f"the artefact differs from the model after a prompt of {row.prompt} tokens"
    end = "nothing was kept; --no-verify keeps the artefact"
    for name, value, bound in (("99th percentile", row.p99_diff, tolerance.p99), ("mean", row.mean_diff, tolerance.mean)):
        if not value <= bound * row.max_logit:  # a NaN fails
            raise VerificationError(
                f"{where}: {name} of the logits' differences is {value:.3g}, allowed is {bound * row.max_logit:.3g}; {end}"
            )
    if row.sampled:
        return
    if row.same_tokens < row.generated - 1:
        raise VerificationError(f"{where}: {row.same_tokens} of {row.generated} generated tokens are the model's; {end}")


def text(report: dict[str, Any]) -> str:
    """A report as a table."""
    rows = [Row(**row) for row in report["rows"]]
    columns = ("prompt", "new", "same", "positions", "logits up to", "differ: mean", "99th perc.", "largest")
    against = report.get("against", PYTORCH)
    lines = [f"verified against {against} (tokens given, generated, the same; logits at so many positions):", "  ".join(columns)]
    if report.get("ran", AS_IT_IS) != AS_IT_IS:
        lines.insert(1, f"what ran, in ONNX Runtime on the CPU: {report['ran']}")
    for x in rows:
        cells = (x.prompt, x.generated, x.same_tokens, x.compared, x.max_logit, x.mean_diff, x.p99_diff, x.max_diff)
        lines.append(
            "  ".join(
                f"{cell:>{len(name)}.3g}" if isinstance(cell, float) else f"{cell:>{len(name)}}"
                for cell, name in zip(cells, columns, strict=True)
            )
        )
    for x in rows:
        if x.sampled:
            lines.append(
                f"{x.sampled} steps after {x.prompt} tokens may have sampled their context, and are not in the differences: "
                f"their logits differ by {x.sampled_diff:.3g} on average, {x.same_tokens} of {x.generated} tokens are the model's"
            )
    for x in rows:
        if x.lost_diff is not None:
            lines.append(
                f"quantising moved the logits after {x.prompt} tokens by {x.lost_diff:.3g} on average; "
                f"{x.generated - x.lost_tokens} of {x.generated} tokens are still those of the model as it was"
            )
    wrapped = max(row.wrapped for row in rows)
    if wrapped:
        lines.append(f"{wrapped} rings were overwritten at least once")
    elif against == FILE:
        lines.append("no ring was overwritten: the file sees all of a text, so that only texts that the plan keeps whole compare")
    else:
        lines.append("no ring was overwritten: every head has room for the longest text; a larger --verify-tokens tests that")
    return "\n".join(lines)
