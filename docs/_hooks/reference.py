"""Writes the reference of the command line into docs/cli.md, from the parsers that the program itself uses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

MARK = "<!-- verbs -->"
_WIDTH = 100


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the mark in cli.md by a section for each verb."""
    if page.file.src_uri != "cli.md":
        return markdown
    from attnspan.export.cli import parser

    return markdown.replace(MARK, "\n".join(_section(below) for below in verbs(parser())))


def verbs(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers below `top`, in the order of its help."""
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below
                yield from verbs(below)


def _section(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _Wide
    level = "#" * parser.prog.count(" ")
    text = [f"#{level} {parser.prog}", "", parser.description or "", "", "```text", parser.format_usage().rstrip(), "```", ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            text += [f"*{_cell(group.title or '')}*", ""]
        text += ["| | |", "|---|---|"]
        for action in actions:
            text += [f"| {name} | {_cell(what)} |" for name, what in _rows(parser, action)]
        text.append("")
    if parser.epilog:
        text += [parser.epilog, ""]
    return "\n".join(text)


def _rows(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[tuple[str, str]]:
    formatter = _Wide(parser.prog)
    if isinstance(action, argparse._SubParsersAction):
        for choice in action._choices_actions:
            name = f"{parser.prog} {choice.dest}"
            yield f"[`{choice.dest}`](#{name.replace(' ', '-')})", choice.help or ""
        return
    yield f"`{formatter._format_action_invocation(action)}`{{.option}}", formatter._expand_help(action) if action.help else ""


class _Wide(argparse.HelpFormatter):
    """Lines as long as a page is wide, wherever the site is built."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
