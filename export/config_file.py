"""The options of `attnspan export` in a YAML or JSON file: its keys are the names of the long options."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnspan.planner.errors import UserError
from attnspan.planner.files import read_json, write_whole
from attnspan.planner.schema import check_keys

__all__ = ["check_writable", "read_config", "write_config"]

KINDS: Mapping[Any, tuple[type, ...]] = {int: (int,), float: (int, float), None: (str,), Path: (str,), bool: (bool,)}
NAMES: Mapping[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
NOT_IN_FILES = ("help", "config", "save_config", "dry_run")


def read_config(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that `file` gives, by their names in `parser`'s namespace.

    UserError for a file that is neither YAML nor JSON, unknown keys (with the nearest known one), keys that say the same
    option twice, and values of the wrong type.
    """
    known = _keys(parser)
    content = check_keys(str(file), _content(file), (), list(known))
    found: dict[str, Any] = {}
    for key, given in content.items():
        action = known[key]
        if action.dest in found:
            raise UserError(f"{file}: {key} is an option that another key has set; drop one of them")
        kind: Any = bool if isinstance(action, argparse.BooleanOptionalAction) else action.type
        if not isinstance(given, KINDS[kind]) or isinstance(given, bool) != (kind is bool):
            raise UserError(f"{file}: {key} is {given!r:.60}; must be {NAMES.get(kind, 'text')}")
        found[action.dest] = given != key.startswith("no-") if kind is bool else (kind or str)(given)
    return found


def write_config(file: Path, given: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Write options, by their names in `parser`'s namespace, so that `read_config` gives them again."""
    content: dict[str, Any] = {}
    for key, action in _keys(parser).items():
        value = given.get(action.dest)
        if value is None or (isinstance(value, bool) and value == key.startswith("no-")):
            continue
        content[key] = True if isinstance(value, bool) else str(value) if isinstance(value, Path) else value
    if _is_json(file):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    else:
        import yaml

        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(file, text.encode())


def check_writable(file: Path) -> None:
    """UserError, before any work, when `file` could not be written at its end."""
    _is_json(file)
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise UserError(f"cannot write {file}; --save-config must be a file in a writable folder")


def _keys(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What may be in a file: the long options without their dashes."""
    actions = [action for action in parser._actions if action.dest not in NOT_IN_FILES]
    return {name.removeprefix("--"): action for action in actions for name in action.option_strings}


def _is_json(file: Path) -> bool:
    if file.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"{file}: a config file must be named .yaml, .yml or .json")
    return file.suffix == ".json"


def _content(file: Path) -> Mapping[str, Any]:
    if _is_json(file):
        return read_json(file)
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds {content!r:.60}: must be options, each as `name: value`")
    names = [key.value for key, _ in node.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{file}: key {twice!r} appears twice")
    return content
