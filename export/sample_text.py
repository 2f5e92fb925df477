"""Prose to try a model on, without a download: what Python's own help says."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from attnspan.runtime.tokenizer import Tokenizer


def sample_tokens(folder: Path, vocab: int, count: int, skip: bool = False) -> list[int]:
    """`count` tokens of English prose by the tokenizer in `folder`; random ones below `vocab` where there is none.

    On random tokens models are erratic: the same rounding errors move single logits 30 times as far. skip: another text.
    """
    if not (folder / "tokenizer.json").is_file():
        return [int(token) for token in np.random.default_rng(int(skip)).integers(0, vocab, count)]
    text = "\n".join(topics[name] for name in sorted(topics, reverse=skip))
    ids = Tokenizer(folder).encode(text[: 16 * count])
    return (ids * (count // len(ids) + 1))[:count]
