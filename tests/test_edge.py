"""samples/edge: the arithmetic; chats of a tiny model under two caps, and their end; the README on the real model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from edge import fit
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from attnspan.planner.errors import UserError
from attnspan.planner.plan import ModelShape, Plan

ROOT = Path(__file__).parents[1]
EDGE = ROOT / "samples" / "edge" / "edge.py"
README = (EDGE.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()]
CALIBRATED = Plan.load(ROOT / "samples" / "data" / "smollm2_135m_plan.json")
LIMIT = 8192
WIDE = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": LIMIT}
"""A tiny model whose caches are not: 4 KB a token."""


@given(
    cap=st.integers(10**8, 2 * 10**9),
    weights=st.integers(10**6, 10**9),
    limit=st.integers(8, 4000).map(lambda n: 64 * n + 37),
    layers=st.integers(1, 30),
    calibrated=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_chosen_fits_and_nothing_longer_does(cap: int, weights: int, limit: int, layers: int, calibrated: bool) -> None:
    model = fit.Model(weights, 4 * 10**6, 2048, 8192, 128_000)
    shape = CALIBRATED.model if calibrated else ModelShape("m", layers, 32, 8, 128)
    given_plan = CALIBRATED if calibrated else None
    least = fit._sparsest(shape, given_plan, fit.LEAST)
    try:
        plan = fit.choose(cap, model, shape, limit, given_plan)
    except UserError as error:
        assert model.need(least).total > cap
        wanted = re.search(r"give --memory (\d+)MB", str(error))
        assert wanted is not None
        assert fit.choose(int(wanted[1]) * 10**6, model, shape, limit, given_plan).n_max >= fit.LEAST
        assert int(wanted[1]) * 10**6 - model.need(least).total <= 10**6
        return
    assert model.need(plan).total <= cap
    if plan.n_max < limit:
        assert plan.n_max % fit.STEP == 0
        longer = fit._sparsest(shape, given_plan, min(plan.n_max + fit.STEP, limit))
        assert model.need(longer).total > cap
        assert plan.density() == fit._sparsest(shape, given_plan, plan.n_max).density()
    else:
        denser = [p for p in fit._ladder(shape, given_plan, limit) if p.density() > plan.density()]
        assert all(model.need(p).total > cap for p in denser)


@pytest.mark.parametrize(
    ("text", "size"), [("350MB", 350_000_000), ("1.5GB", 1_500_000_000), ("1GiB", 2**30), ("512 mib", 2**29), ("2G", 2 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert fit.read_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0MB", "1.5.2GB", "10TB", "MB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="must be a size such as 350MB"):
        fit.read_size(text)


def run(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, EDGE, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@contextmanager
def chat(folder: Path, cap: str, *options: object) -> Iterator[subprocess.Popen[str]]:
    """The chat as a process whose memory can be looked at."""
    words = [sys.executable, EDGE, "chat", folder, "--memory", cap, *map(str, options)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def say(process: subprocess.Popen[str], text: str) -> str:
    """Send a message; the line of figures after the answer, or the last line before the process ends."""
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()
    lines = [""]
    for line in process.stderr:
        lines.append(line)
        if "peak RSS" in line:
            break
    return lines[-1]


def peak(process: subprocess.Popen[str]) -> int:
    """Largest resident set of a process so far, by the system, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(re.findall(r"^VmHWM:\s+(\d+)", status, re.MULTILINE)[0]) * 1024


def check_cap(folder: Path, cap: int, texts: Sequence[str], *options: object) -> int:
    """Converse through `texts`, the last of which ends the conversation; the peak, which was never above the cap."""
    with chat(folder, f"{cap / 1e6}MB", *options) as process:
        highest = 0
        for text in texts[:-1]:
            figures = say(process, text)
            assert "peak RSS" in figures
            highest = peak(process)
            assert highest <= cap
            (said,) = re.findall(r"peak RSS (\d+) MB", figures)
            assert abs(int(said) - highest / 1e6) < 5
        assert "it ends here]" in say(process, texts[-1])
        assert process.wait(60) == 0
    return highest


def needed(folder: Path) -> int:
    """What the chat says that it takes, in bytes."""
    message = run("chat", folder, "--memory", "1MB", status=2).stderr
    assert message.startswith("error: --memory is 1 MB: ")
    assert message.count("\n") == 1
    return int(re.findall(r"give --memory (\d+)MB", message)[0]) * 10**6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("edge") / "wide", **WIDE)


@pytest.fixture(scope="module")
def folders(model: Path) -> dict[str, Path]:
    """Two folders: one for a cap that all of the context fits under, densely; one for half of its caches."""
    made = {"dense": model.parent / "dense", "half": model.parent / "half"}
    run("prepare", made["dense"], "--memory", "1GB", "--model", model, "--no-verify")
    tight = needed(made["dense"]) - 16 * 10**6
    run("prepare", made["half"], "--memory", f"{tight}", "--model", model, "--no-verify")
    return made


@pytest.mark.parametrize("kind", ["dense", "half"])
def test_the_cap_is_kept_and_is_not_far(folders: dict[str, Path], kind: str) -> None:
    """A conversation that fills the caches; one message more ends it."""
    folder = folders[kind]
    info = json.loads((folder / "artefact" / "attnspan.json").read_text())
    assert (info["n_max"], info["cache_dtype"], info["weights"]) == (LIMIT, "int8", "int4")
    cap = needed(folder)
    highest = check_cap(folder, cap, ["Call me Ishmael.", "whale " * 1320, "sea " * 2000], "--max-new-tokens", 4, "--threads", 1)
    assert highest > 0.7 * cap  # a bound that is worth something


def test_half_takes_less(folders: dict[str, Path]) -> None:
    plans = {kind: Plan.load(folder / "artefact") for kind, folder in folders.items()}
    assert plans["dense"].density() == 1
    assert plans["half"].density() == pytest.approx(0.5, abs=0.02)
    assert needed(folders["dense"]) - needed(folders["half"]) == pytest.approx(16.8e6, abs=1.1e6)


def test_an_answer_ends_where_the_context_does(model: Path, tmp_path: Path) -> None:
    run("prepare", tmp_path / "short", "--memory", "1GB", "--model", model, "--context", 512, "--no-verify")
    with chat(tmp_path / "short", "1GB", "--max-new-tokens", 400) as process:
        figures = say(process, "x" * 400)
        held = re.findall(r"(\d+) of 512 tokens", figures)
        if held and int(held[0]) < 511:  # the model stopped by itself: say more until it is full
            assert "it ends here]" in say(process, "y" * 200)
        else:
            assert process.stderr is not None
            assert "full: the conversation ends here]" in process.stderr.readline()
        assert process.wait(60) == 0


def test_mistakes_are_told_in_one_line(folders: dict[str, Path], model: Path, tmp_path: Path) -> None:
    dense = folders["dense"]
    tight = needed(dense) - 16 * 10**6
    for words, message in [
        (["prepare", tmp_path / "no", "--memory", "90MB", "--model", model], "a chat of 512 tokens with wide takes"),
        (["prepare", tmp_path / "no", "--memory", "lots", "--model", model], "--memory is 'lots'; must be a size"),
        (["prepare", tmp_path / "no", "--memory", "1GB", "--model", model, "--context", 9000], "--context is 9000"),
        (["prepare", tmp_path / "no"], "required: --memory"),
        (["chat", dense, "--memory", str(tight)], "for 8192 tokens at density 1.00, takes"),
        (["chat", tmp_path, "--memory", "1GB"], "does not exist"),
        (["chat", dense, "--memory", "1GB", "--threads", 0], "--threads is 0"),
    ]:
        done = run(*words, status=2)
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "no").exists()


@pytest.mark.samples
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_readme_commands(tmp_path: Path) -> None:
    """On the real model, under the README's cap and under one that all fits: a chapter of a book, until the context ends."""
    import demo_model

    book = (ROOT / "samples" / "data" / "moby_dick_1.txt").read_text(encoding="utf-8").replace("\n", " ")
    assert [words[2] for words in COMMANDS] == ["prepare", "prepare", "chat"]
    for larger in ({}, {"350MB": "450MB"}):
        folder = tmp_path / ("large" if larger else "small")
        folder.mkdir()
        (folder / "edge").mkdir()
        (folder / "edge" / demo_model.gguf().name).symlink_to(demo_model.gguf())
        for words in COMMANDS[:2]:
            words = [larger.get(word, word) for word in words[1:]]
            done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, check=False)
            assert done.returncode == 0
        n_max = json.loads((folder / "edge" / "artefact" / "attnspan.json").read_text())["n_max"]
        cap = fit.read_size(larger.get("350MB", "350MB"))
        texts = [book[: 3 * n_max], *[book] * (1 + n_max // 2800)]
        started = time.monotonic()
        highest = check_until_end(folder / "edge", cap, texts)
        print(f"cap {cap / 1e6:.0f} MB, {n_max} tokens: peak {highest / 1e6:.0f} MB in {time.monotonic() - started:.0f} s")
        assert highest > 0.7 * cap


def check_until_end(folder: Path, cap: int, texts: Sequence[str]) -> int:
    """As `check_cap`, for a conversation that ends at one of `texts`."""
    with chat(folder, f"{cap / 1e6}MB", "--max-new-tokens", 24) as process:
        highest = 0
        for text in texts:
            line = say(process, text)
            if "ends here]" in line:
                assert process.wait(60) == 0
                return highest
            highest = peak(process)
            assert highest <= cap
    pytest.fail("the conversation did not end")
