"""The documentation site: it builds strictly and without a network, leads nowhere wrong, and says what the program does."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("material", reason="mkdocs-material (extra docs) is not installed")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILD = """
import socket
def refuse(*_): raise OSError("the documentation is built without a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--config-file", "mkdocs.yml", "--site-dir", {site!r}])
"""
SECONDS = 30
"""Processor time that a build may take."""


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUILD.format(site=str(site))]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


class Page(HTMLParser):
    """What a page refers to: `links` by people's clicks, `loads` by the browser; its anchors and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        self.classes.update(given.get("class", "").split())
        reference = [given[name] for name in ("href", "src", "data", "poster", "srcset", "xlink:href") if name in given]
        canonical = tag == "link" and given.get("rel") in ("prev", "next", "canonical")
        (self.links if tag == "a" or canonical else self.loads).extend(reference)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = build(ROOT, folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")}


def test_every_page_of_the_repository_is_there(pages: dict[Path, Page], site: Path) -> None:
    wanted = {file.relative_to(DOCS).with_suffix(".html") for file in DOCS.rglob("*.md")}
    wanted |= {Path("samples", file.parent.name + ".html") for file in ROOT.glob("samples/*/README.md")}
    built = {file.relative_to(site) for file in pages}
    assert wanted - {Path("samples/data.html")} <= built
    assert Path("contributing.html") in built


def test_links_and_anchors(pages: dict[Path, Page], site: Path) -> None:
    wrong = []
    for file, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else file.parent
            target = (base / unquote(parts.path.lstrip("/"))).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            known = pages[target].anchors if target in pages else {anchor}
            if not target.is_file() or (anchor and anchor not in known):
                wrong.append(f"{file.relative_to(site)}: {link}")
    assert not wrong


def test_nothing_comes_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    for file, page in pages.items():
        outside = [link for link in page.loads if re.match(r"(https?:)?//", link)]
        assert not outside, f"{file.name} loads {outside}"
        assert "mermaid" not in page.classes  # the theme would fetch its library
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(\s*['\"]?|@import\s+['\"])(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_command_line_reference_is_whole(pages: dict[Path, Page], site: Path) -> None:
    from attnspan.export.cli import _words, parser

    page = pages[site / "cli.html"]
    html = (site / "cli.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h[2-4] id="([^"]+)">(.*?)(?=<h[2-4] id=|</article>)', html, re.DOTALL))
    programs = _words(parser())
    assert len(programs) > 15
    for program, words in programs.items():
        if program == "attnspan":
            continue
        section = Page(sections[program.replace(" ", "-")]).text
        wanted = [word for word in words if word not in ("-h", "--help")]
        missing = [word for word in wanted if not re.search(rf"{re.escape(word)}(?![\w-])", section)]
        assert not missing, f"{program}: {missing}"
    assert "<!-- verbs -->" not in page.text


def commands(file: Path) -> list[str]:
    blocks = re.findall(r"```(?:sh|python)\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_quickstart_is_the_readme() -> None:
    """What the README says is tested; the quickstart says the same, with more words around it."""
    readme = commands(ROOT / "README.md")
    quickstart = commands(DOCS / "quickstart.md")
    assert len(quickstart) > 12
    assert [line for line in quickstart if line not in readme] == []


def test_a_page_outside_the_navigation_fails(tmp_path: Path) -> None:
    """A small site with the settings and hooks of this one."""
    docs = tmp_path / "docs"
    docs.mkdir()
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(f"{settings}\nnav: [index.md, contributing.md]\n", encoding="utf-8")
    (docs / "_hooks").symlink_to(DOCS / "_hooks")
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n", encoding="utf-8")
    (docs / "index.md").write_text("# Home\n\n[there](../CONTRIBUTING.md)\n", encoding="utf-8")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    (docs / "forgotten.md").write_text("# Forgotten\n\n[no](nowhere.md), [no](../none.py), [no](index.md#no)\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    for word in ('not included in the "nav"', "nowhere.md", "none.py", "index.md#no"):
        assert word in said


def test_every_target_has_a_page() -> None:
    from attnspan.export.targets import TARGETS

    page = (DOCS / "targets.md").read_text(encoding="utf-8")
    for name in TARGETS:
        assert f"[`{name}`]({name}.md)" in page
        assert (DOCS / f"{name}.md").is_file()


@cache
def _strings() -> list[str]:
    """All strings of the package's modules, with values as a NUL."""
    found = []
    for folder in ("planner", "runtime", "calibration", "export", "cpu_runtime", "plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(x.value) if isinstance(x, ast.Constant) else "\0" for x in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    for source in (ROOT / "cpu_runtime" / "src").glob("*.h"):
        text = source.read_text(encoding="utf-8")
        found += [re.sub(r'"\s*\+\s*[^";]*?\+\s*"', "\0", call) for call in re.findall(r"fail\((.*)\)", text)]
    return found


def _messages() -> list[str]:
    """Messages of ours that the troubleshooting page quotes: code in the first column of a table, with ... for values."""
    rows = re.findall(r"(?m)^\| (.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    return [code.strip() for row in rows for code in re.findall(r"``(.+?)``|(?<!`)`([^`]+)`(?!`)", row) for code in code if code]


def test_there_are_messages() -> None:
    assert len(_messages()) > 40


@pytest.mark.parametrize("message", _messages())
def test_messages_are_those_of_the_program(message: str) -> None:
    pieces = [re.escape(piece) for piece in message.split("...")]
    assert any(re.search(".*".join(pieces), text, re.DOTALL) for text in _strings())


def test_pictures_are_as_drawn(tmp_path: Path, pages: dict[Path, Page], site: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "pictures" / "draw.py"), str(tmp_path)], check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) >= 7
    html = "".join(file.read_text(encoding="utf-8") for file in pages)
    for picture in drawn:
        text = picture.read_text(encoding="utf-8")
        kept = (DOCS / "pictures" / picture.name).read_text(encoding="utf-8")
        assert text == kept, f"{picture.name} is not as drawn: run docs/pictures/draw.py"
        assert text.partition("<style>")[2] in html, f"{picture.name} is on no page"
