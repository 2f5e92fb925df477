"""`attnspan build`: engines of tiny models and the demo model by TensorRT-RTX, which needs no GPU, and what is refused before."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_model
import pytest
from tiny_models import export_rules

from attnspan.export.cli import main
from attnspan.export.pipeline import Options, export_model
from attnspan.planner.errors import UserError
from attnspan.planner.rules import HeadRule
from attnspan.plugins.trt_sparse_attn import build_memory, builder, engine, plugin, sidecar, tensorrt_api
from attnspan.plugins.trt_sparse_attn.engine import BuildOptions, build_engine, profiles
from attnspan.plugins.trt_sparse_attn.tensorrt_api import Gpu
from attnspan.runtime.artefact import Artefact

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RULES = [[HeadRule(beta=0.25), HeadRule(beta=0.75)], [HeadRule("dense"), HeadRule(alpha=64, beta=0.1)]]
H200 = Gpu("NVIDIA H200", "90", 140 << 30, 141 << 30, "13.0")
SM80 = BuildOptions(rtx=True, arch="80")


def export(folder: Path, target: str, dtype: str) -> Path:
    """A llama of two layers and heads of 64, which the kernels take."""
    return export_rules(folder, RULES, config={"head_dim": 64}, target=target, dtype=dtype, cache_dtype=None).folder


@pytest.fixture(scope="module", params=["tensorrt fp16", "tensorrt bf16", "portable bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target, dtype = request.param.split()
    return export(tmp_path_factory.mktemp(f"{target}-{dtype}"), target, dtype)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("bf16"), "tensorrt", "bf16")


@pytest.fixture
def copy(bf16: Path, tmp_path: Path) -> Path:
    """An artefact without an engine, to write into."""
    return Path(shutil.copytree(bf16, tmp_path / "artefact", ignore=shutil.ignore_patterns("engine")))


def test_an_engine_is_built(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, for a GPU that is not here: caches in place, dynamic batch, tokens and logits."""
    assert main(["build", str(folder), "--rtx", "--arch", "80", "--max-batch", "3", "--max-logits", "2"]) == 0
    printed = capsys.readouterr().out
    artefact, api = Artefact.load(folder), tensorrt_api.load(rtx=True)
    path = sidecar.find(folder, api, "80")
    assert f"{path}: " in printed
    longest = 512 if artefact.target == "tensorrt" else 256
    assert f"prefill of up to 1 rows x {longest} tokens; decode of up to 3 rows x 1 tokens" in printed
    assert {file.name for file in path.parent.iterdir()} == {path.name, path.with_suffix(".json").name}
    described = sidecar.check(path, artefact, flavour=api.flavour, version=api.version, sm="80", hashes=True)
    assert described.plugin == ("python" if artefact.target == "tensorrt" else None)
    assert described.profiles[0]["logits_to_keep"] == [1, 1, 2]
    assert described.gpu is None or described.gpu == getattr(tensorrt_api.gpu(), "name", None)


def test_what_tensorrt_makes_of_the_graph(folder: Path) -> None:
    """Inputs and outputs of the network are the artefact's, and only target tensorrt has plugins, one a layer."""
    api, artefact = tensorrt_api.load(rtx=True), Artefact.load(folder)
    plugin.register(api)
    trt, logger = api.trt, api.logger(lambda *_: None)
    network = trt.Builder(logger).create_network(api.network_flags())
    assert trt.OnnxParser(network, logger).parse_from_file(str(folder / "model.onnx"))
    inputs = {x.name: (api.data_type(x.dtype), tuple(x.shape)) for x in map(network.get_input, range(network.num_inputs))}
    outputs = {x.name: (api.data_type(x.dtype), tuple(x.shape)) for x in map(network.get_output, range(network.num_outputs))}
    assert inputs.pop("input_ids") == ("int64", (-1, -1))
    assert inputs.pop("length") == ("int32", (-1,))
    assert inputs.pop("span")[1][1:] == (-1, 2)
    assert inputs.pop("logits_to_keep") == ("int64", (1,))
    assert outputs.pop("logits") == ("float32", (-1, -1, 300))
    caches = {f"{kind}.{part.name}": (artefact.cache_dtype, (-1, *part.cache_shape(64)))
              for part in artefact.parts for kind in ("key", "value")}  # fmt: skip
    assert inputs == {f"past_{name}": cache for name, cache in caches.items()}
    assert outputs == {f"present_{name}": cache for name, cache in caches.items()}
    layers = [network.get_layer(i).type for i in range(network.num_layers)]
    assert layers.count(trt.LayerType.PLUGIN_V3) == (2 if artefact.target == "tensorrt" else 0)
    assert layers.count(trt.LayerType.KV_CACHE_UPDATE) == (0 if artefact.target == "tensorrt" else len(caches))


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_demo_model(tmp_path: Path, dtype: str) -> None:
    """Its first two layers: the whole model takes 5 times as long."""
    options = Options(model=str(demo_model.gguf()), out=tmp_path / "demo", target="tensorrt", dtype=dtype, cache_dtype=None,
                      n_max=2048, num_layers=2)  # fmt: skip
    path = build_engine(export_model(options).folder, dataclasses.replace(SM80, max_batch=2))
    assert path.stat().st_size > 70e6
    assert sidecar.Sidecar.load(path).dtype == {"fp16": "float16", "bf16": "bfloat16"}[dtype]


def test_without_a_gpu_an_architecture_is_asked_for(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "gpu", lambda: None)
    with pytest.raises(UserError, match=r"builds for the GPU at hand, and PyTorch sees none; name the GPU by --arch"):
        build_engine(copy, BuildOptions(rtx=True))
    assert engine.why_not_here() == "PyTorch sees no NVIDIA GPU"
    assert not (copy / "engine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "90"}, r"--arch is 90: TensorRT-RTX .* builds for 75, 80, 86, 89, 120, 121"),
        ({"max_batch": 0}, "--max-batch is 0; must be from 1 to 65535"),
        ({"max_prompt_chunk": 513}, "--max-prompt-chunk is 513; .* allows 1 to 512"),
        ({"max_logits": 513}, "--max-logits is 513; must be from 1 to 512"),
        ({"max_prompt_chunk": 8, "max_logits": 9}, "--max-logits is 9; must be from 1 to 8"),
        ({"workspace": 0}, "--memory is 0 bytes"),
        ({"timing_cache": Path("/no/such/folder/cache")}, "--timing-cache is .*: /no/such/folder does not exist"),
        ({"library": Path("none.so")}, "the plugin library none.so does not exist; change --plugin"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_are_refused(copy: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_engine(copy, dataclasses.replace(SM80, **options))
    assert not (copy / "engine").exists()


def test_a_plugin_library_that_is_none(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libattnspan_trt.so"
    library.write_bytes(b"no ELF")
    with pytest.raises(UserError, match=r"plugin library .* does not load"):
        build_engine(copy, dataclasses.replace(SM80, library=library))
    monkeypatch.setenv("ATTNSPAN_TRT_PLUGIN", str(tmp_path / "other.so"))
    with pytest.raises(UserError, match=r"other\.so does not exist"):
        build_engine(copy, SM80)


def test_a_library_of_another_version(copy: Path, tmp_path: Path) -> None:
    """One that loads, but has none of our plugins."""
    registry = SimpleNamespace(load_library=lambda _: object(), all_creators=[])
    api = tensorrt_api.Api(SimpleNamespace(get_plugin_registry=lambda: registry), "tensorrt_rtx", "1.7")
    library = tmp_path / "libattnspan_trt.so"
    library.touch()
    with pytest.raises(UserError, match="has no plugin SpanAttention, LshHash, MergeAttention in namespace attnspan"):
        engine._plugins(api, Artefact.load(copy), library)


def test_an_artefact_of_another_target(tmp_path: Path) -> None:
    folder = export_rules(tmp_path, RULES).folder
    with pytest.raises(UserError, match="is for target cpu: engines are built of tensorrt or portable; export it again"):
        build_engine(folder, SM80)


def test_a_damaged_model_is_noticed_before_tensorrt_reads_it(copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"attnspan\.json says"):
        build_engine(copy, SM80)


def test_heads_that_no_kernel_takes(tmp_path: Path) -> None:
    folder = export_rules(tmp_path, RULES, target="tensorrt", dtype="fp16", cache_dtype=None).folder
    with pytest.raises(UserError, match=r"node layers\.0\.attention: SpanAttention: a head has 16 elements: must be 64, 80"):
        build_engine(folder, SM80)
    assert not (folder / "engine").exists()


class TestMemory:
    """The estimate, and what is refused with it."""

    def test_it_is_what_the_artefact_says(self, bf16: Path) -> None:
        artefact = Artefact.load(bf16)
        need = build_memory.estimate(artefact, batch=4, chunk=512, kept=1, streaming=False)
        weights = (bf16 / "model.onnx").stat().st_size + (bf16 / "model.onnx.data").stat().st_size
        assert (need.weights, need.caches) == (weights, artefact.kv_bytes(4))
        assert need.gpu > need.weights + need.caches + need.activations > weights + 512 * 64 * 2
        streamed = build_memory.estimate(artefact, batch=4, chunk=512, kept=1, streaming=True)
        assert streamed.weights < weights / 2

    @pytest.mark.parametrize(
        ("free", "message"),
        [
            ("host", "a build takes 1.08 GB of memory: 0.00 GB are available"),
            ("disk", "the engine takes 0.07 GB: 0.00 GB are free where"),
            ("gpu", r"on NVIDIA H200 \(weights .*, caches of 1 rows .*, activations .*\): 0.00 GB of .* are free; lower --max-b"),
        ],
    )
    def test_too_little(self, copy: Path, monkeypatch: pytest.MonkeyPatch, free: str, message: str) -> None:
        if free == "host":
            monkeypatch.setattr(build_memory, "available_bytes", lambda: 4096)
        if free == "disk":
            monkeypatch.setattr(build_memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
        gpu = dataclasses.replace(H200, sm="80", free=4096 if free == "gpu" else H200.free)
        monkeypatch.setattr(tensorrt_api, "gpu", lambda: gpu)
        with pytest.raises(UserError, match=message):
            build_engine(copy, SM80)

    def test_a_gpu_that_the_engine_is_not_for_does_not_matter(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt_api, "gpu", lambda: dataclasses.replace(H200, free=0))
        described = sidecar.Sidecar.load(build_engine(copy, SM80))
        assert (described.gpu, described.sm) == (None, "80")


def test_an_interrupt_stops_the_build_and_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds in a thread; the interrupt comes to the one that waits for it, which lets the build end first."""
    real, returned = builder._run, []

    def run(*arguments: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        tensorrt = arguments[0]
        watched = SimpleNamespace(build_serialized_network=lambda *x: returned.append(tensorrt.build_serialized_network(*x)))
        return real(watched, *arguments[1:])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    monkeypatch.setattr(builder, "_run", run)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engine(copy, SM80)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert returned == [None]
    assert "build" not in [thread.name for thread in threading.enumerate()]
    assert not (copy / "engine").exists()


def test_an_engine_that_cannot_be_written_leaves_the_old_one(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "engine" / sidecar.name_of(tensorrt_api.load(rtx=True), "80")
    path.parent.mkdir()
    path.write_bytes(b"old")
    built = builder.Built(memoryview(b"new"), b"")
    monkeypatch.setattr(engine, "serialize", lambda *_, **__: built)
    monkeypatch.setattr("attnspan.planner.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        build_engine(copy, SM80)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_what_the_plugin_in_cpp_says_is_told() -> None:
    """It speaks to TensorRT's logger; what TensorRT makes of it says less."""
    api = tensorrt_api.load(rtx=True)
    plugin.refusals.clear()
    error = builder._refusal(api, "model.onnx cannot be parsed", ["attnspan: node x: query is float32", "Error 3"], ["Error 4"])
    assert str(error) == f"model.onnx cannot be parsed: node x: query is float32 ({api.product})"
    error = builder._refusal(api, "no engine", [], ["Error 4", "Error  4\n", "Error 5"])
    assert str(error) == f"no engine: Error 4; Error 5 ({api.product})"
    assert "no reason was given" in str(builder._refusal(api, "no engine", [], []))


def test_timings_of_another_tensorrt_are_left_out() -> None:
    """Two configurations: one that takes what it is given, one that refuses the file's timings."""
    config = SimpleNamespace(create_timing_cache=lambda data: data, get_timing_cache=lambda: taken[-1])
    taken: list[bytes] = []

    def take(cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        taken.append(cache)
        return cache != b"others"

    config.set_timing_cache = take
    assert builder._timing_cache(config, b"mine") == b"mine"
    assert builder._timing_cache(config, b"others") == b""


def test_timings_are_kept(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX has no timings: a builder that returns some, and is given those of the last build."""
    given: list[bytes] = []

    def serialize(*_: Any, timings: bytes, **__: Any) -> builder.Built:
        given.append(timings)
        return builder.Built(memoryview(b"engine"), b"timings %d" % len(given))

    monkeypatch.setattr(engine, "serialize", serialize)
    build_engine(copy, SM80)
    build_engine(copy, SM80)
    assert given == [b"", b"timings 1"]
    assert (copy / "engine" / "timing.cache").read_bytes() == b"timings 2"


def test_profiles_cover_prompts_row_by_row_and_steps_of_all_rows(bf16: Path) -> None:
    prefill, decode = profiles(Artefact.load(bf16), BuildOptions(max_batch=8, max_prompt_chunk=100, max_logits=100))
    assert (prefill.batch, prefill.sequence, prefill.logits_to_keep) == ((1, 1, 1), (1, 100, 100), (1, 1, 100))
    assert (decode.batch, decode.sequence, decode.logits_to_keep) == ((1, 8, 8), (1, 1, 1), (1, 1, 1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["build"], "required: DIR"),
        (["build", "none"], "none does not exist: give an artefact folder"),
        (["build", "none", "--max-bach", "3"], "unknown argument '--max-bach', did you mean '--max-batch'?"),
        (["build", "none", "--memory", "0"], "--memory is 0.0 GB; must be more than 0"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_description_is_json_for_programs_in_other_languages(bf16: Path) -> None:
    path = build_engine(bf16, SM80)
    info = json.loads(path.with_suffix(".json").read_text())
    assert (info["flavour"], info["sm"], info["engine"]) == ("tensorrt_rtx", "80", path.name)
    assert info["version"] == tensorrt_api.load(rtx=True).version
