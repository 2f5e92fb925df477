"""Variable tracking (RULER): chains of assignments in English prose; which variables hold a value?"""

from __future__ import annotations

import string

import numpy as np

from attnspan.calibration.tasks.base import Sample, Task, digits, hide
from attnspan.calibration.texts import TextSource

CHAINS, HOPS = 2, 2
QUESTION = "Find all variables that are assigned the value {value} in the text above."


def build(rng: np.random.Generator, source: TextSource, tokens: int, depth: float) -> Sample:
    """Two chains VAR a = number, VAR b = VAR a, VAR c = VAR b; the first assignment of the chain asked for lies at the depth, all
    others of it behind that; the reply is begun, the three names are the answer."""
    names: list[str] = []
    while len(names) < CHAINS * (HOPS + 1):
        name = "".join(rng.choice(list(string.ascii_uppercase), 5))
        if name not in names:
            names.append(name)
    hidden: list[tuple[float, str]] = []
    values = [digits(rng, 5) for _ in range(CHAINS)]
    for chain, value in enumerate(values):
        own = names[chain * (HOPS + 1) :][: HOPS + 1]
        start = depth if chain == 0 else float(rng.uniform(0, 1))
        places = [start, *np.sort(rng.uniform(start, 1, HOPS)).tolist()]
        sources = [value, *(f"VAR {name}" for name in own)]
        hidden += [(place, f"VAR {name} = {of}.") for place, name, of in zip(places, own, sources, strict=False)]
    hidden.sort(key=lambda pair: pair[0])  # of two in one place, the first stays first
    passage = source.passage(rng, tokens - sum(len(source.encode(" " + text)) for _, text in hidden))
    prefix = f"The variables that are assigned the value {values[0]} are"
    answer = " " + ", ".join(f"VAR {name}" for name in names[: HOPS + 1])
    return Sample(hide(source, passage, hidden), QUESTION.format(value=values[0]), prefix, answer, depth)


TASK = Task("variables", build)
