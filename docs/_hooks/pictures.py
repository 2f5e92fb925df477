"""Puts the pictures into their pages as SVG elements, so that they take the colours of the page, light or dark."""

from __future__ import annotations

import html
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_IMAGE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*?pictures/([\w-]+)\.svg"\s*/></p>')


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces images of docs/pictures that stand on their own; the alternative text becomes the caption."""
    folder = Path(config.docs_dir) / "pictures"

    def inlined(match: re.Match[str]) -> str:
        caption, name = match.groups()
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8").partition("<svg")
        label = html.escape(html.unescape(caption), quote=True)
        return f'<figure class="picture"><svg role="img" aria-label="{label}"{svg[2]}<figcaption>{caption}</figcaption></figure>'

    return _IMAGE.sub(inlined, content)
