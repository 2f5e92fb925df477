"""Bad input of `attnspan export`: a line that says what and where, exit status 2, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from foreign_graphs import Form, write_foreign
from huggingface_hub import errors
from safetensors.numpy import load_file, save_file
from tiny_models import save_tiny_model

from attnspan.export.cli import main
from attnspan.runtime.artefact import Artefact

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tied head."""
    return save_tiny_model(tmp_path_factory.mktemp("pristine") / "model", "qwen2")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    folder = tmp_path / "in" / "model"
    folder.mkdir(parents=True)
    for file in pristine.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refused(model: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that is printed; that there is nothing else, on the screen or on the disk."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    before = sorted(x for x in tmp_path.rglob("*"))
    assert main(["export", str(model), str(out / "artefact"), *options]) == 2
    printed, line = capsys.readouterr()
    assert printed == ""
    assert (line.startswith("error: "), line.count("\n")) == (True, 1)
    assert sorted(x for x in tmp_path.rglob("*")) == before
    return line.removeprefix("error: ").rstrip()


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    held = load_file(folder / "model.safetensors") | tensors
    save_file({name: x for name, x in held.items() if x is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            errors.GatedRepoError.__new__(errors.GatedRepoError),
            "some/model is gated: accept its terms on its page of the Hugging Face hub and log in",
        ),
        (
            errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError),
            "nor a model of the Hugging Face hub that you may see; check the name, or log in",
        ),
        (
            errors.LocalEntryNotFoundError("no\nnetwork"),
            "some/model is neither a local folder nor to be had from the Hugging Face hub (no)",
        ),
    ],
    ids=["gated", "private", "offline"],
)
def test_hub(
    failure: Exception, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert message in refused("some/model", tmp_path, capsys)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = {EMBEDDING: "one.safetensors", "model.norm.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def missing_weight(folder: Path) -> None:
    change(folder, **{"model.layers.1.self_attn.v_proj.weight": None})


def wrong_shape(folder: Path) -> None:
    change(folder, **{"model.norm.weight": np.zeros(65, np.float32)})


def integers_among_floats(folder: Path) -> None:
    change(folder, **{"model.norm.weight": np.zeros(64, np.int32)})


def other_head(folder: Path) -> None:
    change(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBEDDING] + 1})


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2", ')


CHECKPOINTS: list[tuple[Callable[[Path], None], str]] = [
    (no_weights, "lacks model.safetensors; MODEL must hold its weights as safetensors"),
    (no_config, "holds neither a config.json nor a .gguf file"),
    (broken_config, "config.json is not JSON"),
    (lfs_pointer, "model.safetensors is not a safetensors file but a pointer of Git LFS (`git lfs pull` fetches it)"),
    (missing_shard, "lacks two.safetensors; model.safetensors.index.json names it; download MODEL again"),
    (missing_weight, "'model.layers.1.self_attn.v_proj.weight'"),
    (wrong_shape, "'model.norm.weight'"),
    (integers_among_floats, "model.norm.weight is I32; weights must be F32, F16, BF16"),
    (other_head, "tie_word_embeddings, but lm_head.weight is not model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS, ids=lambda x: getattr(x, "__name__", ""))
def test_checkpoints(
    spoil: Callable[[Path], None], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    assert message in refused(model, tmp_path, capsys)


def test_weights_that_cannot_be_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.open

    def locked(file: Path, *args: Any, **kwargs: Any) -> Any:
        if file.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(file))
        return whole(file, *args, **kwargs)

    monkeypatch.setattr(Path, "open", locked)
    assert "model.safetensors may not be read; change its permissions" in refused(model, tmp_path, capsys)


def test_fp16_overflow_while_writing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found only when the weight is read: what was written by then is gone."""
    change(model, **{"model.norm.weight": np.full(64, 1e5, np.float32)})
    message = refused(model, tmp_path, capsys, "--target", "portable", "--dtype", "fp16")
    assert "'model.norm.weight' has numbers up to 1e+05, fp16 ends at 65504; use --dtype bf16 or fp32" in message


def test_what_is_odd_but_right(model: Path, tmp_path: Path) -> None:
    """Types that are mixed, and a tied head stored twice: the same artefact as without, the embedding in it once."""
    out = [tmp_path / "a", tmp_path / "b"]
    assert main(["export", str(model), str(out[0]), "--no-verify"]) == 0
    held = load_file(model / "model.safetensors")
    half = {name: x.astype(np.float16) for name, x in held.items() if "mlp" in name}
    change(model, **{HEAD: held[EMBEDDING]}, **half)
    assert main(["export", str(model), str(out[1]), "--no-verify"]) == 0
    sizes = [Artefact.load(folder).info["files"]["model.onnx.data"]["bytes"] for folder in out]
    assert sizes[0] == sizes[1]


def with_opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def set_it(proto: onnx.ModelProto) -> None:
        next(x for x in proto.opset_import if x.domain == "").version = version

    return set_it


def with_location(location: str) -> Callable[[onnx.ModelProto], None]:
    def set_it(proto: onnx.ModelProto) -> None:
        for x in proto.graph.initializer:
            for entry in x.external_data:
                entry.value = location if entry.key == "location" else entry.value

    return set_it


def other_op(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention").op_type = "PagedAttention"


ONNX_FILES: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "opset too new": (with_opset(27), "the file is of opset 27; allowed are 13 to 24: export it with another opset"),
    "unsupported op": (other_op, "the ONNX graph cannot be lifted"),
    "external data missing": (with_location("gone.data"), "gone.data, which does not exist; put it there"),
    "external data elsewhere": (with_location("../model/model.safetensors"), "must be below the folder of the file"),
    "external data by absolute path": (with_location("/etc/hostname"), "must be below the folder of the file"),
}


@pytest.mark.parametrize("name", ONNX_FILES)
def test_onnx_files(name: str, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = ONNX_FILES[name]
    file = write_foreign(tmp_path / "foreign", untied, Form("genai"))
    proto = onnx.load(file, load_external_data=False)
    spoil(proto)
    onnx.save(proto, file)
    assert message in refused(file, tmp_path, capsys)


def test_protobuf_over_2_gb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its size alone: nothing of it is read (the file has holes, and takes no room)."""
    file = tmp_path / "large.onnx"
    with file.open("wb") as stream:
        stream.truncate(2**31)
    message = refused(file, tmp_path, capsys)
    assert message.endswith("large.onnx has 2147483648 bytes, protobuf allows 2 GB; save it with external data")
