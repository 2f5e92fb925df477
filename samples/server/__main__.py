"""`python samples/server ARTEFACT`, or `python -m server ARTEFACT` with samples on the path."""

import sys
from pathlib import Path

if not __package__:  # a folder was run: its modules are those of the package `server`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from server.main import main

if __name__ == "__main__":
    sys.exit(main())
