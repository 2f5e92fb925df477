"""Builds the TensorRT engine of an artefact: checks, ONNX to network, optimisation profiles, build, and the files it leaves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_file, write_whole
from attnspan.plugins.trt_sparse_attn import build_memory, plugin, tensorrt_api
from attnspan.plugins.trt_sparse_attn.builder import serialize
from attnspan.plugins.trt_sparse_attn.loading import plugin_library
from attnspan.plugins.trt_sparse_attn.schema import NAMESPACE, OPS, digest
from attnspan.plugins.trt_sparse_attn.sidecar import FOLDER, Sidecar, name_of
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api
from attnspan.runtime.artefact import Artefact

__all__ = ["TARGETS", "BuildOptions", "Profile", "build_engine", "profiles", "why_not_here"]

TARGETS = ("tensorrt", "portable")
"""Targets of artefacts that engines are built of."""
DEFAULT_CHUNK = 1024


@dataclass(frozen=True)
class BuildOptions:
    """What `attnspan build` was asked for.

    max_batch: rows of a decode step; max_prompt_chunk: tokens of a prompt per call (None: 1024, or what the artefact allows);
    max_logits: positions of a call with logits; rtx: TensorRT-RTX (None: TensorRT where there is one); arch: compute capability
    such as `89` (None: the GPU at hand); timing_cache: file (None: `engine/timing.cache`); workspace: bytes for tactics; library:
    of plugins in C++ (None: as `loading.plugin_library` finds one, else the plugin in Python).
    """

    max_batch: int = 1
    max_prompt_chunk: int | None = None
    max_logits: int = 1
    rtx: bool | None = None
    arch: str | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None
    workspace: int | None = None
    library: Path | None = None


@dataclass(frozen=True)
class Profile:
    """Least, best and most rows, new tokens of a row, and positions with logits of one kind of call."""

    name: str
    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]
    logits_to_keep: tuple[int, int, int]


def why_not_here() -> str | None:
    """Why no engine for this machine can be built on it, in a clause; None when one can."""
    try:
        tensorrt_api.load()
    except UserError as error:
        return str(error).split(";")[0]
    return "PyTorch sees no NVIDIA GPU" if tensorrt_api.gpu() is None else None


def profiles(artefact: Artefact, options: BuildOptions) -> list[Profile]:
    """Prompts row by row in chunks, and decode steps of all rows. UserError for numbers out of range."""
    most = artefact.n_max if artefact.chunk is None else min(artefact.n_max, artefact.chunk)
    chunk = min(DEFAULT_CHUNK, most) if options.max_prompt_chunk is None else options.max_prompt_chunk
    if not 1 <= chunk <= most:
        raise UserError(f"--max-prompt-chunk is {chunk}; {artefact.folder} allows 1 to {most}")
    if not 1 <= options.max_batch <= 65535:
        raise UserError(f"--max-batch is {options.max_batch}; must be from 1 to 65535")
    if not 1 <= options.max_logits <= chunk:
        raise UserError(f"--max-logits is {options.max_logits}; must be from 1 to {chunk}, the tokens of a call")
    one = (1, 1, 1)
    return [
        Profile("prefill", one, (1, chunk, chunk), (1, 1, options.max_logits)),
        Profile("decode", (1, options.max_batch, options.max_batch), one, one),
    ]


def build_engine(folder: str | Path, options: BuildOptions | None = None) -> Path:
    """Build the engine of an artefact for one TensorRT and compute capability, with its description; the engine's path.

    UserError, before anything is parsed, for what cannot work, and for what TensorRT or a plugin refuses. An engine of the same
    name is replaced when the new one is whole.
    """
    options = options or BuildOptions()
    artefact = Artefact.load(folder)
    if artefact.target not in TARGETS:
        raise UserError(f"{folder} is for target {artefact.target}: engines are built of {' or '.join(TARGETS)}; export it again "
                        "with --target tensorrt")  # fmt: skip
    wanted = profiles(artefact, options)
    if options.workspace is not None and options.workspace < 1:
        raise UserError(f"--memory is {options.workspace} bytes: must be more than 0")
    api = tensorrt_api.load(options.rtx)
    gpu = tensorrt_api.gpu()
    if options.arch is None and gpu is None:
        hint = "name the GPU by --arch, such as --arch 89, or " if api.is_rtx else ""
        raise UserError(f"{api.product} builds for the GPU at hand, and PyTorch sees none; {hint}build on a machine with one")
    sm = options.arch or (gpu.sm if gpu else "")
    need = build_memory.estimate(artefact, options.max_batch, wanted[0].sequence[2], options.max_logits, options.weight_streaming)
    build_memory.check(need, artefact.folder, gpu if options.arch in (None, gpu and gpu.sm) else None, options.max_batch)

    used = _plugins(api, artefact, options.library)
    engines = artefact.folder / FOLDER
    cache = options.timing_cache or engines / "timing.cache"
    known = _read_cache(cache, options.timing_cache is not None)
    path = engines / name_of(api, sm)
    built = serialize(
        api, artefact.folder / "model.onnx", wanted, layers=artefact.layers, arch=options.arch, timings=known,
        weight_streaming=options.weight_streaming, workspace=options.workspace,
    )  # fmt: skip
    engines.mkdir(exist_ok=True)
    with whole_file(path) as file:
        file.write(built.engine)
    if built.timings:
        write_whole(cache, built.timings)
    Sidecar(
        engine=path.name, bytes=len(built.engine), sha256=hashlib.sha256(built.engine).hexdigest(), flavour=api.flavour,
        version=api.version, sm=sm, gpu=gpu.name if gpu and gpu.sm == sm else None, cuda=gpu.cuda if gpu else None, plugin=used,
        plugin_schema=digest() if used else None, model=artefact.fingerprint, dtype=artefact.dtype,
        cache_dtype=artefact.cache_dtype, profiles=[vars(profile) for profile in wanted],
        weight_streaming=options.weight_streaming,
    ).save(path)  # fmt: skip
    return path


def _plugins(api: Api, artefact: Artefact, library: Path | None) -> str | None:
    """Makes the plugins of an artefact known; `python` or the library's name, None when it needs none."""
    if artefact.target == "portable":
        return None
    library = plugin_library(artefact.folder, library)
    if library is None:
        plugin.register(api)
        return "python"
    api.load_plugin(library)
    there = {creator.name for creator in api.registry().all_creators if creator.plugin_namespace == NAMESPACE}
    missing = [op.name for op in OPS if op.name not in there]
    if missing:
        what = f"has no plugin {', '.join(missing)} in namespace {NAMESPACE}"
        raise UserError(f"{library} {what}: must be the libattnspan_trt.so of this version of attnspan")
    return library.name


def _read_cache(file: Path, asked_for: bool) -> bytes:
    """Timings of earlier builds; none at first."""
    if file.is_file():
        return file.read_bytes()
    if asked_for and not file.parent.is_dir():
        raise UserError(f"--timing-cache is {file}: {file.parent} does not exist")
    return b""


def describe(engine: Path) -> str:
    """What was built, in two lines."""
    sidecar = Sidecar.load(engine)
    ranges: list[str] = []
    for one in sidecar.profiles:
        batch, sequence = one["batch"][2], one["sequence"][2]
        ranges.append(f"{one['name']} of up to {batch} rows x {sequence} tokens")
    where = f"{sidecar.product}, sm_{sidecar.sm}, {sidecar.dtype}, plugin {sidecar.plugin or 'none'}"
    return f"{engine}: {sidecar.bytes / 1e6:.1f} MB, {where}\n  {'; '.join(ranges)}"


