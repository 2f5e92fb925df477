"""What `attnspan export --target` can be: a table with one row a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnspan.planner.errors import UserError
from attnspan.planner.hybrid import hybrid_parts
from attnspan.planner.parts import Part, plan_parts
from attnspan.planner.plan import Plan
from attnspan.planner.portable import DEFAULT_CHUNK, portable_parts
from attnspan.planner.rules import check_int
from attnspan.planner.shape import ModelShape

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DTYPES", "TARGETS", "Form", "Target", "choose_form"]

DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "INT8"}
"""Types by their names on the command line; the names of onnx_ir.DataType."""


@dataclass(frozen=True)
class Form:
    """What is written: a target, and all that the command line may leave open.

    chunk: tokens of a call at most, None: any. weights: what matrices are quantised to, None: they are of `dtype`.
    """

    target: Target
    dtype: str
    cache_dtype: str
    chunk: int | None = None
    weights: str | None = None

    def rewrite(self, model: ir.Model, plan: Plan, shape: ModelShape) -> None:
        """Turn a normal form in `dtype` into this form, in place. UserError for what the target cannot express."""
        self.target.rewrite(model, plan, shape, self)
        if self.weights is not None:
            from attnspan.export.quantize import quantize_weights

            quantize_weights(model, self.weights)

    def parts(self, plan: Plan) -> Sequence[Part]:
        """The attention ops, with the caches that they have in this form."""
        return self.target.parts(plan, self)

    def cache_bytes(self, plan: Plan, head_dim: int) -> int:
        """Bytes of the key and value caches of one row."""
        each: int = onnx_type(self.cache_dtype).itemsize
        return 2 * sum(part.slots for part in self.parts(plan)) * head_dim * each


@dataclass(frozen=True)
class Target:
    """types: what the model can compute in, each with the types that its cache can have then; firsts are defaults.

    weights: matrices can be quantised. library: the op library lies beside the model. chunked: callers must cut texts. engine:
    `attnspan build` makes an engine.
    """

    name: str
    runs_on: str
    types: Mapping[str, tuple[str, ...]]
    rewrite: Callable[[ir.Model, Plan, ModelShape, Form], None]
    parts: Callable[[Plan, Form], Sequence[Part]] = lambda plan, _: plan_parts(plan)
    weights: bool = False
    library: bool = False
    chunked: bool = False
    engine: bool = False


def choose_form(
    target: str,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    chunk: int | None = None,
    weights: str | None = None,
) -> Form:
    """What the options say, with the target's defaults for those not given. UserError for what does not go together."""
    if target not in TARGETS:
        raise UserError(f"--target is {target!r}; must be one of {', '.join(TARGETS)}")
    row = TARGETS[target]
    dtype = dtype or next(iter(row.types))
    if dtype not in row.types:
        raise UserError(f"--dtype is {dtype!r}; target {target} computes in {' or '.join(row.types)}")
    caches = row.types[dtype]
    cache_dtype = cache_dtype or caches[0]
    if cache_dtype not in caches:
        when = f" with target {target} and --dtype {dtype}" if len(row.types) > 1 else ""
        raise UserError(f"--cache-dtype is {cache_dtype!r}; must be {'one of ' * (len(caches) > 1)}{', '.join(caches)}{when}")
    if weights is not None and not (row.weights and dtype == "fp32"):
        able = ", ".join(name for name, other in TARGETS.items() if other.weights)
        raise UserError(f"--weights is {weights!r} with target {target} in {dtype}; must be with {able} in fp32, drop it")
    if chunk is not None and not row.chunked:
        raise UserError(f"--chunk is {chunk}; target {target} takes chunks of any length, drop it")
    if row.chunked:
        chunk = check_int("--chunk", DEFAULT_CHUNK if chunk is None else chunk, 1, 2**20)
    return Form(row, dtype, cache_dtype, chunk, weights)


def onnx_type(name: str) -> ir.DataType:
    """The ONNX type of a name of the command line."""
    import onnx_ir as ir

    return ir.DataType[DTYPES[name]]


def _rewrite_cpu(model: ir.Model, plan: Plan, shape: ModelShape, form: Form) -> None:
    from attnspan.export.rewrite.cpu import rewrite_cpu

    rewrite_cpu(model, plan, onnx_type(form.cache_dtype), shape)


def _rewrite_tensorrt(model: ir.Model, plan: Plan, shape: ModelShape, form: Form) -> None:
    from attnspan.export.rewrite.tensorrt import rewrite_tensorrt

    rewrite_tensorrt(model, plan, onnx_type(form.cache_dtype), shape)


def _rewrite_portable(model: ir.Model, plan: Plan, _: ModelShape, form: Form) -> None:
    from attnspan.export.rewrite.portable import rewrite_portable

    rewrite_portable(model, plan, onnx_type(form.cache_dtype), _chunk(form))


def _rewrite_hybrid(model: ir.Model, plan: Plan, shape: ModelShape, form: Form) -> None:
    from attnspan.export.rewrite.hybrid import rewrite_hybrid

    rewrite_hybrid(model, plan, onnx_type(form.cache_dtype), shape)


def _portable_parts(plan: Plan, form: Form) -> Sequence[Part]:
    return portable_parts(plan, _chunk(form))


def _chunk(form: Form) -> int:
    assert form.chunk is not None  # choose_form
    return form.chunk


_TARGETS = (
    Target(
        "cpu",
        "ONNX Runtime with our op library",
        {"fp32": ("bf16", "fp16", "fp32", "int8")},
        rewrite=_rewrite_cpu,
        weights=True,
        library=True,
    ),
    Target(
        "tensorrt",
        "TensorRT with our plugin",
        {"bf16": ("bf16",), "fp16": ("fp16",)},
        rewrite=_rewrite_tensorrt,
        engine=True,
    ),
    Target(
        "portable",
        "ONNX Runtime or TensorRT, without a library of ours",
        {"fp32": ("fp32", "fp16", "bf16"), "fp16": ("fp16",), "bf16": ("bf16",)},
        rewrite=_rewrite_portable,
        parts=_portable_parts,
        weights=True,
        chunked=True,
    ),
    Target(
        "hybrid",
        "ONNX Runtime on a GPU, sampling on the CPU, with our op libraries; or all of it on the CPU",
        {"fp16": ("fp16",), "bf16": ("bf16",), "fp32": ("fp32", "bf16", "fp16")},
        rewrite=_rewrite_hybrid,
        parts=lambda plan, _: hybrid_parts(plan),
        library=True,
    ),
)
TARGETS = {target.name: target for target in _TARGETS}
