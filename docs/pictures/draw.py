"""Draws the pictures of the documentation: python docs/pictures/draw.py [FOLDER]"""

from __future__ import annotations

import sys
from pathlib import Path

from choices import sampling, tradeoff
from flows import hybrid, pipeline
from quality import equal_bytes
from spans import elastic, heads, ring, spans
from timeline import hybrid_timeline

PICTURES = (pipeline, spans, ring, elastic, heads, tradeoff, sampling, hybrid, equal_bytes, hybrid_timeline)


def main() -> None:
    """Writes all pictures into a folder, by default the one of this file."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for picture in PICTURES:
        picture().save(folder / f"{picture.__name__}.svg")


if __name__ == "__main__":
    main()
