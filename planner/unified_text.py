"""What a plan takes, in words: heads of each kind, bytes by device, bytes read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from attnspan.planner.cost import device_bytes, format_bytes
from attnspan.planner.plan import Plan
from attnspan.planner.rules import MODES, LshParams

__all__ = ["cache_dtype", "describe_lsh", "kinds", "lines"]


def kinds(plan: Plan) -> dict[str, int]:
    """KV heads of each mode that the plan has, in the order span, dense, lsh."""
    count = Counter(rule.mode for layer in plan.rules for rule in layer)
    return {mode: count[mode] for mode in MODES if count[mode]}


def describe_lsh(params: LshParams) -> str:
    """The parameters of a sampled head in a few words."""
    if params.index == "sketch":
        return f"sketch {params.fraction:g}, window {params.window}"
    if params.index == "signature":
        return f"signature {params.signature_bits} bits, {params.max_hamming} differ, window {params.window}"
    if params.index == "tables":
        return f"tables ({params.bits}, {params.tables}), {params.min_collisions} collisions, window {params.window}"
    return f"{params.index}, window {params.window}"


def cache_dtype(plan: Plan) -> str:
    """Type of the caches that a plan was made for; bf16 where it does not say."""
    made = plan.provenance
    return str(made.get("cache_dtype", "bf16")) if made.get("method") == "unified" else "bf16"


def lines(plan: Plan) -> list[str]:
    """Heads, bytes by device and, of plans that were chosen for it, bytes read and bounds."""
    total = plan.model.layers * plan.model.kv_heads
    out = [f"{total} KV heads: " + ", ".join(f"{count} {mode}" for mode, count in kinds(plan).items())]
    made = plan.provenance
    dtype = cache_dtype(plan)
    sizes = device_bytes(plan, dtype)
    if sizes is not None and any(rule.lsh for layer in plan.rules for rule in layer):
        out.append(
            f"at {plan.n_max} tokens ({dtype}), target hybrid: {format_bytes(sizes[0])} on the GPU, {format_bytes(sizes[1])} on "
            f"the CPU; target cpu: {format_bytes(sizes[2])}"
        )
    read = made.get("read")
    if made.get("method") == "unified" and isinstance(read, Mapping):
        shares = ", ".join(f"{share:.1%} at {n}" for n, share in read.items())
        out.append(f"a token reads {shares} of what dense attention does")
    return out
