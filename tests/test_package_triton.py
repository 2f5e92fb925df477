"""`attnspan package triton`: configurations that Triton's messages parse and graphs agree with; the chat on a stand-in.

Triton itself was not at hand. `fake_triton.py` does what its documentation says; the messages are those of tritonclient.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from fake_triton import END, START, CoreModel, Request, Sender, load_model
from google.protobuf import json_format, text_format
from sampled_artefacts import INDEXES, op_library
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime import Session
from attnspan.export.cli import main
from attnspan.export.package.config import chat_config, core_config
from attnspan.export.package.pbtxt import text
from attnspan.planner.rules import HeadRule
from attnspan.plugins.trt_sparse_attn.schema import digest
from attnspan.plugins.trt_sparse_attn.sidecar import Sidecar
from attnspan.runtime.artefact import Artefact

ROOT = Path(__file__).parents[1]
PACKAGE, MEMBER = "tritonclient==2.73.0", "tritonclient/grpc/model_config_pb2.py"
ONNX = {"float": "FP32", "float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "uint8": "UINT8", "int32": "INT32",
        "int64": "INT64"}  # fmt: skip
ONNX = {f"tensor({theirs})": f"TYPE_{ours}" for theirs, ours in ONNX.items()}
SHARED = {"sequences": 4, "idle": 600}


@cache
def fetched() -> Path | str:
    """Triton's messages, of the client's wheel, or why there are none. Installed, it would want an older ml_dtypes."""
    target = ROOT / "build" / "triton" / "model_config_pb2.py"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target.parent), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the package index does not serve {PACKAGE}: {done.stderr[-200:]}"
        (wheel,) = target.parent.glob("tritonclient-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            part = target.with_suffix(f".{os.getpid()}")
            part.write_bytes(archive.read(MEMBER))
            part.rename(target)
    return target


@pytest.fixture(scope="module")
def messages() -> ModuleType:
    found = fetched()
    if isinstance(found, str):
        pytest.skip(found)
    spec = importlib.util.spec_from_file_location("model_config_pb2", found)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made for an older protobuf, which is allowed
        spec.loader.exec_module(module)
    return module


def export(kind: str, folder: Path) -> Path:
    """Artefacts for the two backends; `sampled` has a layer with two ops, one of which has an index."""
    if kind == "sampled":
        sampled = HeadRule("lsh", lsh=INDEXES["signature"])
        rules = [[sampled, HeadRule("span", 0, 0.5)], [sampled, sampled]]
        return export_rules(folder, rules, n_max=1024, library=op_library()).folder
    options: dict[str, Any] = {
        "span": {"cache_dtype": "bf16", "library": op_library()},
        "int8": {"cache_dtype": "int8", "weights": "int4"},
        "portable": {"target": "portable", "chunk": 64},
        "tensorrt": {"target": "tensorrt", "dtype": "bf16", "cache_dtype": None},
    }[kind]
    return export_tiny(folder, **options).folder


class Folders(dict[str, Path]):
    """Folders by kind, each made when it is first asked for."""

    def __init__(self, make: Callable[[str], Path]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, kind: str) -> Path:
        self[kind] = self._make(kind)
        return self[kind]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(lambda kind: export(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def repositories(artefacts: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """What the command writes, for the ONNX Runtime backend."""

    def pack(kind: str) -> Path:
        out = tmp_path_factory.mktemp("packed") / kind
        assert main(["package", "triton", str(artefacts[kind]), str(out)]) == 0
        return out

    return Folders(pack)


def add_engine(folder: Path, name: str = "trt10.15-sm90.engine", **changes: Any) -> Path:
    """An engine as far as packaging looks at one."""
    artefact = Artefact.load(folder)
    path = folder / "engine" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"engine" * 100)
    about = {
        "engine": name, "bytes": 600, "sha256": hashlib.sha256(b"engine" * 100).hexdigest(), "flavour": "tensorrt",
        "version": "10.15.1.29", "sm": "90", "gpu": None, "cuda": None, "plugin": "libattnspan_trt.so", "plugin_schema": digest(),
        "model": artefact.fingerprint, "dtype": artefact.dtype, "cache_dtype": artefact.cache_dtype,
        "profiles": [{"name": "prefill", "batch": [1, 1, 1], "tokens": [1, 256, 300], "logits": [1, 1, 1]}],
        "weight_streaming": False,
    }  # fmt: skip
    Sidecar(**(about | changes)).save(path)
    return path


# Configurations


@pytest.mark.parametrize("kind", ["span", "int8", "portable", "sampled"])
def test_configurations_parse_and_agree_with_the_graph(kind: str, repositories: dict[str, Path], messages: ModuleType) -> None:
    models = repositories[kind] / "models"
    core = text_format.Parse((models / "chat_core" / "config.pbtxt").read_text(), messages.ModelConfig())
    options = ort.SessionOptions()
    library = models / "chat_core" / "1" / "libattnspan_ort.so"
    if library.is_file():
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(models / "chat_core" / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
    batching, name = core.sequence_batching, messages.DataType.Name
    config = {x.name: (name(x.data_type), list(x.dims)) for x in core.input}
    config |= {x.input_name: (name(x.data_type), list(x.dims)) for x in batching.state}
    given = {x.name: (ONNX[x.type], [d if isinstance(d, int) else -1 for d in x.shape]) for x in session.get_inputs()}
    assert config == given
    config = {x.name: (name(x.data_type), list(x.dims)) for x in core.output}
    config |= {x.output_name: (name(x.data_type), list(x.dims)) for x in batching.state}
    assert config == {x.name: (ONNX[x.type], [d if isinstance(d, int) else -1 for d in x.shape]) for x in session.get_outputs()}
    assert (core.name, core.backend, core.max_batch_size) == ("chat_core", "onnxruntime", 0)
    # Triton pairs states by the order of their names.
    pairs = [(x.input_name, x.output_name) for x in batching.state]
    assert sorted(pairs) == list(zip(sorted(p for p, _ in pairs), sorted(q for _, q in pairs), strict=True))
    artefact = Artefact.load(models / "chat_core" / "1")
    size = {"TYPE_FP32": 4, "TYPE_BF16": 2, "TYPE_FP16": 2}
    total = 0
    for state in batching.state:
        (initial,) = state.initial_state
        assert initial.zero_data
        assert initial.name
        assert initial.data_type == state.data_type
        assert list(initial.dims) == [1, *list(state.dims)[1:]]
        total += int(np.prod(initial.dims)) * size.get(name(initial.data_type), 1)
    assert total == artefact.kv_bytes() + artefact.state_bytes()
    assert list(core.model_operations.op_library_filename) == (
        ["/models/chat_core/1/libattnspan_ort.so"] if library.is_file() else []
    )

    chat = text_format.Parse((models / "chat" / "config.pbtxt").read_text(), messages.ModelConfig())
    assert (chat.name, chat.backend, chat.max_batch_size) == ("chat", "python", 0)
    assert chat.model_transaction_policy.decoupled
    assert {key: value.string_value for key, value in chat.parameters.items()} == {
        "core": "chat_core", "chunk": "64" if kind == "portable" else "512", "idle": "600"
    }  # fmt: skip
    assert chat.sequence_batching.oldest.max_candidate_sequences == batching.oldest.max_candidate_sequences == 4


def test_text_is_the_message(artefacts: dict[str, Path], messages: ModuleType) -> None:
    """As protobuf's own JSON reader understands the same dictionaries, with every option given."""
    artefact = Artefact.load(artefacts["span"])
    core = core_config('a "core"', artefact, sequences=7, idle=5, library="/x/\\y.so", threads=3, file=None)
    for config in (core, chat_config("chät", "core", **SHARED, chunk=9)):
        as_json = dict(config)
        if "parameters" in config:
            as_json["parameters"] = {entry["key"]: entry["value"] for entry in config["parameters"]}
        expected = json_format.ParseDict({k: v for k, v in as_json.items() if v is not None}, messages.ModelConfig())
        assert text_format.Parse(text(config), messages.ModelConfig()) == expected
    assert core["parameters"] == [{"key": "intra_op_thread_count", "value": {"string_value": "3"}}]


# The chat


class Server:
    """The chat of a repository, and the model under it."""

    def __init__(self, repository: Path, name: str = "chat") -> None:
        folder = repository / "models" / f"{name}_core"
        artefact = Artefact.load(folder / "1")
        chunk = artefact.chunk or 512
        config = core_config(f"{name}_core", artefact, **SHARED, library=None, threads=None, file=None)
        self.core = CoreModel(config, folder, artefact.library)
        self.chat = load_model(repository / "models" / name / "1" / "model.py", {f"{name}_core": self.core})
        made = chat_config(name, f"{name}_core", **SHARED, chunk=chunk)
        parameters = {entry["key"]: entry["value"] for entry in made["parameters"]}
        self.chat.initialize({"model_config": json.dumps(made | {"parameters": parameters})})

    def say(
        self, message: str | bytes, sequence: int = 1, flags: int = 0, cancel_after: int | None = None, **inputs: Any
    ) -> tuple[str, Mapping[str, Any] | None, str | None]:
        """Text of the pieces, what the last response says, and the error."""
        kinds = {"max_new_tokens": np.int32, "temperature": np.float32, "top_p": np.float32, "seed": np.int64}
        words = {"message": message} | {key: value for key, value in inputs.items() if key == "system"}
        tensors = {key: np.array([x if isinstance(x, bytes) else x.encode()], np.object_) for key, x in words.items()}
        tensors |= {key: np.array([value], kinds[key]) for key, value in inputs.items() if key in kinds}
        sender = Sender(cancel_after)
        self.chat.execute([Request(sequence, flags, tensors, sender)])
        assert sender.final
        errors = [response.error().message() for response in sender.sent if response.has_error()]
        pieces = [response.tensors for response in sender.sent if not response.has_error()]
        for piece in pieces:
            assert {key: (x.shape, x.dtype.kind) for key, x in piece.items()} == {
                "text": ((1,), "O"), "finish_reason": ((1,), "O"), "tokens": ((1,), "i")
            }  # fmt: skip
        said = b"".join(piece["text"][0] for piece in pieces).decode()
        last = pieces[-1] if pieces and pieces[-1]["finish_reason"][0] else None
        assert len(errors) <= 1
        return said, last, errors[0] if errors else None


def open_session(folder: Path) -> Session:
    return Session(folder, threads=1, **({"library": op_library()} if (folder / "libattnspan_ort.so").is_file() else {}))


TURNS = ["Call me Ishmael. " * 14, "Why?", "Some years ago - never mind how long. "]


@pytest.mark.parametrize("kind", ["span", "int8", "portable", "sampled"])
def test_two_conversations_are_those_of_sessions(kind: str, repositories: dict[str, Path], artefacts: dict[str, Path]) -> None:
    """Turn by turn, in turns of the two; past the wrap of the rings, where they have any. The sequences end with them."""
    server = Server(repositories[kind])
    sessions = {1: open_session(artefacts[kind]), 2: open_session(artefacts[kind])}
    histories: dict[int, list[dict[str, str]]] = {1: [], 2: [{"role": "system", "content": "Be brief."}]}
    for number, turn in enumerate(TURNS):
        for sequence, messages in histories.items():
            asked = turn[:-sequence]
            flags = (START if number == 0 else 0) | (END if number == len(TURNS) - 1 else 0)
            system = {"system": "Be brief."} if sequence == 2 and number == 0 else {}
            said, last, error = server.say(asked, sequence, flags, max_new_tokens=6, **system)
            messages.append({"role": "user", "content": asked})
            expected = sessions[sequence].generate(messages, 6, continue_=True)[0]
            messages.append({"role": "assistant", "content": expected.text or ""})
            assert error is None
            assert said == expected.text
            assert last is not None
            assert last["finish_reason"][0].decode() == expected.finish_reason
            assert last["tokens"][0] == sessions[sequence].lengths[0]
    assert server.core.sequences == {}
    assert [flags for _, flags, _ in server.core.calls].count(START) == 2
    most = 64 if kind == "portable" else 512
    assert max(shape[1] for _, _, shape in server.core.calls) <= most
    if kind == "sampled":
        prompts = [shape[1] for sequence, _, shape in server.core.calls if shape[1] > 1]
        assert prompts


def test_sampling_repeats_with_a_seed(repositories: dict[str, Path]) -> None:
    server = Server(repositories["span"])
    answers = [server.say("Ahab", 5, START, max_new_tokens=12, temperature=3.0, top_p=0.9, seed=seed)[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert len(server.core.sequences) == 1  # a start ends what the sequence was


def test_mistakes_and_failures_end_the_conversation_and_nothing_else(repositories: dict[str, Path]) -> None:
    server = Server(repositories["span"])
    assert "start it with sequence_start" in (server.say("Hello")[2] or "")
    assert server.say("Hello", 7, START, max_new_tokens=3)[2] is None
    for message, inputs, expected in [
        ("x" * 600, {}, "n_max = 512"),
        (b"\xff", {}, "message is not valid UTF-8 at byte 0"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        error = server.say(message, 8, START, **inputs)[2]
        assert expected in (error or "")
        assert list(server.core.sequences) == [7]
        assert "start it with" in (server.say("again", 8)[2] or "")
    server.say("Hello", 9, START, max_new_tokens=3)
    server.core.fail = "the model is being unloaded"
    assert server.say("more", 9)[2] == "the model is being unloaded"
    server.core.fail = ""
    assert "start it with" in (server.say("more", 9)[2] or "")
    assert server.say("Go on", 7, max_new_tokens=3)[2] is None


def test_who_leaves_is_noticed(repositories: dict[str, Path]) -> None:
    server = Server(repositories["span"])
    said, last, error = server.say("Hello", 3, START, cancel_after=2, max_new_tokens=100)
    assert (last, error) == (None, None)
    assert said
    assert len(server.core.calls) < 20
    assert server.core.sequences == {}


def test_idle_conversations_are_forgotten(repositories: dict[str, Path]) -> None:
    """Triton ends them without telling; the next conversation that starts clears them away."""
    server = Server(repositories["span"])
    for sequence in (1, 2):
        server.say("Hello", sequence, START, max_new_tokens=2)
    server.chat._sessions[1].used -= 601
    del server.core.sequences[1]
    server.say("Hello", 3, START, max_new_tokens=2)
    assert sorted(server.chat._sessions) == sorted(server.core.sequences) == [2, 3]


def test_the_repository_needs_nothing_else(repositories: dict[str, Path]) -> None:
    """Without this package: the chat imports what lies beside it, NumPy, tokenizers and Jinja."""
    version = repositories["span"] / "models" / "chat" / "1"
    parameters = {"core": "chat_core", "chunk": "512", "idle": "9"}
    config = json.dumps({"parameters": {key: {"string_value": value} for key, value in parameters.items()}})
    code = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]  # without those of editable installs
sys.path[:] = [path for path in sys.path if path] + [{str(version)!r}]
from types import ModuleType
sys.modules["triton_python_backend_utils"] = ModuleType("triton_python_backend_utils")
before = set(sys.modules)
import model
chat = model.TritonPythonModel()
chat.initialize({{"model_config": {config!r}}})
from attnspan.runtime.tokenizer import Tokenizer
session = model.CoreSession(chat._artefact, "chat_core", 1, 512)
assert session.tokenizer.render([{{"role": "user", "content": "x"}}])
import attnspan
assert attnspan.__file__.startswith({str(version)!r}), attnspan.__file__
tops = {{name.split(".")[0] for name in set(sys.modules) - before}}
files = {{name for name in tops if "site-packages" in (getattr(sys.modules.get(name), "__file__", "") or "")}}
print(sorted(files))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=version, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"numpy", "tokenizers", "jinja2", "markupsafe", "huggingface_hub"}


# TensorRT


def test_tensorrt(artefacts: dict[str, Path], messages: ModuleType, tmp_path: Path) -> None:
    """The engine, its plugin and what registers that; the weights stay behind, as they are in the engine."""
    folder = artefacts["tensorrt"]
    engine = add_engine(folder)
    add_engine(folder, "rtx1.7-sm89.engine", flavour="tensorrt_rtx", version="1.7.1.116", sm="89")
    library = tmp_path / "libattnspan_trt.so"
    library.write_bytes(b"plugin")
    out = tmp_path / "out"
    assert main(["package", "triton", str(folder), str(out), "--plugin", str(library), "--name", "llm", "--sequences", "2"]) == 0
    core = out / "models" / "llm_core"
    assert (core / "1" / "model.plan").read_bytes() == engine.read_bytes()
    assert not (core / "1" / "model.onnx.data").exists()
    assert Artefact.load(core / "1").target == "tensorrt"
    assert (out / "libattnspan_trt.so").read_bytes() == b"plugin"
    config = text_format.Parse((core / "config.pbtxt").read_text(), messages.ModelConfig())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert [x.name for x in config.input if x.is_shape_tensor] == ["logits_to_keep"]
    (group,) = config.instance_group
    assert (messages.ModelInstanceGroup.Kind.Name(group.kind), list(group.profile)) == ("KIND_GPU", ["0", "1"])
    assert {messages.DataType.Name(x.data_type) for x in config.sequence_batching.state} == {"TYPE_BF16"}
    chat = text_format.Parse((out / "models" / "llm" / "config.pbtxt").read_text(), messages.ModelConfig())
    assert chat.parameters["chunk"].string_value == "300"  # of the engine's first profile
    readme = (out / "README.md").read_text()
    assert "TensorRT 10.15.1.29 (the version that built the engine) on a GPU of sm_90" in readme
    assert "--backend-config=tensorrt,plugins=/attnspan/libattnspan_triton.so" in readme


@pytest.mark.skipif(not os.environ.get("TENSORRT_ROOT"), reason="no TensorRT headers: TENSORRT_ROOT is not set")
def test_load_plugin_compiles(tmp_path: Path) -> None:
    source = ROOT / "export" / "package" / "templates" / "load_plugin.cc"
    folders = {str(file.parent) for file in Path(os.environ["TENSORRT_ROOT"]).rglob("NvInferRuntime.h")}
    folders |= {str(file.parent) for file in Path("/usr/local").glob("cuda*/include/cuda_runtime_api.h")}
    headers = [f"-isystem{path}" for path in sorted(folders)]
    done = subprocess.run(
        ["c++", "-shared", "-fPIC", "-Wall", "-Werror", *headers, str(source), "-o", str(tmp_path / "x.so"), "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Files and mistakes


def test_the_pages(repositories: dict[str, Path]) -> None:
    for kind in ("span", "portable"):
        repository = repositories[kind]
        readme = (repository / "README.md").read_text(encoding="utf-8")
        assert "@" not in readme
        assert "--model-repository=/models" in readme
        assert "--gpus" not in readme
        assert Artefact.load(repository / "models" / "chat_core" / "1").model_id in readme, kind
        client = (repository / "client.py").read_text(encoding="utf-8")
        assert 'MODEL = "chat"' in client
        compile(client, "client.py", "exec")


def test_mistakes_are_told_in_one_line(
    artefacts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATTNSPAN_TRT_PLUGIN", raising=False)
    span, out = artefacts["span"], tmp_path / "out"
    bare = export_tiny(tmp_path, target="tensorrt", dtype="fp16", cache_dtype=None).folder
    (tmp_path / "there").mkdir()
    capsys.readouterr()

    def refused(message: str, *words: object) -> None:
        assert main(["package", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
        assert not out.exists()

    refused("invalid choice: 'tritton'", "tritton", span, out)
    refused("does not exist: give an artefact folder", "triton", tmp_path / "no", out)
    refused("exists: must be a new folder; change OUT", "triton", span, tmp_path / "there")
    refused("does not exist; make it or change OUT", "triton", span, tmp_path / "a" / "b")
    refused("--name is 'a b'", "triton", span, out, "--name", "a b")
    refused("--sequences is 0", "triton", span, out, "--sequences", 0)
    refused("--idle is 0", "triton", span, out, "--idle", 0)
    refused("--repository is 'models'", "triton", span, out, "--repository", "models")
    refused("drop --engine", "triton", span, out, "--engine", "x.engine")
    refused("has no engine of TensorRT; build it on the machine with the GPU: attnspan build", "triton", bare, out)
    refused("drop --threads", "triton", bare, out, "--threads", 2)
    add_engine(bare, "rtx1.7-sm89.engine", flavour="tensorrt_rtx", version="1.7.1.116", sm="89")
    refused("only rtx1.7-sm89.engine, which Triton does not run", "triton", bare, out)
    refused("was built by TensorRT-RTX 1.7.1.116", "triton", bare, out, "--engine", bare / "engine" / "rtx1.7-sm89.engine")
    add_engine(bare)
    refused("give --plugin libattnspan_trt.so", "triton", bare, out)
    refused("the plugin library none.so does not exist; change --plugin", "triton", bare, out, "--plugin", "none.so")
    add_engine(bare, "trt10.16-sm90.engine", version="10.16.0.1")
    refused("one repository serves one; give --engine FILE", "triton", bare, out)
    refused("the engine none does not exist; change --engine", "triton", bare, out, "--engine", "none")
    (bare / "engine" / "trt10.16-sm90.engine").write_bytes(b"cut")
    refused("cut short or replaced", "triton", bare, out, "--engine", bare / "engine" / "trt10.16-sm90.engine")
    assert list(tmp_path.glob(".out*")) == []


def test_an_artefact_without_a_chat_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export_tiny(tmp_path).folder
    settings = folder / "tokenizer_config.json"
    info = json.loads((folder / "attnspan.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    info["files"].pop("chat_template.jinja", None)
    content = json.loads(settings.read_text())
    content.pop("chat_template", None)
    settings.write_text(json.dumps(content))
    data = settings.read_bytes()
    info["files"][settings.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "attnspan.json").write_text(json.dumps(info))
    assert main(["package", "triton", str(folder), str(tmp_path / "out")]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_what_fails_leaves_nothing(artefacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("attnspan.export.package.triton._write_chat", full)
    assert main(["package", "triton", str(artefacts["span"]), str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
