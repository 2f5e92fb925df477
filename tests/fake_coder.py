"""A tokenizer for tests: words with the space before them, digits one by one; its vocabulary grows as it reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LEAD = 0
_PIECES = re.compile(r"\d|\s*[^\W\d_]+|\s+|[^\w\s]|_")


class FakeCoder:
    """See `attnspan.calibration.prompts.Coder`; token 0 starts a text."""

    def __init__(self, has_chat_template: bool = False) -> None:
        self.has_chat_template = has_chat_template
        self.pieces = ["<s>"]
        self._ids: dict[str, int] = {}

    def encode(self, text: str, special: bool = True) -> list[int]:
        out = [LEAD] if special else []
        for piece in _PIECES.findall(text):
            if piece not in self._ids:
                self._ids[piece] = len(self.pieces)
                self.pieces.append(piece)
            out.append(self._ids[piece])
        return out

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        return "".join("" if token == LEAD else self.pieces[token] for token in tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        text = "".join(f"[{message['role']}]{message['content']}[end]" for message in messages)
        return text + ("[assistant]" if add_generation_prompt else "")
