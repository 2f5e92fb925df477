"""Retrieval tasks, one file each: raw text with an answer in it."""

from __future__ import annotations

from attnspan.calibration.tasks import frequency, lines, multikey, needle, passkey, perplexity, variables
from attnspan.calibration.tasks.base import Sample, Task
from attnspan.planner.errors import UserError

__all__ = ["TASKS", "Sample", "Task", "task_named"]

_MODULES = (passkey, needle, multikey, lines, variables, frequency, perplexity)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def task_named(name: str) -> Task:
    """A task by its name; UserError when there is none."""
    if name not in TASKS:
        raise UserError(f"task is {name!r}: must be one of {', '.join(TASKS)}; change --tasks")
    return TASKS[name]
