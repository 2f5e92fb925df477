"""`attnspan run` and `attnspan bench generate`, as a user types them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from interrupts import heed
from tiny_models import export_tiny

from attnspan.export.cli import main

PROGRAM = [sys.executable, "-c", "from attnspan.export.cli import main; raise SystemExit(main())"]
SLOW = "--no-library"  # works whether or not the op library was built


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(export_tiny(tmp_path_factory.mktemp("run"), n_max=4096).folder)


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(artefact: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", artefact, "-p", "hello", "--max-new-tokens", "8", SLOW]) == 0
    first = capfd.readouterr()
    assert first.out.endswith("\n")
    assert first.err.count("\n") == 1
    for figure in ("first token after", "tokens/s", "KV 1.0 MB of 2.1 MB dense for 4096 tokens", "peak RSS"):
        assert figure in first.err
    assert main(["run", artefact, "-p", "hello", "--max-new-tokens", "8", SLOW, "--json"]) == 0
    second = capfd.readouterr()
    report = json.loads(second.out)
    assert second.err == ""
    assert report["text"] + "\n" == first.out
    assert report["new_tokens"] == len(report["tokens"]) <= 8
    assert report["kv_bytes"] < report["dense_kv_bytes"]
    # The template puts 3 special tokens and two roles around the prompt.
    assert report["prompt_tokens"] == len("user\nhello\nassistant\n") + 3


def test_raw_prompts_files_and_stdin_are_the_same_prompt(
    artefact: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("héllo", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("héllo"))
    answers = []
    for prompt in (["-p", "héllo"], ["--prompt-file", str(tmp_path / "prompt")], ["--prompt-file", "-"]):
        assert main(["run", artefact, *prompt, "--raw", "--max-new-tokens", "5", SLOW, "--json"]) == 0
        answers.append(json.loads(capfd.readouterr().out))
    assert answers[0]["prompt_tokens"] == 6
    assert answers[0]["tokens"] == answers[1]["tokens"] == answers[2]["tokens"]


def test_sampling_with_a_seed_repeats(artefact: str, capfd: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        sampling = ["--temperature", "2", "--top-p", "0.9", "--seed", seed]
        assert main(["run", artefact, "-p", "x", "--max-new-tokens", "12", SLOW, *sampling]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_chat_goes_on_in_the_same_cache(
    artefact: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nmore\n"))
    assert main(["run", artefact, "--chat", "--system", "be brief", "--max-new-tokens", "4", SLOW]) == 0
    figures = capfd.readouterr().err.splitlines()
    assert len(figures) == 2
    # A pending token, the end of the reply that was cut short, the new message; not the first message again.
    assert "prompt 26 tokens" in figures[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "--temperature", "-1"], "--temperature"),
        (["-p", "x", "--top-p", "2"], "--top-p"),
        (["-p", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["-p", "x", "--max-new-tokens", "5000"], "n_max = 4096"),
        (["-p", "x", "--threads", "0"], "--threads"),
        (["-p", "x" * 5000], "n_max = 4096"),
        (["-p", "", "--raw"], "no tokens"),
        ([], "no prompt"),
        (["--prompt-file", "nowhere"], "nowhere"),
        (["--chat", "--raw"], "--raw"),
        (["--chat", "--json"], "--json"),
        (["-p", "x", "--library", "none.so"], "none.so does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(
    artefact: str, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    library = [] if "--library" in arguments else [SLOW]
    assert main(["run", artefact, *arguments, *library]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_not_an_artefact(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "-p", "x"]) == 2
    assert "is not an artefact" in capfd.readouterr().err


def test_ctrl_c_ends_a_generation_with_130(artefact: str) -> None:
    arguments = ["run", artefact, "-p", "x", "--raw", "--max-new-tokens", "4000", "--temperature", "1", "--seed", "0", SLOW]
    process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)  # generating
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.decode() == "interrupted\n"
    assert out.endswith(b"\n")


def test_a_long_prompt_shows_a_bar_on_a_terminal_only(artefact: str) -> None:
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 90, 0, 0))
    arguments = [*PROGRAM, "run", artefact, "-p", "x" * 1000, "--max-new-tokens", "2", SLOW]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs)
    out, _ = process.communicate(timeout=60)
    os.close(theirs)
    shown = os.read(terminal, 100_000)
    os.close(terminal)
    assert b"reading the prompt" in shown
    assert b"reading" not in out
    quiet = subprocess.run(arguments, capture_output=True, check=True)
    assert quiet.stdout == out
    assert b"reading" not in quiet.stderr


def test_bench_generate(artefact: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    arguments = ["--prompt-tokens", "40", "--new-tokens", "5", "--repeat", "2", "--batch", "2", "--threads", "1"]
    assert main(["bench", "generate", artefact, artefact, *arguments, SLOW, "--json", str(file)]) == 0
    table = capfd.readouterr().out.splitlines()
    assert len(table) == 4
    assert "1.00x" in table[1]
    report = json.loads(file.read_text())
    assert report["bandwidth_gbs"] > 0
    assert report["settings"] == {"prompt_tokens": 40, "new_tokens": 5, "repeat": 2, "batch": 2, "threads": 1}
    assert len(report["results"]) == 2
    for result in report["results"]:
        assert len(result["tpot_seconds_all"]) == len(result["ttft_seconds_all"]) == 2
        assert result["tpot_seconds"] > 0
        # 42 tokens, 2 rows, 2 layers, 2 heads of 16, keys and values in fp32
        assert result["kv_bytes_read_per_step"] == 42 * 2 * 2 * 2 * 16 * 2 * 4
        assert 0 < result["bandwidth_share"] < 10
        assert result["peak_rss_bytes"] > 10e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "4090"], "n_max = 4096"),
        (["--new-tokens", "1"], "--new-tokens"),
        (["--repeat", "0"], "--repeat"),
        (["--json", "/nowhere/x.json"], "--json"),
        (["--json", "."], "it is a folder; must be the path of a file; change --json"),
    ],
)
def test_bench_refuses(artefact: str, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", artefact, *arguments]) == 2
    assert message in capfd.readouterr().err
