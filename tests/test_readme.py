"""The commands of README.md do what it says, on a tiny model: every line of its shell and Python blocks is run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Sizes that suit a tiny model; the commands are the README's.
SMALLER = {"4096": "64", "32768": "512", "8192": "1024", "8000": "900"}


FEWER = {
    "calibrate": ["--lengths", "2048", "--items", "2", "--held-out", "1"],
    "eval": ["--lengths", "1024", "--depths", "2", "--n", "1"],
}
"""Options added to the README's commands, so that they take seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", blocks("sh")[0], re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("readme")
    save_tiny_model(here / "MODEL")
    return here


def run(words: list[str], folder: Path) -> None:
    program = [str(Path(sys.executable).with_name("attnspan"))] if words[0] == "attnspan" else [sys.executable]
    rest = words[1:]
    if words[0] == "python":
        rest = [str(ROOT / rest[0]), *rest[1:]]
    done = subprocess.run([*program, *rest], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}\n{done.stderr}"


def test_commands(folder: Path) -> None:
    lines = [shlex.split(line, comments=True) for line in blocks("sh")[1].splitlines()]
    verbs = ["calibrate", "plan", "plan", "report", "eval", "inspect", "export.py", "run", "bench", "bench", "capture", "bench"]
    assert [words[1] for words in lines] == verbs
    run(["attnspan", "export", "MODEL", "DENSE", "--density", "1", "--no-verify"], folder)
    for words in lines:
        run([SMALLER.get(word, word) for word in words] + FEWER.get(words[1], []), folder)
    assert (folder / "plan.png").stat().st_size > 10_000
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
