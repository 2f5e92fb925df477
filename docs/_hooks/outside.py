"""Pages that lie outside docs/, and links to files of the repository.

Markdown in the repository links to files, so that it can be read there. On the site, a link to a file that is a page leads to the
page; a link to any other file of the repository becomes its path, as text; a link to nothing is an error.
"""

from __future__ import annotations

import logging
import os.path
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks.outside")
_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(?ms)^```.*?^```[ \t]*$|^~~~.*?^~~~[ \t]*$|`[^`\n]+`")


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def outside(root: Path) -> dict[str, str]:
    """Files outside docs/ that are pages: path in the repository -> path in docs/."""
    samples = sorted(root.glob("samples/*/README.md"))
    pages = {f"samples/{file.parent.name}/README.md": f"samples/{file.parent.name}.md" for file in samples}
    pages.pop("samples/data/README.md", None)  # where its texts come from: no page
    return {"CONTRIBUTING.md": "contributing.md", "README.md": "index.md", **pages}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside."""
    root = _root(config)
    for source, page in outside(root).items():
        if page != "index.md":
            files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links that leave docs/, and all links of the pages that come from outside."""
    root = _root(config)
    pages = outside(root)
    sources = {name: source for source, name in pages.items() if name != "index.md"}
    here = PurePosixPath(page.file.src_uri)
    source = PurePosixPath(sources.get(page.file.src_uri, f"docs/{here}"))

    def replaced(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = PurePosixPath(os.path.normpath(source.parent / path))
        if file.is_relative_to("docs"):
            if str(source).startswith("docs/"):
                return match[0]
            wanted = str(file.relative_to("docs"))
        elif str(file) in pages:
            wanted = pages[str(file)]
        elif (root / file).exists() and not image:
            return text if str(file) in text or "\0" in text else f"{text} (`{file}`)"
        else:
            what = "shows %s, which must be in docs/pictures" if image else "links to %s, which does not exist"
            _log.warning("%s " + what, source, target)
            return match[0]
        return f"{image}[{text}]({os.path.relpath(wanted, here.parent)}{'#' * bool(anchor)}{anchor})"

    kept: list[Any] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\0{len(kept) - 1}\0"

    # Code is set aside: what looks like a link in it is none. A link's text may hold code.
    hidden = _CODE.sub(keep, markdown)
    linked = _LINK.sub(replaced, hidden)
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], linked)
