"""Processes that are to be interrupted."""

from __future__ import annotations

import signal


def heed() -> None:
    """For preexec_fn: jobs in the background ignore SIGINT, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
