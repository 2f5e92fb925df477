"""The description beside an engine, `engine/<name>.json`: where the engine may run, compared before TensorRT reads any of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json, write_whole
from attnspan.plugins.trt_sparse_attn.schema import digest
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Api, product
from attnspan.runtime.artefact import HASH_AT_LOAD, Artefact

__all__ = ["FOLDER", "Sidecar", "check", "find", "name_of"]

FOLDER = "engine"
"""Folder of the engines in an artefact."""
SCHEMA = 1


@dataclass(frozen=True)
class Sidecar:
    """What an engine was made of, and for.

    engine: file name; bytes, sha256: of that file; flavour, version: of TensorRT; sm: compute capability; gpu, cuda: of the
    machine that built it, None without a GPU; plugin: `python`, or the library's name, or None for an engine without plugins;
    plugin_schema: digest of the plugins' table; model: fingerprint of the artefact; dtype, cache_dtype: the artefact's;
    profiles: of each the least, best and most of batch, sequence and logits_to_keep.
    """

    engine: str
    bytes: int
    sha256: str
    flavour: str
    version: str
    sm: str
    gpu: str | None
    cuda: str | None
    plugin: str | None
    plugin_schema: str | None
    model: str
    dtype: str
    cache_dtype: str
    profiles: list[dict[str, Any]]
    weight_streaming: bool
    schema: int = SCHEMA

    def save(self, engine: Path) -> None:
        """Write the description of an engine beside it."""
        write_whole(engine.with_suffix(".json"), (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, engine: Path) -> Sidecar:
        """The description of an engine. UserError when it is missing, damaged, or of a newer version."""
        file = engine.with_suffix(".json")
        again = f"make it again with: attnspan build {engine.parent.parent}"
        if not file.is_file():
            raise UserError(f"{engine} has no {file.name} beside it: its TensorRT and GPU are unknown; {again}")
        info: Mapping[str, Any] = read_json(file)
        if info.get("schema") != SCHEMA:
            raise UserError(f"{file}: schema is {info.get('schema')!r}, this version of attnspan reads {SCHEMA}; {again}")
        for field in fields(cls):
            kinds = _KINDS[str(field.type)]
            if field.name not in info or not isinstance(info[field.name], kinds):
                raise UserError(f"{file}: {field.name} is {info.get(field.name)!r}: must be {field.type}; {again}")
        return cls(**{field.name: info[field.name] for field in fields(cls)})

    @property
    def product(self) -> str:
        """The TensorRT that built the engine, for messages."""
        return product(self.flavour, self.version)


_KINDS: dict[str, Any] = {"str": str, "int": int, "bool": bool, "str | None": (str, type(None)), "list[dict[str, Any]]": list}


def name_of(api: Api, sm: str) -> str:
    """File name of the engine of a TensorRT for a compute capability: `trt11.4-sm90.engine`."""
    return f"{api.tag}-sm{sm}.engine"


def find(artefact: Path, api: Api, sm: str) -> Path:
    """The engine in an artefact for this TensorRT and compute capability. UserError that lists those that are there instead."""
    folder = artefact / FOLDER
    path = folder / name_of(api, sm)
    if path.is_file():
        return path
    there = sorted(file.name for file in folder.glob("*.engine"))
    what = f"has engines {', '.join(there)}" if there else "has no engine"
    raise UserError(f"{artefact} {what}: {api.product} on sm_{sm} needs {path.name}; build it with: attnspan build {artefact}")


def check(
    engine: Path, artefact: Artefact, *, flavour: str, version: str, sm: str, hashes: bool = False
) -> Sidecar:
    """Whether an engine is whole and runs with this TensorRT on this GPU: its description. Arguments as of `Api` and `Gpu`.

    UserError that names all that differs: size or hash (of engines above 16 MiB with `hashes` only), TensorRT, compute
    capability, plugins, model and plan.
    """
    again = f"make it again with: attnspan build {artefact.folder}"
    sidecar = Sidecar.load(engine)
    try:
        size = engine.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {engine}: {error.strerror}; {again}") from None
    if size != sidecar.bytes:
        raise UserError(f"{engine} has {size} bytes, its description says {sidecar.bytes}: cut short or replaced; {again}")
    differs = []
    if (sidecar.flavour, sidecar.version) != (flavour, version):
        differs.append(f"it was built by {sidecar.product}, here is {product(flavour, version)}")
    if sidecar.sm != sm:
        gpu = f" ({sidecar.gpu})" if sidecar.gpu else ""
        differs.append(f"it was built for sm_{sidecar.sm}{gpu}, this GPU is sm_{sm}")
    if sidecar.plugin_schema not in (None, digest()):
        versions = f"{str(sidecar.plugin_schema)[:12]}, here {digest()[:12]}"
        differs.append(f"its plugins are of another version of attnspan ({versions})")
    if sidecar.model != artefact.fingerprint:
        differs.append("it was built of another model or plan")
    if (sidecar.dtype, sidecar.cache_dtype) != (artefact.dtype, artefact.cache_dtype):
        got, want = f"{sidecar.dtype} with a {sidecar.cache_dtype} cache", f"{artefact.dtype} with {artefact.cache_dtype}"
        differs.append(f"it computes in {got}, the artefact in {want}")
    if differs:
        raise UserError(f"{engine} does not run here: {'; '.join(differs)}; {again}")
    if size < HASH_AT_LOAD or hashes:
        with engine.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sidecar.sha256:
            hashes_differ = f"SHA-256 is {found[:12]}..., must be {sidecar.sha256[:12]}..."
            raise UserError(f"{engine} was changed or damaged: {hashes_differ}; {again}")
    return sidecar
