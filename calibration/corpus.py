"""The calibration corpus: long documents, questions at their end, the dense model's own answers as supervision."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attnspan.calibration.corpus_kinds import KINDS, Document
from attnspan.calibration.items import Item
from attnspan.calibration.prompts import SLACK, TRIES, Coder, follow, lead_tokens, turns
from attnspan.calibration.texts import CALIBRATION, TextSource
from attnspan.planner.errors import UserError

__all__ = ["MIX", "Answer", "UserDocument", "build_corpus", "read_data"]

Answer = Callable[[list[int], int], list[int]]
"""(prompt, most new tokens) -> the model's own greedy continuation, without the token that ends it. Prompts that extend the
prompt and answer of the call before come in a row, so that an implementation may keep its cache."""

MIX: Mapping[str, float] = {"facts": 0.4, "copies": 0.15, "records": 0.15, "prose": 0.3}
"""Share of each kind of generated document."""
CHAT_EVERY = 4
"""Of the documents whose questions a user might ask, one in so many goes through the chat template."""
ANSWERS = ("model", "given")
DATA_TOKENS = 128
"""Most tokens of an answer to the user's own questions."""
NEARLY = 7 / 8
"""A user's document serves for a length when it has at least this share of it."""


@dataclass(frozen=True)
class UserDocument:
    """A line of `--data`."""

    context: str
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class _Draft:
    """Tokens of the context, then the questions."""

    start: list[int]
    parts: list[_Part]

    def __len__(self) -> int:
        return len(self.start) + sum(len(part.before) + part.limit for part in self.parts)


@dataclass(frozen=True)
class _Part:
    """Tokens before an answer, the answer expected, the most tokens of one, whether the model is asked for its own."""

    before: list[int]
    expected: list[int] | None
    limit: int
    own: bool = True


def build_corpus(
    coder: Coder,
    answer: Answer | None,
    lengths: Sequence[int],
    per_length: int,
    seed: int = 0,
    *,
    mix: Mapping[str, float] = MIX,
    data: Sequence[UserDocument] | None = None,
    answers: str = "model",
    plain: bool = False,
    source: TextSource | None = None,
    progress: bool = True,
) -> list[Item]:
    """`per_length` items of each length, the same for the same seed, kinds interleaved.

    answers "model": `answer` gives the dense model's own; "given": those of the data or of the generator are taken. data: the
    user's documents, which then make up the whole corpus; too long ones lose their middle. plain: no chat template. Every item
    has at most its nominal length of tokens and misses few. UserError: unknown kinds, lengths too short or longer than the
    texts, no user document long enough.
    """
    if answers not in ANSWERS:
        raise UserError(f"answers is {answers!r}: must be one of {', '.join(ANSWERS)}; change --answers")
    if answers == "model" and answer is None:
        raise ValueError("answers of the model need the model")
    if per_length < 1 or not lengths:
        raise UserError(f"{per_length} items at each of the lengths {list(lengths)}: 1 or more each; change --items or --lengths")
    if data is None:
        source = source or TextSource.named(lambda text: coder.encode(text, special=False), CALIBRATION)
        plans = [(length, kind, i) for length in lengths for kind, i in _kinds(mix, per_length)]

        def draft(length: int, kind: str, index: int) -> _Draft:
            return _generated(coder, source, kind, length, index, seed, plain)
    else:
        chosen = _choose(coder, data, lengths, per_length, seed, plain, answers)
        plans = [(length, "data", i) for length in lengths for i in range(len(chosen[length]))]

        def draft(length: int, kind: str, index: int) -> _Draft:
            return chosen[length][index]

    items = []
    for length, kind, index in tqdm(plans, desc="corpus", unit="item", disable=None if progress else True):
        item = _answered(draft(length, kind, index), answer if answers == "model" else None, kind, length)
        if item is not None:
            items.append(item)
    if not items:
        raise UserError("the model answers none of the questions; use --answers given, or other --data")
    return items


def _kinds(mix: Mapping[str, float], count: int) -> list[tuple[str, int]]:
    """So many kinds, each with its number within the kind, and as near to its share as can be at every place in the list."""
    total = sum(mix.values())
    if not set(mix) <= set(KINDS) or not total > 0 or min(mix.values()) < 0:
        raise UserError(f"the mix is {dict(mix)}: must give shares of 0 or more to {', '.join(KINDS)}; change --mix")
    used = dict.fromkeys(mix, 0)
    out = []
    for place in range(1, count + 1):
        kind = max(mix, key=lambda k: mix[k] / total * place - used[k])
        out.append((kind, used[kind]))
        used[kind] += 1
    return out


def _generated(coder: Coder, source: TextSource, kind: str, length: int, index: int, seed: int, plain: bool) -> _Draft:
    room, best = length, None
    for _ in range(TRIES):
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), length, index])
        document = KINDS[kind](rng, source, room)
        draft = _draft(coder, document, plain or not document.chat or index % CHAT_EVERY != 0)
        missing = length - len(draft)
        if missing >= 0 and document.asks and (best is None or len(draft) > len(best)):
            best = draft
        if 0 <= missing <= SLACK:
            break
        room += missing - (1 if missing < 0 else 0)
        if room < 1:
            break
    if best is None:
        raise UserError(f"length {length} is too short for documents of kind {kind!r}; change --lengths")
    return best


def _draft(coder: Coder, document: Document, plain: bool) -> _Draft:
    plain = plain or not coder.has_chat_template
    if plain:
        start = lead_tokens(coder) + coder.encode(document.context, special=False)
        between = [("\n\n" if ask.stem else "") + ask.stem for ask in document.asks]
    else:
        questions = [f'How does this sentence of the text end? "{ask.stem.strip()} ..."' for ask in document.asks]
        questions[0] = f"{document.context}\n\n{questions[0]}"
        head, *between = turns(coder, questions)
        start = coder.encode(head, special=False)
        between = [text + ask.stem for text, ask in zip(["", *between], document.asks, strict=True)]
    parts = []
    for i, (text, ask) in enumerate(zip(between, document.asks, strict=True)):
        expected = follow(coder, ask.answer)[: ask.limit]
        closing = "." if i and plain else ""
        parts.append(_Part(follow(coder, closing + text), expected, len(expected), ask.own))
    return _Draft(start, parts)


def _answered(draft: _Draft, answer: Answer | None, kind: str, length: int) -> Item | None:
    tokens, targets = list(draft.start), list[int]()
    for part in draft.parts:
        tokens += part.before
        own = answer if part.own else None
        reply = part.expected if own is None else [int(token) for token in own(list(tokens), part.limit)]
        if reply is None or len(reply) > part.limit:
            raise ValueError(f"answer {reply}: must have at most {part.limit} tokens")
        targets += range(len(tokens), len(tokens) + len(reply))
        tokens += reply
    return Item(np.array(tokens[: targets[-1] + 1]), np.array(targets), kind, length) if targets else None


def read_data(path: str | Path) -> list[UserDocument]:
    """Read the user's documents: JSON lines of {context, question[, answer]}; UserError names file and line."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}; change --data") from None
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}; change --data") from None
        if not isinstance(entry, dict) or not {"context", "question"} <= set(entry) <= {"context", "question", "answer"}:
            raise UserError(f"{where} must be an object with context, question and perhaps answer; change --data")
        if not all(isinstance(value, str) and value for value in entry.values()):
            raise UserError(f"{where}: context, question and answer must be text, and not empty; change --data")
        out.append(UserDocument(**entry))
    if not out:
        raise UserError(f"{file} holds no document; change --data")
    return out


def _choose(
    coder: Coder, data: Sequence[UserDocument], lengths: Sequence[int], count: int, seed: int, plain: bool, answers: str
) -> dict[int, list[_Draft]]:
    """Drafts of the user's documents that are long enough, for each length."""
    out = {}
    for length in lengths:
        drafts: list[_Draft] = []
        short = 0
        for i in np.random.default_rng([seed, length]).permutation(len(data)):
            if len(drafts) == count:
                break
            draft = _user_draft(coder, data[int(i)], length, plain, answers)
            if draft is None:
                short += 1
            else:
                drafts.append(draft)
        if not drafts:
            raise UserError(
                f"none of the {len(data)} documents has {length} tokens, or {NEARLY:.0%} of them; change --lengths or --data"
            )
        if len(drafts) < count:
            tqdm.write(f"length {length}: {len(drafts)} documents instead of {count}, {short} are too short")
        out[length] = drafts
    return out


def _user_draft(coder: Coder, document: UserDocument, length: int, plain: bool, answers: str) -> _Draft | None:
    """None when the document is too short for the length; too long ones lose the middle of their context."""
    expected = None if document.answer is None else follow(coder, " " + document.answer)[:DATA_TOKENS]
    if answers == "given" and expected is None:
        raise UserError("a document has no answer, and --answers is 'given': give one to each, or use --answers model")
    limit = DATA_TOKENS if answers == "model" or expected is None else len(expected)
    question = f"\n\n{document.question}"
    if coder.has_chat_template and not plain:
        head, tail = coder.render([{"role": "user", "content": f"\0{question}"}]).split("\0")
        before, after = coder.encode(head, special=False), follow(coder, tail)
    else:
        before, after = lead_tokens(coder), follow(coder, f"{question}\n\n")
    context = coder.encode(document.context, special=False)
    room = length - len(before) - len(after) - limit
    if room < 1 or len(context) < room - (1 - NEARLY) * length:
        return None
    if len(context) > room:
        context = context[: (room + 1) // 2] + context[len(context) - room // 2 :]
    return _Draft(before + context, [_Part(after, expected, limit)])
