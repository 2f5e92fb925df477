"""`attnspan export`: --dry-run, --config and --save-config, and what is printed at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_graphs import Form, write_foreign
from tiny_models import export_tiny, save_tiny_model

from attnspan.export import artefact, writer
from attnspan.export.cli import main, parse
from attnspan.export.pipeline import Options, export_model, prepare
from attnspan.export.report import summary
from attnspan.export.verify import FILE, GENERATED, text
from attnspan.planner.cost import format_bytes
from attnspan.runtime.artefact import Artefact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cpu", {}),
        ("int4", {"weights": "int4"}),
        ("portable", {"target": "portable", "cache_dtype": None}),
    ],
)
def test_sizes_are_those_that_are_written(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, every file."""
    done = export_tiny(tmp_path, "qwen2", **options)
    monkeypatch.setattr(writer, "_blocks", lambda _: pytest.fail("a weight was read"))
    asked = {"model": str(tmp_path / "model"), "plan": tmp_path / "tiny-plan.json", "cache_dtype": "fp32"} | options
    planned = prepare(Options(**asked, out=tmp_path / "other"), dry=True).files
    assert planned == {x.name: x.stat().st_size for x in done.folder.iterdir()}
    assert not (tmp_path / "other").exists()


def test_sixteen_bits_are_close(tmp_path: Path) -> None:
    done = export_tiny(tmp_path, target="tensorrt", cache_dtype=None)
    asked = Options(str(tmp_path / "model"), tmp_path / "other", target="tensorrt", plan=tmp_path / "tiny-plan.json")
    planned = prepare(asked, dry=True).files
    written = {x.name: x.stat().st_size for x in done.folder.iterdir()}
    assert planned.pop("model.onnx") == pytest.approx(written.pop("model.onnx"), rel=0.3)
    assert planned == written


def dry_run(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What it prints; that it neither writes nor opens a file of weights for reading."""
    monkeypatch.setattr(artefact, "write_model", lambda *_: pytest.fail("weights were written"))
    before = sorted(folder.rglob("*"))
    assert main(["export", *argv, str(folder / "out"), "--dry-run"]) == 0
    assert sorted(folder.rglob("*")) == before
    return capsys.readouterr().out


def test_dry_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [str(model), "--n-max", "1024", "--cache-dtype", "int8", "--weights", "int8"]
    printed = dry_run(argv, tmp_path, capsys, monkeypatch)
    for line in (
        "tiny: 2 layers, 4 heads, 2 KV heads of 16; for cpu, up to 1024 tokens, density 0.5",
        "computes in fp32, weights in int8, KV cache in int8",
        "measure the scales of the int8 cache",
        f"verify against PyTorch: texts of up to {1024 - GENERATED} tokens, then 32 generated",
        "KV cache of one text of 1024 tokens (int8): 64.0 KiB, dense 128 KiB",
        "to export",
        "to verify",
        "to run one text",
        "are free",
    ):
        assert line in printed
    listed = {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}
    assert listed >= {"model.onnx", "model.onnx.data", "plan.json", "tokenizer.json", "attnspan.json", "libattnspan_ort.so"}


def test_dry_run_of_a_traced_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would need the weights: its size is left open, the model is not loaded."""
    model = save_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}))
    monkeypatch.setattr("attnspan.export.frontends.choose._load", lambda *_: pytest.fail("weights were read"))
    printed = dry_run([str(model), "--n-max", "512", "--no-verify"], tmp_path, capsys, monkeypatch)
    assert "trace it (left out here: it reads the weights)" in printed
    assert "  model.onnx                        -" in printed
    assert "to verify" not in printed


def test_dry_run_of_an_onnx_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_foreign(tmp_path / "foreign", model, Form("genai"))
    printed = dry_run([str(file)], tmp_path, capsys, monkeypatch)
    assert "verify against the ONNX file itself" in printed


def test_dry_run_refuses_what_the_run_would(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["export", str(model), str(tmp_path / "out"), "--dry-run"]) == 2
    assert "exists; allowed is a new folder, or add --overwrite" in capsys.readouterr().err


OPTIONS = {"n-max": 1024, "density": 1, "cache-dtype": "fp32", "no-verify": True, "overwrite": False}


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json"])
def test_config(name: str, model: Path, tmp_path: Path) -> None:
    """The file's options count, those of the command line win, also flags; what is saved gives the same again."""
    file, again = tmp_path / name, tmp_path / f"again-{name}"
    lines = "# ours\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in OPTIONS.items())
    file.write_text(json.dumps(OPTIONS) if name.endswith("json") else lines)
    argv = ["export", str(model), str(tmp_path / "out"), "--config", str(file)]
    assert main([*argv, "--n-max", "512", "--overwrite", "--save-config", str(again)]) == 0
    info = Artefact.load(tmp_path / "out").info
    assert (info["n_max"], info["cache_dtype"], "verify" in info) == (512, "float32", False)
    assert main([*argv[:-1], str(again)]) == 0  # it says overwrite
    assert Artefact.load(tmp_path / "out").n_max == 512
    if name.endswith("json"):
        assert json.loads(again.read_text()) == OPTIONS | {"n-max": 512, "overwrite": True}


def test_flags_of_a_file_can_be_unset(model: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("verify: false\nn-max: 512\nverify-tokens: 64\n")
    argv = ["export", str(model), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml"), "--verify"]
    assert main(argv) == 0
    assert max(row["prompt"] for row in Artefact.load(tmp_path / "out").info["verify"]["rows"]) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", "denisty: 0.5", "c.yaml has the unknown key 'denisty': did you mean 'density'?"),
        ("c.yaml", "n_max: 5", "did you mean 'n-max'?"),
        ("c.json", '{"config": "other.yaml"}', "has the unknown key 'config'"),
        ("c.yaml", "n-max: 1024.5", "n-max is 1024.5; must be an integer"),
        ("c.yaml", "n-max: true", "n-max is True; must be an integer"),
        ("c.yaml", "density: half", "density is 'half'; must be a number"),
        ("c.yaml", "overwrite: 1", "overwrite is 1; must be true or false"),
        ("c.yaml", "plan:", "plan is None; must be text"),
        ("c.yaml", "verify: true\nno-verify: true", "no-verify is an option that another key has set"),
        ("c.yaml", "density: 1\ndensity: 0.5", "key 'density' appears twice"),
        ("c.json", '{"density": 1, "density": 0.5}', "key 'density' appears twice"),
        ("c.yaml", "density: [", "c.yaml is not YAML: "),
        ("c.json", "density: 1", "c.json is not JSON"),
        ("c.yaml", "- density", "must be options, each as `name: value`"),
        ("c.yaml", "", "must be options"),
        ("c.toml", "density = 1", "a config file must be named .yaml, .yml or .json"),
        ("c.yaml", None, "No such file or directory"),
        ("c.yaml", "target: gpu", "--target is 'gpu'; must be one of cpu"),
    ],
)
def test_bad_config(name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["export", "m", str(tmp_path / "out"), "--config", str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert message in printed


@pytest.mark.parametrize(("name", "message"), [("no/c.yaml", "must be a file in a writable folder"), ("c.txt", "must be named")])
def test_save_config_is_checked_first(
    name: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(model), str(tmp_path / "out"), "--save-config", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_not_given_can_be_told() -> None:
    """Every option without a value is absent, so that a file can give it."""
    assert set(vars(parse(["export", "m", "o"]))) == {"verb", "model", "out", "run"}


def test_summary(model: Path, tmp_path: Path) -> None:
    """Every file of the folder, later ones too, with its size; seconds and memory of each stage and of all."""
    done = export_model(Options(str(model), tmp_path / "out", n_max=512))
    (tmp_path / "out" / "engine").mkdir()
    (tmp_path / "out" / "engine" / "some.engine").write_bytes(bytes(5000))
    lines = summary(done).splitlines()
    for file in (x for x in (tmp_path / "out").rglob("*") if x.is_file()):
        name, size = str(file.relative_to(tmp_path / "out")), format_bytes(file.stat().st_size)
        assert any(line.split() == [name, *size.split()] for line in lines)
    assert [line.split()[0] for line in lines[-4:]] == ["stage", "build", "write", "all"]
    assert lines[-1].split()[-1] in ("MiB", "GiB")


def test_what_verification_compared_with() -> None:
    row = {"prompt": 5, "generated": 3, "compared": 8, "max_diff": 0.0, "p99_diff": 0.0, "mean_diff": 0.0, "max_logit": 1.0}
    row |= {"exact_tokens": 3, "same_tokens": 3, "wrapped": 0}
    report = {"rows": [row]}
    assert text(report).startswith("verified against PyTorch (")  # of artefacts that do not say
    of_file = text(report | {"against": FILE})
    assert of_file.startswith("verified against the ONNX file itself in ONNX Runtime (")
    assert "a larger --verify-tokens" in text(report)
    assert "a larger --verify-tokens" not in of_file
