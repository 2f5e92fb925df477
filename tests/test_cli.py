"""The command line: exit statuses, one-line errors, hints, clean ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

from attnspan.export import pipeline
from attnspan.export.cli import main
from attnspan.export.verify import VerificationError

RUN = "from attnspan.export.cli import main; raise SystemExit(main())"


def error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a user's mistake prints."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: VERB"),
        (["exprot"], "unknown verb 'exprot', did you mean 'export'?"),
        (["qqq"], "unknown verb 'qqq'; see attnspan --help"),
        (
            ["export", "m", "o", "--denisty", "1"],
            "unknown argument '--denisty', did you mean '--density'?; see attnspan export --help",
        ),
        (["export", "m", "o", "--over"], "unknown argument '--over'"),
        (["inspect", "p.json", "-o", "x"], "unknown argument '-o'; see attnspan inspect --help"),
        (["plan", "lsh", "--seeds", "1", "-o", "x"], "unknown argument '--seeds', did you mean '--seed'?"),
        (["export", "m"], "required: OUT"),
        (["export", "m", "o", "--density", "half"], "invalid float value: 'half'"),
        (["export", "m", "o", "--target", "gpu"], "--target is 'gpu'; must be one of cpu, tensorrt, portable"),
        (["export", "m", "o", "--dtype", "fp16"], "target cpu computes in fp32"),
        (["export", "m", "o"], "m does not exist; MODEL must be"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(argv, capsys)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--version"], "attnspan 0."), (["--help"], "export"), (["export", "--help"], "--density")):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 0
        assert expected in capsys.readouterr().out


def test_export(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(model), str(out), "--n-max", "1024", "--density", "0.25", "--no-verify"]) == 0
    printed = capsys.readouterr().out
    for word in ("model.onnx.data", "KV cache of one text of 1024 tokens (bf16): 64.0 KiB, dense 256 KiB", "write files"):
        assert word in printed
    assert (out / "libattnspan_ort.so").is_file()
    assert "add --overwrite" in error(["export", str(model), str(out), "--no-verify"], capsys)


def test_root_script(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "export.py"
    done = subprocess.run([sys.executable, script, "none", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: none does not exist")


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (VerificationError("it differs"), 1, "error: it differs\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: the disk is full: x\n"),
        (PermissionError(errno.EACCES, "Permission denied", "y"), 1, "error: Permission denied: y\n"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_failures(
    failure: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise failure

    monkeypatch.setattr(pipeline, "export_model", fail)
    assert main(["export", "m", "o"]) == status
    assert capsys.readouterr().err == message


def test_termination_leaves_nothing(model: Path, tmp_path: Path) -> None:
    kill = (
        "import os, signal; from attnspan.export import artefact; "
        "artefact.write_companions = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
    )
    argv = ["export", str(model), str(tmp_path / "out"), "--no-verify"]
    done = subprocess.run([sys.executable, "-c", kill + RUN, *argv], capture_output=True, check=False)
    assert done.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_nobody_reads(tmp_path: Path) -> None:
    """As in `attnspan inspect plan.json | head -0`."""
    plan = str(tmp_path / "plan.json")
    assert main(["plan", "uniform", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--density", "0.5", "-o", plan]) == 0
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-c", RUN, "inspect", plan, "--no-png"]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_is_quick() -> None:
    """No heavy library is loaded to print the help."""
    script = "import sys; from attnspan.export.cli import parser; parser(); print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "scipy"}
