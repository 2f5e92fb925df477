"""What `attnspan export --dry-run` prints: the plan of work, files, KV cache, memory and disk, without reading a weight."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import onnx_ir as ir

from attnspan.export import artefact
from attnspan.export.pipeline import Work
from attnspan.export.report import cache_lines, file_lines
from attnspan.export.verify import GENERATED, MAX_LOGITS, ROWS
from attnspan.export.weights import BLOCK, Blocks
from attnspan.planner.cost import format_bytes
from attnspan.runtime.memory import available_bytes, peak_rss_bytes

LIBRARIES = 600 * 2**20
"""Bytes of a process with PyTorch, transformers and ONNX Runtime, about."""
BLOCKS = 6  # blocks in fp32 that are in memory while weights are read, converted, hashed and written


def describe(work: Work) -> str:
    """The whole text."""
    shape, plan, form, options = work.given.source.shape, work.plan, work.form, work.options
    lines = [f"dry run: nothing is written to {options.out}"]
    lines.append(
        f"{shape.id}: {shape.layers} layers, {shape.heads} heads, {shape.kv_heads} KV heads of {shape.head_dim}; "
        f"for {form.target.name}, up to {plan.n_max} tokens, density {plan.density(plan.n_max):.3g}"
    )
    lines.append(f"computes in {form.dtype}, weights in {form.weights or form.dtype}, KV cache in {form.cache_dtype}")
    lines.append("plan of work:")
    lines += [f"  {number}. {step}" for number, step in enumerate(_steps(work), 1)]
    lines.append("files (bytes are exact but for model.onnx in 16 bits, and attnspan.json, which gains the verification):")
    lines += file_lines(work.files)
    lines += cache_lines(plan, form, shape.head_dim or 0)
    free = available_bytes()
    lines.append(f"memory, about{f' ({format_bytes(free)} are available here)' if free is not None else ''}:")
    for what, size in _memory(work).items():
        small = "  more than there is here" if free is not None and size > free else ""
        lines.append(f"  {what:24} {format_bytes(size):>10}{small}")
    disk = shutil.disk_usage(options.out.absolute().parent).free
    lines.append(f"disk: {format_bytes(artefact.disk_bytes(work.files))} at most, {format_bytes(disk)} are free")
    return "\n".join(lines)


def _steps(work: Work) -> Iterator[str]:
    form, options = work.form, work.options
    attentions = len(form.parts(work.plan))
    if work.model is None:
        yield f"load {work.given.original} in PyTorch and trace it (left out here: it reads the weights)"
    else:
        nodes = sum(1 for _ in work.model.graph)
        yield f"build the graph: {nodes} nodes, {attentions} of them for attention (done, to make this list)"
    quantized = f", matrices in {form.weights}" if form.weights else ""
    yield f"write the files, weights block by block{quantized}"
    if form.cache_dtype == "int8":
        yield "measure the scales of the int8 cache on a text"
    if options.verify_tokens is not None:
        with_what = "the ONNX file itself" if work.given.lifted else "PyTorch"
        longest = min(options.verify_tokens, work.plan.n_max - GENERATED)
        yield f"verify against {with_what}: texts of up to {longest} tokens, then {GENERATED} generated ones each"
    if form.target.engine:
        yield "build the engine, if this machine has TensorRT and a GPU (it is about as large as the weights)"


def _memory(work: Work) -> dict[str, int]:
    """Bytes by what takes them, estimated."""
    options, source, form = work.options, work.given.source, work.form
    data = work.files[artefact.DATA] or 0
    parameters = source.parameters or data // form_bytes(form.dtype)
    kept = form.cache_bytes(work.plan, source.shape.head_dim or 0)
    if work.model is None:
        writing = LIBRARIES + 2 * 4 * parameters
    else:
        writing = peak_rss_bytes() + BLOCKS * 4 * BLOCK + 2 * _largest_whole(work.model)
    found = {"to export": writing}
    if options.verify_tokens is not None:
        vocab = int(source.config["vocab_size"])
        logits = 4 * sum(min(options.verify_tokens * vocab, MAX_LOGITS) for _ in range(ROWS))
        runs = data * (4 // form_bytes(form.dtype) if form.dtype == "bf16" else 1)
        found["to verify"] = LIBRARIES + 4 * parameters + runs + ROWS * kept + logits
    return found | {"to run one text": data + kept}


def form_bytes(dtype: str) -> int:
    """Bytes of a number of a type of the command line."""
    return 4 if dtype == "fp32" else 2


def _largest_whole(model: ir.Model) -> int:
    """Bytes of the largest tensor that is computed whole, in fp32, when it is written."""
    tensors = (x.const_value for x in model.graph.initializers.values())
    whole = (x for x in tensors if isinstance(x, ir.LazyTensor) and not isinstance(x, Blocks))
    return max((4 * math.prod(int(n) for n in x.shape) for x in whole), default=0)
