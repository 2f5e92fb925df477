"""samples/cpp: built by the commands of its README; the same tokens and text as the Python session; mistakes in one line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from demo_model import gguf
from sampled_artefacts import INDEXES, op_library
from tiny_models import export_rules, export_tiny

from attnspan.cpu_runtime import Session
from attnspan.export.pipeline import Options, export_model
from attnspan.planner.rules import HeadRule
from attnspan.runtime.artefact import Artefact

ROOT = Path(__file__).parents[1]
README = (ROOT / "samples" / "cpp" / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()]
BUILD = ROOT / "build" / "samples"


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder of the programs, built by the README's first two commands, without optimisation and with checks."""
    options = {"CMAKE_BUILD_TYPE": "Debug", "CMAKE_CXX_FLAGS": "-Werror -D_GLIBCXX_ASSERTIONS", "ATTNSPAN_SAMPLES_TESTS": "ON",
               "Python3_EXECUTABLE": sys.executable, "TENSORRT_ROOT": os.environ.get("TENSORRT_ROOT", "")}  # fmt: skip
    headers = sorted((ROOT / "build").glob("*/cpu_runtime/**/onnxruntime_cxx_api.h"))
    if headers:  # those that the op library was built with; else they are fetched again
        options["ONNXRUNTIME_INCLUDE_DIR"] = str(headers[0].parent)
    for words, more in zip(COMMANDS, ([f"-D{key}={value}" for key, value in options.items()], []), strict=False):
        assert words[0] == "cmake"
        done = subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD


def library() -> Path:
    found = op_library()
    return found if found is not None else pytest.skip("no op library")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KV heads of unequal capacity, for 2048 tokens, with the op library inside."""
    return export_tiny(tmp_path_factory.mktemp("cpp"), n_max=2048, library=library(), cache_dtype="bf16").folder


def generate(folder: Path, *words: object, status: int = 0) -> tuple[str, str]:
    """Output and errors of ort_generate."""
    program = BUILD / "ort_generate"
    if not program.is_file():
        pytest.skip("ort_generate was not built: no libonnxruntime.so")
    # Bytes of a random model are not always UTF-8.
    done = subprocess.run([program, folder, *map(str, words)], capture_output=True, check=False)
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(errors="replace"), done.stderr.decode()


def ids(output: str) -> list[list[int]]:
    return [[int(token) for token in line.split(",")] for line in output.splitlines()]


def prompts(*counts: int) -> list[list[int]]:
    return [[(7 * i + row) % 256 for i in range(count)] for row, count in enumerate(counts)]


def given(rows: list[list[int]]) -> list[str]:
    return [word for row in rows for word in ("--ids", ",".join(map(str, row)))]


def test_what_the_programs_share(build: Path, tmp_path: Path) -> None:
    done = subprocess.run([build / "samples_test", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{3,} checks, 0 failures\n", done.stdout)


def test_ids_are_those_of_python(build: Path, artefact: Path) -> None:
    """A prompt of three chunks, past the rings, one of a token, one between: one batch."""
    rows = prompts(1100, 1, 70)
    session = Session(artefact, batch=3, threads=1, library=library())
    want = [result.tokens for result in session.generate(rows, 24)]
    out, err = generate(artefact, *given(rows), "--max-new-tokens", 24, "--threads", 1)
    assert ids(out) == want
    kv = session.kv_bytes / 1e6
    assert re.fullmatch(rf"\[3 rows, all prompts read after \d+\.\d\d s, then \d+\.\d tokens/s, KV {kv:.1f} MB\]\n", err)


def test_heads_that_sample(build: Path, tmp_path: Path) -> None:
    """Their states are bound, and no prompt ends in a chunk of one token: 513 are cut as Python cuts them."""
    sampled = HeadRule("lsh", lsh=INDEXES["signature"])
    rules = [[sampled, HeadRule("span", 0, 0.5)], [sampled, sampled]]
    folder = export_rules(tmp_path, rules, n_max=1024, library=library()).folder
    rows = prompts(513, 700)
    want = [result.tokens for result in Session(folder, batch=2, threads=1, library=library()).generate(rows, 16)]
    assert ids(generate(folder, *given(rows), "--max-new-tokens", 16, "--threads", 1)[0]) == want


def test_target_portable_needs_no_library(build: Path, tmp_path: Path) -> None:
    folder = export_tiny(tmp_path, n_max=1024, target="portable").folder
    rows = prompts(700, 3)
    want = [result.tokens for result in Session(folder, batch=2, threads=1).generate(rows, 12)]
    assert ids(generate(folder, *given(rows), "--max-new-tokens", 12, "--threads", 1)[0]) == want


def test_readme_commands(build: Path, artefact: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="no tokenizer library: onnxruntime-genai is not installed")
    ran = 0
    for program, folder, *words in COMMANDS[2:]:
        assert (program, folder) == ("build/samples/ort_generate", "OUT")
        assert generate(artefact, *words)[0].strip()
        ran += 1
    assert ran == 3


def test_sampling_repeats_with_a_seed(build: Path, artefact: Path) -> None:
    row = given(prompts(20))
    greedy = generate(artefact, *row, "--max-new-tokens", 10)[0]
    answers = [generate(artefact, *row, "--max-new-tokens", 10, "--temperature", 3, "--seed", seed)[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert generate(artefact, *row, "--max-new-tokens", 10, "--temperature", 3, "--top-k", 1)[0] == greedy


@pytest.mark.model
def test_text_is_that_of_python(build: Path, tmp_path: Path) -> None:
    """On the tokenizer of the demo model, cut to two layers: words, spaces, digits, accents, other scripts, line ends."""
    pytest.importorskip("onnxruntime_genai", reason="no tokenizer library: onnxruntime-genai is not installed")
    options = Options(model=str(gguf()), out=tmp_path / "demo", num_layers=2, n_max=1024, library=library())
    folder = export_model(options).folder
    texts = ["Why is the sky blue?", "  two  spaces\n\n\tand 12345 digits", "naïve café: 東京 и 😀😀", "don't <|im_end|> stop"]
    session = Session(folder, batch=len(texts), threads=1, library=library())
    want = session.generate(texts, 24)
    words = [word for text in texts for word in ("-p", text)]
    out = generate(folder, *words, "--max-new-tokens", 24, "--threads", 1)[0]
    assert out == "".join(f"[{row}] {result.text}\n" for row, result in enumerate(want))
    (tmp_path / "prompt").write_text(texts[0])
    alone = generate(folder, "--prompt-file", tmp_path / "prompt", "--max-new-tokens", 24, "--threads", 1)[0]
    assert alone == f"{want[0].text}\n"


def test_mistakes_are_told_in_one_line(build: Path, artefact: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path, ["--ids", "1"], "is not an artefact"),
        (artefact, [], "give prompts"),
        (artefact, ["--ids", "1", "--top-p", "0"], "--top-p"),
        (artefact, ["--ids", "300"], "token id 300 is not in the vocabulary: must be from 0 to 299"),
        (artefact, ["--ids", "1", "--max-new-tokens", "2048"], "n_max = 2048"),
        (artefact, ["--ids", "1", "--threads", "0"], "--threads is 0"),
        (artefact, ["--ids", "1", "--library", "none.so"], "none.so"),
        (artefact, ["-p", "x", "--tokenizer-library", "none.so"], "none.so does not exist"),
        (artefact, ["-p", "x", "--tokenizer-library", str(library())], "has no OgaCreateTokenizerFromPath"),
    ]
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in artefact.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    info = (broken / "attnspan.json").read_text()
    (broken / "attnspan.json").write_text(info.replace('"target": "cpu"', '"target": "tensorrt"'))
    cases.append((broken, ["--ids", "1"], "was exported for target tensorrt: this program takes cpu and portable"))
    for folder, words, message in cases:
        out, err = generate(folder, *words, status=2)
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert message in err
    (broken / "attnspan.json").write_text(info)
    size = Artefact.load(broken).info["files"]["model.onnx"]["bytes"]
    (broken / "model.onnx").write_bytes(b"x" * size)
    assert "cannot load" in generate(broken, "--ids", "1", status=2)[1]
    (broken / "model.onnx").write_bytes(b"x" * (size - 1))
    assert f"has {size - 1} bytes, attnspan.json says {size}" in generate(broken, "--ids", "1", status=2)[1]


@pytest.mark.skipif(not os.environ.get("TENSORRT_ROOT"), reason="no TensorRT headers: TENSORRT_ROOT is not set")
def test_trt_generate_compiles(build: Path) -> None:
    """Without warnings; it is linked where libnvinfer.so is, too."""
    assert list(build.glob("CMakeFiles/trt_generate_objects.dir/**/trt_model.cc.o"))
