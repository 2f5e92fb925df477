"""`attnspan package triton`: the model repository, written whole."""

from __future__ import annotations

import importlib.resources
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnspan.export.folder import check_destination
from attnspan.export.package.config import chat_config, core_config
from attnspan.export.package.pbtxt import text
from attnspan.planner.cost import format_bytes
from attnspan.planner.errors import UserError
from attnspan.planner.files import whole_folder
from attnspan.planner.rules import check_int
from attnspan.runtime.artefact import Artefact
from attnspan.runtime.session import CHUNK

__all__ = ["Options", "package"]

CARRIED = ("planner", "runtime")
"""Packages of attnspan that lie beside the chat: what it needs of it, without compiled parts."""
TARGETS = ("cpu", "portable", "tensorrt")
DATA = "model.onnx.data"
DESCRIPTION = "attnspan.json"
IMAGE = "nvcr.io/nvidia/tritonserver:YY.MM-py3"
BLOCK = 16 << 20


@dataclass(frozen=True)
class Options:
    """What the command line says. repository: where the server will see OUT/models."""

    name: str = "chat"
    sequences: int = 4
    idle: int = 600
    repository: str = "/models"
    threads: int | None = None
    engine: Path | None = None
    plugin: Path | None = None


@dataclass(frozen=True)
class Serving:
    """How a target is served: file of the engine and of its plugin, where it is one; most tokens of a call."""

    engine: Path | None
    plugin: Path | None
    chunk: int


def package(folder: Path, out: Path, options: Options) -> str:
    """Write the repository of an artefact to `out`; what to say about it.

    UserError, before anything is written: no artefact, no tokenizer with a chat template, no engine or plugin library for target
    tensorrt, `out` exists, no space, options that do not suit.
    """
    artefact = Artefact.load(folder)
    _check(artefact, options)
    serving = _tensorrt(artefact, options) if artefact.target == "tensorrt" else Serving(None, None, artefact.chunk or CHUNK)
    if out.exists():
        raise UserError(f"{out} exists: must be a new folder; change OUT")
    files = _model_files(artefact, serving)
    check_destination(out, False, sum(file.stat().st_size for file in files.values()) + 4_000_000)
    core = f"{options.name}_core"
    with whole_folder(out) as work:
        version = work / "models" / core / "1"
        version.mkdir(parents=True)
        _copy(files, version)
        _describe(artefact, serving, version)
        library = f"{options.repository.rstrip('/')}/{core}/1/{artefact.library.name}" if artefact.library else None
        shared = {"sequences": options.sequences, "idle": options.idle}
        file = None if serving.engine is None else "model.plan"
        made = core_config(core, artefact, **shared, library=library, threads=options.threads, file=file)
        (version.parent / "config.pbtxt").write_text(text(made), encoding="utf-8")
        chat = work / "models" / options.name
        _write_chat(chat / "1")
        made = chat_config(options.name, core, **shared, chunk=serving.chunk)
        (chat / "config.pbtxt").write_text(text(made), encoding="utf-8")
        words = _words(artefact, serving, options)
        for name in ("README.md", "client.py"):
            (work / name).write_text(_filled(name, words), encoding="utf-8")
        if serving.plugin is not None:
            shutil.copyfile(serving.plugin, work / "libattnspan_trt.so")
            (work / "load_plugin.cc").write_text(_template("load_plugin.cc"), encoding="utf-8")
    backend = _backend(serving)
    said = [f"{out}: models {options.name} and {core} for Triton's {backend} backend; {out / 'README.md'} says how to start"]
    if artefact.target == "cpu" and artefact.library is None:
        said.append("the artefact has no op library: attention runs as standard ONNX, slowly; export with the library")
    return "\n".join(said)


def _check(artefact: Artefact, options: Options) -> None:
    from attnspan.runtime.tokenizer import Tokenizer

    if artefact.target not in TARGETS:
        allowed = ", ".join(TARGETS)
        raise UserError(f"{artefact.folder} is of target {artefact.target!r}: Triton gets {allowed}; export with --target cpu")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", options.name):
        raise UserError(f"--name is {options.name!r}: must be letters, digits, '_', '.' and '-'")
    check_int("--sequences", options.sequences, 1, 4096)
    check_int("--idle", options.idle, 1, 10**6)
    if options.threads is not None:
        check_int("--threads", options.threads, 1, 4096)
    if not options.repository.startswith("/"):
        raise UserError(f"--repository is {options.repository!r}: must be an absolute path on the server")
    tensorrt = artefact.target == "tensorrt"
    for option, given, wanted in (
        ("--engine", options.engine, tensorrt),
        ("--plugin", options.plugin, tensorrt),
        ("--threads", options.threads, not tensorrt),
    ):
        if given is not None and not wanted:
            raise UserError(f"{option} is {given}: {artefact.folder} is of target {artefact.target!r}; drop {option}")
    if not Tokenizer(artefact.folder).has_chat_template:
        raise UserError(f"{artefact.folder} has no chat template: the model that chats needs one; export a model that has it")


def _tensorrt(artefact: Artefact, options: Options) -> Serving:
    """The engine and the plugin library. UserError when there is none, or not one alone."""
    from attnspan.plugins.trt_sparse_attn.loading import plugin_library
    from attnspan.plugins.trt_sparse_attn.sidecar import FOLDER, Sidecar, check

    build = f"build it on the machine with the GPU: attnspan build {artefact.folder}"
    there = sorted((artefact.folder / FOLDER).glob("*.engine"))
    engine = options.engine
    if engine is None:
        usable = [file for file in there if Sidecar.load(file).flavour == "tensorrt"]
        if not usable:
            others = f", only {', '.join(file.name for file in there)}, which Triton does not run" if there else ""
            raise UserError(f"{artefact.folder} has no engine of TensorRT{others}; {build}")
        if len(usable) > 1:
            names = ", ".join(str(file) for file in usable)
            raise UserError(f"{artefact.folder} has engines {names}: one repository serves one; give --engine FILE")
        (engine,) = usable
    if not engine.is_file():
        raise UserError(f"the engine {engine} does not exist; change --engine, or {build}")
    made = Sidecar.load(engine)
    if made.flavour != "tensorrt":
        raise UserError(f"{engine} was built by {made.product}: Triton runs engines of TensorRT; {build}")
    check(engine, artefact, flavour=made.flavour, version=made.version, sm=made.sm)
    library = None
    if made.plugin is not None:
        library = plugin_library(artefact.folder, options.plugin)
        if library is None:
            raise UserError(f"{engine} needs a plugin, which must be the one in C++ for Triton: give --plugin libattnspan_trt.so")
    longest = max((profile["tokens"][-1] for profile in made.profiles), default=CHUNK)
    return Serving(engine, library, min(CHUNK, longest))


def _backend(serving: Serving) -> str:
    return "ONNX Runtime" if serving.engine is None else "TensorRT"


def _model_files(artefact: Artefact, serving: Serving) -> dict[str, Path]:
    """Files of the model, by their names on the server; an engine has the weights in it."""
    names = [name for name in artefact.info["files"] if serving.engine is None or name != DATA]
    files = {name: artefact.folder / name for name in names if (artefact.folder / name).is_file()}
    return files if serving.engine is None else files | {"model.plan": serving.engine}


def _describe(artefact: Artefact, serving: Serving, version: Path) -> None:
    """attnspan.json, which lists what is there."""
    info = dict(artefact.info)
    info["files"] = {name: entry for name, entry in info["files"].items() if (version / name).is_file()}
    (version / DESCRIPTION).write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(files: Mapping[str, Path], target: Path) -> None:
    from tqdm import tqdm

    total = sum(file.stat().st_size for file in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="copying", delay=2, leave=False, disable=None) as bar:
        for name, file in files.items():
            with file.open("rb") as source, (target / name).open("wb") as copy:
                while block := source.read(BLOCK):
                    copy.write(block)
                    bar.update(len(block))


def _write_chat(version: Path) -> None:
    """The Python model, and what it needs of this package."""
    version.mkdir(parents=True)
    (version / "model.py").write_text(_template("model.py"), encoding="utf-8")
    package = version / "attnspan"
    package.mkdir()
    (package / "__init__.py").write_text('"""The part of attnspan that a server needs."""\n', encoding="utf-8")
    for name in CARRIED:
        (package / name).mkdir()
        for file in importlib.resources.files(f"attnspan.{name}").iterdir():
            if file.name.endswith(".py"):
                (package / name / file.name).write_bytes(file.read_bytes())


def _template(name: str) -> str:
    found: Callable[..., Any] = importlib.resources.files("attnspan.export.package").joinpath
    return str(found("templates", name).read_text(encoding="utf-8"))


def _filled(name: str, words: Mapping[str, str]) -> str:
    filled = _template(name)
    for key, value in words.items():
        filled = filled.replace(f"@{key}@", value)
    return filled


def _words(artefact: Artefact, serving: Serving, options: Options) -> dict[str, str]:
    state = artefact.kv_bytes() + artefact.state_bytes()
    packages = "pip install numpy tokenizers jinja2"
    mounts = [f'-v "$PWD/models:{options.repository}"']
    server = f"tritonserver --model-repository={options.repository}"
    before: list[str] = []
    needs = "ONNX Runtime 1.25 or newer: Triton 2.73 has 1.27"
    if serving.engine is not None:
        from attnspan.plugins.trt_sparse_attn.sidecar import Sidecar

        made = Sidecar.load(serving.engine)
        needs = f"{made.product} (the version that built the engine) on a GPU of sm_{made.sm}"
        if serving.plugin is not None:
            headers = "-I/path/to/TensorRT/include -I/usr/local/cuda/include"
            before = [f"c++ -shared -fPIC {headers} load_plugin.cc -o libattnspan_triton.so -ldl"]
            mounts.append('-v "$PWD:/attnspan" -e ATTNSPAN_TRT_PLUGIN=/attnspan/libattnspan_trt.so')
            server += " --backend-config=tensorrt,plugins=/attnspan/libattnspan_triton.so"
    gpus = "" if serving.engine is None else "--gpus all "
    start = [
        *before,
        f"docker run --rm {gpus}--shm-size=1g -p 8000:8000 -p 8001:8001 {' '.join(mounts)} {IMAGE} \\",
        f"  sh -c '{packages} && {server}'",
    ]
    return {
        "NAME": options.name,
        "MODEL": artefact.model_id,
        "WHAT": f"target {artefact.target}, up to {artefact.n_max} tokens, {artefact.cache_dtype} caches",
        "BACKEND": _backend(serving),
        "START": "\n".join(f"    {line}" for line in start),
        "NEEDS": needs,
        "N_MAX": str(artefact.n_max),
        "IDLE": str(options.idle),
        "SEQUENCES": str(options.sequences),
        "STATE": format_bytes(state),
        "CHUNK": str(serving.chunk),
    }
