"""What `attnspan export` prints at its end: every file, the KV cache, the verification, time and memory of the stages."""

from __future__ import annotations

from collections.abc import Mapping

from attnspan.export.pipeline import Exported
from attnspan.export.targets import Form, onnx_type
from attnspan.export.verify import text
from attnspan.planner.cost import dense_slots, format_bytes, state_bytes
from attnspan.planner.plan import Plan

__all__ = ["cache_lines", "file_lines", "summary"]


def summary(done: Exported) -> str:
    """What was written, what it costs and how long it took, as text."""
    plan, info = done.plan, done.description
    lines = [f"{done.folder}: {plan.model.id} for {info['target']}, up to {plan.n_max} tokens"]
    files = sorted(x for x in done.folder.rglob("*") if x.is_file())
    lines += file_lines({str(x.relative_to(done.folder)): x.stat().st_size for x in files})
    lines += cache_lines(plan, done.form, info["head_dim"])
    if "verify" in info:
        lines.append(text(info["verify"]))
    lines += [f"{'stage':14} {'seconds':>8} {'peak memory':>12}"]
    lines += [f"{x.name:14} {x.seconds:8.1f} {format_bytes(x.peak_rss):>12}" for x in done.stages]
    seconds, peak = sum(x.seconds for x in done.stages), max(x.peak_rss for x in done.stages)
    lines.append(f"{'all':14} {seconds:8.1f} {format_bytes(peak):>12}")
    return "\n".join(lines)


def file_lines(sizes: Mapping[str, int | None]) -> list[str]:
    """A line for each file, and one for all; sizes in bytes, None where unknown."""
    width = max(24, *map(len, sizes))
    lines = [f"  {name:{width}} {format_bytes(size):>10}" for name, size in sizes.items()]
    return [*lines, f"  {f'{len(sizes)} files':{width}} {format_bytes(sum(size or 0 for size in sizes.values())):>10}"]


def cache_lines(plan: Plan, form: Form, head_dim: int) -> list[str]:
    """What a text of n_max tokens takes in memory beside the weights."""
    each = 2 * head_dim * onnx_type(form.cache_dtype).itemsize  # bytes of a slot
    kept, dense = form.cache_bytes(plan, head_dim), each * dense_slots(plan, plan.n_max)
    name = f"KV cache of one text of {plan.n_max} tokens ({form.cache_dtype})"
    lines = [f"{name}: {format_bytes(kept)}, dense {format_bytes(dense)}"]
    if state_bytes(plan) != 0:
        lines.append(f"indexes of sampled heads of one text of {plan.n_max} tokens: {format_bytes(state_bytes(plan))}")
    return lines
